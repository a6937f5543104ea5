"""``ranking_per_query`` for one segment at a time, in functions that can be traced: lengths may be symbolic.

The scores of a segment are made KEY_STEP keys at a time, in a loop that ends where its prefix does. Every number is the
one of ``ranking_per_query``, but for the order of summation.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from s2o_compile.kernels.core.mask import AttentionMask
from s2o_compile.kernels.ranking.per_query import FIRST_KEYS, KEY_STEP, SLOTS, key_stride
from s2o_compile.kernels.support.torch_compat import while_loop


class Segment(NamedTuple):
    """Where a segment lies; int64 tensors without dimensions, for they are known when it runs.

    Attributes:
        first: Its first query.
        start: Its first own key.
        stop: Behind its last own key.
    """

    first: Tensor
    start: Tensor
    stop: Tensor


def rank_segment(
    query: Tensor,
    positions: Tensor,
    key: Tensor,
    non_finite: Tensor,
    allowed: Tensor | None,
    mask: AttentionMask,
    place: Segment,
    segment_len: int,
    n_queries: int,
) -> tuple[Tensor, Tensor]:
    """The prefix keys of one segment, most important first.

    Args:
        query: Its scaled queries that rank, float32 [G, n, R], in few dimensions.
        positions: int64 [G, n], where they stand.
        key: All keys of the head, float32 [Nk, R].
        non_finite: bool [Nk], keys that hold NaN or inf.
        allowed: bool [Nk], the key mask, or None.
        mask: The mask; its own key mask is not read.
        place: Where the segment lies.
        segment_len: S, queries of a segment.
        n_queries: Nq; queries beyond it have no say.

    Returns:
        int64 [L], L >= Nk, and how many of these are prefix keys, int64 [].
    """
    n_keys = key.shape[0]
    normaliser = _row_normaliser(query, positions, key, allowed, mask, place, segment_len)
    normaliser = normaliser.masked_fill(positions >= n_queries, float("inf"))
    rows = torch.cat([query, normaliser[..., None]], dim=-1).flatten(0, 1)
    steps = (n_keys + KEY_STEP - 1) // KEY_STEP
    scores = query.new_full((steps * KEY_STEP,), float("-inf"))

    def more(done: Tensor, scores: Tensor, rows: Tensor, key: Tensor, end: Tensor) -> Tensor:
        return done < end

    def score(done: Tensor, scores: Tensor, rows: Tensor, key: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
        place = done + torch.arange(KEY_STEP, device=key.device)
        columns = torch.nn.functional.pad(key[place.clamp(max=key.shape[0] - 1)], (0, 1), value=-1.0)
        best = (rows @ columns.transpose(0, 1)).view(-1, SLOTS, KEY_STEP).amax(0)
        return done + KEY_STEP, scores.index_copy(0, place, best.logsumexp(0))

    end = place.start if mask.causal else place.start.new_full((), n_keys)
    _, scores = while_loop(more, score, (torch.zeros_like(end), scores), (rows, key, end))
    place_of = torch.arange(steps * KEY_STEP, device=key.device)
    prefix = (place_of < end) & ((place_of < place.start) | (place_of >= place.stop))
    known = place_of.clamp(max=n_keys - 1)
    if allowed is not None:
        prefix = prefix & allowed[known]
    lowest = torch.finfo(scores.dtype).min
    scores = scores.nan_to_num(nan=0.0, posinf=-lowest, neginf=lowest)
    scores = scores.masked_fill(non_finite[known], float("inf")).masked_fill(~prefix, float("-inf"))
    return scores.sort(descending=True, stable=True).indices.clamp(max=n_keys - 1), prefix.sum()


def _row_normaliser(
    query: Tensor,
    positions: Tensor,
    key: Tensor,
    allowed: Tensor | None,
    mask: AttentionMask,
    place: Segment,
    segment_len: int,
) -> Tensor:
    """``ranking_per_query.row_normaliser`` of one segment, [G, n]; keys that it has not are hidden, not left out."""
    n_keys = key.shape[0]
    stride = key_stride(n_keys)
    end = place.start if mask.causal else n_keys
    # Two more than there are may be: that they are several holds for every length.
    sampled = torch.arange(n_keys // stride + 2, device=key.device) * stride + stride // 2
    outside = torch.cat([sampled, torch.arange(FIRST_KEYS, device=key.device)])
    weight = torch.where(outside >= FIRST_KEYS, torch.full((), stride, dtype=key.dtype).log(), 0.0)
    first = torch.arange(outside.shape[0], device=key.device) >= sampled.shape[0]
    present = (outside < end) & ((outside < place.start) | (outside >= place.stop)) & (first | (outside >= FIRST_KEYS))
    own = place.start + torch.arange(segment_len, device=key.device)
    keys = torch.cat([outside, own]).clamp(max=n_keys - 1)
    weight = torch.cat([weight, weight.new_zeros(segment_len)])
    seen = torch.cat([present, own < place.stop]) & mask.visible(positions.flatten(), keys)
    if allowed is not None:
        seen = seen & allowed[keys]
    bias = torch.where(seen, weight, float("-inf"))
    normaliser = torch.addmm(bias, query.flatten(0, 1), key[keys].transpose(0, 1)).logsumexp(-1).view(query.shape[:2])
    return normaliser.masked_fill(normaliser == float("-inf"), float("inf"))
