"""``plan.order_keys`` on the GPU: a counting sort of each list's keys by class of score.

The stop rule is tested once a chunk, so the order inside a chunk is free. Keys fall into CLASSES classes, by thresholds
taken from a sample of their row of scores, and keep their natural order inside a class: neighbours are gathered
together, and the same scores always give the same list. A row is counted, and then written, in parts of PART keys, one
program each, so that a few long lists keep the whole card busy; nothing waits for the device.

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
"""Their sizes grow with the square of their number: the first chunks decide where most tiles stop."""

PART = 8192
"""Keys of one program."""

BLOCK = 128
"""Keys of one step of a program, one warp: what lies before a key in its class is counted without shared memory."""

SAMPLES = 4096
"""Scores of a row that the thresholds are taken from, at most."""

SLACK = 1.1
"""How many more keys than wanted the last threshold aims at: the worst of them are cut off."""


@triton.jit
def load_classes(
    score_ptr, poisoned_ptr, key_mask_ptr, threshold, keys, stop, own_start, own_stop,
    CAUSAL: tl.constexpr, HAS_KEY_MASK: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    """Class of each key, CLASSES where no class takes it, and whether it is a prefix key.

    A key that holds NaN or inf must be visited, so it comes first.
    """
    present = keys < stop
    if not CAUSAL:
        present = present & ((keys < own_start) | (keys >= own_stop))
    if HAS_KEY_MASK:
        present = present & (tl.load(key_mask_ptr + keys, mask=present, other=0) != 0)
    score = tl.load(score_ptr + keys, mask=present, other=-float("inf")).to(tl.float32)
    score = tl.where(score == score, score, 0.0)
    score = tl.where(tl.load(poisoned_ptr + keys, mask=present, other=0) != 0, float("inf"), score)
    place = tl.sum((score[:, None] < threshold[None, :]).to(tl.int32), 1)
    return tl.where(present, place, CLASSES), present


@triton.jit
def packed_ones(place, CLASSES: tl.constexpr):
    """A one in the field of each key's class: 8 fields of 8 bits in an int64, [keys, CLASSES / 8].

    Sums of them count all classes at once; a block of 128 keys overflows no field.
    """
    word = tl.arange(0, CLASSES // 8)
    one = tl.full([1], 1, tl.int64) << (place % 8 * 8).to(tl.int64)
    return tl.where(place[:, None] // 8 == word[None, :], one[:, None], 0)


@triton.jit
def unpacked(sums, CLASSES: tl.constexpr):
    """The fields of int64 [CLASSES / 8] as int32 [CLASSES]."""
    fields = sums[:, None] >> (tl.arange(0, 8) * 8).to(tl.int64)[None, :] & 255
    return tl.reshape(fields.to(tl.int32), [CLASSES])


@triton.jit
def count_classes_kernel(
    score_ptr, threshold_ptr, poisoned_ptr, key_mask_ptr, own_start_ptr, own_stop_ptr, count_ptr, prefix_ptr,
    stride_mb, n_keys, segments, kv_heads, parts,
    CAUSAL: tl.constexpr, HAS_KEY_MASK: tl.constexpr, CLASSES: tl.constexpr, PART: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """How many keys of one part of a row are in each class, and how many are prefix keys."""
    part, segment, head = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    row = head * segments + segment
    own_start, own_stop = tl.load(own_start_ptr + segment), tl.load(own_stop_ptr + segment)
    stop = tl.minimum(own_start if CAUSAL else n_keys, part * PART + PART)
    classes = tl.arange(0, CLASSES)
    threshold = tl.load(threshold_ptr + row * CLASSES + classes)
    sizes = tl.zeros([CLASSES], tl.int32)
    prefix = part * 0
    for j in range(part * PART, stop, BLOCK):
        place, present = load_classes(
            score_ptr + row * n_keys, poisoned_ptr + head * n_keys, key_mask_ptr + head // kv_heads * stride_mb,
            threshold, j + tl.arange(0, BLOCK), stop, own_start, own_stop, CAUSAL, HAS_KEY_MASK, CLASSES,
        )  # fmt: skip
        sizes += unpacked(tl.sum(packed_ones(place, CLASSES), 0), CLASSES)
        prefix += tl.sum(present.to(tl.int32), 0)
    tl.store(count_ptr + (row * CLASSES + classes) * parts + part, sizes)
    tl.store(prefix_ptr + row * parts + part, prefix)


@triton.jit
def write_classes_kernel(
    score_ptr, threshold_ptr, poisoned_ptr, key_mask_ptr, own_start_ptr, own_stop_ptr, first_ptr, length_ptr,
    key_index_ptr, stride_mb, n_keys, segments, kv_heads, parts, list_len,
    CAUSAL: tl.constexpr, HAS_KEY_MASK: tl.constexpr, CLASSES: tl.constexpr, PART: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The keys of one part of a row, written to their places in the list."""
    part, segment, head = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    row = head * segments + segment
    own_start, own_stop = tl.load(own_start_ptr + segment), tl.load(own_stop_ptr + segment)
    stop = tl.minimum(own_start if CAUSAL else n_keys, part * PART + PART)
    classes = tl.arange(0, CLASSES)
    threshold = tl.load(threshold_ptr + row * CLASSES + classes)
    first = tl.load(first_ptr + (row * CLASSES + classes) * parts + part)
    length = tl.load(length_ptr + row)
    for j in range(part * PART, stop, BLOCK):
        keys = j + tl.arange(0, BLOCK)
        place, _ = load_classes(
            score_ptr + row * n_keys, poisoned_ptr + head * n_keys, key_mask_ptr + head // kv_heads * stride_mb,
            threshold, keys, stop, own_start, own_stop, CAUSAL, HAS_KEY_MASK, CLASSES,
        )  # fmt: skip
        ones = packed_ones(place, CLASSES)
        up_to = tl.sum(tl.where(ones != 0, tl.cumsum(ones, 0), 0), 1) >> (place % 8 * 8).to(tl.int64) & 255
        before = tl.sum(tl.where(place[:, None] == classes[None, :], first[None, :], 0), 1)
        entry = before + up_to.to(tl.int32) - 1
        tl.store(key_index_ptr + row * list_len + entry, keys, mask=(place < CLASSES) & (entry < length))
        first += unpacked(tl.sum(ones, 0), CLASSES)


def sample_positions(n_keys: int, device: torch.device) -> tuple[Tensor, int]:
    """Positions to sample, int64 [M], and keys per sample: one of every ``step`` keys, not always at the same place.

    A fixed stride would see one phase only of inputs that repeat, such as the rows of an image.
    """
    step = max(1, -(-n_keys // SAMPLES))
    first = torch.arange(0, n_keys, step, device=device)
    return (first + first // step * 7919 % step).clamp_(max=n_keys - 1), step


def thresholds(scores: Tensor, mask: AttentionMask, starts: Tensor, stops: Tensor, reached: Tensor) -> Tensor:
    """Descending lower bounds of the classes, float32 [B, Hkv, P, CLASSES]; -inf last where a list holds everything."""
    n_keys = scores.shape[3]
    positions, step = sample_positions(n_keys, scores.device)
    prefix = positions < starts[:, None]
    if not mask.causal:
        prefix |= positions >= stops[:, None]
    prefix = prefix[None] if mask.key_mask is None else prefix[None] & mask.key_mask[:, None, positions]
    sample = scores[..., positions].nan_to_num_(nan=0.0).masked_fill_(~prefix[:, None], float("-inf"))
    sample = sample.sort(-1, descending=True).values
    parts = (torch.arange(1, CLASSES + 1, device=scores.device) / CLASSES) ** 2
    rank = (reached[:, None] * (SLACK / step) * parts).long().clamp_(max=len(positions) - 1)
    bounds = sample.gather(-1, rank.expand(*scores.shape[:3], CLASSES)).float()
    above = torch.nextafter(bounds[..., -1:], torch.full_like(bounds[..., -1:], float("inf")))
    bounds[..., :-1] = torch.maximum(bounds[..., :-1], above)  # ties with the last bound are cut first
    whole = starts if mask.causal else n_keys - (stops - starts)
    bounds[..., -1].masked_fill_(reached >= whole, float("-inf"))
    return bounds


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
    bounds = thresholds(scores, mask, starts, stops, reached)
    poisoned = poisoned_keys(key, value)
    parts = triton.cdiv(n_keys, PART)
    counts = reached.new_empty(batch, heads, segments, CLASSES * parts)
    prefix = reached.new_empty(batch, heads, segments, parts)
    key_index = reached.new_empty(batch, heads, segments, max(longest, 1))
    given = scores, bounds, poisoned, poisoned if mask.key_mask is None else mask.key_mask, starts, stops
    sizes = 0 if mask.key_mask is None else mask.key_mask.stride(0), n_keys, segments, heads, parts
    kind = {"CAUSAL": mask.causal, "HAS_KEY_MASK": mask.key_mask is not None, "CLASSES": CLASSES, "PART": PART}
    kind |= {"BLOCK": BLOCK, "num_warps": 1}
    grid = (parts, segments, batch * heads)
    count_classes_kernel[grid](*given, counts, prefix, *sizes, **kind)
    ends = counts.cumsum(-1, dtype=torch.int32)  # class by class, and part by part inside a class
    key_count = torch.minimum(ends[..., -1], reached)
    write_classes_kernel[grid](*given, ends - counts, key_count, key_index, *sizes, key_index.shape[3], **kind)
    return key_index, key_count, prefix[:, 0].sum(-1, dtype=torch.int32)
