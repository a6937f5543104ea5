"""A band of visible keys, and how a mask of unknown origin differs from it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

HIDES = -1e3
"""Numbers from here down are taken for hidden keys; `outweighs` checks whether they hide them."""

ABSORBS = torch.finfo(torch.bfloat16).min
"""Numbers from here down leave nothing of a score that they are added to, in float32 and bfloat16."""


@dataclass(frozen=True)
class Band:
    """Keys in use, and how far behind (``late``) and before (``early``) its own number a query sees.

    Attributes:
        keys: bool [b, Nk].
        late: int64 [], j <= i + late; Nk for no bound.
        early: int64 [], j >= i + early; -Nq for no bound.
    """

    keys: Tensor
    late: Tensor
    early: Tensor


@dataclass(frozen=True)
class Comparison:
    """The differences of a mask from a band.

    Attributes:
        differs: bool [], whether a row that sees any key differs, or a number is none of a mask.
        fully_masked: bool [b, h, q], rows that see no key.
        hidden_rows: bool [b, h, q], those of them to which the band shows a key.
        extremes: float32 [2], the smallest and the largest number that hides; (inf, -inf) for none.
    """

    differs: Tensor
    fully_masked: Tensor
    hidden_rows: Tensor
    extremes: Tensor
