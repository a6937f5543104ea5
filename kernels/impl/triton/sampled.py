"""``exact.sampled`` and ``core.budget_rule`` on the GPU, in one launch a step: the host must not wait, nor be slow.

Few rows leave most of the card idle. So each program of ``sampled_fwd_kernel`` takes a part of the keys for a block of
rows, and ``merge_splits_kernel`` merges the parts by their log-sum-exp. Rows ascend, so the first blocks skip the last
keys. query [B, Hq, Nq, D], key [B, Hkv, Nk, D], value [B, Hkv, Nk, Dv]; R sampled rows, in slots of whole blocks.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from s2o_compile.kernels.core import budget_rule
from s2o_compile.kernels.core.call import AttentionCall
from s2o_compile.kernels.core.plan import TILE_LEN
from s2o_compile.kernels.core.result import Result
from s2o_compile.kernels.exact import sampled
from s2o_compile.kernels.exact.sampled import SAMPLED, ExactRows
from s2o_compile.kernels.impl.triton.exact import attend_range
from s2o_compile.kernels.impl.triton.listing import device_of
from s2o_compile.kernels.impl.triton.tile import (
    LN2,
    NOTHING_SEEN,
    WIDEST_VALUE,
    Launched,
    can_fix,
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
)

PROGRAMS = 256
"""Programs of a launch, down to half of it, while each has SHORTEST keys: two for each multiprocessor of a large card.
Twice as many would take twice the memory."""

SHORTEST = 512

MERGED_ROWS = 16
"""Rows of one program that merges."""

ERROR_ROWS = 32
"""Rows that a program measures at a time."""

TURN, TURNS = tl.constexpr(sampled.TURN), tl.constexpr(sampled.TURNS)


@triton.jit
def sampled_row(slot, n_rows, n_queries):
    """``sampled.sample_rows``; slots behind the last one repeat it."""
    part = tl.minimum(slot, n_rows - 1).to(tl.int64)
    first, behind = part * n_queries // n_rows, (part + 1) * n_queries // n_rows
    return first + (part * TURN + TURNS // 2) % TURNS * (behind - first) // TURNS


@triton.jit
def sampled_fwd_kernel(
    query_ptr, key_ptr, value_ptr, part_ptr, lse_ptr, key_mask_ptr,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn, stride_mb,
    stride_part, split_len, n_rows, n_queries, n_keys, heads, group, offset, qk_scale, inner,
    pages, page_rows, last_page, FIXED: tl.constexpr, CAUSAL: tl.constexpr, HAS_KEY_MASK: tl.constexpr,
    TILE: tl.constexpr, SOFTCAP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, BLOCK_VALUE: tl.constexpr, KEY_BLOCK: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """A block of one head's rows over one split of the keys: output and natural log-sum-exp [.., splits, slots]."""
    split, row_head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h = row_head // heads, row_head % heads
    first_query, first_key = first_row(n_queries), first_row(n_keys)
    n_queries, n_keys, offset = number(n_queries), number(n_keys), number(offset)
    if n_queries == 0:
        return
    slot = tl.program_id(2) * TILE + tl.arange(0, TILE)
    rows = sampled_row(slot, n_rows, n_queries).to(tl.int32)
    start = split * split_len
    stop = tl.minimum(start + split_len, n_keys)
    if CAUSAL:
        stop = tl.minimum(stop, tl.maximum(tl.max(rows, 0) + offset + 1, start))
    query = query_ptr + b * stride_qb + h * stride_qh + first_query * stride_qn
    query = load_rows(query, rows, stride_qn, HEAD_DIM, BLOCK_DIM, WIDE)
    key = key_ptr + b * stride_kb + h // group * stride_kh + first_key * stride_kn
    value = value_ptr + b * stride_vb + h // group * stride_vh + first_key * stride_vn
    key_mask = key_mask_ptr + b * stride_mb
    m = tl.full([TILE], NOTHING_SEEN, tl.float32)
    l = tl.zeros([TILE], tl.float32)
    acc = tl.zeros([TILE, BLOCK_VALUE], tl.float32)
    # Without a key mask a row that sees any of these keys sees the first one: the first block is a reference to keep.
    first = tl.minimum(start + KEY_BLOCK, stop) if FIXED else stop
    m, l, acc = attend_range(
        m, l, acc, query, rows, key, value, key_mask, start, first, stride_kn, stride_vn, n_keys, offset, 0,
        qk_scale, inner, pages, page_rows, last_page, True, False, CAUSAL, False, HAS_KEY_MASK, SOFTCAP, HEAD_DIM,
        BLOCK_DIM, VALUE_DIM, BLOCK_VALUE, KEY_BLOCK, STAGES, PRECISION, WIDE, PAGE,
    )  # fmt: skip
    if FIXED:
        m, l, acc = attend_range(
            m, l, acc, query, rows, key, value, key_mask, first, stop, stride_kn, stride_vn, n_keys, offset, 0,
            qk_scale, inner, pages, page_rows, last_page, True, True, CAUSAL, False, HAS_KEY_MASK, SOFTCAP, HEAD_DIM,
            BLOCK_DIM, VALUE_DIM, BLOCK_VALUE, KEY_BLOCK, STAGES, PRECISION, WIDE, PAGE,
        )  # fmt: skip
        if overflowed(l, acc):
            m, l, acc = tl.zeros_like(m) + NOTHING_SEEN, tl.zeros_like(l), tl.zeros_like(acc)
            m, l, acc = attend_range(
                m, l, acc, query, rows, key, value, key_mask, start, stop, stride_kn, stride_vn, n_keys, offset, 0,
                qk_scale, inner, pages, page_rows, last_page, True, False, CAUSAL, False, HAS_KEY_MASK, SOFTCAP,
                HEAD_DIM, BLOCK_DIM, VALUE_DIM, BLOCK_VALUE, KEY_BLOCK, STAGES, PRECISION, WIDE, PAGE,
            )  # fmt: skip
    part = (row_head * tl.num_programs(0) + split) * (tl.num_programs(2) * TILE) + slot
    dims = tl.arange(0, BLOCK_VALUE)
    result = acc / tl.where(l == 0.0, 1.0, l)[:, None]
    tl.store(part_ptr + part[:, None] * stride_part + dims[None, :], result, mask=(dims < VALUE_DIM)[None, :])
    tl.store(lse_ptr + part, (m + tl.math.log2(l)) * LN2)


@triton.jit
def merge_splits_kernel(
    part_ptr, part_lse_ptr, rows_ptr, out_ptr, lse_ptr, n_rows, n_queries, slots, splits, value_dim,
    ROWS: tl.constexpr, BLOCK_VALUE: tl.constexpr,
):  # fmt: skip
    """Some rows of one head from their parts: output [.., R, Dv] and log-sum-exp [.., R]; and the rows' positions."""
    row_head = tl.program_id(0).to(tl.int64)
    slot = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    dims = tl.program_id(2) * BLOCK_VALUE + tl.arange(0, BLOCK_VALUE)
    present, inside = slot < n_rows, (dims < value_dim)[None, :]
    part_lse = part_lse_ptr + row_head * splits * slots + slot
    m = tl.full([ROWS], NOTHING_SEEN, tl.float32)
    l = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_VALUE], tl.float32)
    for split in range(0, splits):
        lse = tl.load(part_lse + split * slots)
        m_new = tl.where(lse > m, lse, m)
        weight = tl.exp(lse - m_new)
        decay = tl.exp(m - m_new)
        part = ((row_head * splits + split) * slots + slot)[:, None] * value_dim + dims[None, :]
        l = l * decay + weight
        acc = acc * decay[:, None] + weight[:, None] * tl.load(part_ptr + part, mask=inside, other=0.0)
        m = m_new
    result = acc / tl.where(l == 0.0, 1.0, l)[:, None]
    target = row_head * n_rows + slot
    tl.store(out_ptr + target[:, None] * value_dim + dims[None, :], result, mask=present[:, None] & inside)
    tl.store(lse_ptr + target, m + tl.log(l), mask=present)
    tl.store(rows_ptr + slot, sampled_row(slot, n_rows, number(n_queries)), mask=present)


@triton.jit
def sink_share(lse, sink):
    """What a sink leaves of a row's output; a row that sees no key beside a sink of -inf is all zeros."""
    share = tl.sigmoid(lse - sink)
    return tl.where(share == share, share, 1.0)


@triton.jit
def error_sums_kernel(
    expected_ptr, expected_lse_ptr, rows_ptr, out_ptr, lse_ptr, key_mask_ptr, unread_ptr, sinks_ptr, sums_ptr,
    stride_ob, stride_oh, stride_on, stride_lb, stride_lh, stride_mb, stride_ub, stride_sink,
    n_rows, n_queries, n_keys, heads, offset, value_dim,
    HAS_PADDING: tl.constexpr, HAS_UNREAD: tl.constexpr, HAS_SINKS: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
):  # fmt: skip
    """The two sums of one head, float32 [2, B, Hq]."""
    row_head = tl.program_id(0).to(tl.int64)
    b, h = row_head // heads, row_head % heads
    start, n_queries, n_keys, offset = first_row(n_queries), number(n_queries), number(n_keys), number(offset)
    if n_queries == 0:
        return
    out_ptr += start * stride_on
    lse_ptr += start
    off, size = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    for first in range(0, n_rows, ROWS):
        slot = first + tl.arange(0, ROWS)
        counts = slot < n_rows
        slot = tl.minimum(slot, n_rows - 1)
        row = tl.load(rows_ptr + slot)
        expected_share, actual_share = tl.full([ROWS], 1.0, tl.float32), tl.full([ROWS], 1.0, tl.float32)
        if HAS_PADDING:
            position = row + offset
            inside = (position >= 0) & (position < n_keys)
            visible = tl.load(key_mask_ptr + b * stride_mb + position, mask=inside, other=1)
            counts = counts & (visible != 0)
        if HAS_UNREAD:
            counts = counts & (tl.load(unread_ptr + b * stride_ub + row) == 0)
        if HAS_SINKS:
            sink = tl.load(sinks_ptr + h * stride_sink).to(tl.float32)
            expected_share = sink_share(tl.load(expected_lse_ptr + row_head * n_rows + slot), sink)
            actual_share = sink_share(tl.load(lse_ptr + b * stride_lb + h * stride_lh + row), sink)
        for column in range(0, value_dim, BLOCK_VALUE):
            dims = column + tl.arange(0, BLOCK_VALUE)
            there = counts[:, None] & (dims < value_dim)[None, :]
            expected = tl.load(
                expected_ptr + (row_head * n_rows + slot)[:, None] * value_dim + dims[None, :], mask=there, other=0.0
            )
            pointers = out_ptr + b * stride_ob + h * stride_oh + row[:, None] * stride_on + dims[None, :]
            actual = tl.load(pointers, mask=there, other=0.0).to(tl.float32)
            expected, actual = expected * expected_share[:, None], actual * actual_share[:, None]
            expected, actual = tl.where(there, expected, 0.0), tl.where(there, actual, 0.0)
            off += tl.sum((actual - expected) * (actual - expected), 1)
            size += tl.sum(expected * expected, 1)
    tl.store(sums_ptr + row_head, tl.sum(off, 0))
    tl.store(sums_ptr + tl.num_programs(0) + row_head, tl.sum(size, 0))


@triton.jit
def lower_tau_kernel(
    sums_ptr, tau_ptr, limit_ptr, heads, error, margin, aim, steepness, least, largest, BLOCK: tl.constexpr,
):  # fmt: skip
    """The heads of one batch entry: ``budget_rule.lower_tau``."""
    b, h = tl.program_id(0), tl.arange(0, BLOCK)
    inside = h < heads
    at = b * heads + h
    off = tl.load(sums_ptr + at, mask=inside, other=0.0)
    size = tl.load(sums_ptr + tl.num_programs(0) * heads + at, mask=inside, other=0.0)
    square = tl.where(off == 0.0, 0.0, off / (tl.sum(size, 0) / heads))
    distance = tl.sqrt(square) / error
    together = tl.sqrt(tl.sum(distance * distance, 0) / heads)
    held = tl.minimum(distance, together) <= margin  # NaN is above it
    step = tl.exp2(steepness * tl.log2(aim / distance))
    step = tl.where(step == step, tl.minimum(tl.maximum(step, least), largest), tl.minimum(least, largest))
    tau = tl.load(tau_ptr + at, mask=inside, other=0.0) * step
    tl.store(tau_ptr + at, tau, mask=inside)
    tl.store(limit_ptr + at, tl.where(held, float("inf"), tau), mask=inside)


@triton.jit
def first_tau_kernel(tau_ptr, given_ptr, given, stride, heads, HAS_HEAD_TAU: tl.constexpr, BLOCK: tl.constexpr):
    """The heads of one batch entry: ``budget.first_tau``."""
    b, h = tl.program_id(0), tl.arange(0, BLOCK)
    tau = tl.zeros([BLOCK], tl.float32) + given
    if HAS_HEAD_TAU:
        tau = tl.load(given_ptr + b * stride + h, mask=h < heads, other=0.0)
    tl.store(tau_ptr + b * heads + h, tau, mask=h < heads)


def attend_rows(call: AttentionCall, count: int = SAMPLED) -> ExactRows:
    """Exact attention of sampled queries; arguments and results as ``exact.sampled.attend_rows``."""
    (query, key, _), mask = call.tensors, call.mask
    (batch, heads, n_queries, head_dim), n_keys, value_dim = query.shape, call.n_keys, call.value.shape[3]
    n_rows = min(count, n_queries)
    tile = min(max(16, triton.next_power_of_2(n_rows)), TILE_LEN)
    blocks = triton.cdiv(n_rows, tile)
    split_len = max(triton.next_power_of_2(triton.cdiv(n_keys * batch * heads * blocks, PROGRAMS)), SHORTEST)
    splits = triton.cdiv(n_keys, split_len)
    part = torch.empty(batch, heads, splits, blocks * tile, value_dim, dtype=torch.float32, device=query.device)
    part_lse = part.new_empty(part.shape[:4])
    key_mask, stride_mb = key_mask_of(mask.key_mask, part_lse)
    for value, columns in zip(call.value.split(WIDEST_VALUE, 3), part.split(WIDEST_VALUE, 4), strict=True):
        launch(
            sampled_fwd_kernel, (splits, batch * heads, blocks),
            query, key, value, columns, part_lse, key_mask,
            *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], stride_mb, value_dim,
            split_len, n_rows, *call.sizes[:2], heads, call.group, call.sizes.offset,
            **logit_scales(call.scale, call.softcap), **paging(call.pages, key),
            FIXED=mask.key_mask is None and can_fix(query.dtype, mask), CAUSAL=mask.causal,
            HAS_KEY_MASK=mask.key_mask is not None, TILE=tile, WIDE=needs_wide(query, key, value),
            **launch_config(head_dim, value.shape[3], query.dtype, device_of(query)),
        )  # fmt: skip
    exact = ExactRows(
        torch.empty(n_rows, dtype=torch.int64, device=query.device),
        part.new_empty(batch, heads, n_rows, value_dim),
        part.new_empty(batch, heads, n_rows),
    )
    block_value = _value_block(value_dim)
    launch(
        merge_splits_kernel, (batch * heads, triton.cdiv(n_rows, MERGED_ROWS), triton.cdiv(value_dim, block_value)),
        part, part_lse, *exact, n_rows, call.sizes.n_queries, blocks * tile, splits, value_dim,
        ROWS=MERGED_ROWS, BLOCK_VALUE=block_value,
    )  # fmt: skip
    return exact


def error_sums(call: AttentionCall, exact: ExactRows, output: Tensor, lse: Tensor) -> Tensor:
    """Squared distance and squared size over the samples; arguments and results as ``exact.sampled.error_sums``."""
    sums = torch.empty(2, *exact.lse.shape[:2], dtype=torch.float32, device=output.device)
    _launch_sums(call, exact, output, lse, sums)
    return sums


def first_tau(call: AttentionCall, tau: float | Tensor) -> Tensor:
    """As ``budget.first_tau``."""
    batch, heads, by_head = *call.query.shape[:2], isinstance(tau, Tensor)
    first = call.query.new_empty(batch, heads, dtype=torch.float32)
    launch(
        first_tau_kernel, (batch,), first, tau if by_head else first, 0.0 if by_head else tau,
        tau.stride(0) if by_head and tau.dim() == 2 else 0, heads, HAS_HEAD_TAU=by_head,
        BLOCK=triton.next_power_of_2(heads), num_warps=1,
    )  # fmt: skip
    return first


def lowering(
    call: AttentionCall, exact: ExactRows, into: Result, tau: Tensor, limit: Tensor, error: float
) -> Callable[[float], None]:
    """As ``budget.lowering``, in two launches."""
    launched: list[Launched] = []

    def lower(largest: float) -> None:
        if launched:
            measured, lowered = launched
            measured.again()
            lowered.again(largest=largest)
        else:
            sums = torch.empty(2, *tau.shape, dtype=torch.float32, device=tau.device)
            measured = _launch_sums(call, exact, into.output, into.lse, sums)
            launched[:] = measured, launch_lower_tau(sums, tau, limit, error, largest)

    return lower


def launch_lower_tau(sums: Tensor, tau: Tensor, limit: Tensor, error: float, largest: float) -> Launched:
    """``budget_rule.lower_tau``."""
    batch, heads = tau.shape
    return launch(
        lower_tau_kernel, (batch,), sums, tau, limit, heads, error, budget_rule.MARGIN, budget_rule.AIM,
        budget_rule.STEEPNESS, budget_rule.LEAST_STEP,
        largest=largest, BLOCK=triton.next_power_of_2(heads), num_warps=1,
    )  # fmt: skip


def _launch_sums(call: AttentionCall, exact: ExactRows, output: Tensor, lse: Tensor, sums: Tensor) -> Launched:
    (batch, heads, n_rows), mask = exact.lse.shape, call.mask
    has_padding = mask.key_mask is not None and (mask.causal or call.n_queries == call.n_keys)
    key_mask, stride_mb = key_mask_of(mask.key_mask, sums)
    unread, stride_ub = key_mask_of(call.unread_rows, sums)
    sinks = sums if call.sinks is None else call.sinks
    return launch(
        error_sums_kernel, (batch * heads,),
        exact.output, exact.lse, exact.rows, output, lse, key_mask, unread, sinks, sums,
        *output.stride()[:3], *lse.stride()[:2], stride_mb, stride_ub, sinks.stride(-1),
        n_rows, *call.sizes[:2], heads, call.sizes.offset, output.shape[3],
        HAS_PADDING=has_padding, HAS_UNREAD=call.unread_rows is not None, HAS_SINKS=call.sinks is not None,
        ROWS=ERROR_ROWS, BLOCK_VALUE=_value_block(output.shape[3]), num_warps=8,
    )  # fmt: skip


def _value_block(value_dim: int) -> int:
    """Columns that a program holds at a time."""
    return min(max(16, triton.next_power_of_2(value_dim)), TILE_LEN)
