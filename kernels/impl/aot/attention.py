"""``s2o::attention`` in functions that torch can trace, for programs that leave Python: its portable twin.

A custom operator is Python, which an AOTInductor package has not. The twin computes the same by operators of torch's
own. Lengths are symbolic, so the path is chosen when the program runs (``cond``). What shapes depend on, and the
operator chooses by length, is chosen by the longest length that the program accepts.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from s2o_compile.kernels.core.layout import memory_order
from s2o_compile.kernels.core.mask import AttentionMask
from s2o_compile.kernels.core.options import OperatorOptions
from s2o_compile.kernels.core.plan import TILE_LEN, default_segment_len
from s2o_compile.kernels.core.sizes import Size, longest, symbols
from s2o_compile.kernels.exact.dense_heads import query_heads, runs, take
from s2o_compile.kernels.exact.fully_masked_rows import fill_rows, fully_masked_rows
from s2o_compile.kernels.exact.sdpa import sdpa
from s2o_compile.kernels.exact.sinks import sink_share
from s2o_compile.kernels.masked import under_mask
from s2o_compile.kernels.support.torch_compat import cond, statically_known_true


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None = None,
    sinks: Tensor | None = None,
    *,
    min_seq_len: int,
    causal: bool = False,
    causal_offset: Size | None = None,
    window: Size | None = None,
    attention_chunk: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    fully_masked: str = "zeros",
    tau: float = OperatorOptions.tau,
    segment_len: int | None = None,
    head_tau: Sequence[float] | Tensor | None = None,
    dense_heads: Sequence[int] | None = None,
    layout: str = "auto",
    **_: object,
) -> tuple[Tensor, Tensor]:
    """The results of ``s2o::attention``, which has the same arguments; others of it change nothing here.

    ``min_seq_len`` is a number: which device runs the program is known by now. On a CPU ``head_tau`` may be a tensor.
    """
    factor = query.shape[3] ** -0.5 if scale is None else scale
    taus = [tau] * query.shape[1] if head_tau is None or len(head_tau) == 0 else head_tau
    segment_len = segment_len or default_segment_len(longest(query.shape[2]))
    order = memory_order(query, value.shape[3], layout)
    given = [x for x in (query, key, value, key_mask, sinks, head_tau) if isinstance(x, Tensor)]
    shapes = [x.shape for x in given]
    executor = _executor(query.device)

    def opened(
        operands: Sequence[Tensor],
    ) -> tuple[Tensor, Tensor, Tensor, AttentionMask, Tensor | None, Sequence[float] | Tensor]:
        found = [x.view(shape) for x, shape in zip(operands, shapes, strict=False)]
        query, key, value, *rest = found
        mask = AttentionMask.aligned(
            query,
            key,
            causal=causal,
            causal_offset=causal_offset,
            window=window,
            attention_chunk=attention_chunk,
            key_mask=rest.pop(0) if key_mask is not None else None,
        )
        logits = rest.pop(0) if sinks is not None else None
        return query, key, value, mask, logits, rest.pop(0) if isinstance(taus, Tensor) else taus

    def closed(output: Tensor, value: Tensor, mask: AttentionMask, sinks: Tensor | None) -> tuple[Tensor]:
        if fully_masked == "mean":
            rows = fully_masked_rows(mask, output.shape[2], value.shape[2], output.device)
            output = fill_rows(output, value, rows[:, None, :, None], sinks)
        output = output.to(value.dtype)
        return ((output.transpose(1, 2) if order == "BNHD" else output).reshape(-1),)

    def short(*operands: Tensor) -> tuple[Tensor]:
        query, key, value, mask, sinks, _ = opened(operands)
        return closed(_exact(query, key, value, mask, factor, softcap, sinks), value, mask, sinks)

    def long(*operands: Tensor) -> tuple[Tensor]:
        query, key, value, mask, sinks, taus = opened(operands)
        if window is not None:
            output, lse = executor.attend_exact(query, key, value, mask, scale=factor, softcap=softcap)
            output = output if sinks is None else output * sink_share(lse, sinks)[..., None]
            return closed(output, value, mask, sinks)
        outputs = []
        for heads, dense in _parts(key.shape[1], dense_heads or ()):
            members = [query_heads(some, query.shape[1] // key.shape[1]) for some in heads]
            some = take(query, members), take(key, heads), take(value, heads), mask
            logits = None if sinks is None else torch.cat([sinks[part] for part in members])
            if dense:
                output = _exact(*some, factor, softcap, logits)
            else:
                own = [taus[part] for part in members]
                own = torch.cat(own) if isinstance(taus, Tensor) else [t for some in own for t in some]
                output, lse = executor.attend(*some, scale=factor, taus=own, softcap=softcap, segment_len=segment_len)
                output = output if logits is None else output * sink_share(lse, logits)[..., None]
            sizes = [part.stop - part.start for part in members]
            outputs += zip((part.start for part in members), output.to(value.dtype).split(sizes, 1), strict=True)
        return closed(torch.cat([part for _, part in sorted(outputs, key=lambda x: x[0])], 1), value, mask, sinks)

    sparse = attention_chunk is None and factor > 0 and len(set(dense_heads or ())) < key.shape[1]
    enough = torch.sym_min(query.shape[2] - TILE_LEN, key.shape[2] - min_seq_len) >= 0 if sparse else False
    # Copies in one dimension: what a branch is given may share no memory and must lie as it was traced, but query, key
    # and value are often views of one projection, and Inductor lays out what it copies as it likes.
    sizes = [size for shape in shapes for size in shape] + [
        size for size in (causal_offset, window) if size is not None
    ]
    operands = (*(x.reshape(-1).clone() for x in given), *symbols(sizes))
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
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor,
    sinks: Tensor | None = None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    fully_masked: str = "zeros",
    layout: str = "auto",
    **_: object,
) -> tuple[Tensor, Tensor]:
    """``s2o::masked_attention`` by SDPA under the mask as it is: reading a mask takes decisions in Python."""
    factor = query.shape[3] ** -0.5 if scale is None else scale
    output = under_mask(
        query,
        key,
        value,
        attn_mask[(None,) * (4 - attn_mask.dim())],
        scale=factor,
        softcap=softcap,
        sinks=sinks,
        fully_masked=fully_masked,
    )
    if memory_order(query, value.shape[3], layout) == "BNHD":
        output = output.transpose(1, 2).contiguous().transpose(1, 2)
    return output.contiguous() if layout == "BHND" else output, query.new_empty(0, dtype=torch.float32)


def _executor(device: torch.device) -> ModuleType:
    if device.type == "cuda":
        from s2o_compile.kernels.impl.aot import cuda_forward as portable_triton

        return portable_triton
    from s2o_compile.kernels.impl.aot import cpu_forward as portable_walk

    return portable_walk


def _parts(kv_heads: int, dense_heads: Sequence[int]) -> list[tuple[list[slice], bool]]:
    """Sparse and dense key/value heads, each as runs that lie side by side."""
    sparse = [head for head in range(kv_heads) if head not in dense_heads]
    parts = [(runs(sparse, kv_heads), False), (runs(sorted(set(dense_heads)), kv_heads), True)]
    return [(heads, dense) for heads, dense in parts if heads]


def _exact(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: AttentionMask,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Dense attention [B, Hq, Nq, Dv]; the mask is given pair by pair where SDPA has no word for it."""
    plain = softcap is None and sinks is None
    bare = mask.key_mask is None and mask.window is None and mask.attention_chunk is None
    top_left = statically_known_true(mask.offset == 0) and scale > 0
    if plain and bare and (not mask.causal or top_left):
        return sdpa(query, key, value, is_causal=mask.causal, scale=scale)
    rows, columns = (torch.arange(x.shape[2], device=x.device) for x in (query, key))
    visible = mask.visible(rows, columns)[None, None]
    if mask.key_mask is not None:
        visible = visible & mask.key_mask[:, None, None, :]
    return under_mask(query, key, value, visible, scale=scale, softcap=softcap, sinks=sinks)
