"""S2O forward on the GPU: pass 1 in position order, pass 2 over gathered keys until the stop rule holds.

The rule is stated in ``core/stop_rule.py``. K and V rows are gathered by int32 index straight into shared memory. A row
is one piece of at least 128 bytes, and all tiles of a segment share the ranked keys through L2, so gathering costs
almost nothing. A stop test inside the key loop would end software pipelining. So an outer ``while`` visits chunks, an
inner pipelined ``for`` the blocks of a chunk.

The reference of the softmax is FIXED once a tile has met its in-segment keys (``tile.softmax_update``), and pass 2
keeps it. The rare tile whose weights overflow restarts in position order, with the running maximum: it writes
``-computed - 1``, and a second launch computes those tiles, while its other programs end at once.

A tile that keeps its `Progress` can go on later with a lower tau: output, log-sum-exp and the share added for the tail
give its softmax state back, but for the rounding of the output.

Query [B, Hq, Nq, D], key [B, Hkv, Nk, D], value [B, Hkv, Nk, Dv], any strides with unit last stride. One program
computes one tile of one head.
"""

from __future__ import annotations

from collections.abc import Callable

import triton
import triton.language as tl
from torch import Tensor

from s2o_compile.kernels.core.call import AttentionCall
from s2o_compile.kernels.core.plan import TILE_LEN, Plan, n_tiles
from s2o_compile.kernels.core.result import Progress, Result, empty_result
from s2o_compile.kernels.core.stop_rule import TAIL_SHARE
from s2o_compile.kernels.impl.triton.exact import attend_range, launch_exact
from s2o_compile.kernels.impl.triton.listing import device_of
from s2o_compile.kernels.impl.triton.tile import (
    LN2,
    LOG2E,
    NOTHING_SEEN,
    WIDEST_VALUE,
    Launched,
    can_fix,
    cap_products,
    first_row,
    key_mask_of,
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
    tracing,
    value_parts,
)


@triton.jit
def attend_ranked(
    m, l, acc, query, key, value, key_index, start, stop, count, stride_k, stride_v, qk_scale, inner,
    MASKED: tl.constexpr, FIXED: tl.constexpr, SOFTCAP: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_VALUE: tl.constexpr, KEY_BLOCK: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Online softmax over ranked keys [start, stop); MASKED drops those from ``count`` on. FIXED: `softmax_update`."""
    for j in tl.range(start, stop, KEY_BLOCK, num_stages=STAGES):
        entries = j + tl.arange(0, KEY_BLOCK)
        if MASKED:
            keys = tl.load(key_index + tl.minimum(entries, count - 1))
        else:
            keys = tl.load(key_index + entries)
        k = load_rows(key, keys, stride_k, HEAD_DIM, BLOCK_DIM, WIDE)
        products = tl.dot(query, tl.trans(k), input_precision=PRECISION)
        products = cap_products(products, inner, SOFTCAP)
        if MASKED:
            products = tl.where((entries < count)[None, :], products, -float("inf"))
        v = load_rows(value, keys, stride_v, VALUE_DIM, BLOCK_VALUE, WIDE)
        m, l, acc = softmax_update(m, l, acc, products, v, qk_scale, FIXED, PRECISION)
    return m, l, acc


@triton.jit
def gathered_fwd_kernel(
    query_ptr, key_ptr, value_ptr, out_ptr, lse_ptr, computed_ptr,
    key_index_ptr, prefix_count_ptr, key_mask_ptr, tau_ptr, tail_value_ptr, tail_ptr, unvisited_ptr,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_ob, stride_oh, stride_on, stride_lb, stride_lh, stride_cb, stride_ch, stride_mb,
    stride_tb, stride_th, stride_ts, stride_tau,
    n_queries, n_keys, n_segments, ranking_len, heads, group, shared, tail_share, offset, seg_offset, qk_scale, inner,
    tau, pages, page_rows, last_page, FIXED: tl.constexpr, MAY_SEE_NONE: tl.constexpr, CAUSAL: tl.constexpr,
    HAS_KEY_MASK: tl.constexpr, HAS_HEAD_TAU: tl.constexpr, HAS_PROGRESS: tl.constexpr, RESUME: tl.constexpr,
    SEGMENT: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr,
    SOFTCAP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_VALUE: tl.constexpr, KEY_BLOCK: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
    WIDE: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """One query tile of one head: pass 1 over its in-segment keys, pass 2 over its segment's ranked keys."""
    # The heads of a group run side by side: they share keys and rankings, and so L2. The longest visits come first.
    tiles = tl.num_programs(0) // group
    tile = tiles - 1 - tl.program_id(0) // group
    row_head = tl.program_id(1).to(tl.int64) * group + tl.program_id(0) % group
    b, h = row_head // heads, row_head % heads
    kv = h // group
    first_query, first_key = first_row(n_queries), first_row(n_keys)
    n_queries, n_keys, offset, seg_offset = number(n_queries), number(n_keys), number(offset), number(seg_offset)
    if tile * TILE >= n_queries:
        return
    if HAS_HEAD_TAU:
        tau = tl.load(tau_ptr + b * stride_tau + h)
    progress = row_head * tiles + tile
    if RESUME and tl.load(unvisited_ptr + progress) < tau:
        return
    segment = tile * TILE // SEGMENT
    rows = tile * TILE + tl.arange(0, TILE)
    present = rows < n_queries
    rows = tl.minimum(rows, n_queries - 1)
    first = segment * SEGMENT
    last = tl.minimum(first + SEGMENT, n_queries) - 1
    query = query_ptr + b * stride_qb + h * stride_qh + first_query * stride_qn
    query = load_rows(query, rows, stride_qn, HEAD_DIM, BLOCK_DIM, WIDE)
    key = key_ptr + b * stride_kb + kv * stride_kh + first_key * stride_kn
    value = value_ptr + b * stride_vb + kv * stride_vh + first_key * stride_vn
    key_mask = key_mask_ptr + b * stride_mb
    out = out_ptr + b * stride_ob + h * stride_oh + first_query * stride_on
    lse = lse_ptr + b * stride_lb + h * stride_lh + first_query
    dims = tl.arange(0, BLOCK_VALUE)
    mean = tail_value_ptr + b * stride_tb + kv * stride_th + segment * stride_ts + dims

    seg_start = tl.minimum(tl.maximum(first + seg_offset, 0), n_keys)
    seg_stop = tl.maximum(tl.minimum(last + seg_offset + 1, n_keys), seg_start)
    free_stop = seg_stop
    if CAUSAL:  # no query of the tile sees further than its last one
        tile_last = tl.minimum(tile * TILE + TILE - 1, last)
        seg_stop = tl.maximum(tl.minimum(tile_last + offset + 1, seg_stop), seg_start)
        free_stop = tl.minimum(tile * TILE + offset + 1, seg_stop)
    if RESUME:  # every row has seen a key, or the tile would not have stopped
        seen = tl.load(lse + rows)
        tail = tl.load(tail_ptr + row_head * n_queries + rows)
        m = tl.where(seen == -float("inf"), NOTHING_SEEN, seen * LOG2E)
        l = tl.where(seen == -float("inf"), 0.0, 1.0 / (1.0 + tail))
        pointers = out + rows.to(tl.int64)[:, None] * stride_on + dims[None, :]
        acc = tl.load(pointers, mask=(dims < VALUE_DIM)[None, :], other=0.0).to(tl.float32)
        acc -= (1.0 - l)[:, None] * tl.load(mean, mask=dims < VALUE_DIM, other=0.0)[None, :]
    else:
        m = tl.full([TILE], NOTHING_SEEN, tl.float32)
        l = tl.zeros([TILE], tl.float32)
        acc = tl.zeros([TILE, BLOCK_VALUE], tl.float32)
        # The masked tail comes first: it is never empty where there are in-segment keys, so the rest can keep FIXED.
        tail_start = seg_start + tl.maximum(free_stop - seg_start - 1, 0) // KEY_BLOCK * KEY_BLOCK
        m, l, acc = attend_range(
            m, l, acc, query, rows, key, value, key_mask, tail_start, seg_stop, stride_kn, stride_vn, n_keys, offset, 0,
            qk_scale, inner, pages, page_rows, last_page, True, False, CAUSAL, False, HAS_KEY_MASK, SOFTCAP,
            HEAD_DIM, BLOCK_DIM, VALUE_DIM, BLOCK_VALUE, KEY_BLOCK, STAGES, PRECISION, WIDE, PAGE,
        )  # fmt: skip
        m, l, acc = attend_range(
            m, l, acc, query, rows, key, value, key_mask, seg_start, tail_start, stride_kn, stride_vn, n_keys, offset,
            0, qk_scale, inner, pages, page_rows, last_page, False, FIXED, False, False, HAS_KEY_MASK, SOFTCAP,
            HEAD_DIM, BLOCK_DIM, VALUE_DIM, BLOCK_VALUE, KEY_BLOCK, STAGES, PRECISION, WIDE, PAGE,
        )  # fmt: skip

    ranking_row = row_head // shared * n_segments + segment
    key_index = key_index_ptr + ranking_row * ranking_len
    count = tl.load(prefix_count_ptr + b * n_segments + segment)
    whole = count // CHUNK * CHUNK
    visited = whole * 0
    computed = computed_ptr + b * stride_cb + h * stride_ch + tile
    if RESUME:
        visited = tl.load(computed) - (seg_stop - seg_start)
    stopped = whole < 0
    unvisited = tau * 0.0
    tail = tl.zeros([TILE], tl.float32)
    start = visited
    if FIXED and MAY_SEE_NONE and not RESUME:  # some row may have no own key: the best block gives it a reference
        start = tl.minimum(KEY_BLOCK, whole)
        m, l, acc = attend_ranked(
            m, l, acc, query, key, value, key_index, 0, start, count, stride_kn, stride_vn, qk_scale, inner,
            False, False, SOFTCAP, HEAD_DIM, BLOCK_DIM, VALUE_DIM, BLOCK_VALUE, KEY_BLOCK, STAGES, PRECISION, WIDE,
        )  # fmt: skip
    while (visited < whole) & (stopped == 0):
        m_before, l_before = m, l
        m, l, acc = attend_ranked(
            m, l, acc, query, key, value, key_index, start, visited + CHUNK, count, stride_kn, stride_vn,
            qk_scale, inner, False, FIXED, SOFTCAP, HEAD_DIM, BLOCK_DIM, VALUE_DIM, BLOCK_VALUE, KEY_BLOCK, STAGES,
            PRECISION, WIDE,
        )  # fmt: skip
        visited += CHUNK
        start = visited
        gain = 1.0 - l_before * tl.math.exp2(m_before - m) / l
        to_come = tl.math.log2(count.to(tl.float32) / visited) * (LN2 / CHUNK) * visited
        tail = tl.where(visited > CHUNK, gain * to_come, 0.0)
        unvisited = tl.where(visited > CHUNK, tl.max(tail, 0), to_come)
        stopped = (tau > 0.0) & (count >= 2 * CHUNK) & (unvisited < tau)
    if (stopped == 0) & (whole < count):  # the last ranked keys, fewer than a chunk
        m, l, acc = attend_ranked(
            m, l, acc, query, key, value, key_index, whole, count, count, stride_kn, stride_vn, qk_scale, inner,
            True, False, SOFTCAP, HEAD_DIM, BLOCK_DIM, VALUE_DIM, BLOCK_VALUE, KEY_BLOCK, STAGES, PRECISION, WIDE,
        )  # fmt: skip
        visited = count
    if stopped:  # keys left out count as their estimated mass at the mean value
        tail = tl.minimum(tl.maximum(tail, 0.0), 1.0) * tail_share
        acc += (tail * l)[:, None] * tl.load(mean, mask=dims < VALUE_DIM, other=0.0)[None, :]
        l += tail * l
    else:
        unvisited = tau * 0.0 - 1.0

    store_tile(out, lse, m, l, acc, rows, present, stride_on, VALUE_DIM, BLOCK_VALUE)
    n_computed = visited + seg_stop - seg_start
    if FIXED and overflowed(l, acc):  # the second launch leaves no key out
        n_computed = -n_computed - 1
        unvisited = tau * 0.0 - 1.0
    tl.store(computed, n_computed)
    if HAS_PROGRESS:
        tl.store(tail_ptr + row_head * n_queries + rows, tail, mask=present)
        tl.store(unvisited_ptr + progress, unvisited)


def attend(
    call: AttentionCall,
    plan: Plan,
    tau: float | Tensor,
    into: Result | None = None,
    progress: Progress | None = None,
) -> Result:
    """Attention of a call without a window over its plan.

    Args:
        call: Its mask has no window.
        plan: Ranked key indices of every segment.
        tau: One number, or float32 [Hq] or [B, Hq].
        into: Where the results go; new ones if None.
        progress: Where tiles keep their state; None if none will go on.
    """
    result = empty_result(call.query, call.value.shape[3]) if into is None else into
    _launch_parts(call, plan, tau, result, progress)
    return result


def going_on(call: AttentionCall, plan: Plan, tau: Tensor, into: Result, progress: Progress) -> Callable[[], None]:
    """What lets tiles go on from ``into`` and ``progress`` each time it is called: those not below tau by now.

    ``tau`` is float32 [B, Hq], read anew each time; an infinite one leaves a head as it is.
    """
    launched: list[Launched] = []

    def go_on() -> None:
        if launched and call.value.shape[3] <= WIDEST_VALUE:
            for made in launched:
                made.again()
        else:
            launched[:] = _launch_parts(call, plan, tau, into, progress, resume=True)

    return go_on


def _launch_parts(
    call: AttentionCall, plan: Plan, tau: float | Tensor, result: Result, progress: Progress | None, *,
    resume: bool = False,
) -> list[Launched]:  # fmt: skip
    """Launch the tiles of each part of the value's columns, and again in position order those that overflowed."""
    (query, key, value), mask = call.tensors, call.mask
    batch, heads, n_queries, _ = query.shape
    n_keys, sizes = call.n_keys, call.sizes
    group = heads // key.shape[1]
    by_head = isinstance(tau, Tensor)
    fixed = can_fix(query.dtype, mask)
    last_segment = (plan.n_segments - 1) * plan.segment_len
    # Beyond the keys a tile may have no in-segment key; lengths may be symbolic, and those of the device end together.
    beyond = call.lengths is None and (tracing.get() or last_segment + mask.offset >= n_keys)
    may_see_none = mask.key_mask is not None or not mask.causal or beyond
    key_mask, stride_mb = key_mask_of(mask.key_mask, plan.key_index)
    assert plan.tail_value is not None
    means = plan.tail_value.split(WIDEST_VALUE, 3)
    by_batch = heads if by_head and tau.dim() == 2 else 0
    launched: list[Launched] = []
    for (part, piece), mean in zip(value_parts(value, result), means, strict=True):
        state = progress or Progress(mean, mean)
        if resume and len(means) > 1 and mean is not means[-1]:  # the next part goes on from the same state
            piece = piece._replace(lse=piece.lse.clone(), computed=piece.computed.clone())
            state = Progress(state.tail.clone(), state.unvisited.clone())
        made = launch(
            gathered_fwd_kernel, (n_tiles(n_queries) * group, batch * key.shape[1]),
            query, key, part, *piece, plan.key_index, plan.prefix_count, key_mask,
            tau if by_head else plan.key_index, mean, *state,
            *query.stride()[:3], *key.stride()[:3], *part.stride()[:3], *piece.output.stride()[:3],
            *piece.lse.stride()[:2], *piece.computed.stride()[:2], stride_mb, *mean.stride()[:3], by_batch,
            *sizes[:2], plan.n_segments, plan.key_index.shape[3], heads, group,
            heads // plan.key_index.shape[1], TAIL_SHARE, *sizes[2:],
            **logit_scales(call.scale, call.softcap), tau=0.0 if by_head else tau, **paging(call.pages, key),
            FIXED=fixed, MAY_SEE_NONE=may_see_none, CAUSAL=mask.causal, HAS_KEY_MASK=mask.key_mask is not None,
            HAS_HEAD_TAU=by_head, HAS_PROGRESS=progress is not None, RESUME=resume, SEGMENT=plan.segment_len,
            CHUNK=plan.chunk_len, TILE=TILE_LEN, WIDE=needs_wide(query, key, part),
            **launch_config(query.shape[3], part.shape[3], query.dtype, device_of(query)),
        )  # fmt: skip
        launched.append(made)
        if fixed:
            launched.append(launch_exact(call, part, piece, restart=True))
    return launched
