"""Attention under a mask of unknown origin: read where attention is long, handed to SDPA where it is not a known mask.

A mask that cannot be proven when a model is compiled (it enters a graph behind a graph break, or is put together from
data) may still be causal, a sliding window or padding in every call. So it is looked at: then the sparse operator runs
under what it says. If it says anything else, or attention is short, SDPA runs under the mask itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from s2o_compile.kernels.core.call import AttentionCall
from s2o_compile.kernels.core.options import OperatorOptions
from s2o_compile.kernels.core.validation import check_attn_mask
from s2o_compile.kernels.dispatch import choose_path, run
from s2o_compile.kernels.exact.epilogue import fill_rows
from s2o_compile.kernels.exact.formula import attend_under
from s2o_compile.kernels.read_mask import VANISHES, ReadMask, outweighs, read_mask
from s2o_compile.kernels.statistics import record


def run_masked(call: AttentionCall, attn_mask: Tensor, options: OperatorOptions) -> Tensor:
    """Attention output [B, Hq, Nq, Dv].

    Args:
        call: What is attended, under UNKNOWN_MASK. Its ``fully_masked`` is about bool masks; a float mask says by its
            numbers what a fully masked row gets.
        attn_mask: bool (True: may be attended) or floating (added to the scores), of rank 2 to 4 and broadcastable to
            [B, Hq, Nq, Nk].
        options: How to rank, order, stop and run.
    """
    check_attn_mask(attn_mask, call.query, call.key)
    if attn_mask.dim() < 4:
        attn_mask = attn_mask[(None,) * (4 - attn_mask.dim())]
    found = None
    path = choose_path(call, options.min_seq_len)
    if path != "dense" and not _capturing(call.query):
        found = _read(call, attn_mask)
        path = "masked" if found is None else path
    if found is None:
        record(call, path)
        return attend_under(call, attn_mask)
    fully_masked = found.fully_masked if attn_mask.dtype is not torch.bool else call.fully_masked
    output, _ = run(call.but(mask=found.mask, fully_masked=fully_masked), options)
    if found.hidden_rows is not None:
        rows = found.hidden_rows[..., None]
        output = torch.where(rows, output.new_zeros(()), output)
        output = fill_rows(output, call.value, rows, call.sinks) if fully_masked == "mean" else output
    return output


def _read(call: AttentionCall, attn_mask: Tensor) -> ReadMask | None:
    sinks = call.sinks
    found = read_mask(attn_mask, call.n_queries, call.n_keys, call.query.dtype)
    if found is None or not outweighs(found.weakest, call.query, call.key, scale=call.scale, softcap=call.softcap):
        return None
    # Rows of hidden keys alone: beside a sink they get zeros, unless it is as low as the number that hides them.
    if found.fully_masked == "mean" and sinks is not None and not bool(sinks.amin().float() > found.weakest + VANISHES):
        return None
    return found


def _capturing(query: Tensor) -> bool:
    """Whether a CUDA graph records: it cannot wait for what a mask says."""
    return query.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
