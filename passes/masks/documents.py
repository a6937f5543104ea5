"""Packed sequences in masks: integers that tokens hold, those of queries compared with those of keys.

    ids[b, i] == ids[b, j]                  documents; what the integers are does not matter
    positions[b, j] <= positions[b, i] + c  a bound of positions that count up inside every document: j <= i + c

The second is one only beside documents that end where the positions do not go on by one. That follows from the steps
that make the ids, ``cumsum(diff(positions) != 1)``, or from the numbers of tensors that are stored for good.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import fx

from s2o_compile.passes.graph.calls import function_name
from s2o_compile.passes.graph.nodes import Size, arguments, known, value_of
from s2o_compile.passes.graph.rejected import Refused, Rejected, attempt
from s2o_compile.passes.masks import views
from s2o_compile.passes.masks.index_arithmetic import INDEX_DTYPES, IndexEvaluator
from s2o_compile.passes.masks.index_tensor import IndexTensor, broadcast_indices
from s2o_compile.passes.masks.term import Comparison, PositionBound, SameDocument, Terms, TokenComparison

Stored = Callable[[fx.Node], torch.Tensor | None]
"""The numbers of a tensor that is stored for good; None for any other."""

_IDS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_ORDERS = {"le": (1, 0), "lt": (1, -1), "ge": (0, 0), "gt": (0, -1)}  # which side is the larger, and the slack


def comparison(
    node: fx.Node, name: str, shape: Sequence[Size], indices: IndexEvaluator, *, negated: bool, why: Rejected
) -> TokenComparison | None:
    """The term that a comparison of two integer tensors along different dimensions is; None if it is no such one.

    ``name`` is the comparison that must hold, ``negated`` whether ``node`` computes the opposite. Raises `Refused`.
    """
    if len(node.args) != 2 or node.kwargs or (name != "eq" and name not in _ORDERS):
        return None
    shifted = [_shifted(argument, shape, indices, ids=name == "eq") for argument in node.args]
    if any(side is None for side in shifted):
        return None
    (first, left), (second, right) = ((side[0], side[1]) for side in shifted if side is not None)
    along = [
        {dim for index in source.indices for dim, step in enumerate(index.steps) if step} for source in (first, second)
    ]
    if not along[0] - along[1] or not along[1] - along[0]:
        return None  # compared token by token, as a padding mask is made
    if any(value_of(source.node).dtype.is_floating_point for source in (first, second)):
        raise Refused(
            "%s compares floating numbers, of which NaN is not even equal to itself; number the documents by integers",
            node,
        )
    own = tuple(IndexTensor.axis(shape, dim) for dim in range(len(shape)))
    settled = not indices.is_written(node)
    if name == "eq":
        tables, sides = (first.node, second.node), (*first.indices, *second.indices)
        return SameDocument(node, (*own, *sides), negated, why, tables, settled)
    larger, slack = _ORDERS[name]
    sources = (first, second) if larger == 0 else (second, first)
    slack = slack + (left - right if larger == 0 else right - left)
    positions = (*sources[0].indices, *sources[1].indices)
    return PositionBound(node, (*own, *positions), negated, why, (sources[0].node, sources[1].node), settled, slack)


def resolved(terms: Terms, shape: Sequence[Size], indices: IndexEvaluator, stored: Stored | None) -> Terms:
    """The terms with each bound of positions as the bound of indices that it is beside the documents among them.

    A bound that is none becomes a look-up of the comparison itself.
    """
    documents = [term for term in terms if isinstance(term, SameDocument)]
    singleton = [known(size == 1) for size in shape]
    found = []
    for term in terms:
        if isinstance(term, PositionBound):
            bounds = (_bound(term, ids, singleton, indices, stored) for ids in documents)
            bound = next((bound for bound in bounds if bound is not None), None)
            if bound is None and not term.settled:
                raise Refused.because(term.why)
            term = term.plain if bound is None else Comparison(term.node, (bound,))
        found.append(term)
    return tuple(found)


def _table(argument: object, shape: Sequence[Size], indices: IndexEvaluator) -> views.Source | None:
    """The tensor that an argument's numbers lie in, as far as views and casts that change none lead back to it."""
    value = value_of(argument)
    if not isinstance(argument, fx.Node) or not isinstance(value, torch.Tensor):
        return None
    found = None
    for seen in views.chain(argument, indices.evaluate):
        dtype = value_of(seen.node).dtype
        if indices.is_written(seen.node):
            break
        if found is not None and not _holds(value_of(found.node).dtype, dtype):
            break
        found = seen
    if found is None:
        return None
    spread = broadcast_indices(value.shape, shape)
    return views.Source(found.node, tuple(index.at(spread, shape) for index in found.indices))


def _holds(dtype: torch.dtype, narrow: torch.dtype) -> bool:
    """Whether a dtype holds every number of another one."""
    return dtype == narrow or ({dtype, narrow} <= {*_IDS} and torch.promote_types(dtype, narrow) == dtype)


def _shifted(
    argument: object, shape: Sequence[Size], indices: IndexEvaluator, *, ids: bool
) -> tuple[views.Source, Size] | None:
    """The table of an argument, and the constant added to its numbers; ids are compared as they are."""
    source = _table(argument, shape, indices)
    if source is None:
        return None
    node, dtype = source.node, value_of(source.node).dtype
    if ids:
        return (source, 0) if dtype in _IDS or dtype.is_floating_point else None
    if dtype not in INDEX_DTYPES:
        return None
    name = function_name(node)
    if name in ("add", "radd", "sub") and len(node.args) == 2 and not node.kwargs:
        ways = [(*node.args, 1), (*node.args[::-1], 1)] if name != "sub" else [(*node.args, -1)]
        for base, shift, sign in ways:
            number = attempt(indices.evaluate, shift)
            inner = _shifted(base, value_of(node).shape, indices, ids=False)
            if inner is not None and number and number.is_constant:
                moved = tuple(index.at(source.indices, shape) for index in inner[0].indices)
                return views.Source(inner[0].node, moved), inner[1] + sign * number.const
    return source, 0


def _bound(
    bound: PositionBound,
    ids: SameDocument,
    singleton: Sequence[bool],
    indices: IndexEvaluator,
    stored: Stored | None,
) -> IndexTensor | None:
    """A bound of positions as one of indices: inside a document positions differ as their indices do."""
    (positions, other), (table, same) = bound.tables, ids.tables
    if positions is not other or table is not same:
        return None
    shape = ids.indices[0].shape
    counted = _counted(table, indices)
    if counted is not None:
        source, dim = counted
        read = [tuple(index.at(side, shape) for index in source.indices) for side in ids.sides]
        if source.node is not positions:
            return None
    elif stored is not None and _counts_up(stored(positions), stored(table)):
        dim, read = -1, ids.sides
    else:
        return None
    along = dim % len(ids.sides[0])
    rest = [[index for at, index in enumerate(side) if at != along] for side in ids.sides]
    if not _equal(rest[0], rest[1], singleton):
        return None  # the numbers of one row say nothing about those of another
    for first, second in ((0, 1), (1, 0)):
        if _equal(bound.sides[0], read[first], singleton) and _equal(bound.sides[1], read[second], singleton):
            difference = ids.sides[first][dim].plus(ids.sides[second][dim], -1)
            return difference.plus(IndexTensor.constant(bound.slack, shape))
    return None


def _equal(left: Sequence[IndexTensor], right: Sequence[IndexTensor], singleton: Sequence[bool]) -> bool:
    """Whether two tables of one shape are read at the same positions."""
    return len(left) == len(right) and all(
        known(a.const == b.const) and all(one or x == y for one, x, y in zip(singleton, a.steps, b.steps, strict=True))
        for a, b in zip(left, right, strict=True)
    )


def _counted(ids: fx.Node, indices: IndexEvaluator) -> tuple[views.Source, int] | None:
    """The positions of ids that are ``cumsum(diff(positions, prepend=...) != 1)``, read as the ids are; the dimension.

    Between two equal ids all differences are 1. The first difference, of what is prepended, is between no two tokens.
    """
    if function_name(ids) != "cumsum" or value_of(ids).dtype not in INDEX_DTYPES:
        return None
    summed, dim, *_ = arguments(ids, "input|self", "dim")
    differs = _as_it_is(summed, indices)
    if differs is None or function_name(differs) != "ne" or len(differs.args) != 2 or differs.kwargs:
        return None
    difference = _as_it_is(differs.args[0], indices)
    if difference is None or function_name(difference) != "diff" or indices.fill(differs.args[1]) != 1:
        return None
    positions, count, along, prepended, appended = arguments(difference, "input|self", "n", "dim", "prepend", "append")
    rank, first = value_of(ids).ndim, value_of(prepended)
    along = -1 if along is None else along
    if count not in (None, 1) or appended is not None or not isinstance(first, torch.Tensor) or first.ndim != rank:
        return None
    if not isinstance(dim, int) or not isinstance(along, int) or dim % rank != along % rank:
        return None
    if not known(first.shape[dim] == 1) or value_of(difference).dtype not in INDEX_DTYPES:
        return None
    source = _table(positions, value_of(ids).shape, indices)
    return None if source is None else (source, dim % rank)


def _as_it_is(argument: object, indices: IndexEvaluator) -> fx.Node | None:
    """The tensor whose numbers an argument has, each in its place."""
    value = value_of(argument)
    source = _table(argument, value.shape, indices) if isinstance(value, torch.Tensor) else None
    if source is None or len(source.indices) != value.ndim:
        return None
    sizes = enumerate(zip(source.indices, value.shape, strict=True))
    return source.node if all(known(size == 1) or index.is_axis(dim) for dim, (index, size) in sizes) else None


def _counts_up(positions: torch.Tensor | None, ids: torch.Tensor | None) -> bool:
    """Whether numbers go on by one between any two equal ids of a row."""
    if positions is None or ids is None or positions.shape != ids.shape or positions.dtype not in INDEX_DTYPES:
        return False
    steps, before, after = positions.diff(dim=-1) == 1, ids[..., :-1], ids[..., 1:]
    return bool(((after > before) | ((after == before) & steps)).all())  # a difference of bytes or bits has no sign
