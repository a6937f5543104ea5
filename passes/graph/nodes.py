"""Reading a captured graph: the values of its nodes, their sizes and their arguments.

`calls` answers which function a node calls and which tensors it writes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from s2o_compile.kernels.support.torch_compat import (
    bound_sympy,
    free_unbacked_symbols,
    is_held_by_module,
    statically_known_true,
    value_ranges,
)

Size = int | torch.SymInt

LARGEST = 2**30
"""Of lengths and other integers that enter a graph as symbols: lists of keys and positions in many masks are int32."""


def value_of(node: object) -> Any:  # noqa: ANN401 (a tensor, a number, a tuple of them)
    """The fake value of a node (Dynamo's ``example_value`` or export's ``val``); anything else is its own value."""
    if not isinstance(node, fx.Node):
        return node
    return node.meta.get("example_value", node.meta.get("val"))


WEIGHT = "s2o_weight"
"""In the metadata of an exported graph's inputs: that one is a parameter or a buffer. Its value does not show it."""


def is_weight(node: fx.Node) -> bool:
    """Whether a node is a parameter, a buffer or another tensor of a module, and no input of the call."""
    value = value_of(node)
    if node.op not in ("placeholder", "get_attr") or not isinstance(value, torch.Tensor):
        return False
    held = WEIGHT in node.meta or is_held_by_module(node.meta)
    return node.op == "get_attr" or isinstance(value, torch.nn.Parameter) or held


_INHERITED = ("nn_module_stack", "source_fn_stack", "stack_trace", "seq_nr")


def inherit(node: fx.Node, source: fx.Node, value: object) -> None:
    """Gives an inserted node its fake value, and the module and the stack trace of the node that it serves."""
    node.meta |= {name: source.meta[name] for name in _INHERITED if name in source.meta}
    node.meta["example_value" if "example_value" in source.meta else "val"] = value


def known(condition: bool | torch.SymBool) -> bool:
    """Whether a condition on sizes holds for every length the graph accepts; adds no guard."""
    return statically_known_true(condition)


def same_sizes(left: Sequence[Size], right: Sequence[Size]) -> bool:
    """Whether two shapes are equal for every length the graph accepts; ``==`` of shapes would add a guard."""
    return len(left) == len(right) and all(known(a == b) for a, b in zip(left, right, strict=True))


def is_size(value: object) -> bool:
    """Whether a value is an integer fixed when the graph is entered: an int, or a SymInt over input sizes."""
    if isinstance(value, torch.SymInt):
        return not free_unbacked_symbols(value)
    return isinstance(value, int)


def bounds(size: Size) -> tuple[float, float]:
    """The least and the greatest value of a size, infinite where nothing is known.

    No symbol is taken to leave the range from -`LARGEST` to `LARGEST`.
    """
    if not isinstance(size, torch.SymInt):
        return size, size
    extent_of, interval = bound_sympy(), value_ranges()
    if extent_of is None or interval is None:
        return -math.inf, math.inf
    import sympy

    expr, extents = size.node.expr, size.node.shape_env.bound_sympy
    ranges = {}
    for symbol in expr.free_symbols:
        extent_of_symbol = extents(symbol)
        ranges[symbol] = interval(
            sympy.Max(extent_of_symbol.lower, -LARGEST), sympy.Min(extent_of_symbol.upper, LARGEST)
        )
    extent = extent_of(expr, ranges)
    least, greatest = (int(bound) if bound.is_Integer else None for bound in (extent.lower, extent.upper))
    return -math.inf if least is None else least, math.inf if greatest is None else greatest


def simplified(size: Size) -> Size:
    """A size as a plain int where it does not depend on the inputs."""
    if isinstance(size, torch.SymInt) and size.node.expr.is_number:
        return int(size.node.expr)
    return size


def arguments(node: fx.Node, *names: str) -> tuple[Any, ...]:
    """The arguments of a call for the parameters of these names, however they are passed; None for one not given.

    Alternative names are joined by a bar: ``other|mat2``. The tensor of a method is its first argument.
    """
    positional = node.args[: len(names)]
    keyword = (
        next((node.kwargs[part] for part in name.split("|") if part in node.kwargs), None)
        for name in names[len(positional) :]
    )
    return (*positional, *keyword)


def items_of(argument: object) -> tuple[Any, ...]:
    """The elements of an argument that is one element, or a tuple or list of them."""
    return tuple(argument) if isinstance(argument, tuple | list) else (argument,)


def choice(node: fx.Node) -> tuple[Any, Any, Any] | None:
    """Condition, chosen and otherwise of a ``where``; None if its form is not known."""
    method = node.op == "call_method"
    first, second, third = arguments(
        node, *(("input", "condition") if method else ("condition", "input|self")), "other"
    )
    if second is None or third is None or "out" in node.kwargs:
        return None
    return (second, first, third) if method else (first, second, third)
