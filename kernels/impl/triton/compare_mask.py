"""``read_mask.compare_with`` on the GPU: one pass over the mask at the speed of memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from s2o_compile.kernels.core.mask_band import HIDES, Band, Comparison
from s2o_compile.kernels.impl.triton.tile import launch

ROWS, COLUMNS = 8, 512
"""Elements of a block."""

VISIBLE, DIFFERENT, SHOWN, STRANGE = tl.constexpr(1), tl.constexpr(2), tl.constexpr(4), tl.constexpr(8)
"""Bits of a row: a visible key, a difference from the band, a key that the band shows, a number of no mask."""


@triton.jit
def compare_kernel(
    mask_ptr, keys_ptr, late_ptr, early_ptr, state_ptr, extremes_ptr,
    stride_b, stride_h, stride_q, stride_k, heads, n_rows, n_keys, hides,
    BOOL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """State of ROWS rows, and the smallest and largest number that hides in them."""
    plane = tl.program_id(1).to(tl.int64)
    batch, head = plane // heads, plane % heads
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    late, early = tl.load(late_ptr).to(tl.int32), tl.load(early_ptr).to(tl.int32)
    row_ptr = mask_ptr + batch * stride_b + head * stride_h + rows.to(tl.int64) * stride_q
    state = tl.zeros([ROWS, COLUMNS], tl.int32)
    least = tl.full([ROWS, COLUMNS], float("inf"), tl.float32)
    most = tl.full([ROWS, COLUMNS], float("-inf"), tl.float32)
    for start in range(0, n_keys, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        inside = (rows < n_rows)[:, None] & (columns < n_keys)[None, :]
        value = tl.load(row_ptr[:, None] + columns.to(tl.int64)[None, :] * stride_k, mask=inside, other=0)
        used = tl.load(keys_ptr + batch * n_keys + columns, mask=columns < n_keys, other=0) != 0
        distance = columns[None, :] - rows[:, None]
        shown = inside & used[None, :] & (distance <= late) & (distance >= early)
        if BOOL:
            visible = inside & (value != 0)
        else:
            visible = inside & (value == 0)
            number = value.to(tl.float32)
            hidden = inside & (number <= hides)
            state |= tl.where(inside & ~visible & ~hidden, STRANGE, 0)
            least = tl.minimum(least, tl.where(hidden, number, float("inf")))
            most = tl.maximum(most, tl.where(hidden, number, float("-inf")))
        state |= tl.where(visible, VISIBLE, 0) | tl.where(visible != shown, DIFFERENT, 0) | tl.where(shown, SHOWN, 0)
    any_state = tl.reduce(state, 1, _either)
    tl.store(state_ptr + plane * n_rows + rows, any_state, mask=rows < n_rows)
    program = plane * tl.num_programs(0) + tl.program_id(0)
    tl.store(extremes_ptr + 2 * program, tl.min(least))
    tl.store(extremes_ptr + 2 * program + 1, tl.max(most))


@triton.jit
def _either(a, b):
    return a | b


def compare_with(mask: Tensor, band: Band) -> Comparison:
    """Every element of a mask [b, h, q, Nk] compared with a band."""
    b, h, n_rows, n_keys = mask.shape
    blocks = triton.cdiv(n_rows, ROWS)
    state = torch.empty(b, h, n_rows, dtype=torch.int32, device=mask.device)
    extremes = torch.empty(b * h * blocks, 2, dtype=torch.float32, device=mask.device)
    is_bool = mask.dtype is torch.bool
    keys = band.keys.expand(b, -1).contiguous().view(torch.uint8)
    with torch.cuda.device_of(mask):  # Triton launches on the current device
        launch(
            compare_kernel, (blocks, b * h),
            mask.view(torch.uint8) if is_bool else mask, keys, band.late, band.early, state, extremes,
            *mask.stride(), h, n_rows, n_keys, HIDES, BOOL=is_bool, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=4,
        )  # fmt: skip
    visible, different, shown, strange = (state & bit.value != 0 for bit in (VISIBLE, DIFFERENT, SHOWN, STRANGE))
    return Comparison(
        differs=((different & visible) | strange).any(),
        fully_masked=~visible,
        hidden_rows=~visible & shown,
        extremes=torch.stack([extremes[:, 0].amin(), extremes[:, 1].amax()]),
    )
