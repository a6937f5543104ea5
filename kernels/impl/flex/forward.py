"""S2O forward by FlexAttention: a kernel that torch compiles, for devices and functions beyond our own.

The blocks that a tile visits are counted before the launch (``ranking.unvisited``), in the place of the stop rule.
Ranked keys are gathered into blocks behind those in position order (``layout.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from s2o_compile.kernels.core.call import AttentionCall
from s2o_compile.kernels.core.mask import AttentionMask
from s2o_compile.kernels.core.plan import TILE_LEN, Plan, in_segment_starts_stops, n_tiles
from s2o_compile.kernels.core.result import Result
from s2o_compile.kernels.impl.flex.layout import BlockGrid, FlexLayout, lay_out, placed_mask, pool_blocks
from s2o_compile.kernels.ranking.unvisited import BLOCK_LEN
from s2o_compile.kernels.support.errors import ImplementationUnavailableError, InputError
from s2o_compile.kernels.support.torch_compat import dynamo_options

try:
    from s2o_compile.kernels.impl.flex import triton_layout
except ImportError:  # no triton here, and no CUDA device that FlexAttention has kernels for
    triton_layout = None

VARIANTS = 64
"""Kernels that one process may compile: by head dims, dtype, scale and softcap, and on a CPU by length."""

Shape = tuple[int, int, int, int, int]
"""B, Hq, Hkv, Nq, Nk."""

LEAST_HEAD_DIM = 16
"""Smallest head dim of FlexAttention's kernels on a GPU."""


def attend(call: AttentionCall, plan: Plan, visits: Tensor) -> Result:
    """Attention over a plan, of whose rankings the int32 [B, Hq, P] ``visits`` say how many blocks to visit.

    The call's mask has no window. The log-sum-exp is empty unless it is wanted.
    """
    check_available(call)
    shape, row_bytes = _shape(call), call.key.shape[3] * call.key.element_size()
    if plan.key_index.shape[1] != shape[2]:
        raise InputError(
            "ranking_per",
            expected='"group" for implementation="flex", whose gathered keys serve all heads of a group',
            got='"head"',
            remedy='Leave it "group", or use another implementation.',
        )
    return _attend(call, place(call.mask, shape, call.query.device, row_bytes, plan, visits))


def attend_exact(call: AttentionCall) -> Result:
    """Exact attention, every visible block of keys visited in position order."""
    check_available(call)
    shape = batch, heads, kv_heads, n_queries, _ = _shape(call)
    grid = block_grid(call.mask, shape, TILE_LEN * n_tiles(n_queries), call.query.device)
    none = torch.zeros(batch, kv_heads, 1, dtype=torch.int32, device=call.query.device)
    visits, no_keys = none.new_ones(batch, heads, 1), none.new_empty(batch, kv_heads, 1, 0)
    return _attend(call, lay_out(grid, (none[0, 0], none[0, 0]), no_keys, none, none, visits, 0, ranked_whole=True))


def place(
    mask: AttentionMask, shape: Shape, device: torch.device, row_bytes: int, plan: Plan, visits: Tensor
) -> FlexLayout:
    """The layout of a call's keys over a plan that the heads of a group share.

    The mask has no window, a key takes ``row_bytes``, and ``visits`` are as in `attend`.
    """
    kv_heads, n_queries, n_keys = shape[2:]
    bounds = in_segment_starts_stops(mask, n_queries, n_keys, plan.segment_len, device)
    n_ranked = plan.prefix_count[:, None].expand(-1, kv_heads, -1)
    outside = bounds[0].expand_as(n_ranked) if mask.causal else torch.full_like(n_ranked, n_keys)
    grid = block_grid(mask, shape, plan.segment_len, device)
    pool = pool_blocks(mask, grid, row_bytes, on_gpu=device.type != "cpu")
    return lay_out(grid, bounds, plan.key_index, n_ranked, outside, visits, pool, ranked_whole=True)


def block_grid(mask: AttentionMask, shape: Shape, segment_len: int, device: torch.device) -> BlockGrid:
    """The blocks that the tiles of a call see: PARTIAL where some query sees some key, FULL where all see all."""
    batch, heads, _, n_queries, n_keys = shape
    start, stop = mask.row_ranges(n_queries, n_keys, device)
    first_row = torch.arange(0, n_queries, TILE_LEN, device=device)
    last_row = (first_row + TILE_LEN - 1).clamp(max=n_queries - 1)
    first_key = torch.arange(0, n_keys, BLOCK_LEN, device=device)
    behind = first_key + BLOCK_LEN
    seen = (behind > start[first_row, None]) & (first_key < stop[last_row, None])
    full = (first_key >= start[last_row, None]) & (behind <= stop[first_row, None]) & (mask.key_mask is None)
    return BlockGrid(*shape, segment_len, *(x.expand(batch, heads, -1, -1) for x in (seen & ~full, full)))


def _shape(call: AttentionCall) -> Shape:
    return *call.query.shape[:2], call.key.shape[1], call.n_queries, call.n_keys


def check_available(call: AttentionCall) -> None:
    """Refuse a call that FlexAttention cannot run on this device."""
    query, value = call.query, call.value
    if query.is_cpu and call.wants_lse:
        raise ImplementationUnavailableError(
            'implementation="flex": expected a GPU for a log-sum-exp (return_lse, sinks), got cpu, where FlexAttention '
            'returns none. Use "auto" or "torch".'
        )
    narrowest = min(query.shape[3], value.shape[3])
    if not query.is_cpu and narrowest < LEAST_HEAD_DIM:
        raise ImplementationUnavailableError(
            f'implementation="flex": expected a head_dim of at least {LEAST_HEAD_DIM} on a GPU, got {narrowest}. Use '
            '"auto", or pad the heads with zeros.'
        )


def _attend(call: AttentionCall, layout: FlexLayout) -> Result:
    query, key, value = call.tensors
    batch, kv_heads = key.shape[:2]
    folded = query.unflatten(1, (kv_heads, -1)).flatten(0, 1)
    if query.is_cuda and triton_layout is not None:
        stop = layout.ranked_stop.amax((1, 2))
        keys, values = (triton_layout.take(x, layout.index, stop) for x in (key, value))
    else:
        keys, values = (take(x, layout.index) for x in (key, value))
    start, stop = (x.to(torch.int32) for x in call.mask.row_ranges(call.n_queries, call.n_keys, query.device))
    key_mask = call.mask.key_mask
    present = key.new_ones(batch, call.n_keys, dtype=torch.bool) if key_mask is None else key_mask
    present = present.repeat_interleave(kv_heads, 0)
    # A number that a score_mod captured must be a constant because torch 2.11 takes no symbolic float there.
    with dynamo_options(recompile_limit=VARIANTS, specialize_float=True):
        found = _compiled(query.device.type)(
            folded, keys, values, layout, (start, stop, present), call.scale, call.softcap, call.wants_lse
        )
    output, lse = found if call.wants_lse else (found, query.new_empty(0, dtype=torch.float32))
    lse = lse.unflatten(0, (batch, kv_heads)).flatten(1, 2) if call.wants_lse else lse
    computed = layout.computed().unflatten(0, (batch, kv_heads)).flatten(1, 2)
    return Result(output.unflatten(0, (batch, kv_heads)).flatten(1, 2), lse, computed)


def take(x: Tensor, index: Tensor) -> Tensor:
    """Rows of [B, Hkv, Nk, D] by [B * Hkv, K], as [B * Hkv, 1, K, D]."""
    return x.flatten(0, 1).gather(1, index[..., None].expand(-1, -1, x.shape[3]))[:, None]


@cache
def _compiled(device_type: str) -> Callable[..., Any]:
    # One graph or an error: uncompiled, flex_attention would hold every score. On a CPU one length a kernel: torch 2.13
    # writes C++ that does not compile where many sizes are symbols (it replaces the name ks6 in ks60, too).
    return torch.compile(_attend_blocks, fullgraph=True, dynamic=device_type != "cpu")


def _attend_blocks(
    query: Tensor, key: Tensor, value: Tensor, layout: FlexLayout, rows: tuple[Tensor, Tensor, Tensor], scale: float,
    softcap: float | None, wants_lse: bool,
) -> Any:  # noqa: ANN401 (a tensor or two)  # fmt: skip
    """FlexAttention of query [B * Hkv, G, Nq, D] over gathered key and value [B * Hkv, 1, K, ..].

    The mask_mod of a call is its own mask, by the first key that each row sees, the key behind its last, and the keys
    in use; its score_mod is the softcap.
    """

    def cap(score: Tensor, *_: Tensor) -> Tensor:
        return score if softcap is None else softcap * torch.tanh(score / softcap)

    visible = placed_mask(_is_seen, proven=True)

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return visible(b, h, i, j, *layout.buffers, *rows)

    from torch.nn.attention.flex_attention import flex_attention  # loads sympy, from torch 2.14 on

    return flex_attention(
        query, key, value, score_mod=None if softcap is None else cap,
        block_mask=layout.block_mask(seen, query.shape[2]), scale=scale, enable_gqa=True, return_lse=wants_lse,
    )  # fmt: skip


def _is_seen(
    row: Tensor, _g: Tensor, i: Tensor, position: Tensor, start: Tensor, stop: Tensor, present: Tensor
) -> Tensor:
    """The mask_mod of an `AttentionMask`; positions behind the last key are places of gathered keys."""
    return (position >= start[i]) & (position < stop[i]) & present[row, position.clamp(max=present.shape[1] - 1)]
