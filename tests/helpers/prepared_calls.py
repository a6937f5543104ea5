"""Calls whose launches can be prepared, and the operator on them."""

import torch

from s2o_compile.kernels import dispatch, ops
from s2o_compile.kernels.core.call import AttentionCall
from s2o_compile.kernels.core.mask import AttentionMask
from s2o_compile.kernels.core.options import OperatorOptions

LENGTH = 640
PADDED = torch.arange(LENGTH).expand(2, -1) % 7 > 0


def call_of(length=LENGTH, *, heads=4, kv_heads=2, dim=16, device="cpu", dtype=torch.float32, mask=None, **given):
    generator = torch.Generator().manual_seed(length)
    shapes = [(2, h, length, dim) for h in (heads, kv_heads, kv_heads)]
    query, key, value = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
    mask = AttentionMask(causal=True) if mask is None else mask
    return AttentionCall(query=query, key=key, value=value, mask=mask, scale=0.25, **given)


def options_of(**given):
    return OperatorOptions(**{"min_seq_len": 0, "segment_len": 128, "implementation": "triton", **given})


def run(call, options):
    return dispatch.execute(call, "s2o", options)


def moved(x):
    """The same numbers at an address that is no multiple of 16."""
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


def attend(call, *, layout="auto", **options):
    """A call through the operator."""
    mask, of = call.mask, options_of(tau=0.5, **options).to_op_kwargs()
    offset = mask.offset if mask.causal else None
    return ops.attention(
        *call.tensors, mask.key_mask, call.sinks, causal=mask.causal, causal_offset=offset, window=mask.window,
        attention_chunk=mask.attention_chunk, scale=call.scale, softcap=call.softcap,
        fully_masked=call.fully_masked, return_lse=call.return_lse, dense_heads=call.dense_heads, layout=layout, **of,
    )  # fmt: skip


def same(one, other):
    return all(torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for x, y in zip(one, other, strict=True))


KNOWN = {
    "default": {},
    "padded": {"mask": AttentionMask(causal=True, key_mask=PADDED)},
    "log-sum-exp": {"return_lse": True, "softcap": 20.0},
    "cross": {"mask": AttentionMask()},
}

UNKNOWN = {
    "sinks": {"sinks": torch.zeros(4)},
    "mean": {"fully_masked": "mean"},
    "marked head": {"dense_heads": [1]},
    "mask of one row": {"mask": AttentionMask(causal=True, key_mask=PADDED[:1])},
    "chunk that holds all": {"mask": AttentionMask(causal=True, attention_chunk=LENGTH)},
    "chunks": {"mask": AttentionMask(causal=True, attention_chunk=LENGTH // 2)},
    "window that hides nothing": {"mask": AttentionMask(causal=True, window=LENGTH)},
    "far offset": {"mask": AttentionMask(causal=True, offset=2 * LENGTH)},
}
"""Calls that are changed on the way to their launches, or behind them."""
