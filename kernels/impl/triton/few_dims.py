"""``ranking.per_query.choose_dims`` on the GPU, and factors that bring the dimensions to one size: two launches a call.

    salience_d = E[q_d^2] Var[k_d],   query_factor_d = sqrt(scale * size(k_d) / size(q_d)),   key_factor_d its inverse
                                                       times scale, size = root mean square

Moments are estimated from every few queries and keys, in PARTS that are summed one behind the other: the same bits
every time. query [B, Hq, Nq, D], key [B, Hkv, Nk, D].
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from s2o_compile.kernels.core.call import AttentionCall
from s2o_compile.kernels.impl.triton.tile import key_rows, launch, load_rows, needs_wide, paging
from s2o_compile.kernels.ranking.per_query import dim_stride

PARTS = 16
"""Programs that sum the samples of a key/value head."""


class FewDims(NamedTuple):
    """The dimensions of each key/value head that are kept, the most salient first; contiguous but for a head slice.

    Attributes:
        dims: int32 [B, Hkv, R].
        query_factor: float32 [B, Hkv, R], what a query is multiplied by, the softmax scale included.
        key_factor: float32 [B, Hkv, R], what a key is multiplied by.
    """

    dims: Tensor
    query_factor: Tensor
    key_factor: Tensor


@triton.jit
def sum_samples(
    base, stride_n, first, stop, step, length, pages, page_rows, last_page, HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """Sums of x and of x^2 over samples [first, stop) of the rows at ``base``, float32 [BLOCK_DIM] each."""
    total = tl.zeros([BLOCK_DIM], tl.float32)
    power = tl.zeros([BLOCK_DIM], tl.float32)
    for j in range(first, stop, ROWS):
        sample = j + tl.arange(0, ROWS)
        rows = key_rows(tl.minimum(sample * step, length - 1), pages, page_rows, last_page, PAGE)
        x = load_rows(base, rows, stride_n, HEAD_DIM, BLOCK_DIM, WIDE).to(tl.float32)
        x = tl.where((sample < stop)[:, None], x, 0.0)
        total += tl.sum(x, 0)
        power += tl.sum(x * x, 0)
    return total, power


@triton.jit
def sum_moments_kernel(
    query_ptr, key_ptr, sum_ptr, stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, n_queries, n_keys,
    query_step, key_step, kv_heads, group, pages, page_rows, last_page, HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
    PARTS: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """Sums of q^2 (over the group), k^2 and k over one part of the samples: [B * Hkv, 3, PARTS, BLOCK_DIM]."""
    part, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h = head // kv_heads, head % kv_heads
    samples = tl.cdiv(n_queries, query_step)
    share = tl.cdiv(samples, PARTS)
    query_power = tl.zeros([BLOCK_DIM], tl.float32)
    for member in range(group):
        base = query_ptr + b * stride_qb + (h * group + member) * stride_qh
        _, power = sum_samples(
            base, stride_qn, part * share, tl.minimum(part * share + share, samples), query_step, n_queries, pages,
            page_rows, last_page, HEAD_DIM, BLOCK_DIM, ROWS, WIDE, 0,
        )  # fmt: skip
        query_power += power
    samples = tl.cdiv(n_keys, key_step)
    share = tl.cdiv(samples, PARTS)
    total, power = sum_samples(
        key_ptr + b * stride_kb + h * stride_kh, stride_kn, part * share, tl.minimum(part * share + share, samples),
        key_step, n_keys, pages, page_rows, last_page, HEAD_DIM, BLOCK_DIM, ROWS, WIDE, PAGE,
    )  # fmt: skip
    target = sum_ptr + (head * 3 * PARTS + part) * BLOCK_DIM + tl.arange(0, BLOCK_DIM)
    tl.store(target, query_power)
    tl.store(target + PARTS * BLOCK_DIM, power)
    tl.store(target + 2 * PARTS * BLOCK_DIM, total)


@triton.jit
def load_moments(
    sum_ptr, dims, query_samples, key_samples, HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, PARTS: tl.constexpr
):  # fmt: skip
    """E[q^2], E[k^2] and the salience of some dimensions: 0 for a number that is not finite, -1 for padding."""
    cells = sum_ptr + tl.arange(0, PARTS)[:, None] * BLOCK_DIM + dims[None, :]
    query = tl.sum(tl.load(cells), 0) / query_samples
    key = tl.sum(tl.load(cells + PARTS * BLOCK_DIM), 0) / key_samples
    mean = tl.sum(tl.load(cells + 2 * PARTS * BLOCK_DIM), 0) / key_samples
    variance = tl.maximum(key - mean * mean, 0.0)
    query = tl.where(query < float("inf"), query, 0.0)
    key = tl.where(key < float("inf"), key, 0.0)
    variance = tl.where(variance < float("inf"), variance, 0.0)
    return query, key, tl.where(dims < HEAD_DIM, query * variance, -1.0)


@triton.jit
def choose_dims_kernel(
    sum_ptr, dims_ptr, query_factor_ptr, key_factor_ptr, query_samples, key_samples, scale, count,
    HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """The ``count`` most salient dimensions of one head, of equals the lower first, and their factors."""
    head = tl.program_id(0).to(tl.int64)
    sums = sum_ptr + head * 3 * PARTS * BLOCK_DIM
    rank = tl.arange(0, BLOCK_DIM)
    _, _, salience = load_moments(sums, rank, query_samples, key_samples, HEAD_DIM, BLOCK_DIM, PARTS)
    # Salience and number are sorted as one: ranks counted from two copies of a sum might be no permutation.
    numbered = (salience.to(tl.int32, bitcast=True).to(tl.int64) << 32) | (BLOCK_DIM - 1 - rank)
    dims = (BLOCK_DIM - 1 - (tl.sort(numbered, descending=True) & 0xFFFFFFFF)).to(tl.int32)
    query, key, _ = load_moments(sums, dims, query_samples, key_samples, HEAD_DIM, BLOCK_DIM, PARTS)
    balance = tl.sqrt(tl.maximum(tl.sqrt(key), 1e-6) / tl.maximum(tl.sqrt(query), 1e-6) / scale)
    target, kept = head * count + rank, rank < count
    tl.store(dims_ptr + target, dims, mask=kept)
    tl.store(query_factor_ptr + target, balance * scale, mask=kept)
    tl.store(key_factor_ptr + target, 1.0 / balance, mask=kept)


def choose_dims(call: AttentionCall, count: int) -> FewDims:
    """The ``count`` dimensions that carry most of the logits' variance, and their factors."""
    query, key, _ = call.tensors
    batch, heads, n_queries, head_dim = query.shape
    kv_heads, n_keys = key.shape[1], call.n_keys
    group, block_dim = heads // kv_heads, max(16, triton.next_power_of_2(head_dim))
    query_step, key_step = (dim_stride(length) for length in (n_queries, n_keys))
    sums = torch.empty(batch * kv_heads, 3, PARTS, block_dim, device=query.device, dtype=torch.float32)
    chosen = FewDims(*(sums.new_empty(batch, kv_heads, count, dtype=kind) for kind in (torch.int32, None, None)))
    launch(
        sum_moments_kernel, (PARTS, batch * kv_heads),
        query, key, sums, *query.stride()[:3], *key.stride()[:3], n_queries, n_keys, query_step, key_step, kv_heads,
        group, **paging(call.pages, key), HEAD_DIM=head_dim, BLOCK_DIM=block_dim, PARTS=PARTS, ROWS=32,
        WIDE=needs_wide(query, key), num_warps=4,
    )  # fmt: skip
    launch(
        choose_dims_kernel, (batch * kv_heads,),
        sums, *chosen, triton.cdiv(n_queries, query_step) * group, triton.cdiv(n_keys, key_step), call.scale, count,
        HEAD_DIM=head_dim, BLOCK_DIM=block_dim, PARTS=PARTS, num_warps=4,
    )  # fmt: skip
    return chosen
