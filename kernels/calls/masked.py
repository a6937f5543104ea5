"""Attention under a mask of unknown origin: read where attention is long, handed to SDPA where it is not a known mask.

Some masks cannot be proven when a model is compiled: they enter a graph behind a graph break, or are put together from
data. They may still be causal, a sliding window or padding in every call. So their numbers are read, and the sparse
operator runs under a known mask. Under any other mask, and where attention is short, SDPA runs under the mask itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from s2o_compile.kernels.calls.read_mask import VANISHES, ReadMask, outweighs, read_mask
from s2o_compile.kernels.core.call import AttentionCall
from s2o_compile.kernels.core.options import OperatorOptions
from s2o_compile.kernels.core.validation import check_attn_mask, check_fill
from s2o_compile.kernels.dispatch import choose_path, run
from s2o_compile.kernels.exact.epilogue import fill_rows
from s2o_compile.kernels.exact.formula import attend_under
from s2o_compile.kernels.statistics import record


def run_masked(call: AttentionCall, attn_mask: Tensor, options: OperatorOptions, fill: float | None = None) -> Tensor:
    """Attention output [B, Hq, Nq, Dv] of a call under UNKNOWN_MASK and a mask tensor.

    That is bool (True: may be attended) or floating (added to the scores), of rank 2 to 4 and broadcastable to
    [B, Hq, Nq, Nk]. The call's ``fully_masked`` is about bool masks; a float mask says by its numbers what a fully
    masked row gets. A ``fill`` is the number that takes the place of the scores which a bool mask hides.
    """
    check_attn_mask(attn_mask, call.query, call.key)
    check_fill(fill, attn_mask)
    if attn_mask.dim() < 4:
        attn_mask = attn_mask[(None,) * (4 - attn_mask.dim())]
    read = None
    path = choose_path(call, options.min_seq_len)
    # A CUDA graph cannot wait for the numbers of a mask.
    if path != "dense" and not (call.query.is_cuda and torch.cuda.is_current_stream_capturing()):
        read = _read(call, attn_mask, fill)
        path = "masked" if read is None else path
    if read is None:
        record(call, path)
        return attend_under(call, attn_mask, fill)
    fully_masked = read.fully_masked if attn_mask.dtype is not torch.bool else call.fully_masked
    fully_masked = fully_masked if fill is None else "mean"
    hidden = read.hidden_rows
    unread = None if hidden is None else hidden[:, 0].expand(call.query.shape[0], call.n_queries).contiguous()
    output, _ = run(call.but(mask=read.mask, fully_masked=fully_masked, unread_rows=unread), options)
    if hidden is not None:
        rows = hidden[..., None]
        output = torch.where(rows, output.new_zeros(()), output)
        output = fill_rows(output, call.value, rows, call.sinks) if fully_masked == "mean" else output
    return output


def _read(call: AttentionCall, attn_mask: Tensor, fill: float | None) -> ReadMask | None:
    sinks = call.sinks
    read = read_mask(attn_mask, call.n_queries, call.n_keys, call.query.dtype)
    if read is None:
        return None
    weakest = read.weakest if fill is None else fill
    if not outweighs(weakest, call.query, call.key, scale=call.scale, softcap=call.softcap):
        return None
    # A fully masked row gets zeros beside a sink, unless the sink is as low as the number that hides its keys.
    mean = read.fully_masked == "mean" or fill is not None
    if mean and sinks is not None and not bool(sinks.amin().float() > weakest + VANISHES):
        return None
    return read
