"""``ranking.per_query`` for one segment at a time, in functions that can be traced: lengths may be symbolic.

The scores of a segment are made KEY_STEP keys at a time, in a loop that ends where its prefix does. Numbers are those
of ``ranking.per_query`` but for the order of summation.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from s2o_compile.kernels.core.mask import AttentionMask
from s2o_compile.kernels.ranking.per_query import FIRST_KEYS, key_stride
from s2o_compile.kernels.ranking.slots import KEY_STEP, SLOTS
from s2o_compile.kernels.support.torch_compat import while_loop


class Segment(NamedTuple):
    """The place of a segment, in int64 tensors without dimensions: they are known only when it runs.

    Attributes:
        first: Its first query.
        start: Its first in-segment key.
        stop: The key behind its last in-segment key.
    """

    first: Tensor
    start: Tensor
    stop: Tensor


def rank_segment(
    query: Tensor, normaliser: Tensor, key: Tensor, non_finite: Tensor, allowed: Tensor | None, causal: bool,
    segment: Segment,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The prefix keys of one segment, most important first.

    Args:
        query: Its scaled queries that rank, float32 [G, n, R], in few dimensions.
        normaliser: Of `row_normaliser`, float32 [G, n]; inf for queries that do not count.
        key: All keys of the head, float32 [Nk, R].
        non_finite: bool [Nk], keys that hold NaN or inf.
        allowed: bool [Nk], the key mask, or None.
        causal: Whether the prefix ends where the segment starts.
        segment: The place of the segment.

    Returns:
        int64 [L], L >= Nk, and how many of these are prefix keys, int64 [].
    """
    n_keys = key.shape[0]
    rows = torch.cat([query, normaliser[..., None]], dim=-1).flatten(0, 1)
    steps = (n_keys + KEY_STEP - 1) // KEY_STEP
    scores = query.new_full((steps * KEY_STEP,), float("-inf"))

    def more(done: Tensor, scores: Tensor, rows: Tensor, key: Tensor, end: Tensor) -> Tensor:
        return done < end

    def score(done: Tensor, scores: Tensor, rows: Tensor, key: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
        positions = done + torch.arange(KEY_STEP, device=key.device)
        columns = torch.nn.functional.pad(key[positions.clamp(max=key.shape[0] - 1)], (0, 1), value=-1.0)
        best = (rows @ columns.transpose(0, 1)).view(-1, SLOTS, KEY_STEP).amax(0)
        return done + KEY_STEP, scores.index_copy(0, positions, best.logsumexp(0))

    end = segment.start if causal else segment.start.new_full((), n_keys)
    _, scores = while_loop(more, score, (torch.zeros_like(end), scores), (rows, key, end))
    positions = torch.arange(steps * KEY_STEP, device=key.device)
    prefix = (positions < end) & ((positions < segment.start) | (positions >= segment.stop))
    known = positions.clamp(max=n_keys - 1)
    if allowed is not None:
        prefix = prefix & allowed[known]
    lowest = torch.finfo(scores.dtype).min
    scores = scores.nan_to_num(nan=0.0, posinf=-lowest, neginf=lowest)
    scores = scores.masked_fill(non_finite[known], float("inf")).masked_fill(~prefix, float("-inf"))
    return scores.sort(descending=True, stable=True).indices.clamp(max=n_keys - 1), prefix.sum()


def row_normaliser(
    query: Tensor, positions: Tensor, key: Tensor, allowed: Tensor | None, mask: AttentionMask, segment: Segment,
    segment_len: int,
) -> Tensor:  # fmt: skip
    """``ranking.per_query.row_normaliser`` of one segment, [G, n]; keys that it lacks are hidden, not left out.

    Queries, float32 [G, n, R], are scaled and stand at ``positions``, int64 [G, n]. Other arguments are as for
    `rank_segment`; the key mask of ``mask`` is not read.
    """
    n_keys = key.shape[0]
    stride = key_stride(n_keys)
    end = segment.start if mask.causal else n_keys
    # Up to two samples too many: so there are several at every length.
    sampled = torch.arange(n_keys // stride + 2, device=key.device) * stride + stride // 2
    outside = torch.cat([sampled, torch.arange(FIRST_KEYS, device=key.device)])
    weight = torch.where(outside >= FIRST_KEYS, torch.full((), stride, dtype=key.dtype).log(), 0.0)
    first = torch.arange(outside.shape[0], device=key.device) >= sampled.shape[0]
    present = (outside < end) & ((outside < segment.start) | (outside >= segment.stop))
    present = present & (first | (outside >= FIRST_KEYS))
    own = segment.start + torch.arange(segment_len, device=key.device)
    keys = torch.cat([outside, own]).clamp(max=n_keys - 1)
    weight = torch.cat([weight, weight.new_zeros(segment_len)])
    seen = torch.cat([present, own < segment.stop]) & mask.visible(positions.flatten(), keys)
    if allowed is not None:
        seen = seen & allowed[keys]
    bias = torch.where(seen, weight, float("-inf"))
    normaliser = torch.addmm(bias, query.flatten(0, 1), key[keys].transpose(0, 1)).logsumexp(-1).view(query.shape[:2])
    return normaliser.masked_fill(normaliser == float("-inf"), float("inf"))
