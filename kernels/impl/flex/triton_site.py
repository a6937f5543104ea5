"""``flex_site.block_table`` on the GPU: one launch, where torch would sort wide rows of flags.

Flags bool [B * Hkv, G, T, blocks], table int32 of the same shape.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

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
    """Arguments and results as ``flex_site.block_table``."""
    count = torch.empty(chosen.shape[:-1], dtype=torch.int32, device=chosen.device)
    index = count.new_empty(chosen.shape)
    block_table_kernel[(count.numel(),)](
        chosen.contiguous(), count, index, chosen.shape[-1], ENTRIES=ENTRIES, num_warps=4
    )
    return count, index
