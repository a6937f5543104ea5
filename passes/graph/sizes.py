"""Writes a symbolic size back into a graph, as nodes that compute it."""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import cache, reduce
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from s2o_compile.kernels.support.torch_compat import sympy_max, sympy_min
from s2o_compile.passes.graph.nodes import Size, inherit, simplified, value_of
from s2o_compile.passes.graph.rejected import Refused

if TYPE_CHECKING:
    import sympy


@cache
def _functions() -> tuple[tuple[tuple[type, ...], Callable[..., Any]], ...]:
    """Kinds of sympy's expressions, and the function that computes each."""
    import sympy

    return (
        ((sympy.Add,), operator.add),
        ((sympy.Mul,), operator.mul),
        ((sympy_max() or sympy.Max, sympy.Max), torch.sym_max),
        ((sympy_min() or sympy.Min, sympy.Min), torch.sym_min),
    )


def emit(size: Size, before: fx.Node) -> fx.Node | int:
    """A size as an int, a node that already holds it, or new nodes ahead of ``before``; raises `Refused`."""
    size = simplified(size)
    if isinstance(size, int):
        return size
    holders: dict[sympy.Expr, fx.Node] = {}
    for node in before.graph.nodes:
        if node is before:
            break
        value = value_of(node)
        if isinstance(value, torch.SymInt):
            holders.setdefault(value.node.expr, node)

    def emitted(expr: Any) -> fx.Node | int:  # noqa: ANN401 (sympy has no types)
        if expr in holders:
            return holders[expr]
        if expr.is_Integer:
            return int(expr)
        function = next((function for kinds, function in _functions() if isinstance(expr, kinds)), None)
        if function is not None:
            return reduce(
                lambda left, right: _call(before, function, left, right), [emitted(argument) for argument in expr.args]
            )
        holder = _shape_lookup(expr, before)
        if holder is None:
            raise Refused("%s cannot be computed from sizes in the graph", size)
        return holder

    with before.graph.inserting_before(before):
        return emitted(size.node.expr)


def _shape_lookup(expr: sympy.Expr, before: fx.Node) -> fx.Node | None:
    """Reads a size off an input tensor: exported graphs have no size inputs."""
    for node in before.graph.find_nodes(op="placeholder"):
        value = value_of(node)
        if isinstance(value, torch.Tensor):
            for dim, extent in enumerate(value.shape):
                if isinstance(extent, torch.SymInt) and extent.node.expr == expr:
                    return _call(before, torch.ops.aten.sym_size.int, node, dim)
    return None


def _call(before: fx.Node, function: object, left: fx.Node | int, right: fx.Node | int) -> fx.Node:
    node = before.graph.call_function(function, (left, right))  # pyright: ignore[reportArgumentType]
    first, second = value_of(left), value_of(right)
    extent = isinstance(first, torch.Tensor)
    inherit(node, before, first.shape[second] if extent else function(first, second))  # pyright: ignore
    return node
