"""Views as look-ups: the source element that each element of a view, broadcast, slice or gather reads.

``unsqueeze``, ``expand``, ``x[:, None, 3:]`` and ``x[batch_indices, key_indices]`` all read element
``(f0(i), f1(i), ...)`` of their source with affine ``f``. One `IndexTensor` a source dimension holds ``f``, so the
evaluators need a single rule for all views. Shapes come from the fake values; only the mapping is derived here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from s2o_compile.kernels.support.dtensors import is_dtensor
from s2o_compile.passes.graph.calls import function_name
from s2o_compile.passes.graph.nodes import Size, arguments, known, value_of
from s2o_compile.passes.graph.rejected import Refused, attempt
from s2o_compile.passes.masks.index_tensor import IndexTensor, broadcast_indices

Indices = tuple[IndexTensor, ...]
Shape = Sequence[Size]
Evaluate = Callable[[object], IndexTensor]
"""Gives the value of a node or of a Python number, or raises `Refused`: ``IndexEvaluator.evaluate``."""


@dataclass(frozen=True, eq=False)
class Source:
    """The tensor that a view reads, and for each of its dimensions the position read, of the view's shape."""

    node: fx.Node
    indices: Indices


def source(node: fx.Node, evaluate: Evaluate) -> Source | None:
    """The source of a view, None if the node is none; raises `Refused` if its mapping is not affine."""
    handler = VIEWS.get(function_name(node))
    if handler is None or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    base, value = value_of(node.args[0]), value_of(node)
    if not isinstance(base, torch.Tensor) or not isinstance(value, torch.Tensor):
        return None
    return Source(node.args[0], handler(node, base.shape, value.shape, evaluate))


def chain(node: fx.Node, evaluate: Evaluate) -> Iterator[Source]:
    """A tensor and those that it is a view of, nearest first, each with the positions that the tensor itself reads."""
    shape = value_of(node).shape
    seen = Source(node, _same(node, shape, shape, evaluate))
    yield seen
    while viewed := attempt(source, seen.node, evaluate):
        seen = Source(viewed.node, tuple(index.at(seen.indices, shape) for index in viewed.indices))
        yield seen


def _same(node: fx.Node, base: Shape, shape: Shape, evaluate: Evaluate) -> Indices:
    return tuple(IndexTensor.axis(shape, dim) for dim in range(len(shape)))


def _placed(node: fx.Node, base: Shape, shape: Shape, evaluate: Evaluate) -> Indices:
    """Of a tensor and the DTensor that is made of it, or the other way round, where every rank holds all of both."""
    values = (x for x in map(value_of, (node, node.args[0])) if is_dtensor(x))
    if not all(placement.is_replicate() for x in values for placement in x.placements):
        raise Refused("%s is held in shards", node)
    return _same(node, base, shape, evaluate)


def _reshape(node: fx.Node, base: Shape, shape: Shape, evaluate: Evaluate) -> Indices:
    if any(isinstance(argument, torch.dtype) for argument in (*node.args, *node.kwargs.values())):
        raise Refused("%s reinterprets the bits of its source", node)
    old = [dim for dim, size in enumerate(base) if not known(size == 1)]
    new = [dim for dim, size in enumerate(shape) if not known(size == 1)]
    if len(old) != len(new) or not all(known(base[a] == shape[b]) for a, b in zip(old, new, strict=True)):
        raise Refused("%s merges or splits dimensions", node)
    target = dict(zip(old, new, strict=True))
    return tuple(
        IndexTensor.axis(shape, target[dim]) if dim in target else IndexTensor.constant(0, shape)
        for dim in range(len(base))
    )


def _expand(node: fx.Node, base: Shape, shape: Shape, evaluate: Evaluate) -> Indices:
    return broadcast_indices(base, shape)


def _repeat(node: fx.Node, base: Shape, shape: Shape, evaluate: Evaluate) -> Indices:
    lead = len(shape) - len(base)
    if not all(known(size == 1) or known(size == shape[lead + dim]) for dim, size in enumerate(base)):
        raise Refused("%s repeats a dimension of several elements", node)
    return broadcast_indices(base, shape)


def _permute(node: fx.Node, base: Shape, shape: Shape, evaluate: Evaluate) -> Indices:
    order = permutation(node)
    return tuple(IndexTensor.axis(shape, order.index(dim)) for dim in range(len(shape)))


def permutation(node: fx.Node) -> list[int]:
    """The dimensions of its source in the order in which a ``transpose``, ``permute``, ``T`` or ``mT`` has them."""
    name, dims, rank = function_name(node), node.args[1:], value_of(node.args[0]).ndim
    if name in ("getattr", "mT", "numpy_T"):  # attributes are calls of ATen from torch 2.14 on
        attribute = dims[0] if name == "getattr" else name
        if attribute not in ("T", "mT", "numpy_T") or rank < 2 or (attribute != "mT" and rank > 2):
            raise Refused("%s (%s) is not a view this pass understands", node, attribute)
        dims = (-2, -1)
    elif name == "t":
        dims = (0, 1)
    elif name == "permute" and len(dims) == 1 and isinstance(dims[0], tuple | list):
        dims = dims[0]
    dims = [dim for dim in dims if isinstance(dim, int)]
    if name == "permute" and len(dims) == rank:
        return [dim % rank for dim in dims]
    if name == "permute" or len(dims) != 2 or rank < 2:
        raise Refused("%s has an unexpected signature", node)
    order = list(range(rank))
    first, second = dims
    order[first], order[second] = order[second], order[first]
    return order


def _getitem(node: fx.Node, base: Shape, shape: Shape, evaluate: Evaluate) -> Indices:
    items: list[object] = list(node.args[1]) if isinstance(node.args[1], tuple) else [node.args[1]]
    if any(isinstance(item, bool | list) for item in items):
        raise Refused("%s gathers by a list", node)
    if any(isinstance(value_of(item), torch.Tensor) for item in items):
        return _gather(node, items, base, shape, evaluate)
    consumed = sum(item is not None and item is not Ellipsis for item in items)
    at = items.index(Ellipsis) if Ellipsis in items else len(items)
    items[at : at + 1] = [slice(None)] * (len(base) - consumed)
    indices: list[IndexTensor] = []
    out = 0
    for item in items:
        if item is None:
            out += 1
            continue
        size = base[len(indices)]
        if isinstance(item, slice):
            indices.append(_slice(node, item, size, shape, out, evaluate))
            out += 1
        else:
            indices.append(_position(node, item, size, shape, evaluate))
    return tuple(indices)


def _index(node: fx.Node, base: Shape, shape: Shape, evaluate: Evaluate) -> Indices:
    """ATen's ``index(x, [i, j])``: exported graphs hold it instead of ``x[i, j]``."""
    return _gather(node, node.args[1], base, shape, evaluate)


def _gather(node: fx.Node, items: Sequence[object], base: Shape, shape: Shape, evaluate: Evaluate) -> Indices:
    if len(items) != len(base) or not all(isinstance(value_of(item), torch.Tensor) for item in items):
        raise Refused("%s mixes index tensors with slices", node)
    indices = []
    for item in items:
        index = evaluate(item)
        if value_of(item).dtype is torch.bool:
            raise Refused("%s selects by a bool tensor", node)
        if not known(index.minimum >= 0):
            raise Refused("%s may gather at negative positions, which count from the end", node)
        indices.append(index.broadcast(shape))
    return tuple(indices)


def _slice(node: fx.Node, item: slice, size: Size, shape: Shape, dim: int, evaluate: Evaluate) -> IndexTensor:
    step = 1 if item.step is None else item.step
    if not isinstance(step, int) or step < 1:
        raise Refused("%s slices with a step that is no positive constant", node)
    first = _position(node, 0 if item.start is None else item.start, size, shape, evaluate)
    return first.plus(IndexTensor.axis(shape, dim), step)


def _position(node: fx.Node, item: object, size: Size, shape: Shape, evaluate: Evaluate) -> IndexTensor:
    index = evaluate(item)
    position = index.const + size if known(index.const < 0) else index.const
    if not known(position >= 0):
        raise Refused("%s may start before the first element", node)
    return IndexTensor.constant(position, shape)


def _index_select(node: fx.Node, base: Shape, shape: Shape, evaluate: Evaluate) -> Indices:
    _, dim, chosen = arguments(node, "input|self", "dim", "index")
    positions = evaluate(chosen)
    if not isinstance(dim, int) or len(positions.shape) != 1:
        raise Refused("%s has an unexpected signature", node)
    if not known(positions.minimum >= 0):
        raise Refused("%s may gather at negative positions", node)
    dim %= len(base)
    indices = [IndexTensor.axis(shape, at) for at in range(len(shape))]
    indices[dim] = positions.at([indices[dim]], shape)
    return tuple(indices)


def _select(node: fx.Node, base: Shape, shape: Shape, evaluate: Evaluate) -> Indices:
    """``select(dim, index)``, ``narrow(dim, start, length)`` and ATen's ``slice(dim, start, end, step)``."""
    defaults = {"dim": 0, "start": None, "step": 1}
    names = {"select": ("dim", "index"), "narrow": ("dim", "start", "length"), "slice": ("dim", "start", "end", "step")}
    name = function_name(node)
    options = {**defaults, **dict(zip(names[name], node.args[1:], strict=False)), **node.kwargs}
    dim = options["dim"]
    if not isinstance(dim, int):
        raise Refused("%s has an unexpected signature", node)
    dim %= len(base)
    indices = [IndexTensor.axis(shape, at) for at in range(len(shape))]
    if name == "select":
        indices.insert(dim, _position(node, options["index"], base[dim], shape, evaluate))
    else:
        item = slice(options["start"], None, options["step"])
        indices[dim] = _slice(node, item, base[dim], shape, dim, evaluate)
    return tuple(indices)


_Handler = Callable[[fx.Node, Shape, Shape, Evaluate], Indices]
CASTS = frozenset({"to", "type", "type_as", "bool", "long", "int", "float", "half", "bfloat16", "double"})
PERMUTATIONS = frozenset({"transpose", "swapaxes", "swapdims", "t", "permute", "getattr", "mT", "numpy_T"})
VIEWS: dict[str, _Handler] = {
    **dict.fromkeys((*CASTS, "contiguous", "clone", "detach", "alias", "cpu", "cuda"), _same),
    **dict.fromkeys(("unsqueeze", "squeeze", "view", "reshape", "flatten", "unflatten", "view_as"), _reshape),
    **dict.fromkeys(("expand", "expand_as", "broadcast_to"), _expand),
    **dict.fromkeys(("repeat", "tile"), _repeat),
    **dict.fromkeys(PERMUTATIONS, _permute),
    "redistribute": _placed,  # as `moves_shards` names them all
    "getitem": _getitem,
    "index": _index,
    "index_select": _index_select,
    **dict.fromkeys(("select", "narrow", "slice"), _select),
}
