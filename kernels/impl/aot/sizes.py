"""Sizes that are not known when a program is made."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from s2o_compile.kernels.core.mask import upper_bound

Size = int | torch.SymInt

UNBOUNDED = 32768
"""Longest length in tokens, by convention, of a program that accepts any."""


def longest(length: Size) -> int:
    """The largest value of a length that the program accepts."""
    bound = upper_bound(length)
    return UNBOUNDED if bound == float("inf") else int(bound)


def symbols(sizes: Sequence[Size]) -> list[torch.SymInt]:
    """The different symbolic ones: a branch or a loop needs each size that it uses among its operands, once."""
    by_expression = {size.node.expr: size for size in sizes if isinstance(size, torch.SymInt)}
    return [size for expression, size in by_expression.items() if not expression.is_number]
