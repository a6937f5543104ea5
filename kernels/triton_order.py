"""``plan.order_keys`` on the GPU: select the keys that a list can reach, then bring them into order class by class.

The stop rule is tested once a chunk, so the order inside a chunk is free. Keys fall into CLASSES classes, by thresholds
taken from a sample of their row of scores, and keep their natural order inside a class: neighbours are gathered
together, and the same scores always give the same list. One program makes one list; nothing waits for the device.

score [B, Hkv, P, Nk], key_index int32 [B, Hkv, P, L].
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from s2o_compile.kernels.mask import AttentionMask
from s2o_compile.kernels.plan import default_chunk_len, longest_list, own_starts_stops, poisoned_keys, reached_keys

CLASSES = 32
"""At 128K a list of 16384 keys holds 16 chunks of 1024: two classes a chunk."""

SAMPLES = 8192
"""Scores of a row that the thresholds are taken from, at most."""

SLACK = 1.1
"""How many more keys than wanted the last threshold aims at: the worst of them are cut off once they are in order."""


@triton.jit
def load_scores(score_ptr, poisoned_ptr, keys, present):
    """Scores as float32; a key that holds NaN or inf must be visited, so it comes first."""
    score = tl.load(score_ptr + keys, mask=present, other=-float("inf")).to(tl.float32)
    score = tl.where(score == score, score, 0.0)
    return tl.where(tl.load(poisoned_ptr + keys, mask=present, other=0) != 0, float("inf"), score)


@triton.jit
def select_keys_kernel(
    score_ptr, threshold_ptr, room_ptr, poisoned_ptr, key_mask_ptr, own_start_ptr, own_stop_ptr, kept_ptr,
    kept_count_ptr, prefix_count_ptr, stride_mb, n_keys, segments, kv_heads, capacity,
    CAUSAL: tl.constexpr, HAS_KEY_MASK: tl.constexpr, CLASSES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The prefix keys of one list whose score reaches the last threshold, in natural order, and how many there are."""
    segment = segments - 1 - tl.program_id(0)  # the longest first
    head = tl.program_id(1).to(tl.int64)
    row = head * segments + segment
    own_start, own_stop = tl.load(own_start_ptr + segment), tl.load(own_stop_ptr + segment)
    stop = own_start if CAUSAL else n_keys
    threshold = tl.load(threshold_ptr + row * CLASSES + CLASSES - 1)
    room = tl.load(room_ptr + row)
    count = segment * 0
    equals = segment * 0
    prefix = segment * 0
    for j in range(0, stop, BLOCK):
        keys = j + tl.arange(0, BLOCK)
        present = keys < stop
        if not CAUSAL:
            present = present & ((keys < own_start) | (keys >= own_stop))
        if HAS_KEY_MASK:
            present = present & (
                tl.load(key_mask_ptr + head // kv_heads * stride_mb + keys, mask=present, other=0) != 0
            )
        score = load_scores(score_ptr + row * n_keys, poisoned_ptr + head * n_keys, keys, present)
        kept = present & (score >= threshold)
        if room < capacity:
            equal = (present & (score == threshold)).to(tl.int32)
            kept = kept & ((score > threshold) | (equals + tl.cumsum(equal, 0) <= room))
            equals += tl.sum(equal, 0)
        place = count + tl.cumsum(kept.to(tl.int32), 0) - 1
        tl.store(kept_ptr + row * capacity + place, keys, mask=kept & (place < capacity))
        count += tl.sum(kept.to(tl.int32), 0)
        prefix += tl.sum(present.to(tl.int32), 0)
    tl.store(kept_count_ptr + row, tl.minimum(count, capacity))
    tl.store(prefix_count_ptr + row, prefix)


@triton.jit
def order_keys_kernel(
    score_ptr, threshold_ptr, poisoned_ptr, kept_ptr, kept_count_ptr, reached_ptr, key_index_ptr, key_count_ptr,
    n_keys, segments, capacity, list_len, CLASSES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The kept keys of one list, best class first, natural order inside a class: a counting sort."""
    segment = segments - 1 - tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    row = head * segments + segment
    classes = tl.arange(0, CLASSES)
    threshold = tl.load(threshold_ptr + row * CLASSES + classes)
    count = tl.load(kept_count_ptr + row)
    length = tl.minimum(count, tl.load(reached_ptr + segment))
    score_ptr += row * n_keys
    poisoned_ptr += head * n_keys
    sizes = tl.zeros([CLASSES], tl.int32)
    for j in range(0, count, BLOCK):
        entries = j + tl.arange(0, BLOCK)
        keys = tl.load(kept_ptr + row * capacity + entries, mask=entries < count, other=0)
        score = load_scores(score_ptr, poisoned_ptr, keys, entries < count)
        place = tl.sum((score[:, None] < threshold[None, :]).to(tl.int32), 1)
        sizes += tl.sum((place[:, None] == classes[None, :]).to(tl.int32), 0)
    first = tl.cumsum(sizes, 0) - sizes
    for j in range(0, count, BLOCK):
        entries = j + tl.arange(0, BLOCK)
        present = entries < count
        keys = tl.load(kept_ptr + row * capacity + entries, mask=present, other=0)
        score = load_scores(score_ptr, poisoned_ptr, keys, present)
        place = tl.sum((score[:, None] < threshold[None, :]).to(tl.int32), 1)
        mine = (place[:, None] == classes[None, :]).to(tl.int32)
        place = tl.sum(mine * (first[None, :] + tl.cumsum(mine, 0) - 1), 1)
        tl.store(key_index_ptr + row * list_len + place, keys, mask=present & (place < length))
        first += tl.sum(mine, 0)
    tl.store(key_count_ptr + row, length)


def sample_positions(n_keys: int, device: torch.device) -> tuple[Tensor, int]:
    """Positions to sample, int64 [M], and keys per sample: one of every ``step`` keys, not always at the same place.

    A fixed stride would see one phase only of inputs that repeat, such as the rows of an image.
    """
    step = max(1, -(-n_keys // SAMPLES))
    first = torch.arange(0, n_keys, step, device=device)
    return (first + first // step * 7919 % step).clamp_(max=n_keys - 1), step


def thresholds(
    scores: Tensor, mask: AttentionMask, starts: Tensor, stops: Tensor, reached: Tensor, longest: int, capacity: int
) -> tuple[Tensor, Tensor]:
    """Descending lower bounds of the classes, float32 [B, Hkv, P, CLASSES]; -inf last where a list holds everything.

    And how many keys that equal the last bound may be kept, int32 [B, Hkv, P]: ``capacity``, but where that many are
    seen among the samples, the first of them must leave room for the better ones behind them.
    """
    n_keys = scores.shape[3]
    positions, step = sample_positions(n_keys, scores.device)
    prefix = positions < starts[:, None]
    if not mask.causal:
        prefix |= positions >= stops[:, None]
    prefix = prefix[None] if mask.key_mask is None else prefix[None] & mask.key_mask[:, None, positions]
    sample = scores[..., positions].nan_to_num_(nan=0.0).masked_fill_(~prefix[:, None], float("-inf"))
    best = min(int(longest * SLACK) // step + 1, len(positions))
    best_samples = sample.topk(best, dim=-1, sorted=True).values
    parts = torch.arange(1, CLASSES + 1, device=scores.device) / CLASSES
    rank = (reached[:, None] * (SLACK / step) * parts).long().clamp_(max=best - 1)
    bounds = best_samples.gather(-1, rank.expand(*scores.shape[:3], CLASSES)).float()
    last = bounds[..., -1:].to(sample.dtype)
    crowded = (sample >= last).sum(-1) * step > capacity
    room = (capacity - 64 - (sample > last).sum(-1) * (step * SLACK)).clamp(min=0)
    above = torch.nextafter(bounds[..., -1:], torch.full_like(bounds[..., -1:], float("inf")))
    bounds[..., :-1] = torch.maximum(bounds[..., :-1], above)  # what equals the last bound belongs into the last class
    whole = starts if mask.causal else n_keys - (stops - starts)
    bounds[..., -1].masked_fill_(reached >= whole, float("-inf"))
    return bounds, torch.where(crowded & (reached < whole), room, capacity).to(torch.int32)


def order_keys(
    scores: Tensor, key: Tensor, value: Tensor, mask: AttentionMask, *, n_queries: int, segment_len: int, tau: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Turn importance scores into lists; arguments and results as ``plan.order_keys``.

    A list may fall short of its reach by what the thresholds miss it by; it is never longer.
    """
    batch, heads, segments, n_keys = scores.shape
    chunk_len = default_chunk_len(n_keys)
    starts, stops = own_starts_stops(mask, n_queries, n_keys, segment_len, scores.device)
    reached = reached_keys(mask, starts, stops, n_keys, tau, chunk_len).to(torch.int32)
    longest = longest_list(mask, n_queries, n_keys, segment_len, tau, chunk_len)
    capacity = min(int(longest * SLACK * SLACK) + 64, n_keys)
    bounds, room = thresholds(scores, mask, starts, stops, reached, longest, capacity)
    poisoned = poisoned_keys(key, value)
    kept = torch.empty(batch, heads, segments, capacity, device=scores.device, dtype=torch.int32)
    key_index = kept.new_empty(batch, heads, segments, max(longest, 1))
    kept_count, key_count, prefix_count = (kept.new_empty(batch, heads, segments) for _ in range(3))
    grid = (segments, batch * heads)
    select_keys_kernel[grid](
        scores, bounds, room, poisoned, poisoned if mask.key_mask is None else mask.key_mask, starts, stops, kept,
        kept_count, prefix_count, 0 if mask.key_mask is None else mask.key_mask.stride(0), n_keys, segments, heads,
        capacity, CAUSAL=mask.causal, HAS_KEY_MASK=mask.key_mask is not None, CLASSES=CLASSES, BLOCK=4096,
        num_warps=8,
    )  # fmt: skip
    order_keys_kernel[grid](
        scores, bounds, poisoned, kept, kept_count, reached, key_index, key_count, n_keys, segments, capacity,
        key_index.shape[3], CLASSES=CLASSES, BLOCK=512, num_warps=8,
    )  # fmt: skip
    return key_index, key_count, prefix_count[:, 0].contiguous()
