"""``flex_layout.lay_out`` over a plan, and ``flex_forward.take``, on the GPU: a launch for each kind of table.

As operations of torch they are eighty small launches, and pass over tables of 64-bit numbers a dozen times.

Tables int32 [B * Hkv, G, T, blocks], index int64 [B * Hkv, K]; see ``flex_layout.FlexLayout``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from s2o_compile.kernels.core.mask import AttentionMask
from s2o_compile.kernels.core.plan import TILE_LEN, Plan, n_tiles
from s2o_compile.kernels.impl.flex.layout import WORTH_GATHERING, FlexLayout
from s2o_compile.kernels.impl.triton.tile import load_rows, needs_wide, seg_bounds
from s2o_compile.kernels.ranking.unvisited import BLOCK_LEN

PAIRS = 4096
"""Pairs of segments that are compared together."""

ENTRIES = 1024
"""Entries of a table that are written together."""

ROWS = 64
"""Keys that are copied together."""


@triton.jit
def load_walk(
    visits_ptr, prefix_count_ptr, segment, position_order, segments, BLOCK_LEN: tl.constexpr, WORTH: tl.constexpr
):
    """Blocks that one head would visit of each list, and whether that is worth gathering them."""
    walk = tl.load(visits_ptr + segment, mask=segment < segments, other=0)
    listed = tl.load(prefix_count_ptr + segment, mask=segment < segments, other=0)
    # A list's last block may be short, and a list that is walked to the end saves nothing.
    fits = (walk <= listed // BLOCK_LEN) & (walk.to(tl.float32) * BLOCK_LEN <= position_order.to(tl.float32) * WORTH)
    return walk, fits


@triton.jit
def wanted_blocks(
    visits_ptr, prefix_count_ptr, segment, segments, group, n_queries, n_keys, seg_offset,
    CAUSAL: tl.constexpr, SEGMENT: tl.constexpr, BLOCK_LEN: tl.constexpr, WORTH: tl.constexpr,
):  # fmt: skip
    """Blocks of each list that some head of a group wants, their share of its natural keys, and the number of these."""
    position_order, _ = seg_bounds(segment, n_queries, n_keys, seg_offset, SEGMENT)
    if not CAUSAL:
        position_order = position_order * 0 + n_keys
    wanted = segment * 0
    for g in range(0, group):
        walk, fits = load_walk(
            visits_ptr + g * segments, prefix_count_ptr, segment, position_order, segments, BLOCK_LEN, WORTH
        )  # fmt: skip
        wanted = tl.maximum(wanted, tl.where(fits, walk, 0))
    share = tl.div_rn((wanted * BLOCK_LEN).to(tl.float32), tl.maximum(position_order, 1).to(tl.float32))
    return wanted, share, position_order


@triton.jit
def choose_lists_kernel(
    visits_ptr, prefix_count_ptr, walk_ptr, end_ptr, n_queries, n_keys, seg_offset, segments, kv_heads, group, pool,
    CAUSAL: tl.constexpr, SEGMENT: tl.constexpr, SEGMENTS: tl.constexpr, STEP: tl.constexpr, BLOCK_LEN: tl.constexpr,
    WORTH: tl.constexpr,
):  # fmt: skip
    """Blocks that each head of a group visits of each list, -1 for position order, and where the lists' blocks end."""
    row = tl.program_id(0).to(tl.int64)
    visits_ptr += row * group * segments
    prefix_count_ptr += row // kv_heads * segments
    segment = tl.arange(0, SEGMENTS)
    wanted, share, position_order = wanted_blocks(
        visits_ptr, prefix_count_ptr, segment, segments, group, n_queries, n_keys, seg_offset, CAUSAL, SEGMENT,
        BLOCK_LEN, WORTH,
    )  # fmt: skip
    before = tl.zeros([SEGMENTS], tl.int32)  # itself and all that save more a block
    for start in range(0, segments, STEP):
        other = start + tl.arange(0, STEP)
        more, better, _ = wanted_blocks(
            visits_ptr, prefix_count_ptr, other, segments, group, n_queries, n_keys, seg_offset, CAUSAL, SEGMENT,
            BLOCK_LEN, WORTH,
        )  # fmt: skip
        first = (better[None, :] == share[:, None]) & (other[None, :] <= segment[:, None])
        first = first | (better[None, :] < share[:, None])
        before += tl.sum(tl.where(first, more[None, :], 0), 1)
    room = before <= pool
    tl.store(end_ptr + row * segments + segment, tl.cumsum(tl.where(room, wanted, 0), 0), mask=segment < segments)
    for g in range(0, group):
        walk, fits = load_walk(
            visits_ptr + g * segments, prefix_count_ptr, segment, position_order, segments, BLOCK_LEN, WORTH
        )  # fmt: skip
        target = walk_ptr + (row * group + g) * segments + segment
        tl.store(target, tl.where(fits & room, walk, -1), mask=segment < segments)


@triton.jit
def place_keys_kernel(
    key_index_ptr, end_ptr, index_ptr, n_keys, segments, list_len, position_blocks,
    SEGMENTS: tl.constexpr, BLOCK_LEN: tl.constexpr,
):  # fmt: skip
    """Which keys stand in one block: of position order, then of the lists."""
    block, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    lane = tl.arange(0, BLOCK_LEN)
    keys = block * BLOCK_LEN + lane
    if block >= position_blocks:
        block = block - position_blocks
        segment = tl.arange(0, SEGMENTS)
        ends = tl.load(end_ptr + row * segments + segment, mask=segment < segments, other=0)
        owner = tl.minimum(tl.sum(((ends <= block) & (segment < segments)).to(tl.int32), 0), segments - 1)
        start = tl.max(tl.where(segment < owner, ends, 0), 0)
        entry = tl.minimum((block - start) * BLOCK_LEN + lane, list_len - 1)
        keys = tl.load(key_index_ptr + (row * segments + owner) * list_len + entry, mask=entry >= 0, other=0)
    keys = tl.minimum(tl.maximum(keys, 0), n_keys - 1)
    target = index_ptr + (row * tl.num_programs(0) + tl.program_id(0)) * BLOCK_LEN + lane
    tl.store(target, keys.to(tl.int64))


@triton.jit
def write_tables_kernel(
    walk_ptr, end_ptr, row_start_ptr, row_stop_ptr, position_start_ptr, position_stop_ptr,
    list_start_ptr, list_stop_ptr,
    partial_count_ptr, partial_index_ptr, full_count_ptr, full_index_ptr,
    n_queries, n_keys, offset, seg_offset, segments, group, position_blocks, blocks,
    CAUSAL: tl.constexpr, HAS_KEY_MASK: tl.constexpr, SEGMENT: tl.constexpr, TILE: tl.constexpr,
    BLOCK_LEN: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """Everything that FlexAttention must know of one tile of one head."""
    tile, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    tiles, row, segment = tl.num_programs(0), head // group, tile * TILE // SEGMENT
    walk = tl.load(walk_ptr + head * segments + segment)
    gathered, visited = walk >= 0, tl.maximum(walk, 0)
    before = tl.load(end_ptr + row * segments + segment - 1, mask=segment > 0, other=0)
    first_block = position_blocks + before
    seg_start, seg_stop = seg_bounds(segment, n_queries, n_keys, seg_offset, SEGMENT)
    start, stop = tl.where(gathered, seg_start, 0), tl.where(gathered, seg_stop, n_keys)

    position = tile * TILE + tl.arange(0, TILE)
    last = tl.minimum(tile * TILE + TILE, n_queries) - 1
    row_stop, some_stop, every_stop = position * 0 + n_keys, stop, stop
    if CAUSAL:
        row_stop = tl.minimum(tl.maximum(position + 1 + offset, 0), n_keys)
        some_stop = tl.minimum(tl.maximum(last + 1 + offset, 0), stop)
        every_stop = tl.minimum(tl.maximum(tile * TILE + 1 + offset, 0), stop)
    begin = start // BLOCK_LEN
    end = tl.where(some_stop > start, tl.cdiv(some_stop, BLOCK_LEN), begin)
    full_begin, full_end = tl.cdiv(start, BLOCK_LEN), every_stop // BLOCK_LEN
    none = full_end <= full_begin
    if HAS_KEY_MASK:
        none = full_end == full_end
    full_begin, full_end = tl.where(none, begin, full_begin), tl.where(none, begin, full_end)
    before_full, n_full = full_begin - begin, full_end - full_begin

    at = head * tiles + tile
    tl.store(position_start_ptr + at, start)
    tl.store(position_stop_ptr + at, stop)
    tl.store(list_stop_ptr + at, (first_block + visited) * BLOCK_LEN)
    tl.store(partial_count_ptr + at, end - begin - n_full)
    tl.store(full_count_ptr + at, n_full + visited)
    if head % group == 0:
        tl.store(list_start_ptr + row * tiles + tile, first_block * BLOCK_LEN)
    if head == 0:
        tl.store(row_start_ptr + position, position * 0, mask=position < n_queries)
        tl.store(row_stop_ptr + position, row_stop, mask=position < n_queries)
    for entry in range(0, blocks, ENTRIES):
        place = entry + tl.arange(0, ENTRIES)
        partial = tl.where(place < before_full, begin + place, full_end - before_full + place)
        full = tl.where(place < n_full, full_begin + place, first_block - n_full + place)
        partial, full = tl.minimum(tl.maximum(partial, 0), blocks - 1), tl.minimum(tl.maximum(full, 0), blocks - 1)
        tl.store(partial_index_ptr + at * blocks + place, partial, mask=place < blocks)
        tl.store(full_index_ptr + at * blocks + place, full, mask=place < blocks)


@triton.jit
def take_kernel(
    x_ptr, index_ptr, stop_ptr, out_ptr, stride_b, stride_h, stride_n, places, kv_heads,
    HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Rows of one head by index, side by side."""
    row, dims = tl.program_id(1).to(tl.int64), tl.arange(0, BLOCK_DIM)
    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    if tl.program_id(0) * ROWS >= tl.load(stop_ptr + row):
        return
    keys = tl.load(index_ptr + row * places + place)
    x = load_rows(
        x_ptr + row // kv_heads * stride_b + row % kv_heads * stride_h, keys if WIDE else keys.to(tl.int32), stride_n,
        HEAD_DIM, BLOCK_DIM, WIDE,
    )  # fmt: skip
    target = out_ptr + (row * places + place)[:, None] * HEAD_DIM + dims[None, :]
    tl.store(target, x, mask=dims[None, :] < HEAD_DIM)


def lay_out(mask: AttentionMask, query: Tensor, n_keys: int, plan: Plan, visits: Tensor, pool: int) -> FlexLayout:
    """Place the keys of a call over a plan; results as ``flex_layout.lay_out``.

    Args:
        mask: Which keys a query sees, without a window.
        query: [B, Hq, Nq, D].
        n_keys: Number of keys.
        plan: Lists of every group of heads, queries in position order.
        visits: int32 [B, Hq, P], blocks of each list to visit.
        pool: Blocks that are gathered at most.
    """
    batch, heads, n_queries, _ = query.shape
    kv_heads, segments, longest = plan.key_index.shape[1:]
    rows, group, tiles = batch * kv_heads, heads // kv_heads, n_tiles(n_queries)
    position_blocks = triton.cdiv(n_keys, BLOCK_LEN)
    blocks, padded = position_blocks + pool, max(triton.next_power_of_2(segments), 2)
    kind = {"CAUSAL": mask.causal, "SEGMENT": plan.segment_len, "BLOCK_LEN": BLOCK_LEN}
    seg_offset = mask.seg_offset(n_queries, n_keys)

    def integers(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=query.device)

    walk, ends = integers(rows, group, segments), integers(rows, segments)
    choose_lists_kernel[(rows,)](
        visits, plan.prefix_count, walk, ends, n_queries, n_keys, seg_offset, segments, kv_heads, group,
        pool, SEGMENTS=padded, STEP=min(padded, max(PAIRS // padded, 1)), WORTH=WORTH_GATHERING, num_warps=4, **kind,
    )  # fmt: skip
    index = torch.empty(rows, blocks * BLOCK_LEN, dtype=torch.int64, device=query.device)
    place_keys_kernel[(blocks, rows)](
        plan.key_index, ends, index, n_keys, segments, longest, position_blocks, SEGMENTS=padded, BLOCK_LEN=BLOCK_LEN,
        num_warps=1,
    )  # fmt: skip
    each, table = (rows, group, tiles), (rows, group, tiles, blocks)
    shapes = (n_queries,), (n_queries,), each, each, (rows, tiles), each, each, table, each, table
    numbers = [integers(*shape) for shape in shapes]
    write_tables_kernel[(tiles, rows * group)](
        walk, ends, *numbers, n_queries, n_keys, mask.offset, seg_offset, segments, group, position_blocks, blocks,
        HAS_KEY_MASK=mask.key_mask is not None, TILE=TILE_LEN, ENTRIES=ENTRIES, num_warps=4, **kind,
    )  # fmt: skip
    if mask.key_mask is None:
        present = torch.ones(rows, n_keys, dtype=torch.bool, device=query.device)
    else:
        present = mask.key_mask.expand(batch, -1).repeat_interleave(kv_heads, 0)
    return FlexLayout(index, present, *numbers)


def take(x: Tensor, index: Tensor, stop: Tensor) -> Tensor:
    """Rows of [B, Hkv, Nk, D] by [B * Hkv, K], as [B * Hkv, 1, K, D]; without a gradient.

    Args:
        x: Keys or values.
        index: int64 [B * Hkv, K].
        stop: int32 [B * Hkv], the end of what some tile visits; places behind it stay unwritten.
    """
    kv_heads, head_dim = x.shape[1], x.shape[3]
    rows, places = index.shape
    out = x.new_empty(rows, 1, places, head_dim)
    take_kernel[(places // ROWS, rows)](
        x, index, stop, out, *x.stride()[:3], places, kv_heads, HEAD_DIM=head_dim,
        BLOCK_DIM=triton.next_power_of_2(head_dim), ROWS=ROWS, WIDE=needs_wide(x), num_warps=4,
    )  # fmt: skip
    return out
