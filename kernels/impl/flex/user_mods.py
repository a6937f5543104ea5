"""flex_attention with the caller's score and mask functions, made sparse while it is traced into a graph.

A function of a score and its position may mean anything, so nothing is proven of it. The functions and the block mask
still decide which keys a query sees. The plan decides only which of these are computed. Keys are ranked by sampled
queries, which attend through the functions (``sample.py``).

    keys of a segment    in-segment blocks in position order, then ranked blocks; or all in position order
    score_mod, mask_mod  those of the call, of the position that a gathered key came from
    block mask           looked up by that position: blocks that it leaves out stay out, full ones need no mask_mod

All steps are tensor operations of sizes known from lengths: Inductor compiles them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from s2o_compile.kernels.core.plan import TILE_LEN, default_segment_len, n_tiles
from s2o_compile.kernels.impl.flex.forward import take
from s2o_compile.kernels.impl.flex.layout import BlockGrid, FlexLayout, Function, lay_out, placed_mask, pool_blocks
from s2o_compile.kernels.impl.flex.sample import sample, seg_blocks
from s2o_compile.kernels.ranking.unvisited import BLOCK_LEN, blocks_to_visit
from s2o_compile.kernels.support.define_op import define_operator
from s2o_compile.kernels.support.torch_compat import fake_mode_of

TABLES_AT = 2
"""Index of the tables in a block mask's tuple: two lengths, counts and order of partial and of full blocks, other
tables, the sizes of a block of queries and of keys, the mask_mod."""

PROMISES = ("ROWS_GUARANTEED_SAFE", "BLOCKS_ARE_CONTIGUOUS")
"""Kernel options about the call's own blocks: they do not hold for the blocks that are visited."""


def block_len_fits(query_block: int, key_block: int, n_queries: int, n_keys: int) -> bool:
    """Whether blocks of this size are whole tiles, or one block is everything."""
    return all(
        block % TILE_LEN == 0 or block >= length for block, length in ((query_block, n_queries), (key_block, n_keys))
    )


def sparse_flex_attention(
    query: Tensor, key: Tensor, value: Tensor, score_mod: Function, block_mask: Sequence[Any], scale: float,
    kernel_options: dict[str, Any], score_mod_other_buffers: tuple[Any, ...] = (),
    mask_mod_other_buffers: tuple[Any, ...] = (), *, tau: float | Sequence[float], segment_len: int | None = None,
    dense_heads: Sequence[int] = (), stride: Sequence[int] | None = None,
) -> tuple[Any, ...]:  # fmt: skip
    """The higher-order operator's output, [B, Hq, Nq, Dv] and two more, computed sparsely where it is being traced.

    Outside a trace it is the operator itself: uncompiled FlexAttention gains nothing from fewer blocks. Arguments by
    position are the operator's, the block mask a tuple. ``tau``, ``segment_len`` and ``dense_heads`` are as in
    ``s2o::attention``. The output gets the strides ``stride``, or the operator's own.
    """
    operator = torch.ops.higher_order.flex_attention
    if fake_mode_of([query]) is None:
        return operator(
            query, key, value, score_mod, block_mask, scale, kernel_options, score_mod_other_buffers,
            mask_mod_other_buffers,
        )  # fmt: skip
    mods, buffers = (score_mod, block_mask[-1]), (score_mod_other_buffers, mask_mod_other_buffers)
    with torch.no_grad():
        grid = _read(query, key, block_mask, segment_len or default_segment_len(query.shape[2]))
        ranked_keys, unvisited, n_ranked = sample(query, key, value, grid, mods, buffers, scale)
        if isinstance(tau, Sequence):
            visits = torch.stack([blocks_to_visit(unvisited[:, h], limit) for h, limit in enumerate(tau)], dim=1)
        else:
            visits = blocks_to_visit(unvisited, tau)
        everything = unvisited.shape[-1] + 1
        for head in dense_heads:
            marked = slice(head * grid.group, (head + 1) * grid.group)
            visits = torch.cat(
                [visits[:, : marked.start], torch.full_like(visits[:, marked], everything), visits[:, marked.stop :]], 1
            )
        row_bytes = key.shape[3] * key.element_size()
        pool = pool_blocks(None, grid, row_bytes, on_gpu=not query.is_cpu)
        layout = FlexLayout(*_place_blocks(ranked_keys, n_ranked, visits, grid.partial, grid.full, *grid[3:6], pool))
    output = _attend(query, key, value, layout, mods, buffers, scale, kernel_options)
    if query.is_cpu:
        output = _in_memory(output, stride)
    elif stride is not None and output.stride() != tuple(stride):
        output = output.new_empty_strided(output.shape, tuple(stride)).copy_(output)
    return output, None, None


def _read(query: Tensor, key: Tensor, block_mask: Sequence[Any], segment_len: int) -> BlockGrid:
    """The sizes of a call, and its block mask as flags for blocks of TILE_LEN queries and BLOCK_LEN keys."""
    batch, heads, n_queries, _ = query.shape
    kv_heads, n_keys = key.shape[1:3]
    tiles, blocks = n_tiles(n_queries), -(-n_keys // BLOCK_LEN)
    counts, order, full_counts, full_order = block_mask[TABLES_AT : TABLES_AT + 4]
    query_block, key_block = block_mask[-3:-1]

    def flags(counts: Tensor | None, order: Tensor | None) -> Tensor:
        if counts is None or order is None:
            return torch.zeros(batch, heads, tiles, blocks, dtype=torch.bool, device=query.device)
        width = -(-n_keys // key_block)  # tables may be narrower
        real = torch.arange(order.shape[3], device=order.device) < counts[..., None]
        place = torch.where(real, order, width).clamp(max=width).long()
        found = torch.zeros(*order.shape[:3], width + 1, dtype=torch.bool, device=order.device)
        found = found.scatter(3, place, real)[..., :width]
        found = found.repeat_interleave(min(-(-query_block // TILE_LEN), tiles), 2)[:, :, :tiles]
        found = found.repeat_interleave(min(-(-key_block // BLOCK_LEN), blocks), 3)[..., :blocks]
        missing = (0, blocks - found.shape[3], 0, tiles - found.shape[2])
        return torch.nn.functional.pad(found, missing).expand(batch, heads, -1, -1)

    partial, full = flags(counts, order), flags(full_counts, full_order)
    return BlockGrid(batch, heads, kv_heads, n_queries, n_keys, segment_len, partial & ~full, full)


def place_blocks(
    ranked_keys: Tensor, n_ranked: Tensor, visits: Tensor, partial: Tensor, full: Tensor,
    n_queries: int, n_keys: int, segment_len: int, pool: int,
) -> list[Tensor]:  # fmt: skip
    """The tensors of a `FlexLayout`; an operator because Inductor's CPU template wants them in memory.

    ``ranked_keys`` are int32 [B, Hkv, P, Nk] without in-segment keys, ``n_ranked`` of them real, int64 [B, Hkv, P].
    ``visits`` are int32 [B, Hq, P], blocks of each ranking. ``partial`` and ``full`` are as in `BlockGrid`, and
    ``pool`` as in `lay_out`.
    """
    grid = BlockGrid(
        ranked_keys.shape[0], visits.shape[1], ranked_keys.shape[1], n_queries, n_keys, segment_len, partial, full
    )
    start, stop = seg_blocks(grid, ranked_keys.device)
    bounds = start * BLOCK_LEN, stop * BLOCK_LEN
    layout = lay_out(grid, bounds, ranked_keys, n_ranked, n_ranked, visits, pool, ranked_whole=False)
    return [x.contiguous() for x in layout]


def in_memory(x: Tensor, stride: Sequence[int] | None = None) -> Tensor:
    """A copy with these strides, made by Inductor: its CPU template reads no view of a view, and has no epilogue."""
    return x.new_empty_strided(x.shape, x.contiguous().stride() if stride is None else tuple(stride)).copy_(x)


_library = torch.library.Library("s2o", "FRAGMENT")
_in_memory = define_operator(_library, in_memory)
_place_blocks = define_operator(_library, place_blocks)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, layout: FlexLayout, mods: tuple[Function, Function],
    buffers: tuple[tuple[Any, ...], tuple[Any, ...]], scale: float, kernel_options: dict[str, Any],
) -> Tensor:  # fmt: skip
    """FlexAttention over placed keys, [B, Hq, Nq, Dv]; mods and buffers are those of scores and of the mask."""
    batch, kv_heads = key.shape[:2]
    group, (score_mod, mask_mod) = query.shape[1] // kv_heads, mods

    def of_position(row: Tensor, g: Tensor, i: Tensor, position: Tensor, *captured: Any) -> Tensor:  # noqa: ANN401
        return mask_mod(row // kv_heads, row % kv_heads * group + g, i, position, *captured)

    def score(score: Tensor, row: Tensor, g: Tensor, i: Tensor, j: Tensor, place: Tensor, *captured: Any) -> Tensor:  # noqa: ANN401
        return score_mod(score, row // kv_heads, row % kv_heads * group + g, i, place[row, j], *captured)

    folded = query.unflatten(1, (kv_heads, group)).flatten(0, 1)
    keys, values = (take(x, layout.index) for x in (key, value))
    if query.is_cpu:
        folded, keys, values = (_in_memory(x) for x in (folded, keys, values))
    blocks = layout.block_mask(placed_mask(of_position), query.shape[2])
    kernel_options = {name: False if name.endswith(PROMISES) else x for name, x in kernel_options.items()}
    output = torch.ops.higher_order.flex_attention(
        folded, keys, values, score, blocks.as_tuple(), scale, kernel_options, (layout.place, *buffers[0]),
        (*layout.buffers, *buffers[1]),
    )[0]  # fmt: skip
    return output.unflatten(0, (batch, kv_heads)).flatten(1, 2)
