"""``layout.block_table`` and ``forward.take`` on the GPU, a launch each.

Flags bool [B * Hkv, G, T, blocks], table int32 of the same shape, index int64 [B * Hkv, K].
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from s2o_compile.kernels.impl.triton.tile import load_rows, needs_wide

ROWS = 64
"""Keys that are copied together."""

ENTRIES = 1024
"""Flags that are read together."""


@triton.jit
def block_table_kernel(chosen_ptr, count_ptr, index_ptr, blocks, ENTRIES: tl.constexpr):
    """The numbers of all flags of one row that are set, side by side; block 0 behind them."""
    row = tl.program_id(0).to(tl.int64)
    chosen_ptr += row * blocks
    index_ptr += row * blocks
    count = tl.zeros([], tl.int32)
    for entry in range(0, blocks, ENTRIES):
        block = entry + tl.arange(0, ENTRIES)
        chosen = (tl.load(chosen_ptr + block, mask=block < blocks, other=0) != 0).to(tl.int32)
        tl.store(index_ptr + count + tl.cumsum(chosen, 0) - 1, block, mask=chosen != 0)
        count += tl.sum(chosen, 0)
    tl.store(count_ptr + row, count)
    for entry in range(0, blocks, ENTRIES):
        block = entry + tl.arange(0, ENTRIES)
        tl.store(index_ptr + block, block * 0, mask=(block >= count) & (block < blocks))


def block_table(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Count and order of chosen blocks; arguments and results as ``layout.block_table``."""
    count = torch.empty(chosen.shape[:-1], dtype=torch.int32, device=chosen.device)
    index = count.new_empty(chosen.shape)
    block_table_kernel[(count.numel(),)](
        chosen.contiguous(), count, index, chosen.shape[-1], ENTRIES=ENTRIES, num_warps=4
    )
    return count, index


@triton.jit
def take_kernel(
    x_ptr, index_ptr, stop_ptr, out_ptr, stride_b, stride_h, stride_n, places, kv_heads,
    HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Rows of one head by index, side by side."""
    row, dims = tl.program_id(1).to(tl.int64), tl.arange(0, BLOCK_DIM)
    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    if tl.program_id(0) * ROWS >= tl.load(stop_ptr + row):
        return
    keys = tl.load(index_ptr + row * places + place)
    x = load_rows(
        x_ptr + row // kv_heads * stride_b + row % kv_heads * stride_h, keys if WIDE else keys.to(tl.int32), stride_n,
        HEAD_DIM, BLOCK_DIM, WIDE,
    )  # fmt: skip
    target = out_ptr + (row * places + place)[:, None] * HEAD_DIM + dims[None, :]
    tl.store(target, x, mask=dims[None, :] < HEAD_DIM)


def take(x: Tensor, index: Tensor, stop: Tensor) -> Tensor:
    """Rows of [B, Hkv, Nk, D] by [B * Hkv, K], as [B * Hkv, 1, K, D]; without a gradient.

    Args:
        x: Keys or values.
        index: int64 [B * Hkv, K].
        stop: int32 [B * Hkv], the end of what some tile visits; places behind it stay unwritten.
    """
    kv_heads, head_dim = x.shape[1], x.shape[3]
    rows, places = index.shape
    out = x.new_empty(rows, 1, places, head_dim)
    take_kernel[(places // ROWS, rows)](
        x, index, stop, out, *x.stride()[:3], places, kv_heads, HEAD_DIM=head_dim,
        BLOCK_DIM=triton.next_power_of_2(head_dim), ROWS=ROWS, WIDE=needs_wide(x), num_warps=4,
    )  # fmt: skip
    return out
