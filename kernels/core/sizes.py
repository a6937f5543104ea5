"""Sizes that are not known when a program is made."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from s2o_compile.kernels.core.mask import upper_bound

Size = int | torch.SymInt

UNBOUNDED = 32768
"""What counts as the longest length of a program that accepts any, in tokens."""


def longest(length: Size) -> int:
    """The largest value of a length that the program accepts."""
    bound = upper_bound(length)
    return UNBOUNDED if bound == float("inf") else int(bound)


def symbols(sizes: Sequence[Size]) -> list[torch.SymInt]:
    """The different symbolic ones: what a branch or a loop computes with must be among its operands, once."""
    found = {size.node.expr: size for size in sizes if isinstance(size, torch.SymInt)}
    return [size for expr, size in found.items() if not expr.is_number]
