"""The symbolic value of an index tensor: ``value[i0, i1, ...] = const + step0 * i0 + step1 * i1 + ...``.

The constant and the sizes may be symbolic (functions of the sizes of the graph's inputs); the steps are plain integers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from s2o_compile.passes.graph.nodes import Size, bounds, known


@dataclass(frozen=True, eq=False)
class IndexTensor:
    """An integer tensor that is affine in its own position, with the value ``const`` at position 0."""

    shape: tuple[Size, ...]
    const: Size
    steps: tuple[int, ...]

    @classmethod
    def constant(cls, value: Size, shape: Sequence[Size] = ()) -> IndexTensor:
        """The same value everywhere."""
        return cls(tuple(shape), value, (0,) * len(shape))

    @classmethod
    def axis(cls, shape: Sequence[Size], dim: int) -> IndexTensor:
        """The position along one dimension."""
        return cls(tuple(shape), 0, tuple(int(d == dim) for d in range(len(shape))))

    def at(self, indices: Sequence[IndexTensor], shape: Sequence[Size]) -> IndexTensor:
        """This tensor gathered at affine positions, one index tensor of the given shape a dimension."""
        const, steps = self.const, [0] * len(shape)
        for step, index in zip(self.steps, indices, strict=True):
            if step:
                const = const + step * index.const
                steps = [total + step * inner for total, inner in zip(steps, index.steps, strict=True)]
        return IndexTensor(tuple(shape), const, tuple(steps))

    def broadcast(self, shape: Sequence[Size]) -> IndexTensor:
        """This tensor expanded to a shape, by the usual rules."""
        return self.at(broadcast_indices(self.shape, shape), shape)

    def plus(self, other: IndexTensor, factor: int = 1) -> IndexTensor:
        """``self + factor * other``, for two tensors of one shape."""
        steps = tuple(a + factor * b for a, b in zip(self.steps, other.steps, strict=True))
        return IndexTensor(self.shape, self.const + factor * other.const, steps)

    def times(self, factor: int) -> IndexTensor:
        """``factor * self``."""
        return IndexTensor(self.shape, factor * self.const, tuple(factor * step for step in self.steps))

    def fits(self, dtype: torch.dtype) -> bool:
        """Whether every value is a number of a dtype, so that computing it there does not wrap around."""
        if dtype is torch.bool:
            return known(self.minimum >= 0) and known(self.maximum <= 1)
        numbers = torch.iinfo(dtype)
        return bounds(self.minimum)[0] >= numbers.min and bounds(self.maximum)[1] <= numbers.max

    def is_axis(self, dim: int, start: int = 0) -> bool:
        """Whether the value is the position along one dimension, counted from a start."""
        return known(self.const == start) and self.steps == IndexTensor.axis(self.shape, dim).steps

    @property
    def is_constant(self) -> bool:
        """Whether the value is the same everywhere."""
        return not any(self.steps)

    @property
    def minimum(self) -> Size:
        """The least value, provided the tensor is not empty."""
        return self.const + sum(
            step * (size - 1) for step, size in zip(self.steps, self.shape, strict=True) if step < 0
        )

    @property
    def maximum(self) -> Size:
        """The greatest value, provided the tensor is not empty."""
        return self.const + sum(
            step * (size - 1) for step, size in zip(self.steps, self.shape, strict=True) if step > 0
        )


def broadcast_indices(source: Sequence[Size], shape: Sequence[Size]) -> tuple[IndexTensor, ...]:
    """The positions that a broadcast tensor reads: one index tensor a source dimension."""
    lead = len(shape) - len(source)
    return tuple(
        IndexTensor.constant(0, shape) if known(size == 1) else IndexTensor.axis(shape, lead + dim)
        for dim, size in enumerate(source)
    )


def compare(name: str, left: IndexTensor, right: IndexTensor) -> tuple[IndexTensor, ...]:
    """``left name right`` as index tensors that must all be >= 0; empty for ``ne``, which is no such conjunction."""
    difference = right.plus(left, -1)
    one = IndexTensor.constant(1, difference.shape)
    return {
        "le": (difference,),
        "lt": (difference.plus(one, -1),),
        "ge": (difference.times(-1),),
        "gt": (difference.times(-1).plus(one, -1),),
        "eq": (difference, difference.times(-1)),
        "ne": (),
    }[name]


def always_differ(left: IndexTensor, right: IndexTensor) -> bool:
    """Whether two tensors provably differ everywhere."""
    return any(known(compare(strict, left, right)[0].minimum >= 0) for strict in ("lt", "gt"))


COMPARISONS = {"le": "gt", "lt": "ge", "ge": "lt", "gt": "le", "eq": "ne", "ne": "eq"}  # each with its negation
