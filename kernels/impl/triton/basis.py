"""``ranking.basis.choose_basis`` on the GPU, and factors that bring its directions to one size.

    query_d = A_d scale balance_d,   key_d = B_d / balance_d,   balance_d = sqrt(size(B_d' k) / size(A_d' q) / scale)

The size of a direction is the root mean square of its numbers. Moments are estimated from every few queries and keys,
in PARTS that are summed in one order: the same bits every time. query [B, Hq, Nq, D], key [B, Hkv, Nk, D].
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from s2o_compile.kernels.core.call import AttentionCall
from s2o_compile.kernels.impl.triton.listing import device_of
from s2o_compile.kernels.impl.triton.tile import first_row, key_mask_of, key_rows, launch, needs_wide, number, paging
from s2o_compile.kernels.pages.sizes import number as number_of
from s2o_compile.kernels.ranking.basis import RIDGE, Basis, dim_stride, half_steps

PARTS = 16
"""Programs that sum the samples of a block of a key/value head's moments."""

BLOCK = 128
"""Rows and columns of such a block at most: it must stay in registers."""

ADDED = 1024
"""Numbers of one program that adds up the parts of a head."""

LARGEST_FACTOR = 30000.0
"""Clamp of factors, which float16 inputs are multiplied by."""


@triton.jit
def add_samples(
    moment, total, count, base, stride_n, key_mask, first, stop, step, length, row, column, pages, page_rows, last_page,
    HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr, PAGE: tl.constexpr, HAS_KEY_MASK: tl.constexpr,
):  # fmt: skip
    """Add x x', x and the number of samples [first, stop) of the rows at ``base``, but for those that a mask hides.

    Of x these are the dimensions ``row`` and ``column``.
    """
    for j in range(first, stop, ROWS):
        sample = j + tl.arange(0, ROWS)
        position = tl.minimum(sample * step, length - 1)
        shown = sample < stop
        if HAS_KEY_MASK:
            shown = shown & (tl.load(key_mask + position, mask=shown, other=0) != 0)
        rows = key_rows(position, pages, page_rows, last_page, PAGE)
        if WIDE:
            rows = rows.to(tl.int64)
        source, present = base + rows[:, None] * stride_n, shown[:, None]
        x = tl.load(source + row[None, :], mask=present & (row < HEAD_DIM)[None, :], other=0.0)
        y = tl.load(source + column[None, :], mask=present & (column < HEAD_DIM)[None, :], other=0.0)
        x = tl.where(tl.abs(x.to(tl.float32)) < float("inf"), x, 0.0)
        y = tl.where(tl.abs(y.to(tl.float32)) < float("inf"), y, 0.0)
        moment = tl.dot(tl.trans(x), y, moment, input_precision="ieee")
        total += tl.sum(x.to(tl.float32), 0)
        count += shown.to(tl.float32)
    return moment, total, count


@triton.jit
def sum_moments_kernel(
    query_ptr, key_ptr, key_mask_ptr, sum_ptr, stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    stride_mb, n_queries, n_keys, query_step, key_step, kv_heads, group, pages, page_rows, last_page,
    HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr,
    WIDE: tl.constexpr, PAGE: tl.constexpr, HAS_KEY_MASK: tl.constexpr,
):  # fmt: skip
    """Sums of q q' (over the group), k k', k and 1 over one part of the samples, zero beyond HEAD_DIM.

    float32 [B * Hkv, PARTS, 2 * BLOCK_DIM + 2, BLOCK_DIM]; the last row holds the number of keys in all its columns.
    """
    part, head = tl.program_id(0), tl.program_id(2).to(tl.int64)
    b, h = head // kv_heads, head % kv_heads
    query = query_ptr + b * stride_qb + first_row(n_queries) * stride_qn
    key = key_ptr + b * stride_kb + first_row(n_keys) * stride_kn
    n_queries, n_keys = number(n_queries), number(n_keys)
    query_step, key_step = number(query_step), number(key_step)
    row = tl.program_id(1) // (BLOCK_DIM // BLOCK) * BLOCK + tl.arange(0, BLOCK)
    column = tl.program_id(1) % (BLOCK_DIM // BLOCK) * BLOCK + tl.arange(0, BLOCK)
    sums = sum_ptr + (head * PARTS + part) * (2 * BLOCK_DIM + 2) * BLOCK_DIM
    target = sums + row[:, None] * BLOCK_DIM + column[None, :]
    samples = tl.cdiv(n_queries, query_step)
    share = tl.cdiv(samples, PARTS)
    moment, total = tl.zeros([BLOCK, BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    none = tl.zeros([ROWS], tl.float32)
    for member in range(group):
        moment, total, _ = add_samples(
            moment, total, none, query + (h * group + member) * stride_qh, stride_qn, key_mask_ptr, part * share,
            tl.minimum(part * share + share, samples), query_step, n_queries, row, column, pages,
            page_rows, last_page, HEAD_DIM, ROWS, WIDE, 0, False,
        )  # fmt: skip
    tl.store(target, moment)
    samples = tl.cdiv(n_keys, key_step)
    share = tl.cdiv(samples, PARTS)
    moment, total, count = add_samples(
        tl.zeros([BLOCK, BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32), none,
        key + h * stride_kh, stride_kn, key_mask_ptr + b * stride_mb, part * share,
        tl.minimum(part * share + share, samples), key_step, n_keys, row, column, pages, page_rows,
        last_page, HEAD_DIM, ROWS, WIDE, PAGE, HAS_KEY_MASK,
    )  # fmt: skip
    tl.store(target + BLOCK_DIM * BLOCK_DIM, moment)
    totals = sums + 2 * BLOCK_DIM * BLOCK_DIM + row  # the same from every block of columns
    tl.store(totals, total)
    tl.store(totals + BLOCK_DIM, tl.zeros([BLOCK], tl.float32) + tl.sum(count))


@triton.jit
def add_parts_kernel(part_ptr, sum_ptr, size, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """The sums of one head over all parts."""
    at, head = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1).to(tl.int64)
    total = tl.zeros([BLOCK], tl.float32)
    for part in tl.static_range(PARTS):
        total += tl.load(part_ptr + (head * PARTS + part) * size + at, mask=at < size, other=0.0)
    tl.store(sum_ptr + head * size + at, total, mask=at < size)


@triton.jit
def finite_and_mean(power, inside, HEAD_DIM: tl.constexpr):
    """Which diagonal elements [BLOCK_DIM] do not overflow, and their mean; 1 if they are zero."""
    kept = inside & (power < float("inf"))
    mean = tl.sum(tl.where(kept, power, 0.0)) / HEAD_DIM
    return kept, tl.where(mean > 0.0, mean, 1.0)


@triton.jit
def inverse_of_block(matrix, SIZE: tl.constexpr):
    """Inverse of a symmetric positive matrix [SIZE, SIZE] by Gauss-Jordan, pivots in their order."""
    i = tl.arange(0, SIZE)
    for k in range(SIZE):
        here = i == k
        row = tl.sum(tl.where(here[:, None], matrix, 0.0), 0)
        column = tl.sum(tl.where(here[None, :], matrix, 0.0), 1)
        pivot = tl.sum(tl.where(here, row, 0.0))
        row = tl.where(here, 1.0, row) / pivot
        rest = tl.where(here[None, :], 0.0, matrix) - column[:, None] * row[None, :]
        matrix = tl.where(here[:, None], row[None, :], rest)
    return matrix


@triton.jit
def invert(matrix, SIZE: tl.constexpr, STEP: tl.constexpr, PREC: tl.constexpr):
    """Invert a symmetric positive matrix [SIZE, SIZE] in memory, STEP pivots at a time."""
    i, k = tl.arange(0, SIZE), tl.arange(0, STEP)
    for first in range(0, SIZE, STEP):
        now = first + k
        pivot = inverse_of_block(tl.load(matrix + now[:, None] * SIZE + now[None, :]), STEP)
        rows, columns = matrix + now[:, None] * SIZE + i[None, :], matrix + i[:, None] * SIZE + now[None, :]
        if SIZE == STEP:
            tl.debug_barrier()
            tl.store(rows, pivot)
        else:
            outside = (i < first) | (i >= first + STEP)
            row = tl.dot(pivot, tl.load(rows), input_precision=PREC)
            column = tl.load(columns)
            rest = tl.load(matrix + i[:, None] * SIZE + i[None, :]) - tl.dot(column, row, input_precision=PREC)
            column = -tl.dot(column, pivot, input_precision=PREC)
            tl.debug_barrier()
            both = outside[:, None] & outside[None, :]
            tl.store(matrix + i[:, None] * SIZE + i[None, :], rest, mask=both)
            tl.store(columns, column, mask=outside[:, None] & (k >= 0)[None, :])
            tl.store(rows, row, mask=(k >= 0)[:, None] & outside[None, :])
            tl.store(matrix + now[:, None] * SIZE + now[None, :], pivot)
        tl.debug_barrier()


@triton.jit
def times(matrix, rows, factor, BLOCK_DIM: tl.constexpr, RANK: tl.constexpr, PREC: tl.constexpr):
    """Some rows of a matrix [BLOCK_DIM, BLOCK_DIM] times a factor [BLOCK_DIM, RANK], both in memory."""
    rank = tl.arange(0, RANK)
    DIM_STEP: tl.constexpr = 64 if BLOCK_DIM > 64 else BLOCK_DIM
    product = tl.zeros([rows.shape[0], RANK], tl.float32)
    for d in range(0, BLOCK_DIM, DIM_STEP):
        dims = d + tl.arange(0, DIM_STEP)
        left = tl.load(matrix + rows[:, None] * BLOCK_DIM + dims[None, :])
        right = tl.load(factor + dims[:, None] * RANK + rank[None, :])
        product = tl.dot(left, right, product, input_precision=PREC)
    return product


@triton.jit
def best_factor(
    moment, other, target, gram_ptr, count, BLOCK_DIM: tl.constexpr, STEP: tl.constexpr, RANK: tl.constexpr,
    RIDGE: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """``target`` = C X (X' C X)^-1 of a moment C and the ``other`` factor X, with a ridge."""
    rank = tl.arange(0, RANK)
    gram = tl.zeros([RANK, RANK], tl.float32)
    for d in range(0, BLOCK_DIM, STEP):
        rows = d + tl.arange(0, STEP)
        place = rows[:, None] * RANK + rank[None, :]
        product = times(moment, rows, other, BLOCK_DIM, RANK, PREC)
        gram = tl.dot(tl.trans(tl.load(other + place)), product, gram, input_precision=PREC)
        tl.store(target + place, product)
    on_diagonal = rank[:, None] == rank[None, :]
    power = tl.sum(tl.where(on_diagonal, gram, 0.0), 0)
    ridge = tl.where(rank < count, RIDGE * (power + tl.sum(power) / count) + 1e-38, 1.0)  # unit rows from count on
    gram_place = gram_ptr + rank[:, None] * RANK + rank[None, :]
    tl.store(gram_place, tl.where(on_diagonal, gram + ridge[None, :], gram))
    tl.debug_barrier()
    invert(gram_ptr, RANK, 32, PREC)
    gram = tl.load(gram_place)
    for d in range(0, BLOCK_DIM, STEP):
        place = (d + tl.arange(0, STEP))[:, None] * RANK + rank[None, :]
        product = tl.load(target + place)
        tl.debug_barrier()
        tl.store(target + place, tl.dot(product, gram, input_precision=PREC))
    tl.debug_barrier()


@triton.jit
def solve_basis_kernel(
    sum_ptr, work_ptr, dims_ptr, query_ptr, key_ptr, query_samples, scale, count, half_steps, largest,
    HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, RANK: tl.constexpr, STEP: tl.constexpr, RIDGE: tl.constexpr,
    PREC: tl.constexpr,
):  # fmt: skip
    """Both factors of one head, [HEAD_DIM, RANK] with zeros from column ``count`` on.

    Sums are those of ``sum_moments_kernel`` over all parts; E[q q'] and Cov[k] replace them, each with a mean diagonal
    of 1. ``work`` float32 [B * Hkv, 2 * BLOCK_DIM + RANK, RANK] holds the factors before they are balanced.
    """
    head = tl.program_id(0).to(tl.int64)
    query_samples = number(query_samples)
    if query_samples == 0:
        return
    area, every, rank = BLOCK_DIM * BLOCK_DIM, tl.arange(0, BLOCK_DIM), tl.arange(0, RANK)
    query_moment = sum_ptr + head * (2 * BLOCK_DIM + 2) * BLOCK_DIM
    key_moment, totals = query_moment + area, query_moment + 2 * area
    left = work_ptr + head * (2 * BLOCK_DIM + RANK) * RANK
    right, gram = left + BLOCK_DIM * RANK, left + 2 * BLOCK_DIM * RANK

    key_samples = tl.maximum(tl.load(totals + BLOCK_DIM), 1.0)
    mean = tl.load(totals + every) / key_samples
    query_power = tl.load(query_moment + every * (BLOCK_DIM + 1)) / query_samples
    key_power = tl.maximum(tl.load(key_moment + every * (BLOCK_DIM + 1)) / key_samples - mean * mean, 0.0)
    query_kept, query_mean = finite_and_mean(query_power, every < HEAD_DIM, HEAD_DIM)
    key_kept, key_mean = finite_and_mean(key_power, every < HEAD_DIM, HEAD_DIM)
    salience = tl.where(query_kept & key_kept, query_power / query_mean * (key_power / key_mean), 0.0)
    salience = tl.where(every < HEAD_DIM, salience, -1.0)
    # Salience and number are sorted as one: ranks counted from two copies of a sum might be no permutation.
    numbered = (salience.to(tl.int32, bitcast=True).to(tl.int64) << 32) | (BLOCK_DIM - 1 - every)
    dims = (BLOCK_DIM - 1 - (tl.sort(numbered, descending=True) & 0xFFFFFFFF)).to(tl.int32)
    tl.store(dims_ptr + head * BLOCK_DIM + every, dims)
    tl.debug_barrier()  # the diagonals are read before they are overwritten
    dims, used = tl.load(dims_ptr + head * BLOCK_DIM + rank, mask=rank < BLOCK_DIM, other=-1), rank < count
    for d in range(0, BLOCK_DIM, STEP):
        rows = d + tl.arange(0, STEP)
        cell = rows[:, None] * BLOCK_DIM + every[None, :]
        kept = tl.load(query_moment + rows * (BLOCK_DIM + 1)) < float("inf")
        query = tl.load(query_moment + cell) / query_samples / query_mean
        row_mean = tl.load(totals + rows) / key_samples
        key_whole = (tl.load(key_moment + rows * (BLOCK_DIM + 1)) < float("inf"))[:, None] & key_kept[None, :]
        key = (tl.load(key_moment + cell) / key_samples - row_mean[:, None] * mean[None, :]) / key_mean
        chosen = tl.where((rows[:, None] == dims[None, :]) & used[None, :], 1.0, 0.0)
        tl.debug_barrier()
        tl.store(query_moment + cell, tl.where(kept[:, None] & query_kept[None, :], query, 0.0))
        tl.store(key_moment + cell, tl.where(key_whole, key, 0.0))
        tl.store(left + rows[:, None] * RANK + rank[None, :], chosen)
        tl.store(right + rows[:, None] * RANK + rank[None, :], chosen)
    tl.debug_barrier()

    for step in range(half_steps):  # one copy of the code: the factors take turns
        turn = step % 2
        other, target = right - turn * BLOCK_DIM * RANK, left + turn * BLOCK_DIM * RANK
        best_factor(key_moment - turn * area, other, target, gram, count, BLOCK_DIM, STEP, RANK, RIDGE, PREC)

    query_size, key_size = tl.zeros([RANK], tl.float32), tl.zeros([RANK], tl.float32)
    mean_size = tl.zeros([RANK], tl.float32)
    for d in range(0, BLOCK_DIM, STEP):
        rows = d + tl.arange(0, STEP)
        place = rows[:, None] * RANK + rank[None, :]
        query_size += tl.sum(tl.load(left + place) * times(query_moment, rows, left, BLOCK_DIM, RANK, PREC), 0)
        key = tl.load(right + place)
        key_size += tl.sum(key * times(key_moment, rows, right, BLOCK_DIM, RANK, PREC), 0)
        row_mean = tl.load(totals + rows) / key_samples
        mean_size += tl.sum(key * tl.where(tl.abs(row_mean) < float("inf"), row_mean, 0.0)[:, None], 0)
    query_size = tl.sqrt(tl.maximum(query_size, 0.0) * query_mean)
    key_size = tl.sqrt(tl.maximum(key_size, 0.0) * key_mean + mean_size * mean_size)
    balance = tl.sqrt(tl.maximum(key_size, 1e-6) / tl.maximum(query_size, 1e-6) / scale)
    for d in range(0, BLOCK_DIM, STEP):
        rows = d + tl.arange(0, STEP)
        place, present = rows[:, None] * RANK + rank[None, :], (rows < HEAD_DIM)[:, None] & (rank >= 0)[None, :]
        query = tl.where(used[None, :], tl.load(left + place) * (balance * scale)[None, :], 0.0)
        key = tl.where(used[None, :], tl.load(right + place) / balance[None, :], 0.0)
        query, key = tl.clamp(query, -largest, largest), tl.clamp(key, -largest, largest)
        target = head * HEAD_DIM * RANK + place
        tl.store(query_ptr + target, query.to(query_ptr.dtype.element_ty), mask=present)
        tl.store(key_ptr + target, key.to(key_ptr.dtype.element_ty), mask=present)


def choose_basis(call: AttentionCall, count: int, rank: int, *, of_samples: bool = False) -> Basis:
    """The balanced basis of ``count`` directions of a call, in the dtype of its query and key, [B, Hkv, D, rank].

    Columns from ``count`` on are zero. The query's factor includes the softmax scale. The queries and keys of the call
    may be ``of_samples``: only those that the whole call's basis is solved for.
    """
    query, key, _ = call.tensors
    batch, heads, _, head_dim = query.shape
    kv_heads = key.shape[1]
    group, block_dim = heads // kv_heads, max(32, triton.next_power_of_2(head_dim))
    block = min(block_dim, BLOCK)
    lengths = number_of(call.sizes.n_queries), number_of(call.sizes.n_keys)
    query_step, key_step = (1 if of_samples else dim_stride(length) for length in lengths)
    query_samples = -(-lengths[0] // query_step)
    shape = PARTS, 2 * block_dim + 2, block_dim
    parts = torch.empty(batch * kv_heads, *shape, device=query.device, dtype=torch.float32)
    key_mask, stride_mb = key_mask_of(call.mask.key_mask, key)
    launch(
        sum_moments_kernel, (PARTS, (block_dim // block) ** 2, batch * kv_heads),
        query, key, key_mask, parts, *query.stride()[:3], *key.stride()[:3], stride_mb, *call.sizes[:2], query_step,
        key_step, kv_heads, group, **paging(call.pages, key), HEAD_DIM=head_dim, BLOCK_DIM=block_dim, BLOCK=block,
        PARTS=PARTS, ROWS=32, WIDE=needs_wide(query, key), HAS_KEY_MASK=call.mask.key_mask is not None,
        num_warps=4 if block < BLOCK else 8,
    )  # fmt: skip
    size, sums = shape[1] * block_dim, parts.new_empty(batch * kv_heads, *shape[1:])
    launch(
        add_parts_kernel, (triton.cdiv(size, ADDED), batch * kv_heads), parts, sums, size, PARTS=PARTS, BLOCK=ADDED,
        num_warps=4,
    )  # fmt: skip
    work = sums.new_empty(batch * kv_heads, 2 * block_dim + rank, rank)
    dims = sums.new_empty(batch * kv_heads, block_dim, dtype=torch.int32)
    basis = Basis(*(query.new_empty(batch, kv_heads, head_dim, rank) for _ in range(2)))
    exact = device_of(query).type != "cuda" or torch.version.hip
    launch(
        solve_basis_kernel, (batch * kv_heads,),
        sums, work, dims, *basis, query_samples * group,
        call.scale, count, half_steps(head_dim, count), LARGEST_FACTOR, HEAD_DIM=head_dim, BLOCK_DIM=block_dim,
        RANK=rank, STEP=32 if block_dim > 128 else min(64, block_dim), RIDGE=RIDGE, PREC="ieee" if exact else "tf32",
        num_warps=8 if rank > 64 else 4, num_stages=1,
    )  # fmt: skip
    return basis
