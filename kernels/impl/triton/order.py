"""``plan.order_keys`` on the GPU: a counting sort of each segment's prefix keys by class of score.

The stop rule is tested once a chunk, so the order inside a chunk is free. Keys fall into CLASSES classes, by bounds
taken from a sample of their row of scores. Every lane of a program counts, and then writes, keys of its own: no lane
waits for another. Inside a class keys stand lane by lane, so the same scores always give the same ranking. A row is
cut into programs of LANES lanes, so that a few rows keep the whole card busy. The host does not wait.

score [B, Hr, P, Nk], key_index int32 [B, Hr, P, L].
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from s2o_compile.kernels.core.mask import AttentionMask
from s2o_compile.kernels.core.plan import longest_prefix
from s2o_compile.kernels.impl.triton.tile import (
    first_row,
    key_mask_of,
    key_rows,
    launch,
    load_rows,
    needs_wide,
    number,
    paging,
    seg_bounds,
    tracing,
)
from s2o_compile.kernels.pages.sizes import Size, Sizes
from s2o_compile.kernels.pages.table import Pages

CLASSES = 32
"""Their sizes grow with the square of their number: the first chunks decide where most tiles stop."""

LANES = 64
"""Lanes of one program, a thread each."""

LANE_KEYS = 128
"""Keys of one lane at most, every LANES-th of its program: a load takes neighbours. A counter's field holds 255."""

SHARES = tl.constexpr(4)
"""Programs that share a short row: a few mostly wait for memory. On an H200 one took 52 us at 8K, four take 24."""

STEPS = 4
"""Keys of a lane that are loaded together: the loop waits for memory."""

SAMPLES = 4096
"""Scores of a row that the bounds are taken from, at most; a power of two."""

SUMMED = 2048
"""Counts of a row that are added up at a time."""

LARGEST = tl.constexpr(65504.0)
"""Clamp of scores, float16's largest number: inf is for keys that hold NaN or inf."""


@triton.jit
def find_non_finite_kernel(
    key_ptr, value_ptr, non_finite_ptr, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn, first_key,
    n_keys, length, kv_heads, pages, page_rows, last_page, HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, BLOCK_VALUE: tl.constexpr, KEYS: tl.constexpr, WIDE: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """Mark keys that hold NaN or inf, or whose value does: ``plan.non_finite_keys``."""
    start, n_keys = first_row(n_keys), number(n_keys)
    if first_key + tl.program_id(0) * KEYS >= n_keys:
        return
    head = tl.program_id(1).to(tl.int64)
    keys = first_key + tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    rows = key_rows(tl.minimum(keys, n_keys - 1), pages, page_rows, last_page, PAGE)
    key = key_ptr + head // kv_heads * stride_kb + head % kv_heads * stride_kh + start * stride_kn
    value = value_ptr + head // kv_heads * stride_vb + head % kv_heads * stride_vh + start * stride_vn
    total = tl.sum(load_rows(key, rows, stride_kn, HEAD_DIM, BLOCK_DIM, WIDE).to(tl.float32), 1)
    total += tl.sum(load_rows(value, rows, stride_vn, VALUE_DIM, BLOCK_VALUE, WIDE).to(tl.float32), 1)
    finite = tl.abs(total) < float("inf")
    target = non_finite_ptr + head * length + keys - first_key
    tl.store(target, finite == 0, mask=keys < n_keys)


# Each kernel loads by itself the numbers that the address of a store depends on. Torch finds out what a kernel writes
# to, and takes a pointer as written to if it was passed to a function whose result such an address depends on.


@triton.jit
def in_prefix(keys, stop, seg_start, seg_stop, CAUSAL: tl.constexpr):
    """True for prefix keys, by position alone: before ``stop``, and no in-segment keys."""
    present = keys < stop
    if not CAUSAL:
        present = present & ((keys < seg_start) | (keys >= seg_stop))
    return present


@triton.jit
def rate(score, non_finite):
    """Scores as float32. A key that holds NaN or inf must be visited, so it comes first."""
    score = score.to(tl.float32)
    score = tl.where(score == score, tl.minimum(tl.maximum(score, -LARGEST), LARGEST), 0.0)
    return tl.where(non_finite != 0, float("inf"), score)


@triton.jit
def sample_step(stop, samples):
    """Distance of the sampled keys before ``stop``."""
    return tl.maximum(tl.cdiv(stop, samples), 1)


@triton.jit
def bound_ranks(seg_start, seg_stop, n_keys, samples, CAUSAL: tl.constexpr, CLASSES: tl.constexpr):
    """For each class the place, from the best on, of the sample of a row that bounds it."""
    whole, step = seg_start, sample_step(seg_start, samples)
    if not CAUSAL:
        whole, step = n_keys - (seg_stop - seg_start), sample_step(n_keys, samples)
    share = (tl.arange(0, CLASSES) + 1).to(tl.float32) / CLASSES
    return tl.minimum((whole.to(tl.float32) / step * share * share).to(tl.int32), samples - 1)


@triton.jit
def order_bits(number):
    """Float16 as integers from 0 to 65535 in the same order."""
    bits = number.to(tl.int16, bitcast=True).to(tl.int32)
    return (bits ^ (bits >> 15 & 0x7FFF)) + 0x8000


@triton.jit
def float_of_bits(bits):
    """The inverse of ``order_bits``."""
    bits = bits - 0x8000
    return (bits ^ (bits >> 15 & 0x7FFF)).to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def bound_classes_kernel(
    score_ptr, non_finite_ptr, key_mask_ptr, bound_ptr,
    stride_pb, stride_ph, stride_mb, n_queries, n_keys, segments, kv_heads, seg_offset, samples,
    CAUSAL: tl.constexpr, HAS_KEY_MASK: tl.constexpr, SEGMENT: tl.constexpr, CLASSES: tl.constexpr,
    SAMPLES: tl.constexpr,
):  # fmt: skip
    """Lower bounds of a row's classes: scores of one of every few keys of its prefix, the lowest for other keys.

    The distance of the sampled keys varies: a fixed one would see a single phase of inputs that repeat, such as the
    rows of an image. All bounds are found together, the first half of their bits by a histogram and the others bit by
    bit, where a sort would order what nobody reads.
    """
    segment, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row = head * segments + segment
    n_queries, n_keys, seg_offset = number(n_queries), number(n_keys), number(seg_offset)
    if segment * SEGMENT >= n_queries:
        return
    seg_start, seg_stop = seg_bounds(segment, n_queries, n_keys, seg_offset, SEGMENT)
    stop = seg_start if CAUSAL else n_keys
    step = sample_step(stop, samples)
    score_ptr += row * n_keys
    non_finite_ptr += head // kv_heads * stride_pb + head % kv_heads * stride_ph
    key_mask_ptr += head // kv_heads * stride_mb
    sample = tl.arange(0, SAMPLES)
    keys = sample * step + sample * 7919 % step
    present = in_prefix(keys, stop, seg_start, seg_stop, CAUSAL) & (sample < samples)
    if HAS_KEY_MASK:
        present = present & (tl.load(key_mask_ptr + keys, mask=present, other=0) != 0)
    score = tl.load(score_ptr + keys, mask=present, other=-float("inf"))
    score = rate(score, tl.load(non_finite_ptr + keys, mask=present, other=0)).to(tl.float16)
    place = tl.where(sample < samples, order_bits(score), -1)
    ranks = bound_ranks(seg_start, seg_stop, n_keys, samples, CAUSAL, CLASSES)
    counts = tl.histogram(tl.maximum(place, 0) >> 8, 256)  # the lowest bin, of absent ones too, bounds nothing
    from_here = tl.sum(counts, 0) - tl.cumsum(counts, 0) + counts  # samples of such first bits or higher ones
    bound = tl.maximum(tl.sum((from_here[None, :] > ranks[:, None]).to(tl.int32), 1) - 1, 0) << 8
    for bit in range(8):
        trial = bound | (0x80 >> bit)
        above = tl.sum((place[None, :] >= trial[:, None]).to(tl.int32), 1)
        bound = tl.where(above > ranks, trial, bound)
    tl.store(bound_ptr + row * CLASSES + tl.arange(0, CLASSES), float_of_bits(bound))


@triton.jit
def program_keys(
    program, seg_start, n_keys, CAUSAL: tl.constexpr, LANES: tl.constexpr, LANE_KEYS: tl.constexpr,
    STEPS: tl.constexpr,
):  # fmt: skip
    """First key of a program and the key behind its last, its lanes, and their keys in STEPS steps [STEPS, LANES].

    How a row is shared depends on its prefix alone, as no ranking may depend on what else a call ranks.
    """
    stop = seg_start if CAUSAL else n_keys
    keys = tl.minimum(tl.cdiv(stop, SHARES * LANES * STEPS) * STEPS, LANE_KEYS) * LANES
    start = program * keys
    stop = tl.minimum(stop, start + keys)
    lane = tl.arange(0, LANES)
    return start, stop, lane, tl.arange(0, STEPS)[:, None] * LANES + lane[None, :]


@triton.jit
def class_bounds(bound, CLASSES: tl.constexpr):
    """Descending lower bounds of the classes, -inf last, from those of ``bound_classes_kernel``.

    A key lies above its class's bound: where many scores are equal, the better ones still come first. The first class
    holds keys of NaN or inf only.
    """
    number = tl.arange(0, CLASSES)
    bound = tl.where(number == 0, LARGEST, tl.minimum(bound.to(tl.float32), LARGEST))
    return tl.where(number == CLASSES - 1, -float("inf"), bound)


@triton.jit
def find_classes(score, present, bound, CLASSES: tl.constexpr):
    """Class of each key [STEPS, LANES]: how many of the bounds it is not above. CLASSES for keys of no ranking."""
    return tl.where(present, tl.sum((score[None, :, :] <= bound[:, None, None]).to(tl.int32), 0), CLASSES)


@triton.jit
def take_step(x, step):
    """Row ``step`` of int32 [STEPS, LANES]: every lane's own, so nothing moves."""
    return tl.sum(tl.where(tl.arange(0, x.shape[0])[:, None] == step, x, 0), 0)


@triton.jit
def one_in_class(places, step, CLASSES: tl.constexpr):
    """A one in the field of the class of each lane's key at this step: int32 [CLASSES / 4, LANES], 4 fields each."""
    place = take_step(places, step)
    one = 1 << place % 4 * 8
    return tl.where(tl.arange(0, CLASSES // 4)[:, None] == (place // 4)[None, :], one[None, :], 0)


@triton.jit
def count_classes_kernel(
    score_ptr, non_finite_ptr, key_mask_ptr, bound_ptr, count_ptr,
    stride_pb, stride_ph, stride_mb, n_queries, n_keys, segments, kv_heads, seg_offset,
    CAUSAL: tl.constexpr, HAS_KEY_MASK: tl.constexpr, SEGMENT: tl.constexpr,
    CLASSES: tl.constexpr, LANES: tl.constexpr, LANE_KEYS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Count the keys of each lane of a row by class."""
    program, segment, head = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    row = head * segments + segment
    n_queries, n_keys, seg_offset = number(n_queries), number(n_keys), number(seg_offset)
    if segment * SEGMENT >= n_queries:
        return
    seg_start, seg_stop = seg_bounds(segment, n_queries, n_keys, seg_offset, SEGMENT)
    start, stop, lane, steps = program_keys(program, seg_start, n_keys, CAUSAL, LANES, LANE_KEYS, STEPS)
    bound = class_bounds(tl.load(bound_ptr + row * CLASSES + tl.arange(0, CLASSES)), CLASSES)
    score_ptr += row * n_keys
    non_finite_ptr += head // kv_heads * stride_pb + head % kv_heads * stride_ph
    key_mask_ptr += head // kv_heads * stride_mb
    counts = tl.zeros([CLASSES // 4, LANES], tl.int32)
    for j in range(start, stop, STEPS * LANES):
        keys = j + steps
        present = in_prefix(keys, stop, seg_start, seg_stop, CAUSAL)
        if HAS_KEY_MASK:
            present = present & (tl.load(key_mask_ptr + keys, mask=present, other=0) != 0)
        score = tl.load(score_ptr + keys, mask=present, other=-float("inf"))
        score = rate(score, tl.load(non_finite_ptr + keys, mask=present, other=0))
        places = find_classes(score, present, bound, CLASSES)
        for nth in tl.static_range(STEPS):
            counts += one_in_class(places, nth, CLASSES)
    lanes = tl.num_programs(0) * LANES
    for field in tl.static_range(4):
        place = tl.arange(0, CLASSES // 4) * 4 + field
        cell = (row * CLASSES + place)[:, None] * lanes + (program * LANES + lane)[None, :]
        tl.store(count_ptr + cell, counts >> field * 8 & 255)


@triton.jit
def add_counts_kernel(
    count_ptr, total_ptr, n_queries, segments, kv_heads, cells, SEGMENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Replace the counts of a row by how many keys stand before each, class by class, and lane by lane inside a class.

    ``total``, [B, P], gets the keys of a segment's rankings, which are as many in every head.
    """
    segment, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if segment * SEGMENT >= number(n_queries):
        return
    count_ptr += (head * segments + segment) * cells
    before = segment * 0
    for j in range(0, cells, BLOCK):
        cell = j + tl.arange(0, BLOCK)
        count = tl.load(count_ptr + cell, mask=cell < cells, other=0)
        tl.store(count_ptr + cell, before + tl.cumsum(count, 0) - count, mask=cell < cells)
        before += tl.sum(count, 0)
    if head % kv_heads == 0:
        tl.store(total_ptr + head // kv_heads * segments + segment, before)


@triton.jit
def write_classes_kernel(
    score_ptr, non_finite_ptr, key_mask_ptr, bound_ptr, start_ptr, key_index_ptr,
    stride_pb, stride_ph, stride_mb, n_queries, n_keys, segments, kv_heads, seg_offset, ranking_len,
    pages, page_rows, last_page, CAUSAL: tl.constexpr, HAS_KEY_MASK: tl.constexpr, SEGMENT: tl.constexpr,
    CLASSES: tl.constexpr, LANES: tl.constexpr, LANE_KEYS: tl.constexpr, STEPS: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """Write the keys of each lane of a row to their places in the ranking: of pages, the rows where keys lie."""
    program, segment, head = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    row = head * segments + segment
    n_queries, n_keys, seg_offset = number(n_queries), number(n_keys), number(seg_offset)
    if segment * SEGMENT >= n_queries:
        return
    seg_start, seg_stop = seg_bounds(segment, n_queries, n_keys, seg_offset, SEGMENT)
    start, stop, lane, steps = program_keys(program, seg_start, n_keys, CAUSAL, LANES, LANE_KEYS, STEPS)
    bound = class_bounds(tl.load(bound_ptr + row * CLASSES + tl.arange(0, CLASSES)), CLASSES)
    score_ptr += row * n_keys
    non_finite_ptr += head // kv_heads * stride_pb + head % kv_heads * stride_ph
    key_mask_ptr += head // kv_heads * stride_mb
    written = tl.zeros([CLASSES // 4, LANES], tl.int32)
    lanes = tl.num_programs(0) * LANES
    start_ptr += row * CLASSES * lanes
    for j in range(start, stop, STEPS * LANES):
        keys = j + steps
        present = in_prefix(keys, stop, seg_start, seg_stop, CAUSAL)
        if HAS_KEY_MASK:
            present = present & (tl.load(key_mask_ptr + keys, mask=present, other=0) != 0)
        score = tl.load(score_ptr + keys, mask=present, other=-float("inf"))
        score = rate(score, tl.load(non_finite_ptr + keys, mask=present, other=0))
        places = find_classes(score, present, bound, CLASSES)
        first = tl.zeros([STEPS, LANES], tl.int32)
        for nth in tl.static_range(STEPS):  # all loads before the first store, which they would wait for
            place = take_step(places, nth)
            cell = place * lanes + program * LANES + lane
            begin = tl.load(start_ptr + cell, mask=place < CLASSES, other=0)
            first += tl.where(tl.arange(0, STEPS)[:, None] == nth, begin[None, :], 0)
        for nth in tl.static_range(STEPS):
            place, one = take_step(places, nth), one_in_class(places, nth, CLASSES)
            before = tl.sum(tl.where(one != 0, written, 0), 0) >> place % 4 * 8 & 255
            entry = take_step(first, nth) + before
            key = j + nth * LANES + lane
            if PAGE:
                key = key_rows(tl.minimum(key, n_keys - 1), pages, page_rows, last_page, PAGE)
            tl.store(key_index_ptr + row * ranking_len + entry, key, mask=place < CLASSES)
            written += one


def find_non_finite(
    key: Tensor, value: Tensor, pages: Pages | None = None, first: int = 0, size: Size | None = None
) -> Tensor:
    """``plan.non_finite_keys`` of the keys from ``first`` on, in one launch.

    ``size`` is the number of keys on the device, if the tensors' is a bound (``pages/sizes.py``).
    """
    batch, heads, n_keys, head_dim = key.shape
    n_keys = n_keys if pages is None else pages.length
    non_finite = torch.empty(batch, heads, n_keys - first, dtype=torch.bool, device=key.device)
    launch(
        find_non_finite_kernel, (triton.cdiv(n_keys - first, 64), batch * heads),
        key, value, non_finite, *key.stride()[:3], *value.stride()[:3], first, n_keys if size is None else size,
        n_keys - first, heads, **paging(pages, key),
        HEAD_DIM=head_dim, BLOCK_DIM=triton.next_power_of_2(head_dim), VALUE_DIM=value.shape[3],
        BLOCK_VALUE=triton.next_power_of_2(value.shape[3]), KEYS=64, WIDE=needs_wide(key, value), num_warps=4,
    )  # fmt: skip
    return non_finite


def order_keys(
    scores: Tensor, non_finite: Tensor, mask: AttentionMask, *, n_queries: int, segment_len: int,
    pages: Pages | None = None, sizes: Sizes | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Turn float16 scores [B, Hr, P, Nk] into key_index int32 [B, Hr, P, L] and prefix_count int32 [B, P].

    ``non_finite`` is bool [B, Hr, Nk], of `find_non_finite`. With pages an index is the row where the key lies.
    ``sizes`` are those of the device, if lengths are bounds.
    """
    batch, heads, segments, n_keys = scores.shape
    programs = torch.sym_max(SHARES.value, triton.cdiv(n_keys, LANES * LANE_KEYS))
    counts = scores.new_empty(batch, heads, segments, CLASSES * programs * LANES, dtype=torch.int32)
    longest = n_keys if tracing.get() else max(longest_prefix(mask, n_queries, n_keys, segment_len), 1)
    key_index = counts.new_empty(batch, heads, segments, longest)
    key_mask, stride_mb = key_mask_of(mask.key_mask, non_finite)
    rows = scores, non_finite, key_mask
    lengths = sizes or Sizes(n_queries, n_keys, mask.offset, mask.seg_offset(n_queries, n_keys))
    sizes = (
        *non_finite.stride()[:2], stride_mb, *lengths[:2], segments, heads, lengths.seg_offset,
    )  # fmt: skip
    kind = {"CAUSAL": mask.causal, "HAS_KEY_MASK": mask.key_mask is not None, "SEGMENT": segment_len}
    kind |= {"CLASSES": CLASSES}
    bounds = scores.new_empty(batch, heads, segments, CLASSES)
    launch(
        bound_classes_kernel, (segments, batch * heads), *rows, bounds, *sizes, torch.sym_min(SAMPLES, n_keys), **kind,
        SAMPLES=SAMPLES, num_warps=8,
    )  # fmt: skip
    kind |= {"LANES": LANES, "LANE_KEYS": LANE_KEYS, "STEPS": STEPS, "num_warps": LANES // 32}
    grid, rows = (programs, segments, batch * heads), (*rows, bounds)
    launch(count_classes_kernel, grid, *rows, counts, *sizes, **kind)
    prefix_count = counts.new_empty(batch, segments)
    launch(
        add_counts_kernel, (segments, batch * heads), counts, prefix_count, lengths[0], segments, heads,
        counts.shape[3], SEGMENT=segment_len, BLOCK=SUMMED, num_warps=4,
    )  # fmt: skip
    launch(write_classes_kernel, grid, *rows, counts, key_index, *sizes, longest, **paging(pages, non_finite), **kind)
    return key_index, prefix_count
