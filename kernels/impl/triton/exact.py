"""Exact attention in position order on the GPU: sliding windows, dense heads, and tiles that overflowed.

    out[i] = sum_j softmax_j(q_i . k_j * scale) v_j      over the keys visible to i (``mask.py``)

Only the visible range of a tile is computed, and only the blocks at its edges are masked. Query [B, Hq, Nq, D], key
[B, Hkv, Nk, D], value [B, Hkv, Nk, Dv], any strides with unit last stride. One program computes one tile of one head.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from s2o_compile.kernels.core.call import AttentionCall
from s2o_compile.kernels.core.plan import TILE_LEN, n_tiles
from s2o_compile.kernels.core.result import Result, empty_result
from s2o_compile.kernels.impl.triton.listing import device_of
from s2o_compile.kernels.impl.triton.tile import (
    NOTHING_SEEN,
    Launched,
    can_fix,
    cap_products,
    first_row,
    key_mask_of,
    key_rows,
    launch,
    launch_config,
    load_rows,
    logit_scales,
    needs_wide,
    number,
    overflowed,
    paging,
    softmax_update,
    store_tile,
    value_parts,
)


@triton.jit
def attend_range(
    m, l, acc, query, rows, key, value, key_mask, start, stop, stride_k, stride_v, n_keys, offset, window, qk_scale,
    inner, pages, page_rows, last_page, MASKED: tl.constexpr, FIXED: tl.constexpr, CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_KEY_MASK: tl.constexpr, SOFTCAP: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_VALUE: tl.constexpr, KEY_BLOCK: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """Online softmax over keys [start, stop) in position order; MASKED tests every pair, FIXED: ``softmax_update``."""
    last = tl.zeros_like(rows) + stop - 1
    if CAUSAL:
        last = tl.minimum(last, rows + offset)
    for j in tl.range(start, stop, KEY_BLOCK, num_stages=STAGES):
        position = j + tl.arange(0, KEY_BLOCK)
        keys = tl.minimum(position, n_keys - 1) if MASKED or HAS_KEY_MASK else position
        places = key_rows(keys, pages, page_rows, last_page, PAGE)
        k = load_rows(key, places, stride_k, HEAD_DIM, BLOCK_DIM, WIDE)
        products = tl.dot(query, tl.trans(k), input_precision=PRECISION)
        products = cap_products(products, inner, SOFTCAP)
        if MASKED or HAS_KEY_MASK:
            if HAS_KEY_MASK:
                position = tl.where(tl.load(key_mask + keys) != 0, position, 0x7FFFFFFF)  # behind every row
            seen = position[None, :] <= last[:, None]
            if HAS_WINDOW:
                seen = seen & (position[None, :] > rows[:, None] + offset - window)
            products = tl.where(seen, products, -float("inf"))
        v = load_rows(value, places, stride_v, VALUE_DIM, BLOCK_VALUE, WIDE)
        m, l, acc = softmax_update(m, l, acc, products, v, qk_scale, FIXED, PRECISION)
    return m, l, acc


@triton.jit
def attend_parts(
    query, rows, key, value, key_mask, start, head_stop, tail_start, stop, stride_k, stride_v, n_keys, offset, window,
    qk_scale, inner, pages, page_rows, last_page, FIXED: tl.constexpr, CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HAS_KEY_MASK: tl.constexpr, TILE: tl.constexpr, SOFTCAP: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_VALUE: tl.constexpr, KEY_BLOCK: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """All keys of a tile. Those in [start, head_stop) and [tail_start, stop) need a mask, those between do not.

    The tail comes first. It is never empty where there are keys, and a causal row finds its own key there. So the rest
    has a reference to keep FIXED.
    """
    m = tl.full([TILE], NOTHING_SEEN, tl.float32)
    l = tl.zeros([TILE], tl.float32)
    acc = tl.zeros([TILE, BLOCK_VALUE], tl.float32)
    m, l, acc = attend_range(
        m, l, acc, query, rows, key, value, key_mask, tail_start, stop, stride_k, stride_v, n_keys, offset, window,
        qk_scale, inner, pages, page_rows, last_page, True, False, CAUSAL, HAS_WINDOW, HAS_KEY_MASK, SOFTCAP,
        HEAD_DIM, BLOCK_DIM, VALUE_DIM, BLOCK_VALUE, KEY_BLOCK, STAGES, PRECISION, WIDE, PAGE,
    )  # fmt: skip
    m, l, acc = attend_range(
        m, l, acc, query, rows, key, value, key_mask, head_stop, tail_start, stride_k, stride_v, n_keys, offset, window,
        qk_scale, inner, pages, page_rows, last_page, False, FIXED, False, False, HAS_KEY_MASK, SOFTCAP,
        HEAD_DIM, BLOCK_DIM, VALUE_DIM, BLOCK_VALUE, KEY_BLOCK, STAGES, PRECISION, WIDE, PAGE,
    )  # fmt: skip
    if HAS_WINDOW:
        m, l, acc = attend_range(
            m, l, acc, query, rows, key, value, key_mask, start, head_stop, stride_k, stride_v, n_keys, offset, window,
            qk_scale, inner, pages, page_rows, last_page, True, False, CAUSAL, HAS_WINDOW, HAS_KEY_MASK, SOFTCAP,
            HEAD_DIM, BLOCK_DIM, VALUE_DIM, BLOCK_VALUE, KEY_BLOCK, STAGES, PRECISION, WIDE, PAGE,
        )  # fmt: skip
    return m, l, acc


@triton.jit
def attend_tile(
    query, rows, first, last, key, value, key_mask, stride_k, stride_v, n_keys, offset, window,
    qk_scale, inner, pages, page_rows, last_page, FIXED: tl.constexpr, CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HAS_KEY_MASK: tl.constexpr, TILE: tl.constexpr, SOFTCAP: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_VALUE: tl.constexpr, KEY_BLOCK: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """Softmax state of the queries first..last over all keys that they see, and the number of keys computed."""
    start, stop = 0, n_keys
    free_start, free_stop = 0, n_keys  # keys that every row of the tile sees: no mask needed there
    if CAUSAL:
        stop = tl.maximum(tl.minimum(last + offset + 1, n_keys), 0)
        free_stop = tl.minimum(first + offset + 1, stop)
    if HAS_WINDOW:
        start = tl.minimum(tl.maximum(first + offset - window + 1, 0), stop)
        free_start = tl.minimum(tl.maximum(last + offset - window + 1, start), stop)
    head_stop = tl.minimum(start + tl.cdiv(free_start - start, KEY_BLOCK) * KEY_BLOCK, stop)
    free_blocks = tl.maximum(free_stop - head_stop - 1, 0) // KEY_BLOCK
    tail_start = head_stop + free_blocks * KEY_BLOCK
    m, l, acc = attend_parts(
        query, rows, key, value, key_mask, start, head_stop, tail_start, stop, stride_k, stride_v, n_keys, offset,
        window, qk_scale, inner, pages, page_rows, last_page, FIXED, CAUSAL, HAS_WINDOW, HAS_KEY_MASK, TILE,
        SOFTCAP, HEAD_DIM, BLOCK_DIM, VALUE_DIM, BLOCK_VALUE, KEY_BLOCK, STAGES, PRECISION, WIDE, PAGE,
    )  # fmt: skip
    if FIXED and overflowed(l, acc):
        m, l, acc = attend_parts(
            query, rows, key, value, key_mask, start, head_stop, tail_start, stop, stride_k, stride_v, n_keys, offset,
            window, qk_scale, inner, pages, page_rows, last_page, False, CAUSAL, HAS_WINDOW, HAS_KEY_MASK, TILE,
            SOFTCAP, HEAD_DIM, BLOCK_DIM, VALUE_DIM, BLOCK_VALUE, KEY_BLOCK, STAGES, PRECISION, WIDE, PAGE,
        )  # fmt: skip
    return m, l, acc, stop - start


@triton.jit
def exact_fwd_kernel(
    query_ptr, key_ptr, value_ptr, out_ptr, lse_ptr, computed_ptr, key_mask_ptr,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_ob, stride_oh, stride_on, stride_lb, stride_lh, stride_cb, stride_ch, stride_mb,
    n_queries, n_keys, heads, group, offset, window, qk_scale, inner, pages, page_rows, last_page,
    RESTART: tl.constexpr, FIXED: tl.constexpr, CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HAS_KEY_MASK: tl.constexpr, TILE: tl.constexpr, SOFTCAP: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_VALUE: tl.constexpr,
    KEY_BLOCK: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """One query tile of one head; with RESTART only tiles whose ``computed`` is negative (``forward.py``)."""
    # The heads of a group run side by side: they share keys, and so L2. The longest rows come first.
    tiles = tl.num_programs(0) // group
    tile = tiles - 1 - tl.program_id(0) // group
    row_head = tl.program_id(1).to(tl.int64) * group + tl.program_id(0) % group
    b, h = row_head // heads, row_head % heads
    first_query, first_key = first_row(n_queries), first_row(n_keys)
    n_queries, n_keys, offset = number(n_queries), number(n_keys), number(offset)
    if tile * TILE >= n_queries:
        return
    computed = computed_ptr + b * stride_cb + h * stride_ch + tile
    visited = 0
    if RESTART:
        flag = tl.load(computed)
        if flag >= 0:
            return
        visited = -flag - 1
    rows = tile * TILE + tl.arange(0, TILE)
    present = rows < n_queries
    rows = tl.minimum(rows, n_queries - 1)
    first, last = tile * TILE, tl.minimum(tile * TILE + TILE, n_queries) - 1
    query = query_ptr + b * stride_qb + h * stride_qh + first_query * stride_qn
    query = load_rows(query, rows, stride_qn, HEAD_DIM, BLOCK_DIM, WIDE)
    key = key_ptr + b * stride_kb + (h // group) * stride_kh + first_key * stride_kn
    value = value_ptr + b * stride_vb + (h // group) * stride_vh + first_key * stride_vn
    m, l, acc, seen = attend_tile(
        query, rows, first, last, key, value, key_mask_ptr + b * stride_mb, stride_kn, stride_vn, n_keys, offset,
        window, qk_scale, inner, pages, page_rows, last_page, FIXED, CAUSAL, HAS_WINDOW, HAS_KEY_MASK, TILE,
        SOFTCAP, HEAD_DIM, BLOCK_DIM, VALUE_DIM, BLOCK_VALUE, KEY_BLOCK, STAGES, PRECISION, WIDE, PAGE,
    )  # fmt: skip
    out = out_ptr + b * stride_ob + h * stride_oh + first_query * stride_on
    lse = lse_ptr + b * stride_lb + h * stride_lh + first_query
    store_tile(out, lse, m, l, acc, rows, present, stride_on, VALUE_DIM, BLOCK_VALUE)
    tl.store(computed, visited + seen)


def launch_exact(call: AttentionCall, value: Tensor, into: Result, *, restart: bool = False) -> Launched:
    """Fill ``into`` for a part of the value's columns: every tile, or those that overflowed in pass 2."""
    (query, key, _), mask = call.tensors, call.mask
    batch, heads, n_queries, _ = query.shape
    group = heads // key.shape[1]
    key_mask, stride_mb = key_mask_of(mask.key_mask, into.computed)
    return launch(
        exact_fwd_kernel, (n_tiles(n_queries) * group, batch * key.shape[1]),
        query, key, value, into.output, into.lse, into.computed, key_mask,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *into.output.stride()[:3],
        *into.lse.stride()[:2], *into.computed.stride()[:2], stride_mb,
        *call.sizes[:2], heads, group, call.sizes.offset, 0 if mask.window is None else mask.window,
        **logit_scales(call.scale, call.softcap), **paging(call.pages, key),
        RESTART=restart, FIXED=can_fix(query.dtype, mask), CAUSAL=mask.causal, HAS_WINDOW=mask.window is not None,
        HAS_KEY_MASK=mask.key_mask is not None, TILE=TILE_LEN, WIDE=needs_wide(query, key, value),
        **launch_config(query.shape[3], value.shape[3], query.dtype, device_of(query)),
    )  # fmt: skip


def attend_exact(call: AttentionCall) -> Result:
    """Exact attention; results as ``reference.attend``, with every visible key computed."""
    call = with_positive_scale(call)
    result = empty_result(call.query, call.value.shape[3])
    for part, into in value_parts(call.value, result):
        launch_exact(call, part, into)
    return result


def with_positive_scale(call: AttentionCall) -> AttentionCall:
    """The same attention by a scale above 0: kernels scale hidden products of -inf, so the query takes the sign."""
    if call.scale > 0:
        return call
    return call.but(query=call.query * (-1 if call.scale < 0 else 0), scale=abs(call.scale) or 1.0)
