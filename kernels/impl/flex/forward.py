"""S2O forward by FlexAttention: a kernel that torch compiles, for devices and functions beyond our own.

The walk along every list is decided before the launch (``unvisited.py``), and the lists are blocks of gathered keys
(``flex_layout.py``). The mask_mod says the same as the tables of blocks do, so that the result is one, whether a kernel
skips by them or not; only a compiled kernel does. Uncompiled, flex_attention computes every score and holds all of
them: where nothing compiles around the call, it compiles itself.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from s2o_compile.kernels.core.call import AttentionCall
from s2o_compile.kernels.core.plan import TILE_LEN, Plan
from s2o_compile.kernels.core.result import Result
from s2o_compile.kernels.impl.flex.layout import FlexLayout, lay_out, pool_blocks
from s2o_compile.kernels.ranking.unvisited import BLOCK_LEN
from s2o_compile.kernels.support.errors import ImplementationUnavailableError, InputError
from s2o_compile.kernels.support.torch_compat import dynamo_options

try:
    from s2o_compile.kernels.impl.flex import triton_layout
except ImportError:  # no triton here, and no CUDA device that FlexAttention has kernels for
    triton_layout = None

VARIANTS = 64
"""Kernels that one process may compile: by head dims, dtype, scale and softcap, and on a CPU by length."""

LEAST_HEAD_DIM = 16
"""Of FlexAttention's kernels on a GPU."""


def attend(call: AttentionCall, plan: Plan, visits: Tensor) -> Result:
    """Attention over a plan.

    Args:
        call: Its mask has no window. The log-sum-exp is empty unless it is wanted.
        plan: Ranked key indices of every segment.
        visits: int32 [B, Hq, P], blocks of each ranking to visit.
    """
    return _attend(call, plan, visits)


def attend_exact(call: AttentionCall) -> Result:
    """Exact attention, every visible block of keys visited in position order."""
    return _attend(call, None, None)


def _attend(call: AttentionCall, plan: Plan | None, visits: Tensor | None) -> Result:
    check_available(call)
    layout = place(call, plan, visits)
    output, lse = attend_layout(call, layout)
    computed = layout.computed().unflatten(0, call.key.shape[:2]).flatten(1, 2)
    return Result(output, call.query.new_empty(0, dtype=torch.float32) if lse is None else lse, computed)


def place(call: AttentionCall, plan: Plan | None, visits: Tensor | None) -> FlexLayout:
    """Where a call finds its keys: a plan's ranked keys, or without a plan all keys in position order."""
    query, key, _ = call.tensors
    batch, heads, n_queries, _ = query.shape
    kv_heads, n_keys = key.shape[1:3]
    if plan is not None and plan.key_index.shape[1] != kv_heads:
        raise InputError(
            "ranking_per",
            expected='"group" for implementation="flex", whose gathered keys serve all heads of a group',
            got='"head"',
            remedy='Leave it "group", or use another implementation.',
        )
    shape, pool = (batch, heads, kv_heads, n_queries, n_keys), 0
    if plan is not None:
        row_bytes = key.shape[3] * key.element_size()
        pool = pool_blocks(call.mask, shape, plan.segment_len, row_bytes, on_gpu=not query.is_cpu)
    if plan is not None and visits is not None and query.is_cuda and triton_layout is not None:
        return triton_layout.lay_out(call.mask, query, n_keys, plan, visits, pool)
    return lay_out(call.mask, shape=shape, device=query.device, plan=plan, visits=visits, pool=pool)


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


def attend_layout(call: AttentionCall, layout: FlexLayout) -> tuple[Tensor, Tensor | None]:
    """Output [B, Hq, Nq, Dv] and, if wanted, log-sum-exp float32 [B, Hq, Nq] over keys placed by a layout."""
    query, key, value = call.tensors
    batch, kv_heads = key.shape[:2]
    folded = query.unflatten(1, (kv_heads, -1)).flatten(0, 1)
    if query.is_cuda and triton_layout is not None:
        stop = layout.list_stop.amax((1, 2))
        keys, values = (triton_layout.take(x, layout.index, stop) for x in (key, value))
    else:
        keys, values = (take(x, layout.index) for x in (key, value))
    # A number that a score_mod captured must be a constant: torch 2.11 takes no symbolic float there.
    with dynamo_options(recompile_limit=VARIANTS, specialize_float=True):
        attend = _compiled(query.device.type)
        output = attend(folded, keys, values, layout, call.scale, call.softcap, call.wants_lse)
    output, lse = output if call.wants_lse else (output, None)
    output = output.unflatten(0, (batch, kv_heads)).flatten(1, 2)
    return output, None if lse is None else lse.unflatten(0, (batch, kv_heads)).flatten(1, 2)


def take(x: Tensor, index: Tensor) -> Tensor:
    """Rows of [B, Hkv, Nk, D] by [B * Hkv, K], as [B * Hkv, 1, K, D]."""
    return x.flatten(0, 1).gather(1, index[..., None].expand(-1, -1, x.shape[3]))[:, None]


@cache
def _compiled(device_type: str) -> Callable[..., Any]:
    # One graph or an error: uncompiled, flex_attention would hold every score. On a CPU one length a kernel: torch 2.13
    # writes C++ that does not compile where many sizes are symbols (it replaces the name ks6 in ks60, too).
    return torch.compile(_attend_blocks, fullgraph=True, dynamic=device_type != "cpu")


def _attend_blocks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: FlexLayout,
    scale: float,
    softcap: float | None,
    wants_lse: bool,
) -> Any:  # noqa: ANN401 (a tensor or two)
    """FlexAttention of query [B * Hkv, G, Nq, D] over gathered key and value [B * Hkv, 1, K, ..]."""

    def cap(score: Tensor, *_: Tensor) -> Tensor:
        return score if softcap is None else softcap * torch.tanh(score / softcap)

    return flex_attention(
        query,
        key,
        value,
        score_mod=None if softcap is None else cap,
        block_mask=block_mask(query, key, layout),
        scale=scale,
        enable_gqa=True,
        return_lse=wants_lse,
    )


def block_mask(query: Tensor, key: Tensor, layout: FlexLayout) -> BlockMask:
    """A layout as FlexAttention takes it; without the tables by key, which only a backward needs."""

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return visible(b, h, i, j, *layout[LOOKED_UP])

    return BlockMask.from_kv_blocks(
        layout.partial_count,
        layout.partial_index,
        layout.full_count,
        layout.full_index,
        BLOCK_SIZE=(TILE_LEN, BLOCK_LEN),
        mask_mod=seen,
        seq_lengths=(query.shape[2], key.shape[2]),
        compute_q_blocks=False,
    )


LOOKED_UP = slice(1, 8)
"""Of a layout, what ``visible`` takes behind the position."""


def visible(
    b: Tensor, h: Tensor, i: Tensor, j: Tensor, present: Tensor, row_start: Tensor, row_stop: Tensor,
    position_start: Tensor, position_stop: Tensor, list_start: Tensor, list_stop: Tensor,
) -> Tensor:  # fmt: skip
    """The mask_mod of a layout: whether a query visits the key that stands at place j."""
    tile = i // TILE_LEN
    position = j.clamp(max=present.shape[1] - 1)
    position_order = (j >= position_start[b, h, tile]) & (j < position_stop[b, h, tile])
    position_order = position_order & (j >= row_start[i]) & (j < row_stop[i]) & present[b, position]
    return position_order | ((j >= list_start[b, tile]) & (j < list_stop[b, h, tile]))
