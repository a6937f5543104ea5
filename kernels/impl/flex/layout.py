"""Where FlexAttention finds its keys: the lists of a plan as blocks behind the keys in position order.

    keys of one head   [ position order, Nk | blocks of segment a | blocks of segment c | ... unused ]
    blocks of a tile   in-segment keys (under the mask), then the first blocks of its segment's list (whole)

A head that visits nearly all of a list walks the position order instead, under the mask: every key stands in one place
or the other, and is counted once. So do all heads of a segment that finds no room: gathered blocks have a pool of fixed
size, whatever the plan, and what saves most per block goes first. Sizes depend on lengths alone: nothing waits for the
device, and a graph of one shape serves every plan.

Measured on SmolLM2 at 8K, with the true mass of every block known, this layout computes 0.20 of all pairs for an error
of 4.4 %; blocks of neighbouring keys, permuted inside 512 keys or not at all, take 0.29 and 0.37 for it.

Shapes: B batch, Hkv key/value heads, G query heads for each of them, T query tiles, K = Nk in whole blocks + the pool.
Key/value heads are folded into the batch, so that the query heads of a group share the gathered keys. FlexAttention's
kernels find a table's rows by its sizes, and those of full blocks as those of partial ones: all tables are contiguous
and alike, which takes 8 bytes for each query head, tile and block.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from s2o_compile.kernels.core.mask import AttentionMask
from s2o_compile.kernels.core.plan import TILE_LEN, Plan, in_segment_starts_stops, n_segments, n_tiles
from s2o_compile.kernels.ranking.unvisited import BLOCK_LEN

POOL = 4
"""Gathered blocks, in units of the blocks of all keys: all there are on a CPU."""

POOL_BYTES = 5 * 2**29
"""Memory of gathered keys, values and their part of all tables: a GPU gathers that much, where it is more. Lists want
11.6 times the keys at 32K, where half of the walks found no room among POOL times the keys (synthetic input)."""

WORTH_GATHERING = 7 / 8
"""A segment is gathered if it visits at most this share of its natural blocks."""


class FlexLayout(NamedTuple):
    """Tensors that place one call's keys; positions and blocks count in the gathered keys.

    Attributes:
        index: int64 [B * Hkv, K], which key stands at each place.
        present: bool [B * Hkv, Nk], False for padding.
        row_start: int32 [Nq], first key that a query sees.
        row_stop: int32 [Nq], and the key behind its last.
        natural_start: int32 [B * Hkv, G, T], first key that a tile visits in position order.
        natural_stop: int32 [B * Hkv, G, T], and the key behind its last.
        list_start: int32 [B * Hkv, T], where the tile's list begins.
        list_stop: int32 [B * Hkv, G, T], where the tile's walk along it ends.
        partial_count: int32 [B * Hkv, G, T], blocks that need the mask.
        partial_index: int32 [B * Hkv, G, T, blocks], these first.
        full_count: int32 [B * Hkv, G, T], blocks that every query of the tile sees as a whole.
        full_index: int32 [B * Hkv, G, T, blocks], these first: in-segment keys, then the list, most important first.
    """

    index: Tensor
    present: Tensor
    row_start: Tensor
    row_stop: Tensor
    position_start: Tensor
    position_stop: Tensor
    list_start: Tensor
    list_stop: Tensor
    partial_count: Tensor
    partial_index: Tensor
    full_count: Tensor
    full_index: Tensor

    def computed(self) -> Tensor:
        """Keys that each tile computes, int32 [B * Hkv, G, T]; blocks count as a whole."""
        return (self.partial_count + self.full_count) * BLOCK_LEN


def pool_blocks(
    mask: AttentionMask | None,
    shape: tuple[int, int, int, int, int],
    segment_len: int,
    row_bytes: int,
    *,
    on_gpu: bool,
) -> int:
    """Blocks that one key/value head has room to gather, from lengths alone.

    Args:
        mask: Which keys a query sees; None where that is not known.
        shape: B, Hq, Hkv, Nq, Nk.
        segment_len: Queries of one list.
        row_bytes: Memory of one key; that of a value is taken to be the same.
        on_gpu: Whether there is memory to spend.
    """
    batch, heads, kv_heads, n_queries, n_keys = shape
    segments, pool = n_segments(n_queries, segment_len), POOL * -(-n_keys // BLOCK_LEN)
    if on_gpu:
        tables = 2 * 4 * heads * n_tiles(n_queries)
        pool = max(pool, POOL_BYTES // (batch * (kv_heads * BLOCK_LEN * (2 * row_bytes + 8) + tables)))
    # What is worth gathering is part of a segment's keys outside its own.
    longest = [n_keys] * segments
    if mask is not None and mask.causal:
        offset = mask.seg_offset(n_queries, n_keys)
        longest = [min(max(s * segment_len + offset, 0), n_keys) for s in range(segments)]
    return min(pool, sum(int(keys * WORTH_GATHERING) // BLOCK_LEN for keys in longest))


def lay_out(
    mask: AttentionMask,
    *,
    shape: tuple[int, int, int, int, int],
    device: torch.device,
    plan: Plan | None = None,
    visits: Tensor | None = None,
    pool: int = 0,
) -> FlexLayout:
    """Place the keys of a call.

    Args:
        mask: Which keys a query sees; with a plan, without a window.
        shape: B, Hq, Hkv, Nq, Nk.
        device: Where the tensors live.
        plan: Lists of every segment, queries in position order; None for exact attention in position order.
        visits: int32 [B, Hq, P], blocks of each list to visit (``unvisited.blocks_to_visit``).
        pool: Blocks that are gathered at most, of ``pool_blocks``.
    """
    batch, heads, kv_heads, n_queries, n_keys = shape
    rows, tiles, position_blocks = batch * kv_heads, n_tiles(n_queries), -(-n_keys // BLOCK_LEN)
    index = torch.arange(position_blocks * BLOCK_LEN, device=device).clamp_(max=n_keys - 1).expand(rows, -1)
    position_start = torch.zeros(rows, heads // kv_heads, tiles, dtype=torch.int64, device=device)
    position_stop, first_block, visited = (
        position_start + n_keys,
        position_start[:, 0] + position_blocks,
        position_start,
    )
    if plan is not None and visits is not None:
        walk = visits.view(batch, kv_heads, -1, plan.n_segments).flatten(0, 1).long()
        seg_start, seg_stop = in_segment_starts_stops(mask, n_queries, n_keys, plan.segment_len, device)
        listed = plan.prefix_count.repeat_interleave(kv_heads, 0)
        position_order = seg_start.expand_as(listed) if mask.causal else torch.full_like(listed, n_keys)
        gathered, first, keys = gather_lists(
            plan.key_index.flatten(0, 1), listed, position_order, walk, position_blocks, pool
        )  # fmt: skip
        index = torch.cat([index, keys.clamp(0, n_keys - 1)], dim=1)
        segment = torch.arange(tiles, device=device) * TILE_LEN // plan.segment_len
        gathered, first_block = gathered[:, :, segment], first[:, segment]
        position_start = torch.where(gathered, seg_start[segment], position_start)
        position_stop = torch.where(gathered, seg_stop[segment], position_stop)
        visited = torch.where(gathered, walk[:, :, segment], 0)

    row_start, row_stop = mask.row_ranges(n_queries, n_keys, device)
    row_stop = torch.maximum(row_start, row_stop)
    first_row = torch.arange(0, n_queries, TILE_LEN, device=device)
    last_row = (first_row + TILE_LEN - 1).clamp(max=n_queries - 1)
    # Blocks that some query of the tile sees a part of, and blocks that all of them see as a whole.
    some = torch.maximum(row_start[first_row], position_start), torch.minimum(row_stop[last_row], position_stop)
    every = torch.maximum(row_start[last_row], position_start), torch.minimum(row_stop[first_row], position_stop)
    seen = some[1] > some[0]
    begin, end = some[0] // BLOCK_LEN, torch.where(seen, -(-some[1] // BLOCK_LEN), some[0] // BLOCK_LEN)
    full_begin, full_end = -(-every[0] // BLOCK_LEN), every[1] // BLOCK_LEN
    none = (full_end <= full_begin) if mask.key_mask is None else torch.ones_like(seen)
    full_begin, full_end = torch.where(none, begin, full_begin), torch.where(none, begin, full_end)
    place = torch.arange(index.shape[1] // BLOCK_LEN, device=device)
    partial = torch.where(
        place < (full_begin - begin)[..., None],
        begin[..., None] + place,
        (full_end - (full_begin - begin))[..., None] + place,
    )
    n_full = full_end - full_begin
    full = torch.where(
        place < n_full[..., None], full_begin[..., None] + place, (first_block[:, None] - n_full)[..., None] + place
    )
    present = torch.ones(rows, n_keys, dtype=torch.bool, device=device)
    if mask.key_mask is not None:
        present = mask.key_mask.expand(batch, -1).repeat_interleave(kv_heads, 0)
    list_start = first_block * BLOCK_LEN
    numbers = (
        row_start,
        row_stop,
        position_start,
        position_stop,
        list_start,
        list_start[:, None] + visited * BLOCK_LEN,
        (end - begin) - n_full,
        partial.clamp(0, len(place) - 1),
        n_full + visited,
        full.clamp(0, len(place) - 1),
    )
    return FlexLayout(index.contiguous(), present.contiguous(), *(x.to(torch.int32).contiguous() for x in numbers))


def gather_lists(
    key_index: Tensor, listed: Tensor, position_order: Tensor, walk: Tensor, position_blocks: int, pool: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose who walks a list, and place the blocks of all lists behind those in position order.

    Args:
        key_index: int32 [B * Hkv, P, L], the lists.
        listed: int32 [B * Hkv, P], how many entries are real.
        position_order: Integers [B * Hkv, P], keys that a head computes outside its segment if it walks no list.
        walk: Blocks of its list that each head would visit, int64 [B * Hkv, G, P].
        position_blocks: Blocks in position order.
        pool: Blocks that are gathered at most.

    Returns:
        Bool [B * Hkv, G, P], the heads that walk a list; int64 [B * Hkv, P], the first block of each list; int64
        [B * Hkv, pool * BLOCK_LEN], the keys of all blocks of lists.
    """
    segments, longest = key_index.shape[1:]
    # A list's last block may be short, and a list that is walked to the end saves nothing.
    fits = (walk <= (listed // BLOCK_LEN)[:, None]) & (walk * BLOCK_LEN <= (position_order * WORTH_GATHERING)[:, None])
    wanted = torch.where(fits, walk, 0).amax(1)
    order = (wanted * BLOCK_LEN / position_order.clamp(min=1)).argsort(dim=-1, stable=True)
    room = torch.zeros_like(listed, dtype=torch.bool).scatter(1, order, wanted.gather(1, order).cumsum(-1) <= pool)
    taken, gathered = torch.where(room, wanted, 0), fits & room[:, None]
    ends = taken.cumsum(-1)
    block = torch.arange(pool, device=key_index.device).expand(len(ends), -1).contiguous()
    if longest == 0:
        return gathered, position_blocks + ends - taken, block.new_zeros(len(ends), pool * BLOCK_LEN)
    owner = torch.searchsorted(ends, block, right=True).clamp(max=segments - 1)
    lanes = torch.arange(BLOCK_LEN, device=key_index.device)
    entry = ((block - (ends - taken).gather(1, owner)) * BLOCK_LEN)[..., None] + lanes
    entry = owner[..., None] * longest + entry.clamp(0, longest - 1)
    keys = key_index.flatten(1).gather(1, entry.flatten(1)).long()
    return gathered, position_blocks + ends - taken, keys
