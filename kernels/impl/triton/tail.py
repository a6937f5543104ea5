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
from s2o_compile.kernels.impl.triton.tile import (
    first_row,
    key_mask_of,
    key_rows,
    launch,
    load_rows,
    needs_wide,
    number,
    paging,
)
from s2o_compile.kernels.pages.sizes import Size
from s2o_compile.kernels.ranking.tail import block_shift

ROWS = 64
"""Values that are loaded together."""


@triton.jit
def block_sums_kernel(
    value_ptr, key_mask_ptr, sum_ptr, count_ptr, stride_vb, stride_vh, stride_vn, stride_mb, first_block, n_keys,
    kv_heads, shift, block_len, pages, page_rows, last_page, HAS_KEY_MASK: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_VALUE: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """Sum and number of the values of one block of keys of one head: keys ``j * block_len - shift`` and on.

    The first program takes block ``first_block``.
    """
    block, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    first, n_keys, shift = first_row(n_keys), number(n_keys), number(shift)
    if n_keys == 0:
        return
    value = value_ptr + head // kv_heads * stride_vb + head % kv_heads * stride_vh + first * stride_vn
    key_mask = key_mask_ptr + head // kv_heads * stride_mb
    start = (first_block + block) * block_len - shift
    stop = tl.minimum(start + block_len, n_keys)
    total = tl.zeros([BLOCK_VALUE], tl.float32)
    count = tl.zeros([ROWS], tl.float32)
    for j in range(start, stop, ROWS):
        keys = j + tl.arange(0, ROWS)
        present = (keys >= 0) & (keys < stop)
        if HAS_KEY_MASK:
            present = present & (tl.load(key_mask + keys, mask=present, other=0) != 0)
        rows = key_rows(tl.minimum(tl.maximum(keys, 0), n_keys - 1), pages, page_rows, last_page, PAGE)
        x = load_rows(value, rows, stride_vn, VALUE_DIM, BLOCK_VALUE, WIDE).to(tl.float32)
        total += tl.sum(tl.where(present[:, None], x, 0.0), 0)
        count += present.to(tl.float32)
    dims = tl.arange(0, BLOCK_VALUE)
    row = head * tl.num_programs(0) + block
    tl.store(sum_ptr + row * VALUE_DIM + dims, total, mask=dims < VALUE_DIM)
    tl.store(count_ptr + row, tl.sum(count, 0))


@triton.jit
def tail_means_kernel(
    sum_ptr, count_ptr, mean_ptr, stride_sum, stride_count, blocks, first_own, CAUSAL: tl.constexpr,
    VALUE_DIM: tl.constexpr, BLOCK_VALUE: tl.constexpr,
):  # fmt: skip
    """The mean of all blocks of one head but a segment's own, which is ``first_own`` + segment, and what is behind it.

    Own blocks are left out, not taken away again: that would leave their rounding.
    """
    segment, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    own = number(first_own) + segment
    stop = blocks
    if CAUSAL:
        stop = tl.minimum(tl.maximum(own, 0), blocks)
    dims = tl.arange(0, BLOCK_VALUE)
    total = tl.zeros([BLOCK_VALUE], tl.float32)
    count = 0.0
    for block in range(0, stop):
        x = tl.load(sum_ptr + head * stride_sum + block * VALUE_DIM + dims, mask=dims < VALUE_DIM, other=0.0)
        total += tl.where(block == own, 0.0, x)
        count += tl.where(block == own, 0.0, tl.load(count_ptr + head * stride_count + block))
    mean = total / tl.maximum(count, 1.0)
    tl.store(mean_ptr + (head * tl.num_programs(0) + segment) * VALUE_DIM + dims, mean, mask=dims < VALUE_DIM)


def tail_values(call: AttentionCall, segment_len: int) -> Tensor:
    """Mean value of the prefix keys of every segment; arguments and results as ``ranking.tail.tail_values``."""
    return means_of(call, segment_len, *_kept_sums(call, block_shift(call, segment_len), segment_len))


def sums_of(call: AttentionCall, block_len: int) -> tuple[Tensor, ...]:
    """What `means_of` takes, of keys that begin where a block does: every block's is made of its own keys alone."""
    return block_sums(call, 0, block_len)


def means_of(call: AttentionCall, segment_len: int, sums: Tensor, counts: Tensor) -> Tensor:
    """`tail_values` from the `block_sums` of all blocks; of the call's tensors only the sizes are looked at."""
    n_queries, (batch, heads, _, value_dim) = call.n_queries, call.value.shape
    shift = block_shift(call, segment_len)
    means = sums.new_empty(batch, heads, n_segments(n_queries, segment_len), value_dim)
    launch(
        tail_means_kernel, (means.shape[2], batch * heads),
        sums, counts, means, sums.stride(1), counts.stride(1), sums.shape[2],
        (call.sizes.seg_offset + shift) // segment_len,
        CAUSAL=call.mask.causal, **_dims(value_dim), num_warps=1,
    )  # fmt: skip
    return means


def _kept_sums(call: AttentionCall, shift: Size, block_len: int) -> tuple[Tensor, Tensor]:
    """The sums and counts of all blocks; those that earlier chunks of a prefill have filled are not made again."""
    if call.kept is None or isinstance(shift, Tensor):
        return block_sums(call, shift, block_len)
    version = shift, block_len
    first = (call.kept.known("value sums", call.earlier_keys, version) + shift) // block_len
    made = block_sums(call, shift, block_len, first)
    names = "value sums", "value counts"
    sums, counts = (call.kept.extend(name, call.n_keys, first, x, version) for name, x in zip(names, made, strict=True))
    return sums, counts


def block_sums(call: AttentionCall, shift: Size, block_len: int, first: int = 0) -> tuple[Tensor, Tensor]:
    """Sums float32 [B, Hkv, blocks, Dv] and numbers float32 [B, Hkv, blocks] of the values of blocks from one on."""
    value, key_mask, n_keys = call.value, call.mask.key_mask, call.n_keys
    batch, heads, _, value_dim = value.shape
    most = block_len - 1 if isinstance(shift, Tensor) else shift
    blocks = n_segments(n_keys + most, block_len) - first
    sums = torch.empty(batch, heads, blocks, value_dim, device=value.device, dtype=torch.float32)
    counts = sums.new_empty(batch, heads, blocks)
    mask, stride_mb = key_mask_of(key_mask, sums)
    launch(
        block_sums_kernel, (blocks, batch * heads),
        value, mask, sums, counts, *value.stride()[:3], stride_mb, first, call.sizes.n_keys, heads, shift, block_len,
        **paging(call.pages, value), HAS_KEY_MASK=key_mask is not None, **_dims(value_dim), ROWS=ROWS,
        WIDE=needs_wide(value), num_warps=4,
    )  # fmt: skip
    return sums, counts


def _dims(value_dim: int) -> dict[str, int]:
    return {"VALUE_DIM": value_dim, "BLOCK_VALUE": max(16, triton.next_power_of_2(value_dim))}
