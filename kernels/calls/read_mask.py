"""Reads a mask of unknown origin: whether its values are a causal, sliding or padding mask.

    True,  or 0          the key is visible
    False, or <= HIDES   the key is hidden
    any other number     is added to the score, as a position bias is: no mask

Some rows suggest the band and the keys in use. Then every element is compared with them, so the mask that is returned
equals the tensor everywhere. Nothing is remembered between calls: compiled code and inference mode write a tensor
without a trace. One reading costs little beside attention at the lengths where it is wanted. It waits for the device.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from s2o_compile.kernels.core.mask import AttentionMask
from s2o_compile.kernels.core.mask_band import ABSORBS, HIDES, Band, Comparison

VANISHES = 110.0
"""A logit this far below another of its row has no weight: exp(-110) is zero in float32."""

SAMPLES = 64
"""Rows that suggest a band."""

ELEMENTS = 1 << 22
"""Elements compared at once on a CPU."""


@dataclass(frozen=True)
class ReadMask:
    """A mask that was read.

    Attributes:
        mask: Equal to the tensor in every row but the hidden ones.
        hidden_rows: bool [B or 1, 1, Nq or 1], rows that see no key although ``mask`` shows them some; None for none.
        fully_masked: The output of rows without any key, "zeros" or "mean" (``exact.epilogue``).
        weakest: The largest number that hides a key; -inf if there is none, or a bool mask.
    """

    mask: AttentionMask
    hidden_rows: Tensor | None
    fully_masked: str
    weakest: float


def read_mask(mask: Tensor, n_queries: int, n_keys: int, dtype: torch.dtype) -> ReadMask | None:
    """The operator's mask that equals a mask tensor; None if there is none.

    The tensor is bool or floating, 4-d and broadcastable to [B, Hq, Nq, Nk]; ``dtype`` is the query's.
    """
    mask = _unexpanded(mask, n_keys)
    band = suggest(mask)
    compare = compare_with
    if mask.device.type == "cuda":
        with suppress(ImportError):  # no triton here
            from s2o_compile.kernels.impl.triton.compare_mask import compare_with as compare
    compared = compare(mask, band)
    heads_agree = (compared.hidden_rows == compared.hidden_rows[:, :1]).all()
    refused = compared.differs | ~heads_agree | ~band.keys.any()
    facts = refused, band.late, band.early, band.keys.all(), compared.fully_masked.any(), compared.hidden_rows.any()
    numbers = torch.stack([fact.double() for fact in (*facts, *compared.extremes)]).tolist()  # the host waits here only
    refused, late, early, whole, any_fully_masked, any_hidden, least, most = numbers
    if refused:
        return None
    fully_masked = "zeros"
    if any_fully_masked and mask.dtype is not torch.bool and most > -torch.inf:
        # Several numbers in a row without any key give no mean, and small ones leave a softmax of the scores.
        absorbed = most <= ABSORBS and mask.dtype == dtype and dtype in (torch.float32, torch.bfloat16)
        if least != most or not absorbed:
            return None
        fully_masked = "mean"
    early_bound, late_bound = early > -mask.shape[2], late < n_keys
    offset = int(late) if late_bound else n_keys - 1
    window = offset - int(early) + 1 if early_bound else None
    if window is not None and window < 1:
        return None
    read = AttentionMask(
        causal=late_bound or early_bound,
        offset=offset if late_bound or early_bound else 0,
        window=window,
        key_mask=None if whole else band.keys,
    )
    rows = compared.hidden_rows[:, :1] if any_hidden else None
    return ReadMask(read, rows, fully_masked, most if mask.dtype is not torch.bool else -torch.inf)


def outweighs(number: float, query: Tensor, key: Tensor, *, scale: float, softcap: float | None) -> bool:
    """Whether a number added to a score leaves it a weight of zero beside every score without: then it hides.

    The bound is |q . k| <= |q| |k|. Unless the number alone is large enough, the host waits for the device.
    """
    if number <= ABSORBS:
        return True
    norms = [x.norm(dim=-1, dtype=torch.float32).amax() for x in (query, key)]
    reach = abs(scale) * (norms[0] * norms[1]).item()
    reach = reach if softcap is None else min(reach, softcap)
    return number + 2 * reach < -VANISHES


def is_visible(mask: Tensor) -> Tensor:
    """True for elements that show their key."""
    return mask if mask.dtype is torch.bool else mask == 0


def suggest(mask: Tensor) -> Band:
    """The band that some rows of a mask [b, h, q, Nk] suggest, without waiting for the device.

    A row that ends at the last key in use says nothing about a causal bound. One that begins at the first key in use
    says nothing about a window.
    """
    n_rows, n_keys = mask.shape[2:]
    samples = sorted({n_rows - 1 - at * n_rows // SAMPLES for at in range(min(SAMPLES, n_rows))} | {0})
    rows = torch.tensor(samples, device=mask.device)
    columns = torch.arange(n_keys, device=mask.device)
    visible = is_visible(mask.index_select(2, rows)).any(1)  # [b, samples, Nk]
    last = torch.where(visible, columns, -1).amax(-1)
    first = torch.where(visible, columns, n_keys).amin(-1)
    ends, begins = last < last.amax(-1, keepdim=True), first > first.amin(-1, keepdim=True)
    late = torch.where(ends & (last >= 0), last - rows, -n_rows).amax()
    late = torch.where(late > -n_rows, late, n_keys)
    early = torch.where(begins & (last >= 0), first - rows, n_keys).amin()
    early = torch.where(early < n_keys, early, -n_rows)
    newest = (columns - late).clamp(0, n_rows - 1)  # the first query that sees each key in the band
    keys = visible.any(1) | is_visible(mask[:, :, newest, columns]).any(1)
    return Band(keys, late, early)


def compare_with(mask: Tensor, band: Band) -> Comparison:
    """Every element of a mask [b, h, q, Nk] compared with a band."""
    b, h, n_rows, n_keys = mask.shape
    columns = torch.arange(n_keys, device=mask.device)
    parts: list[Comparison] = []
    step = max(ELEMENTS // (b * h * n_keys), 1)
    for start in range(0, n_rows, step):
        part = mask[:, :, start : start + step]
        distance = columns - torch.arange(start, start + part.shape[2], device=mask.device)[:, None]
        shown = band.keys[:, None, None] & (distance <= band.late) & (distance >= band.early)
        visible = is_visible(part)
        fully_masked = ~visible.any(-1)
        differs = ((visible != shown).any(-1) & ~fully_masked).any()
        extremes = torch.tensor((torch.inf, -torch.inf), dtype=torch.float32, device=mask.device)
        if mask.dtype is not torch.bool:
            differs = differs | ~(visible | (part <= HIDES)).all()
            extremes = torch.stack([part.masked_fill(visible, x).flatten() for x in (torch.inf, -torch.inf)])
            extremes = torch.stack([extremes[0].amin(), extremes[1].amax()]).float()
        parts.append(Comparison(differs, fully_masked, fully_masked & shown.any(-1), extremes))
        if mask.device.type == "cpu" and differs:
            break  # nobody reads the other rows
    numbers = torch.stack([part.extremes for part in parts])
    return Comparison(
        differs=torch.stack([part.differs for part in parts]).any(),
        fully_masked=torch.cat([part.fully_masked for part in parts], -1),
        hidden_rows=torch.cat([part.hidden_rows for part in parts], -1),
        extremes=torch.stack([numbers[:, 0].amin(), numbers[:, 1].amax()]),
    )


def _unexpanded(mask: Tensor, n_keys: int) -> Tensor:
    """The mask without repetitions along batch, heads and queries, its keys written out."""
    for dim in range(3):
        if mask.stride(dim) == 0:
            mask = mask.narrow(dim, 0, 1)
    return mask.expand(-1, -1, -1, n_keys)
