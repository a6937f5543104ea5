"""Where FlexAttention finds its keys: ranked keys as gathered blocks behind the keys in position order.

    keys of one head   [ position order, Nk | blocks of segment a | blocks of segment c | ... unused ]
    blocks of a tile   in-segment keys (under the mask), then the first blocks of its segment's ranked keys

A head that visits nearly all of a ranking visits the keys in position order instead, so every key is counted once. All
heads of a segment without room do the same: gathered blocks have a pool of fixed size, whatever the plan, and the
segment that saves most per block goes first. Sizes depend on lengths alone: the host does not wait for the device, and
a graph of one shape serves every plan.

Measured on SmolLM2 at 8K, with the true mass of every block known, this layout computes 0.20 of all pairs for an error
of 4.4 %; blocks of neighbouring keys, permuted inside 512 keys or not at all, take 0.29 and 0.37 for it.

Shapes: B batch, Hkv key/value heads, G query heads for each of them, T query tiles, K = Nk in whole blocks + the pool.
Key/value heads are folded into the batch, so that the query heads of a group share the gathered keys. FlexAttention's
kernels find a table's rows by its sizes, and those of full blocks as those of partial ones: all tables are contiguous
and alike, which takes 8 bytes for each query head, tile and block.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from s2o_compile.kernels.core.mask import AttentionMask
from s2o_compile.kernels.core.plan import TILE_LEN, n_segments, n_tiles
from s2o_compile.kernels.ranking.unvisited import BLOCK_LEN
from s2o_compile.kernels.support.torch_compat import is_fake

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

try:
    from s2o_compile.kernels.impl.flex import triton_layout
except ImportError:  # no triton here, and no CUDA device
    triton_layout = None

POOL = 4
"""Gathered blocks, in units of the blocks of all keys: all there are on a CPU."""

POOL_BYTES = 5 * 2**29
"""Memory of gathered keys, values and their part of all tables: a GPU gathers that much, where it is more. At 32K
rankings want 11.6 times the keys, and half of them found no room among POOL times the keys (synthetic input)."""

WORTH_GATHERING = 7 / 8
"""A segment is gathered if it visits at most this share of its blocks in position order."""


PARTIAL, FULL = 1, 2
"""Kinds of blocks: the mask_mod decides, or every query of the tile sees the whole block."""

Function = Callable[..., Tensor]


class BlockGrid(NamedTuple):
    """The sizes of a call, and which blocks of keys its tiles of queries see."""

    batch: int
    heads: int
    kv_heads: int
    n_queries: int
    n_keys: int
    segment_len: int
    partial: Tensor
    """Bool [B, Hq, T, key blocks], blocks whose mask_mod decides."""
    full: Tensor
    """The same for blocks that every query of the tile sees as a whole."""

    @property
    def group(self) -> int:
        """Query heads of one key/value head."""
        return self.heads // self.kv_heads


class FlexLayout(NamedTuple):
    """Tensors that place one call's keys; places and blocks count in the gathered keys.

    Attributes:
        index: int64 [B * Hkv, K], which key stands at each place.
        place: int32 [B * Hkv, K], the same.
        position_start: int32 [B * Hkv, G, T], first key that a tile visits in position order.
        position_stop: int32 [B * Hkv, G, T], and the key behind its last.
        ranked_start: int32 [B * Hkv, T], where the segment's ranked keys begin.
        ranked_stop: int32 [B * Hkv, G, T], where the tile's visits of them end.
        kinds: int64 [B * Hkv, G, T, key blocks], PARTIAL, FULL or neither, of blocks in position order. Of fewer bits,
            results of Inductor's CPU template are wrong (torch 2.13).
        partial_count: int32 [B * Hkv, G, T], blocks that need the mask.
        partial_index: int32 [B * Hkv, G, T, blocks], these first.
        full_count: int32 [B * Hkv, G, T], blocks that every query of the tile sees as a whole.
        full_index: int32 [B * Hkv, G, T, blocks], these first.
    """

    index: Tensor
    place: Tensor
    position_start: Tensor
    position_stop: Tensor
    ranked_start: Tensor
    ranked_stop: Tensor
    kinds: Tensor
    partial_count: Tensor
    partial_index: Tensor
    full_count: Tensor
    full_index: Tensor

    @property
    def buffers(self) -> tuple[Tensor, ...]:
        """The tensors that ``placed_mask`` looks up."""
        return self[1:7]

    def computed(self) -> Tensor:
        """Keys that each tile computes, int32 [B * Hkv, G, T]; blocks count as a whole."""
        return (self.partial_count + self.full_count) * BLOCK_LEN

    def block_mask(self, mask_mod: Function, n_queries: int) -> BlockMask:
        """The tables as FlexAttention takes them, without the tables by key, which only a backward needs."""
        from torch.nn.attention.flex_attention import BlockMask  # as in ``forward.py``

        return BlockMask.from_kv_blocks(
            self.partial_count,
            self.partial_index,
            self.full_count,
            self.full_index,
            BLOCK_SIZE=(TILE_LEN, BLOCK_LEN),
            mask_mod=mask_mod,
            seq_lengths=(n_queries, self.index.shape[1]),
            compute_q_blocks=False,
        )


def placed_mask(mask_mod: Function, *, proven: bool = False) -> Function:
    """The mask_mod of gathered keys: of row, head of the group, query, place, ``FlexLayout.buffers`` and captures.

    Args:
        mask_mod: That of the call, of row, head of the group, query, key position and its own captures.
        proven: Whether every query of a segment sees all of its ranked keys, and the kinds of blocks follow from
            mask_mod alone. Two look-ups fewer take 2 of 15 ms (H200, 32K tokens).
    """

    def visible(
        row: Tensor, g: Tensor, i: Tensor, j: Tensor, place: Tensor, position_start: Tensor, position_stop: Tensor,
        ranked_start: Tensor, ranked_stop: Tensor, kinds: Tensor, *captured: Any,  # noqa: ANN401
    ) -> Tensor:  # fmt: skip
        tile = i // TILE_LEN
        ranked = (j >= ranked_start[row, tile]) & (j < ranked_stop[row, g, tile])
        in_order = (j >= position_start[row, g, tile]) & (j < position_stop[row, g, tile])
        if proven:
            return ranked | (in_order & mask_mod(row, g, i, j, *captured))
        position = place[row, j]
        seen = mask_mod(row, g, i, position, *captured)
        kind = kinds[row, g, tile, position // BLOCK_LEN]
        return (ranked | in_order) & ((kind == FULL) | ((kind == PARTIAL) & seen))

    return visible


def pool_blocks(mask: AttentionMask | None, grid: BlockGrid, row_bytes: int, *, on_gpu: bool) -> int:
    """Blocks that one key/value head has room to gather, from lengths alone.

    The mask is None where it is not known. A key takes ``row_bytes``, and a value is taken to need the same. ``on_gpu``
    says whether there is memory to spend.
    """
    batch, heads, kv_heads, n_queries, n_keys, segment_len = grid[:6]
    segments, pool = n_segments(n_queries, segment_len), POOL * -(-n_keys // BLOCK_LEN)
    if on_gpu:
        tables = 2 * 4 * heads * n_tiles(n_queries)
        pool = max(pool, POOL_BYTES // (batch * (kv_heads * BLOCK_LEN * (2 * row_bytes + 8) + tables)))
    # Only part of a segment's prefix keys is worth gathering.
    longest = [n_keys] * segments
    if mask is not None and mask.causal:
        offset = mask.seg_offset(n_queries, n_keys)
        longest = [min(max(s * segment_len + offset, 0), n_keys) for s in range(segments)]
    return min(pool, sum(int(keys * WORTH_GATHERING) // BLOCK_LEN for keys in longest))


def lay_out(
    grid: BlockGrid, bounds: tuple[Tensor, Tensor], key_index: Tensor, n_ranked: Tensor, outside: Tensor,
    visits: Tensor, pool: int, *, ranked_whole: bool,
) -> FlexLayout:  # fmt: skip
    """Place the keys of a call.

    Args:
        grid: Its sizes and blocks.
        bounds: Integers [P], first in-segment key of every segment, and the key behind its last.
        key_index: int32 [B, Hkv, P, L], ranked keys of every segment.
        n_ranked: Integers [B, Hkv, P], how many of them are real.
        outside: Integers [B, Hkv, P], keys outside the segment that a head computes if it visits none of them ranked.
        visits: Integers [B, Hq, P], blocks of ranked keys to visit (``unvisited.blocks_to_visit``).
        pool: Blocks that are gathered at most, of ``pool_blocks``.
        ranked_whole: Whether every query of a segment sees all of its ranked keys, so that none of them needs the mask.
    """
    device, (tiles, position_blocks) = key_index.device, grid.partial.shape[2:]
    rows = grid.batch * grid.kv_heads
    visits = visits.unflatten(1, (grid.kv_heads, grid.group)).flatten(0, 1).long()
    gathered, first, keys = gather_blocks(
        key_index.flatten(0, 1), n_ranked.flatten(0, 1), outside.flatten(0, 1), visits, position_blocks, pool
    )
    keys = keys.clamp(0, grid.n_keys - 1)
    positions = torch.arange(position_blocks * BLOCK_LEN, device=device).clamp(max=grid.n_keys - 1).expand(rows, -1)
    segment = torch.arange(tiles, device=device) * TILE_LEN // grid.segment_len
    gathered, first, visited = gathered[:, :, segment], first[:, segment], visits[:, :, segment]
    visited = torch.where(gathered, visited, 0)
    start = torch.where(gathered, bounds[0][segment], 0)
    stop = torch.where(gathered, bounds[1][segment], position_blocks * BLOCK_LEN)
    partial, full = (
        flags.unflatten(1, (grid.kv_heads, grid.group)).flatten(0, 1) for flags in (grid.partial, grid.full)
    )
    block = torch.arange(position_blocks + pool, device=device)
    first_key = block[:position_blocks] * BLOCK_LEN
    inside = (first_key + BLOCK_LEN > start[..., None]) & (first_key < stop[..., None])
    # Behind the last key, and before and behind the in-segment keys, a block needs the mask.
    last = stop.clamp(max=grid.n_keys)[..., None]
    whole = full & (first_key >= start[..., None]) & (first_key + BLOCK_LEN <= last)
    ranked_stop = first[:, None] + visited
    ranked = (block[position_blocks:] >= first[:, None, :, None]) & (block[position_blocks:] < ranked_stop[..., None])
    masked = torch.zeros_like(ranked)
    if not ranked_whole:
        hidden, seen = (some_key_from(flags, keys, pool) for flags in (~full, partial | full))
        ranked, masked = ranked & ~hidden, ranked & hidden & seen
    on_gpu = triton_layout is not None and lives_on_gpu(key_index)
    table = triton_layout.block_table if on_gpu else block_table  # pyright: ignore[reportOptionalMemberAccess]
    index = torch.cat([positions, keys], dim=1)
    numbers = index, start, stop.clamp(max=grid.n_keys), first * BLOCK_LEN, ranked_stop * BLOCK_LEN
    return FlexLayout(
        index,
        *(x.to(torch.int32) for x in numbers),
        partial.long() * PARTIAL + full.long() * FULL,
        *table(torch.cat([inside & (partial | full) & ~whole, masked], -1)),
        *table(torch.cat([inside & whole, ranked], -1)),
    )


def some_key_from(flags: Tensor, keys: Tensor, pool: int) -> Tensor:
    """Bool [B * Hkv, G, T, pool], gathered blocks with a key from one of some blocks in position order.

    These are flagged by bool [B * Hkv, G, T, key blocks]. The keys of all gathered blocks are int64
    [B * Hkv, pool * BLOCK_LEN].
    """
    dtype = torch.float16 if keys.is_cuda else torch.float32
    source = torch.zeros(len(keys), pool, flags.shape[3], dtype=dtype, device=keys.device)
    source.scatter_(2, keys.unflatten(1, (pool, BLOCK_LEN)) // BLOCK_LEN, 1.0)
    return (flags.flatten(1, 2).to(dtype) @ source.mT > 0).unflatten(1, flags.shape[1:3])


def lives_on_gpu(x: Tensor) -> bool:
    """Whether a kernel can take a tensor: a fake one has no memory."""
    return x.is_cuda and not is_fake(x)


def block_table(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Count int32 [B * Hkv, G, T] and order int32 [B * Hkv, G, T, blocks] of blocks chosen by flags of that shape.

    Entries behind a row's count are any blocks.
    """
    order = chosen.to(torch.int32).argsort(dim=-1, descending=True, stable=True)
    return chosen.sum(-1, dtype=torch.int32), order.to(torch.int32)


def gather_blocks(
    key_index: Tensor, n_ranked: Tensor, outside: Tensor, visits: Tensor, position_blocks: int, pool: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose the heads that visit ranked keys, and place the blocks of these behind those in position order.

    Arguments are those of `lay_out` with key/value heads folded into the batch, such as ``visits``, int64
    [B * Hkv, G, P]; ``position_blocks`` is the number of blocks in position order.

    Returns:
        Bool [B * Hkv, G, P], the heads that visit ranked keys; int64 [B * Hkv, P], the first block of each segment's;
        int64 [B * Hkv, pool * BLOCK_LEN], the keys of all gathered blocks.
    """
    segments, longest = key_index.shape[1:]
    # The last block of a ranking may be short, and visiting a whole ranking saves nothing.
    fits = (visits <= (n_ranked // BLOCK_LEN)[:, None]) & (visits * BLOCK_LEN <= (outside * WORTH_GATHERING)[:, None])
    wanted = torch.where(fits, visits, 0).amax(1)
    order = (wanted * BLOCK_LEN / outside.clamp(min=1)).argsort(dim=-1, stable=True)
    room = torch.zeros_like(n_ranked, dtype=torch.bool).scatter(1, order, wanted.gather(1, order).cumsum(-1) <= pool)
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
