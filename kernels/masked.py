"""Attention under a mask of unknown origin: read where attention is long, handed to SDPA where it is not a known mask.

A mask that cannot be proven when a model is compiled (it enters a graph behind a graph break, or is put together from
data) may still be causal, a sliding window or padding in every call. So it is looked at: then the sparse operator runs
under what it says. If it says anything else, or attention is short, SDPA runs under the mask itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from s2o_compile.kernels.autograd import plain_attention
from s2o_compile.kernels.core.mask import AttentionMask
from s2o_compile.kernels.core.options import OperatorOptions
from s2o_compile.kernels.core.validation import check_attn_mask, check_inputs
from s2o_compile.kernels.dispatch import choose_path, run
from s2o_compile.kernels.exact.fully_masked_rows import fill_rows
from s2o_compile.kernels.exact.sdpa import sdpa
from s2o_compile.kernels.read_mask import VANISHES, ReadMask, outweighs, read_mask
from s2o_compile.kernels.statistics import record

_NO_MASK = AttentionMask()


def run_masked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor,
    *,
    scale: float | None,
    options: OperatorOptions,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    fully_masked: str = "zeros",
    dense_heads: Sequence[int] = (),
    site: str = "",
) -> Tensor:
    """Attention output [B, Hq, Nq, Dv].

    Args:
        query: [B, Hq, Nq, D].
        key: [B, Hkv, Nk, D].
        value: [B, Hkv, Nk, Dv].
        attn_mask: bool (True: may be attended) or floating (added to the scores), of rank 2 to 4 and broadcastable to
            [B, Hq, Nq, Nk].
        scale: Softmax scale, None for 1 / sqrt(D).
        options: How to rank, order, stop and run.
        softcap: Bound of the logits, None for none.
        sinks: Floating [Hq], one more logit a head.
        fully_masked: What a query gets that sees no key, under a bool mask; a float mask says it itself.
        dense_heads: Key/value heads whose groups run densely beside the others.
        site: Module path for the report.
    """
    check_inputs(
        query,
        key,
        value,
        None,
        sinks,
        causal=False,
        window=None,
        softcap=softcap,
        fully_masked=fully_masked,
        dense_heads=dense_heads,
    )
    check_attn_mask(attn_mask, query, key)
    if attn_mask.dim() < 4:
        attn_mask = attn_mask[(None,) * (4 - attn_mask.dim())]
    scale = query.shape[3] ** -0.5 if scale is None else scale
    found = None
    path = choose_path(query, key, _NO_MASK, scale=scale, min_seq_len=options.min_seq_len)
    if path != "dense" and not _capturing(query):
        found = _read(query, key, attn_mask, sinks, scale=scale, softcap=softcap)
        path = "masked" if found is None else path
    if found is None:
        record(site, path, query, key, None)
        return under_mask(
            query, key, value, attn_mask, scale=scale, softcap=softcap, sinks=sinks, fully_masked=fully_masked
        )
    fully_masked = found.fully_masked if attn_mask.dtype is not torch.bool else fully_masked
    output, _ = run(
        query,
        key,
        value,
        found.mask,
        scale=scale,
        return_lse=False,
        options=options,
        softcap=softcap,
        sinks=sinks,
        fully_masked=fully_masked,
        dense_heads=dense_heads,
        site=site,
    )
    if found.hidden_rows is not None:
        rows = found.hidden_rows[..., None]
        output = torch.where(rows, output.new_zeros(()), output)
        output = fill_rows(output, value, rows, sinks) if fully_masked == "mean" else output
    return output


def under_mask(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor,
    *,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    fully_masked: str = "zeros",
) -> Tensor:
    """Exact attention [B, Hq, Nq, Dv] under a mask of rank 4 as it is; arguments as `run_masked`."""
    if softcap is not None or sinks is not None:
        output = plain_attention(query, key, value, attn_mask, scale=scale, softcap=softcap, sinks=sinks)
    else:
        output = sdpa(query, key, value, attn_mask, scale=scale)
    if fully_masked == "mean" and attn_mask.dtype is torch.bool:
        output = fill_rows(output, value, ~attn_mask.any(-1, keepdim=True), sinks)
    return output


def _read(
    query: Tensor, key: Tensor, attn_mask: Tensor, sinks: Tensor | None, *, scale: float, softcap: float | None
) -> ReadMask | None:
    found = read_mask(attn_mask, query.shape[2], key.shape[2], query.dtype)
    if found is None or not outweighs(found.weakest, query, key, scale=scale, softcap=softcap):
        return None
    # Rows of hidden keys alone: beside a sink they get zeros, unless it is as low as the number that hides them.
    if found.fully_masked == "mean" and sinks is not None and not bool(sinks.amin().float() > found.weakest + VANISHES):
        return None
    return found


def _capturing(query: Tensor) -> bool:
    """Whether a CUDA graph records: it cannot wait for what a mask says."""
    return query.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
