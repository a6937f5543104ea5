"""``tail.block_sums`` and ``tail.running_sums`` on the GPU: every value read once, and nothing of its size made.

Sums run in one order, the same bits every time; torch refuses its own cumsum under deterministic algorithms.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from s2o_compile.kernels.core.plan import n_segments
from s2o_compile.kernels.impl.triton.tile import key_mask_of, launch, load_rows, needs_wide

ROWS = 64
"""Values that are loaded together."""


@triton.jit
def block_sums_kernel(
    value_ptr, key_mask_ptr, sum_ptr, stride_vb, stride_vh, stride_vn, stride_mb, n_keys, kv_heads, shift, block_len,
    HAS_KEY_MASK: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_VALUE: tl.constexpr, ROWS: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Sum of the values of one block of keys of one head."""
    block, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    value = value_ptr + head // kv_heads * stride_vb + head % kv_heads * stride_vh
    key_mask = key_mask_ptr + head // kv_heads * stride_mb
    start = block * block_len - shift
    stop = tl.minimum(start + block_len, n_keys)
    total = tl.zeros([BLOCK_VALUE], tl.float32)
    for j in range(start, stop, ROWS):
        keys = j + tl.arange(0, ROWS)
        present = (keys >= 0) & (keys < stop)
        if HAS_KEY_MASK:
            present = present & (tl.load(key_mask + keys, mask=present, other=0) != 0)
        rows = tl.minimum(tl.maximum(keys, 0), n_keys - 1)
        x = load_rows(value, rows, stride_vn, VALUE_DIM, BLOCK_VALUE, WIDE).to(tl.float32)
        total += tl.sum(tl.where(present[:, None], x, 0.0), 0)
    dims = tl.arange(0, BLOCK_VALUE)
    tl.store(sum_ptr + (head * tl.num_programs(0) + block) * VALUE_DIM + dims, total, mask=dims < VALUE_DIM)


@triton.jit
def running_sums_kernel(sum_ptr, running_ptr, blocks, VALUE_DIM: tl.constexpr, BLOCK_VALUE: tl.constexpr):
    """Sums of all blocks of one head before each block, and of all."""
    head = tl.program_id(0).to(tl.int64)
    dims = tl.arange(0, BLOCK_VALUE)
    total = tl.zeros([BLOCK_VALUE], tl.float32)
    for block in range(0, blocks):
        tl.store(running_ptr + (head * (blocks + 1) + block) * VALUE_DIM + dims, total, mask=dims < VALUE_DIM)
        total += tl.load(sum_ptr + (head * blocks + block) * VALUE_DIM + dims, mask=dims < VALUE_DIM, other=0.0)
    tl.store(running_ptr + (head * (blocks + 1) + blocks) * VALUE_DIM + dims, total, mask=dims < VALUE_DIM)


def block_sums(value: Tensor, key_mask: Tensor | None, shift: int, block_len: int) -> Tensor:
    """Sums of the values of blocks of keys ``j * block_len - shift`` and on, float32 [B, Hkv, blocks, Dv]."""
    batch, heads, n_keys, value_dim = value.shape
    blocks = n_segments(n_keys + shift, block_len)
    sums = torch.empty(batch, heads, blocks, value_dim, device=value.device, dtype=torch.float32)
    columns, stride_mb = key_mask_of(key_mask, sums)
    launch(
        block_sums_kernel, (blocks, batch * heads),
        value, columns, sums, *value.stride()[:3], stride_mb, n_keys, heads, shift, block_len,
        HAS_KEY_MASK=key_mask is not None, VALUE_DIM=value_dim,
        BLOCK_VALUE=max(16, triton.next_power_of_2(value_dim)), ROWS=ROWS, WIDE=needs_wide(value), num_warps=4,
    )  # fmt: skip
    return sums


def running_sums(sums: Tensor) -> Tensor:
    """Sums of all blocks before each, and of all: [B, Hkv, blocks + 1, Dv] of float32 [B, Hkv, blocks, Dv]."""
    batch, heads, blocks, value_dim = sums.shape
    running = sums.new_empty(batch, heads, blocks + 1, value_dim)
    launch(
        running_sums_kernel, (batch * heads,),
        sums.contiguous(), running, blocks, VALUE_DIM=value_dim,
        BLOCK_VALUE=max(16, triton.next_power_of_2(value_dim)), num_warps=1,
    )  # fmt: skip
    return running
