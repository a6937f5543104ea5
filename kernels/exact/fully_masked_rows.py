"""Fully masked rows: queries that see no key. What they get is a convention of the mask that hid everything from them.

"zeros" is what SDPA makes of a boolean mask. "mean" is the mean of all values, which SDPA and eager attention make of a
finite additive mask (``finfo.min``): it drowns the logits, all keys weigh the same. A sink takes all the mass of such a
row, which is left with zeros; a sink of -inf is none.

Which rows are fully masked follows from the mask alone, in O(B (Nq + Nk)) and without waiting for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from s2o_compile.kernels.core.mask import AttentionMask


def all_rows_see(mask: AttentionMask, n_queries: int, n_keys: int) -> bool:
    """Whether lengths alone prove that every row sees a key: only the first or the last row can be fully masked."""
    ends = (mask.visible_range(row, row, n_keys) for row in (0, n_queries - 1))
    return mask.key_mask is None and all(start < stop for start, stop in ends)


def fully_masked_rows(mask: AttentionMask, n_queries: int, n_keys: int, device: torch.device) -> Tensor:
    """Bool [B or 1, Nq], True for a query that sees no key."""
    start, stop = mask.row_ranges(n_queries, n_keys, device)
    if mask.key_mask is None:
        return (start == stop)[None]
    before = torch.nn.functional.pad(mask.key_mask.cumsum(-1), (1, 0))  # keys that may be attended before each position
    return before.index_select(1, start) == before.index_select(1, stop)


def fill_fully_masked_rows(output: Tensor, value: Tensor, mask: AttentionMask, sinks: Tensor | None = None) -> Tensor:
    """The output with the mean of all values in every fully masked row of a mask; arguments as `fill_rows`."""
    n_queries, n_keys = output.shape[2], value.shape[2]
    if all_rows_see(mask, n_queries, n_keys):
        return output
    fully_masked = fully_masked_rows(mask, n_queries, n_keys, output.device)
    return fill_rows(output, value, fully_masked[:, None, :, None], sinks)


def fill_rows(output: Tensor, value: Tensor, fully_masked: Tensor, sinks: Tensor | None = None) -> Tensor:
    """The output with the mean of all values of its head in these rows, but where a sink takes their mass.

    Args:
        output: [B, Hq, Nq, Dv].
        value: [B, Hkv, Nk, Dv].
        fully_masked: bool, broadcastable to [B, Hq, Nq, 1].
        sinks: Floating [Hq].
    """
    if sinks is not None:
        fully_masked = fully_masked & (sinks == -torch.inf)[:, None, None]
    return torch.where(fully_masked, value_mean(value, output), output)


def value_mean(value: Tensor, output: Tensor) -> Tensor:
    """The mean of all values [B, Hkv, Nk, Dv] for the heads of an output [B, Hq, Nq, Dv], [B, Hq, 1, Dv]."""
    mean = value.mean(2, keepdim=True, dtype=torch.float32).to(output.dtype)
    return mean.repeat_interleave(output.shape[1] // value.shape[1], dim=1)
