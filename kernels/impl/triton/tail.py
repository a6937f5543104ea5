"""``ranking.tail`` on the GPU, in two launches: every value is read once, and nothing of its size is made.

Sums run in one order, the same bits every time; torch refuses its own cumsum under deterministic algorithms.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from s2o_compile.kernels.core.call import AttentionCall
from s2o_compile.kernels.core.plan import n_segments
from s2o_compile.kernels.impl.triton.tile import key_mask_of, launch, load_rows, needs_wide
from s2o_compile.kernels.ranking.tail import block_shift

ROWS = 64
"""Values that are loaded together."""


@triton.jit
def block_sums_kernel(
    value_ptr, key_mask_ptr, sum_ptr, count_ptr, stride_vb, stride_vh, stride_vn, stride_mb, n_keys, kv_heads, shift,
    block_len, HAS_KEY_MASK: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_VALUE: tl.constexpr, ROWS: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Sum and number of the values of one block of keys of one head: keys ``j * block_len - shift`` and on."""
    block, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    value = value_ptr + head // kv_heads * stride_vb + head % kv_heads * stride_vh
    key_mask = key_mask_ptr + head // kv_heads * stride_mb
    start = block * block_len - shift
    stop = tl.minimum(start + block_len, n_keys)
    total = tl.zeros([BLOCK_VALUE], tl.float32)
    count = tl.zeros([ROWS], tl.float32)
    for j in range(start, stop, ROWS):
        keys = j + tl.arange(0, ROWS)
        present = (keys >= 0) & (keys < stop)
        if HAS_KEY_MASK:
            present = present & (tl.load(key_mask + keys, mask=present, other=0) != 0)
        rows = tl.minimum(tl.maximum(keys, 0), n_keys - 1)
        x = load_rows(value, rows, stride_vn, VALUE_DIM, BLOCK_VALUE, WIDE).to(tl.float32)
        total += tl.sum(tl.where(present[:, None], x, 0.0), 0)
        count += present.to(tl.float32)
    dims = tl.arange(0, BLOCK_VALUE)
    row = head * tl.num_programs(0) + block
    tl.store(sum_ptr + row * VALUE_DIM + dims, total, mask=dims < VALUE_DIM)
    tl.store(count_ptr + row, tl.sum(count, 0))


@triton.jit
def tail_means_kernel(
    sum_ptr, count_ptr, mean_ptr, blocks, first_own, CAUSAL: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
):  # fmt: skip
    """The mean of all blocks of one head but a segment's own, which is ``first_own`` + segment, and what is behind it.

    Own blocks are left out, not taken away again: that would leave their rounding.
    """
    segment, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    own = first_own + segment
    stop = blocks
    if CAUSAL:
        stop = tl.minimum(tl.maximum(own, 0), blocks)
    dims = tl.arange(0, BLOCK_VALUE)
    total = tl.zeros([BLOCK_VALUE], tl.float32)
    count = 0.0
    for block in range(0, stop):
        row = head * blocks + block
        x = tl.load(sum_ptr + row * VALUE_DIM + dims, mask=dims < VALUE_DIM, other=0.0)
        total += tl.where(block == own, 0.0, x)
        count += tl.where(block == own, 0.0, tl.load(count_ptr + row))
    mean = total / tl.maximum(count, 1.0)
    tl.store(mean_ptr + (head * tl.num_programs(0) + segment) * VALUE_DIM + dims, mean, mask=dims < VALUE_DIM)


def tail_values(call: AttentionCall, segment_len: int) -> Tensor:
    """Mean value of the prefix keys of every segment; arguments and results as ``ranking.tail.tail_values``."""
    value, mask, n_queries = call.value, call.mask, call.n_queries
    batch, heads, n_keys, value_dim = value.shape
    shift = block_shift(call, segment_len)
    blocks, segments = n_segments(n_keys + shift, segment_len), n_segments(n_queries, segment_len)
    sums = torch.empty(batch, heads, blocks, value_dim, device=value.device, dtype=torch.float32)
    counts, means = sums.new_empty(batch, heads, blocks), sums.new_empty(batch, heads, segments, value_dim)
    key_mask, stride_mb = key_mask_of(mask.key_mask, sums)
    dims = {"VALUE_DIM": value_dim, "BLOCK_VALUE": max(16, triton.next_power_of_2(value_dim))}
    launch(
        block_sums_kernel, (blocks, batch * heads),
        value, key_mask, sums, counts, *value.stride()[:3], stride_mb, n_keys, heads, shift, segment_len,
        HAS_KEY_MASK=mask.key_mask is not None, **dims, ROWS=ROWS, WIDE=needs_wide(value), num_warps=4,
    )  # fmt: skip
    first_own = (mask.seg_offset(n_queries, n_keys) + shift) // segment_len
    launch(
        tail_means_kernel, (segments, batch * heads),
        sums, counts, means, blocks, first_own, CAUSAL=mask.causal, **dims, num_warps=1,
    )  # fmt: skip
    return means
