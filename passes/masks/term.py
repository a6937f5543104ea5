"""The terms of a mask: what must hold for a key to be visible."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import fx

from s2o_compile.passes.graph.nodes import Size, value_of
from s2o_compile.passes.graph.rejected import Rejected
from s2o_compile.passes.masks.index_tensor import IndexTensor


@dataclass(frozen=True, eq=False)
class Term:
    """Something that must hold for a key to be visible.

    Attributes:
        node: The node that asks for it.
        indices: Everything that it depends on, as index tensors of the mask's shape.
    """

    node: fx.Node
    indices: tuple[IndexTensor, ...]

    def at(self, indices: Sequence[IndexTensor], shape: Sequence[Size]) -> Term:
        """The term seen through a view."""
        return replace(self, indices=tuple(index.at(indices, shape) for index in self.indices))


class Comparison(Term):
    """True where the one index is >= 0."""


@dataclass(frozen=True, eq=False)
class SameChunk(Term):
    """True where ``left // size == right // size`` of the two indices."""

    size: int


@dataclass(frozen=True, eq=False)
class LookUp(Term):
    """True where ``node[indices]`` of a bool tensor is (or, if ``negated``, is not).

    Attributes:
        negated: Whether the values are inverted.
        why: Why the tensor was not taken apart further.
    """

    negated: bool
    why: Rejected


@dataclass(frozen=True, eq=False)
class TokenComparison(LookUp):
    """A look-up of a bool tensor that compares two integer tensors.

    The comparison is that of ``tables[0]`` at some positions with ``tables[1]`` at others, one index a dimension. These
    follow in ``indices`` behind the positions of the look-up itself.

    Attributes:
        tables: The two tensors.
        settled: Whether the bool tensor itself may be looked up: nobody writes to it.
    """

    tables: tuple[fx.Node, fx.Node]
    settled: bool

    @property
    def plain(self) -> LookUp:
        """The look-up alone."""
        return LookUp(self.node, self._parts[0], self.negated, self.why)

    @property
    def sides(self) -> tuple[tuple[IndexTensor, ...], tuple[IndexTensor, ...]]:
        """The positions in each table."""
        return self._parts[1:]

    @property
    def _parts(self) -> tuple[tuple[IndexTensor, ...], tuple[IndexTensor, ...], tuple[IndexTensor, ...]]:
        first, second = (value_of(table).ndim for table in self.tables)
        own = len(self.indices) - first - second
        return self.indices[:own], self.indices[own : own + first], self.indices[own + first :]


class SameDocument(TokenComparison):
    """True where the two numbers are equal."""


@dataclass(frozen=True, eq=False)
class PositionBound(TokenComparison):
    """True where the first number is at least the second one, less some slack."""

    slack: Size


Terms = tuple[Term, ...]
