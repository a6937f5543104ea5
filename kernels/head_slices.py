"""S2O for some key/value heads at a time: ranked, attended, forgotten.

Scores and lists grow with segments times keys. Held for all heads at once they would take as much memory as key and
value; held for as many heads as keep the card busy they stay a fraction of them.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from s2o_compile.kernels import torch_forward
from s2o_compile.kernels.definition import Result
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
) -> Result:
    """Attention over plans; arguments and results as ``definition.attend``.

    Args:
        query: [B, Hq, Nq, D].
        key: [B, Hkv, Nk, D].
        value: [B, Hkv, Nk, Dv].
        mask: The proven mask, without a window.
        scale: Softmax scale.
        softcap: Bound of the logits, None for none.
        options: How to rank, order and stop.
        executor: `torch_forward` or `triton_forward`.
    """
    segment_len = options.segment_len or default_segment_len(query.shape[2])
    group = query.shape[1] // key.shape[1]
    together = heads_together(key, value, n_segments(query.shape[2], segment_len))
    output = empty_output(query, value.shape[3])
    results, orders = [], []
    for first in range(0, key.shape[1], together):
        heads, rows = slice(first, first + together), slice(first * group, (first + together) * group)
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
        results.append(
            executor.attend(*some, plan, scale=scale, tau=options.tau, softcap=softcap, output=output[:, rows])
        )
        orders.append(plan.query_order)
        del plan  # before the next is made
    lse, computed, order = (
        parts[0] if len(parts) == 1 or parts[0] is None else torch.cat(parts, 1)
        for parts in ([part.lse for part in results], [part.computed for part in results], orders)
    )
    result = Result(output, lse, computed)
    # A tile that restarts takes as long as hundreds that stop: those of all slices run side by side.
    if executor is not torch_forward:
        executor.restart(query, key, value, mask, result, segment_len, order, scale=scale, softcap=softcap)
    return result
