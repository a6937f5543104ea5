"""The decomposition of ``s2o::attention`` into functions that torch can trace, for programs that leave Python.

A custom operator is Python code, and an AOTInductor package has no Python. The decomposition computes the same by
torch's own operators. Lengths are symbolic, so the path is chosen when the program runs (``cond``). Shapes that the
operator chooses by length are chosen by the longest length that the program accepts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from s2o_compile.kernels.core.call import AttentionCall, scale_of
from s2o_compile.kernels.core.documents import by_pairs
from s2o_compile.kernels.core.layout import memory_order
from s2o_compile.kernels.core.mask import AttentionMask
from s2o_compile.kernels.core.options import taus_by_head
from s2o_compile.kernels.core.plan import TILE_LEN, default_segment_len
from s2o_compile.kernels.core.tuned import NEVER
from s2o_compile.kernels.exact.dense_heads import query_heads, runs, take
from s2o_compile.kernels.exact.epilogue import fill_rows, fully_masked_rows, sink_share
from s2o_compile.kernels.exact.formula import attend_under
from s2o_compile.kernels.exact.sdpa import sdpa
from s2o_compile.kernels.impl.aot.sizes import Size, longest, symbols
from s2o_compile.kernels.support.torch_compat import cond, statically_known_true


def attention(
    query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None = None, sinks: Tensor | None = None, *,
    min_seq_len: int, causal: bool = False, causal_offset: Size | None = None, window: Size | None = None,
    attention_chunk: int | None = None, scale: float | None = None, softcap: float | None = None,
    fully_masked: str = "zeros", tau: float | None = None, segment_len: int | None = None,
    head_tau: Sequence[float] | Tensor | None = None, error: float | None = None,
    dense_heads: Sequence[int] | None = None, layout: str = "auto", **_: object,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The results of ``s2o::attention`` from the same arguments; its others change nothing here.

    ``min_seq_len`` is a number because the program's device is known by now. On a CPU ``head_tau`` may be a tensor.
    Nothing measures the error here: it only says a tau where none is given.
    """
    factor = scale_of(query, scale)
    key_mask = None if key_mask is None else key_mask.expand(query.shape[0], -1)  # one row may serve the whole batch
    taus = head_tau if isinstance(head_tau, Tensor) else taus_by_head(query.shape[1], tau, head_tau, error)
    segment_len = segment_len or default_segment_len(max(longest(query.shape[2]), longest(key.shape[2])))
    order = memory_order(query, value.shape[3], layout)
    tensors = [x for x in (query, key, value, key_mask, sinks, head_tau) if isinstance(x, Tensor)]
    shapes = [x.shape for x in tensors]
    if query.device.type == "cuda":
        from s2o_compile.kernels.impl.aot import cuda_forward as executor
    else:
        from s2o_compile.kernels.impl.aot import cpu_forward as executor

    def opened(operands: Sequence[Tensor]) -> tuple[AttentionCall, Sequence[float] | Tensor]:
        query, key, value, *rest = [x.view(shape) for x, shape in zip(operands, shapes, strict=False)]
        terms = {"causal_offset": causal_offset, "window": window, "attention_chunk": attention_chunk}
        key_masks = rest.pop(0) if key_mask is not None else None
        mask = AttentionMask.aligned(query, key, causal=causal, key_mask=key_masks, **terms)
        logits = rest.pop(0) if sinks is not None else None
        call = AttentionCall(query=query, key=key, value=value, mask=mask, scale=factor, softcap=softcap, sinks=logits)
        return call, rest.pop(0) if isinstance(taus, Tensor) else taus

    def closed(call: AttentionCall, output: Tensor) -> tuple[Tensor]:
        rows = fully_masked_rows(call.mask, call.n_queries, call.n_keys, output.device)[:, None, :, None]
        output = output.masked_fill(rows, 0.0)  # a weight of nothing times NaN is NaN
        if fully_masked == "mean":
            output = fill_rows(output, call.value, rows, call.sinks)
        output = output.to(call.value.dtype)
        return ((output.transpose(1, 2) if order == "BNHD" else output).reshape(-1),)

    def short(*operands: Tensor) -> tuple[Tensor]:
        call, _ = opened(operands)
        return closed(call, _exact(call))

    def long(*operands: Tensor) -> tuple[Tensor]:
        whole, taus = opened(operands)
        call, outputs = _over_seen_keys(whole).without_hidden_keys(), []
        for heads, dense in _parts(call.key.shape[1], (dense_heads or ()) if window is None else range(key.shape[1])):
            members = [query_heads(part, call.group) for part in heads]
            logits = None if call.sinks is None else torch.cat([call.sinks[part] for part in members])
            part = call.but(
                query=take(call.query, members), key=take(call.key, heads), value=take(call.value, heads), sinks=logits
            )
            if dense:
                output = _exact(part, executor.attend_exact)
            else:
                limits = [taus[rows] for rows in members]
                limits = torch.cat(limits) if isinstance(taus, Tensor) else [tau for run in limits for tau in run]
                output = _with_sinks(part, *executor.attend(part, limits, segment_len))
            sizes = [rows.stop - rows.start for rows in members]
            outputs += zip((rows.start for rows in members), output.to(value.dtype).split(sizes, 1), strict=True)
        return closed(whole, torch.cat([output for _, output in sorted(outputs, key=lambda x: x[0])], 1))

    sparse = attention_chunk is None and factor > 0 and min_seq_len < NEVER
    enough = torch.sym_min(query.shape[2] - TILE_LEN, key.shape[2] - min_seq_len) >= 0 if sparse else False
    # Copies in one dimension: operands of a branch may share no memory and must lie as they were traced. But query, key
    # and value are often views of one projection, and Inductor chooses the layout of its copies.
    sizes = [*(size for shape in shapes for size in shape), *(x for x in (causal_offset, window) if x is not None)]
    operands = (*(x.reshape(-1).clone() for x in tensors), *symbols(sizes))
    if statically_known_true(enough) or statically_known_true(enough == False):  # noqa: E712 (may be symbolic)
        (output,) = (long if statically_known_true(enough) else short)(*operands)
    else:
        (output,) = cond(enough, long, short, operands)
    batch, heads, n_queries, _ = query.shape
    if order == "BNHD":
        output = output.view(batch, n_queries, heads, value.shape[3]).transpose(1, 2)
    else:
        output = output.view(batch, heads, n_queries, value.shape[3])
    return output, query.new_empty(0, dtype=torch.float32)


def masked_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor, sinks: Tensor | None = None, *,
    scale: float | None = None, softcap: float | None = None, fully_masked: str = "zeros", fill: float | None = None,
    layout: str = "auto", **_: object,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``s2o::masked_attention`` by SDPA under the mask as it is: reading a mask takes decisions in Python."""
    call = AttentionCall(
        query=query, key=key, value=value, scale=scale_of(query, scale), softcap=softcap, sinks=sinks,
        fully_masked=fully_masked,
    )  # fmt: skip
    output = attend_under(call, attn_mask[(None,) * (4 - attn_mask.dim())], fill)
    if memory_order(query, value.shape[3], layout) == "BNHD":
        output = output.transpose(1, 2).contiguous().transpose(1, 2)
    return output.contiguous() if layout == "BHND" else output, query.new_empty(0, dtype=torch.float32)


packed_attention = by_pairs(masked_attention)
"""``s2o::packed_attention`` by SDPA: finding documents takes decisions in Python."""


def _parts(kv_heads: int, dense_heads: Sequence[int]) -> list[tuple[list[slice], bool]]:
    """Sparse and dense key/value heads, each as runs that lie side by side."""
    sparse = [head for head in range(kv_heads) if head not in dense_heads]
    parts = [(runs(sparse, kv_heads), False), (runs(sorted(set(dense_heads)), kv_heads), True)]
    return [(heads, dense) for heads, dense in parts if heads]


def _over_seen_keys(call: AttentionCall) -> AttentionCall:
    """`AttentionCall.over_seen_keys` by a key mask: a length cut short would be 1 for some lengths only."""
    mask, stop = call.mask, call.n_queries + call.mask.offset
    if not mask.causal or statically_known_true(stop >= call.n_keys):
        return call
    seen = (torch.arange(call.n_keys, device=call.key.device) < stop).repeat(call.key.shape[0], 1)
    return call.but(mask=replace(mask, key_mask=seen if mask.key_mask is None else mask.key_mask & seen))


def _with_sinks(call: AttentionCall, output: Tensor, lse: Tensor) -> Tensor:
    return output if call.sinks is None else output * sink_share(lse, call.sinks)[..., None]


def _exact(call: AttentionCall, executor: Callable[[AttentionCall], tuple[Tensor, Tensor]] | None = None) -> Tensor:
    """Dense attention [B, Hq, Nq, Dv]; where ``is_causal`` cannot express the mask by an executor, or all its pairs."""
    mask = call.mask
    plain = call.softcap is call.sinks is mask.key_mask is mask.window is mask.attention_chunk is None
    top_left = statically_known_true(mask.offset == 0) and call.scale > 0
    if plain and (not mask.causal or top_left):
        return sdpa(*call.tensors, is_causal=mask.causal, scale=call.scale)
    if executor is not None:
        return _with_sinks(call, *executor(call))
    rows, columns = (torch.arange(x.shape[2], device=x.device) for x in (call.query, call.key))
    visible = mask.visible(rows, columns)[None, None]
    return attend_under(call, visible if mask.key_mask is None else visible & mask.key_mask[:, None, None, :])
