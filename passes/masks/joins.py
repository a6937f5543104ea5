"""Masks joined of parts along one dimension, as the mask of new keys joined to that of cached ones.

    hstack([zeros(N, cached), triu(full((N, N), -inf), 1)])    and cat, concat, vstack
    pad(triu(full((N, N), -inf), 1), (cached, 0))

A bound of one part, ``j' <= i`` with its own j' = j - cached, is a bound of the whole if it holds in all other parts by
itself: there j' is negative.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from s2o_compile.passes.graph.calls import function_name
from s2o_compile.passes.graph.nodes import Size, arguments, is_size, known, value_of
from s2o_compile.passes.masks.index_arithmetic import held
from s2o_compile.passes.masks.index_tensor import IndexTensor

_DIMS = {"hstack": 1, "vstack": 0}
NAMES = frozenset({"cat", *_DIMS})
"""Functions that join tensors of their first argument."""


@dataclass(frozen=True)
class Part:
    """A part of a joined tensor.

    Attributes:
        source: A node, or the number that fills the part.
        start: Its first position along the dimension.
        size: Its length there.
    """

    source: fx.Node | float
    start: Size
    size: Size


@dataclass(frozen=True)
class Join:
    """A tensor of parts that stand behind one another along a dimension."""

    node: fx.Node
    dim: int
    parts: tuple[Part, ...]

    @property
    def shape(self) -> torch.Size:
        """Of the whole."""
        return value_of(self.node).shape

    def indices(self, part: Part) -> list[IndexTensor]:
        """The position in a part of each position in the whole; before and behind the part it is outside of it."""
        indices = [IndexTensor.axis(self.shape, dim) for dim in range(len(self.shape))]
        indices[self.dim] = indices[self.dim].plus(IndexTensor.constant(part.start, self.shape), -1)
        return indices

    def of(self, part: Part, index: IndexTensor) -> IndexTensor:
        """An index tensor of the whole where it lies in a part."""
        shape = (*self.shape[: self.dim], part.size, *self.shape[self.dim + 1 :])
        return IndexTensor(shape, index.const + index.steps[self.dim] * part.start, index.steps)


def read(node: fx.Node) -> Join | None:
    """The parts that a tensor is joined of; None if it is not, or not so that it is understood."""
    name, value = function_name(node), value_of(node)
    if not isinstance(value, torch.Tensor) or (name not in NAMES and name != "pad"):
        return None
    if name == "pad":
        base, pads, mode, fill = arguments(node, "input|self", "pad", "mode", "value")
        if not isinstance(base, fx.Node) or mode not in (None, "constant") or not isinstance(pads, tuple | list):
            return None
        if len(pads) != 2 or value.ndim < 2:
            return None  # of several dimensions
        fill, dim = held(0 if fill is None else fill, value.dtype), value.ndim - 1
        sizes = (value_of(pads[0]), value_of(base).shape[dim], value_of(pads[1]))
        if fill is None or any(known(size < 0) or not is_size(size) for size in sizes):
            return None
        return Join(node, dim, tuple(_placed((fill, base, fill), sizes)))
    tensors, dim = arguments(node, "tensors", "dim|axis")
    dim = _DIMS.get(name, 0 if dim is None else dim)
    if not isinstance(tensors, tuple | list) or not isinstance(dim, int):
        return None
    values = [value_of(tensor) for tensor in tensors]
    if not all(isinstance(other, torch.Tensor) and other.ndim == value.ndim > 1 for other in values):
        return None
    dim %= value.ndim
    return Join(node, dim, tuple(_placed(tensors, [other.shape[dim] for other in values])))


def _placed(sources: Sequence[fx.Node | float], sizes: Sequence[Size]) -> Iterator[Part]:
    start: Size = 0
    for source, size in zip(sources, sizes, strict=True):
        if not known(size == 0):
            yield Part(source, start, size)
        start = start + size
