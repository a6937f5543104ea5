"""Views as look-ups: the source element that each element of a view, broadcast, slice or gather reads.

``unsqueeze``, ``expand``, ``x[:, None, 3:]`` and ``x[batch_indices, key_indices]`` all read element
``(f0(i), f1(i), ...)`` of their source with affine ``f``. One `IndexTensor` a source dimension holds ``f``, so the
evaluators need a single rule for all views. Shapes come from the fake values; only the mapping is derived here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from s2o_compile.passes.graph.calls import function_name
from s2o_compile.passes.graph.nodes import Size, known, value_of
from s2o_compile.passes.graph.rejected import Refused
from s2o_compile.passes.masks.index_tensor import Evaluator, IndexTensor, broadcast_indices

Indices = tuple[IndexTensor, ...]
Shape = Sequence[Size]


@dataclass(frozen=True, eq=False)
class Source:
    """The tensor that a view reads, and the positions.

    Attributes:
        node: The tensor it reads from.
        indices: For each dimension of that tensor the position read, as a tensor of the view's shape.
    """

    node: fx.Node
    indices: Indices


def source(node: fx.Node, evaluator: Evaluator) -> Source | None:
    """The source of a view, None if the node is none; raises `Refused` if its mapping is not affine."""
    handler = VIEWS.get(function_name(node))
    if handler is None or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    base, value = value_of(node.args[0]), value_of(node)
    if not isinstance(base, torch.Tensor) or not isinstance(value, torch.Tensor):
        return None
    return Source(node.args[0], handler(node, base.shape, value.shape, evaluator))


def _same(node: fx.Node, base: Shape, shape: Shape, evaluator: Evaluator) -> Indices:
    return tuple(IndexTensor.axis(shape, dim) for dim in range(len(shape)))


def _reshape(node: fx.Node, base: Shape, shape: Shape, evaluator: Evaluator) -> Indices:
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


def _expand(node: fx.Node, base: Shape, shape: Shape, evaluator: Evaluator) -> Indices:
    return broadcast_indices(base, shape)


def _repeat(node: fx.Node, base: Shape, shape: Shape, evaluator: Evaluator) -> Indices:
    lead = len(shape) - len(base)
    if not all(known(size == 1) or known(size == shape[lead + dim]) for dim, size in enumerate(base)):
        raise Refused("%s repeats a dimension of several elements", node)
    return broadcast_indices(base, shape)


def _transpose(node: fx.Node, base: Shape, shape: Shape, evaluator: Evaluator) -> Indices:
    rank = len(base)
    dims = [0, 1] if function_name(node) == "t" else [dim for dim in node.args[1:] if isinstance(dim, int)]
    if len(dims) != 2 or rank < 2:
        raise Refused("%s has an unexpected signature", node)
    order = list(range(rank))
    first, second = (dim % rank for dim in dims)
    order[first], order[second] = second, first
    return _permuted(order, shape)


def _attribute(node: fx.Node, base: Shape, shape: Shape, evaluator: Evaluator) -> Indices:
    """``x.T`` of a matrix and ``x.mT``."""
    if node.args[1] not in ("T", "mT") or len(base) < 2 or (node.args[1] == "T" and len(base) > 2):
        raise Refused("%s (%s) is not a view this pass understands", node, node.args[1])
    rank = len(base)
    return _permuted([*range(rank - 2), rank - 1, rank - 2], shape)


def _permute(node: fx.Node, base: Shape, shape: Shape, evaluator: Evaluator) -> Indices:
    order = node.args[1] if len(node.args) == 2 and isinstance(node.args[1], tuple | list) else node.args[1:]
    dims = [dim for dim in order if isinstance(dim, int)]
    if len(dims) != len(base):
        raise Refused("%s has an unexpected signature", node)
    return _permuted([dim % len(base) for dim in dims], shape)


def _permuted(order: Sequence[int], shape: Shape) -> Indices:
    return tuple(IndexTensor.axis(shape, order.index(dim)) for dim in range(len(shape)))


def _getitem(node: fx.Node, base: Shape, shape: Shape, evaluator: Evaluator) -> Indices:
    items: list[object] = list(node.args[1]) if isinstance(node.args[1], tuple) else [node.args[1]]
    if any(isinstance(item, bool | list) for item in items):
        raise Refused("%s gathers by a list", node)
    if any(isinstance(value_of(item), torch.Tensor) for item in items):
        return _gather(node, items, base, shape, evaluator)
    consumed = sum(item is not None and item is not Ellipsis for item in items)
    padding: list[object] = [slice(None)] * (len(base) - consumed)
    if Ellipsis in items:
        at = items.index(Ellipsis)
        items = [*items[:at], *padding, *items[at + 1 :]]
    else:
        items = [*items, *padding]
    indices: list[IndexTensor] = []
    out = 0
    for item in items:
        if item is None:
            out += 1
            continue
        whole = isinstance(item, slice)
        position = _slice(node, item, base[len(indices)], shape, out, evaluator) if whole else None
        if position is None:
            position = _position(node, item, base[len(indices)], shape, evaluator)
        indices.append(position)
        out += whole
    return tuple(indices)


def _index(node: fx.Node, base: Shape, shape: Shape, evaluator: Evaluator) -> Indices:
    """ATen's ``index(x, [i, j])``: exported graphs hold it instead of ``x[i, j]``."""
    return _gather(node, node.args[1], base, shape, evaluator)


def _gather(node: fx.Node, items: Sequence[object], base: Shape, shape: Shape, evaluator: Evaluator) -> Indices:
    if len(items) != len(base) or not all(isinstance(value_of(item), torch.Tensor) for item in items):
        raise Refused("%s mixes index tensors with slices", node)
    indices = []
    for item in items:
        index = evaluator.evaluate(item)
        if value_of(item).dtype is torch.bool:
            raise Refused("%s selects by a bool tensor", node)
        if not known(index.minimum >= 0):
            raise Refused("%s may gather at negative positions, which count from the end", node)
        indices.append(index.broadcast(shape))
    return tuple(indices)


def _slice(node: fx.Node, item: slice, size: Size, shape: Shape, dim: int, evaluator: Evaluator) -> IndexTensor:
    step = 1 if item.step is None else item.step
    if not isinstance(step, int) or step < 1:
        raise Refused("%s slices with a step that is no positive constant", node)
    first = _position(node, 0 if item.start is None else item.start, size, shape, evaluator)
    return first.plus(IndexTensor.axis(shape, dim), step)


def _position(node: fx.Node, item: object, size: Size, shape: Shape, evaluator: Evaluator) -> IndexTensor:
    index = evaluator.evaluate(item)
    position = index.const + size if known(index.const < 0) else index.const
    if not known(position >= 0):
        raise Refused("%s may start before the first element", node)
    return IndexTensor.constant(position, shape)


def _select(node: fx.Node, base: Shape, shape: Shape, evaluator: Evaluator) -> Indices:
    """``select(dim, index)``, ``narrow(dim, start, length)`` and ATen's ``slice(dim, start, end, step)``."""
    defaults = {"dim": 0, "start": None, "step": 1}
    names = {"select": ("dim", "index"), "narrow": ("dim", "start", "length"), "slice": ("dim", "start", "end", "step")}
    name = function_name(node)
    options = {**defaults, **dict(zip(names[name], node.args[1:], strict=False)), **node.kwargs}
    dim = options["dim"]
    if not isinstance(dim, int):
        raise Refused("%s has an unexpected signature", node)
    dim %= len(base)
    item = options["index"] if name == "select" else slice(options["start"], None, options["step"])
    if name == "select":
        position = _position(node, item, base[dim], shape, evaluator)
        others = [d for d in range(len(base)) if d != dim]
        indices = {d: IndexTensor.axis(shape, at) for at, d in enumerate(others)}
    else:
        position = _slice(node, item, base[dim], shape, dim, evaluator)
        indices = {d: IndexTensor.axis(shape, d) for d in range(len(base))}
    indices[dim] = position
    return tuple(indices[d] for d in range(len(base)))


_Handler = Callable[[fx.Node, Shape, Shape, Evaluator], Indices]
CASTS = frozenset({"to", "type", "type_as", "bool", "long", "int", "float", "half", "bfloat16", "double"})
VIEWS: dict[str, _Handler] = {
    **dict.fromkeys((*CASTS, "contiguous", "clone", "detach", "alias", "cpu", "cuda"), _same),
    **dict.fromkeys(("unsqueeze", "squeeze", "view", "reshape", "flatten", "unflatten", "view_as"), _reshape),
    **dict.fromkeys(("expand", "expand_as", "broadcast_to"), _expand),
    **dict.fromkeys(("repeat", "tile"), _repeat),
    **dict.fromkeys(("transpose", "swapaxes", "swapdims", "t"), _transpose),
    "permute": _permute,
    "getattr": _attribute,
    "getitem": _getitem,
    "index": _index,
    **dict.fromkeys(("select", "narrow", "slice"), _select),
}
