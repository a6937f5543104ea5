"""S2O for some key/value heads at a time: ranked, attended, forgotten.

Scores and lists grow with segments times keys. Held for all heads at once they would take as much memory as key and
value; held for as many heads as keep the card busy they stay a fraction of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from s2o_compile.kernels import torch_forward
from s2o_compile.kernels.definition import Result
from s2o_compile.kernels.dense_heads import attend_dense, query_heads, runs
from s2o_compile.kernels.layout import empty_output
from s2o_compile.kernels.mask import AttentionMask
from s2o_compile.kernels.options import OperatorOptions
from s2o_compile.kernels.plan import default_segment_len, n_segments
from s2o_compile.kernels.rank import build_plan

SCRATCH_SHARE = 8
SCRATCH_BYTES = 64 * 2**20
"""Scores and lists that are held at once take at most 1/8 of the memory of key and value, or 64 MiB, or those of one
head."""

BYTES_A_SCORE = 5
"""A score in float16, half an entry of int32 in a list, and the counts of classes that order it."""


def heads_together(key: Tensor, value: Tensor, segments: int) -> int:
    """Key/value heads that are ranked at a time, so that scores and lists stay small beside key and value."""
    held = max((key.numel() + value.numel()) * key.element_size() // SCRATCH_SHARE, SCRATCH_BYTES)
    of_one_head = key.shape[0] * segments * key.shape[2] * BYTES_A_SCORE
    return max(1, min(key.shape[1], held // of_one_head))


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: AttentionMask,
    *,
    scale: float,
    softcap: float | None,
    options: OperatorOptions,
    executor: ModuleType,
    natural: ModuleType,
    dense_heads: Sequence[int] = (),
    wants_lse: bool = True,
) -> Result:
    """Attention over plans, but for heads marked dense; arguments and results as ``definition.attend``.

    Args:
        query: [B, Hq, Nq, D].
        key: [B, Hkv, Nk, D].
        value: [B, Hkv, Nk, Dv].
        mask: The proven mask, without a window.
        scale: Softmax scale.
        softcap: Bound of the logits, None for none.
        options: How to rank, order and stop.
        executor: `torch_forward` or `triton_forward`.
        natural: The same implementation's executor in natural order.
        dense_heads: Key/value heads that run densely (``dense_heads.py``), ascending.
        wants_lse: Whether the log-sum-exp is wanted; if not, that of dense heads may be uninitialised.
    """
    segment_len = options.segment_len or default_segment_len(query.shape[2])
    group = query.shape[1] // key.shape[1]
    together = heads_together(key, value, n_segments(query.shape[2], segment_len))
    output = empty_output(query, value.shape[3])
    parts, orders = {}, {}
    if dense_heads:
        parts = attend_dense(
            query,
            key,
            value,
            mask,
            output,
            dense_heads,
            scale=scale,
            softcap=softcap,
            wants_lse=wants_lse,
            natural=natural,
        )
        if options.query_order != "none":  # nothing restarts where all is computed: no order of theirs is read
            orders = {first: part.lse.new_empty(part.lse.shape, dtype=torch.int32) for first, part in parts.items()}
    for heads in runs((head for head in range(key.shape[1]) if head not in dense_heads), together):
        rows = query_heads(heads, group)
        some = query[:, rows], key[:, heads], value[:, heads], mask
        plan = build_plan(
            *some,
            scale=scale,
            tau=options.tau,
            ranking=options.ranking,
            query_order=options.query_order,
            segment_len=segment_len,
            implementation="torch" if executor is torch_forward else "triton",
        )
        parts[heads.start] = executor.attend(
            *some, plan, scale=scale, tau=options.tau, softcap=softcap, output=output[:, rows]
        )
        if plan.query_order is not None:
            orders[heads.start] = plan.query_order
        del plan  # before the next is made
    lse = _joined({first: part.lse for first, part in parts.items()})
    computed = _joined({first: part.computed for first, part in parts.items()})
    result = Result(output, lse, computed)
    order = _joined(orders) if orders else None
    # A tile that restarts takes as long as hundreds that stop: those of all slices run side by side.
    if executor is not torch_forward:
        executor.restart(query, key, value, mask, result, segment_len, order, scale=scale, softcap=softcap)
    return result


def _joined(parts: dict[int, Tensor]) -> Tensor:
    """Parts [B, some heads, ...] by first head as one tensor of all heads."""
    return next(iter(parts.values())) if len(parts) == 1 else torch.cat([parts[first] for first in sorted(parts)], 1)
