"""Exact attention by the formula itself, and under any mask tensor; all of it is differentiable.

The formula serves softcap and sinks, for which SDPA has no argument, and graphs that leave torch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from s2o_compile.kernels.core.call import AttentionCall
from s2o_compile.kernels.core.layout import memory_order
from s2o_compile.kernels.exact.chunked import attend_chunks
from s2o_compile.kernels.exact.epilogue import fill_fully_masked_rows, fill_rows
from s2o_compile.kernels.exact.sdpa import attend_by_sdpa, sdpa
from s2o_compile.kernels.support.derivatives import every_derivative


def attend_differentiably(call: AttentionCall) -> Tensor:
    """Exact attention [B, Hq, Nq, Dv] that derivatives pass: SDPA, or the formula for softcap and sinks."""

    def attend(part: AttentionCall) -> tuple[Tensor, None]:
        by_sdpa = part.softcap is None and part.sinks is None
        return (attend_by_sdpa if by_sdpa else attend_by_formula)(part), None

    with every_derivative():
        output, _ = attend_chunks(call, attend) if call.mask.attention_chunk is not None else attend(call)
    return fill_fully_masked_rows(call, output)


def attend_under(call: AttentionCall, attn_mask: Tensor, fill: float | None = None) -> Tensor:
    """Exact attention [B, Hq, Nq, Dv] under a mask tensor as it is, in the place of the call's own mask.

    It is bool or additive, of rank 4 and broadcastable to [B, Hq, Nq, Nk]. ``fill`` is a number for the scores that a
    bool mask hides, if that is not -inf.
    """
    if fill is not None:
        return attend_by_formula(call, attn_mask, fill)
    if call.softcap is not None or call.sinks is not None:
        output = attend_by_formula(call, attn_mask)
    else:
        with every_derivative():
            output = sdpa(*call.tensors, attn_mask, scale=call.scale)
    return _with_means(call, output, attn_mask)


def attend_outside_torch(
    call: AttentionCall, attn_mask: Tensor | None = None, layout: str = "auto", fill: float | None = None
) -> Tensor:
    """Exact attention [B, Hq, Nq, Dv] by the formula alone, for graphs that leave torch.

    A bool or additive ``attn_mask`` of rank 2 to 4 takes the place of the call's own, with a fill as in `attend_under`.
    The output lies as ``layout`` says (``core/layout.py``). Fully masked rows get zeros from SDPA in torch, and other
    values in other formats. Nothing is written in place.
    """
    if attn_mask is None:
        attn_mask = call.mask.visible_pairs(call.n_queries, call.n_keys, call.query.device)
    output = attend_by_formula(call, attn_mask, fill)
    output = _with_means(call, output, attn_mask) if fill is None else output
    if memory_order(call.query, call.value.shape[3], layout) == "BHND":
        return output.contiguous()
    return output.transpose(1, 2).contiguous().transpose(1, 2)


def _with_means(call: AttentionCall, output: Tensor, attn_mask: Tensor) -> Tensor:
    if call.fully_masked == "mean" and attn_mask.dtype is torch.bool:
        output = fill_rows(output, call.value, ~attn_mask.any(-1, keepdim=True), call.sinks)
    return output


def attend_by_formula(call: AttentionCall, attn_mask: Tensor | None = None, fill: float | None = None) -> Tensor:
    """The formula under a bool or additive mask, logits and softmax in float32; all Nq x Nk logits are held.

    Numbers of the mask are added to the logits in float32 as they are. A key under -inf weighs nothing; keys under
    ``finfo.min`` share a row that has no others. A row without any logit above -inf gets zeros. A ``fill`` takes the
    place of the logits that a bool mask hides, and nothing else hides them.
    """
    mask = attn_mask
    if mask is None:
        mask = call.mask.visible_pairs(call.n_queries, call.n_keys, call.query.device)
    query, sinks, softcap, n_keys = call.query, call.sinks, call.softcap, call.n_keys
    key, value = (x.repeat_interleave(call.group, dim=1) for x in (call.key, call.value))
    exact = torch.float32 if query.dtype is torch.float16 else query.dtype  # products overflow in float16
    logits = (query.to(exact) @ key.to(exact).transpose(-1, -2)).float() * call.scale
    if softcap is not None:
        logits = softcap * (logits / softcap).tanh()
    hidden = ~mask if mask.dtype is torch.bool else mask == -torch.inf
    if mask.dtype is not torch.bool:
        logits = logits + mask
    logits = logits.masked_fill(hidden, -torch.inf if fill is None else fill)  # also where the key is NaN
    if sinks is not None:
        logits = torch.cat([logits, sinks.float()[:, None, None].expand(*logits.shape[:3], 1)], dim=-1)
    # Softmax of -inf alone is NaN, and so is its gradient: such rows go through it as zeros, and come out as zeros.
    empty = logits.detach().amax(-1, keepdim=True) == -torch.inf
    weights = logits.masked_fill(empty, 0.0).softmax(-1)[..., :n_keys].masked_fill(empty, 0.0)
    return weights.to(value.dtype) @ value
