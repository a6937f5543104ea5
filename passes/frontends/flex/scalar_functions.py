"""Writes functions of one score out for all scores: flex_attention's ``mask_mod`` and ``score_mod``.

Such a function is a graph over 0-dimensional tensors: a score, its position (batch, head, query, key), and captured
tensors. Its steps are elementwise, or they read one element of a captured tensor. The same steps over position tensors
that broadcast against each other compute the function for all scores at once. The frontends and the prover read this
form like any mask of the graph. Other steps mean something else on tensors and are `Refused`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from s2o_compile.passes.graph import sizes
from s2o_compile.passes.graph.calls import function_name, written_nodes
from s2o_compile.passes.graph.nodes import Size, inherit, items_of, value_of
from s2o_compile.passes.graph.operand import computed
from s2o_compile.passes.graph.rejected import Refused
from s2o_compile.passes.masks import views
from s2o_compile.passes.masks.index_tensor import COMPARISONS

_ELEMENTWISE = frozenset(
    {
        *COMPARISONS,
        *("and", "or", "xor", "invert", "where", "masked_fill", "minimum", "maximum", "clamp", "sign", "isfinite"),
        *("add", "radd", "sub", "rsub", "mul", "rmul", "neg", "pos", "abs", "square", "pow", "sqrt", "rsqrt"),
        *("div", "truediv", "rtruediv", "divide", "true_divide", "floordiv", "floor_divide", "remainder", "mod"),
        *("tanh", "sigmoid", "exp", "exp2", "log", "log2", "log1p", "sin", "cos", "erf", "relu", "floor", "ceil"),
        *("ones_like", "zeros_like", "full_like", "new_ones", "new_zeros", "new_full"),
        *("clone", "detach", "contiguous", *views.CASTS),
    }
)
_READS = ("getitem", "index")


@dataclass(frozen=True, eq=False)
class _Part:
    """A captured tensor of which some leading dimensions have been read, as ``table[b]`` of ``table[b][kv_idx]``."""

    tensor: fx.Node
    items: tuple[object, ...]


class Inserter:
    """Inserts calls ahead of a node, with fake values like a tensor of the graph; ``nodes`` gets what is inserted."""

    def __init__(self, before: fx.Node, like: object, nodes: list[fx.Node]) -> None:
        self.before = before
        self.nodes = nodes
        self._like = like

    def call(self, target: Callable[..., Any] | str, *args: Any, **kwargs: Any) -> fx.Node:  # noqa: ANN401 (fx arguments)
        """A call of a function, or of a method by name."""
        graph = self.before.graph
        with graph.inserting_before(self.before):
            insert = graph.call_method if isinstance(target, str) else graph.call_function
            node = insert(target, args, kwargs)  # pyright: ignore[reportArgumentType]
        self.nodes.append(node)
        function = getattr(type(value_of(args[0])), target) if isinstance(target, str) else target
        inherit(node, self.before, computed(self._like, function, args, kwargs))
        return node

    def size(self, size: Size) -> fx.Node | int:
        """A size as an argument."""
        known = set(self.before.graph.nodes)
        try:
            return sizes.emit(size, self.before)
        finally:  # also what was inserted before a refusal
            self.nodes += [node for node in self.before.graph.nodes if node not in known]


def positions(insert: Inserter, lengths: Sequence[Size], used: Sequence[bool], device: object) -> list[Any]:
    """The position along each dimension of [B, Hq, Nq, Nk] scores, [B, 1, 1, 1] to [1, 1, 1, Nk]; None if not used."""
    indices: list[Any] = []
    for dim, (length, wanted) in enumerate(zip(lengths, used, strict=True)):
        index = None
        if wanted:
            index = insert.call(torch.arange, insert.size(length), dtype=torch.int32, device=device)
            index = insert.call(operator.getitem, index, tuple(slice(None) if d == dim else None for d in range(4)))
        indices.append(index)
    return indices


def write_out(body: fx.Graph, arguments: Sequence[object], scalars: int, insert: Inserter) -> object:
    """Inserts the function for all scores, and returns its result, a node or a number.

    The body has one argument a placeholder: ``scalars`` tensors over all scores, then captured tensors or sizes.
    Raises `Refused` where a step means something else for all scores.
    """
    written: dict[fx.Node, Any] = {}
    lifted: set[fx.Node] = set()
    for node in body.nodes:
        if node.op == "placeholder":
            if len(written) < scalars:
                lifted.add(node)
            written[node] = arguments[len(written)]
        elif node.op == "output":
            (result,) = items_of(node.args[0])
            result = written[result] if isinstance(result, fx.Node) else result
            if isinstance(result, _Part):
                raise Refused("it returns a row of a tensor")
            return result
        else:
            written[node] = _step(node, written, lifted, insert)
    raise Refused("it returns nothing")


def _step(node: fx.Node, written: dict[fx.Node, Any], lifted: set[fx.Node], insert: Inserter) -> Any:  # noqa: ANN401
    name = function_name(node)
    if not name or written_nodes(node):
        raise Refused("it calls %s, which is not understood", node.target)
    reads = any(argument in lifted for argument in node.all_input_nodes)
    if reads:
        lifted.add(node)
        if name in _READS:
            return _read(node, written, lifted, insert)
        if name not in _ELEMENTWISE:
            raise Refused("it calls %s, which is not elementwise", name)
    if any(isinstance(written[argument], _Part) for argument in node.all_input_nodes):
        raise Refused("it calls %s on a row of a tensor", name)
    args, kwargs = (fx.map_arg(part, written.__getitem__) for part in (node.args, node.kwargs))
    return insert.call(node.target, *args, **kwargs)  # pyright: ignore[reportArgumentType, reportCallIssue]


def _read(node: fx.Node, written: dict[fx.Node, Any], lifted: set[fx.Node], insert: Inserter) -> Any:  # noqa: ANN401
    """One element of a captured tensor; a `_Part` if not all dimensions are read yet."""
    source = written[node.args[0]]  # pyright: ignore[reportArgumentType]
    items = tuple(written[item] if isinstance(item, fx.Node) else item for item in items_of(node.args[1]))
    if isinstance(source, _Part):
        source, items = source.tensor, (*source.items, *items)
    elif node.args[0] in lifted:
        raise Refused("it reads elements of %s, which depends on the position", node.args[0])
    for item in items:
        value = value_of(item)
        counts = isinstance(value, int | torch.SymInt) or (
            isinstance(value, torch.Tensor) and value.dtype in (torch.int64, torch.int32)
        )
        if not isinstance(item, int | fx.Node) or isinstance(item, bool) or not counts:
            raise Refused("it reads %s by something else than single positions", node.args[0])
    tensor = value_of(source)
    if not isinstance(tensor, torch.Tensor) or len(items) > tensor.ndim:
        raise Refused("it reads %s, which is no tensor of %s dimensions", node.args[0], len(items))
    if len(items) < tensor.ndim:
        return _Part(source, items)
    for dim in reversed(range(len(items))):
        if not isinstance(value_of(items[dim]), torch.Tensor):
            source = insert.call(torch.select, source, dim, items[dim])
    return insert.call(
        operator.getitem, source, tuple(item for item in items if isinstance(value_of(item), torch.Tensor))
    )
