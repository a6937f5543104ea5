"""Reading a captured graph: what a node calls, what its value is, and what it writes to.

The passes reason about a node from the function it calls. That is only sound while (1) the function is torch's or
Python's own, and not a user's function of the same name, and (2) nobody writes into the tensor afterwards. The first
question is answered here, the second in `mutations`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols, statically_known_true

Size = int | torch.SymInt

_OPERATOR_WRITES = frozenset(
    {
        *("iadd", "isub", "imul", "iand", "ior", "ixor", "itruediv", "ifloordiv", "imod", "ipow"),
        *("ilshift", "irshift", "imatmul", "iconcat", "setitem", "delitem"),
    }
)
_METHOD_WRITES = frozenset(f"__{name}__" for name in _OPERATOR_WRITES)
_SYNONYMS = {
    "less_equal": "le",
    "less": "lt",
    "greater_equal": "ge",
    "greater": "gt",
    "not_equal": "ne",
    "bitwise_and": "and",
    "iand": "and",
    "ior": "or",
    "iadd": "add",
    "imul": "mul",
    "absolute": "abs",
    "logical_and": "and",
    "bitwise_or": "or",
    "logical_or": "or",
    "bitwise_not": "invert",
    "logical_not": "invert",
    "not": "invert",
    "inv": "invert",
    "subtract": "sub",
    "multiply": "mul",
    "negative": "neg",
}


def value_of(node: object) -> Any:  # noqa: ANN401 (a tensor, a number, a tuple of them)
    """The fake value of a node (Dynamo's ``example_value`` or export's ``val``); anything else is its own value."""
    if not isinstance(node, fx.Node):
        return node
    return node.meta.get("example_value", node.meta.get("val"))


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


def simplified(size: Size) -> Size:
    """A size as a plain int where it does not depend on the inputs."""
    if isinstance(size, torch.SymInt) and size.node.expr.is_number:
        return int(size.node.expr)
    return size


def is_understood(target: object) -> bool:
    """Whether a call target is Python's or torch's own, so that its name says what it does."""
    if isinstance(target, torch._ops.OpOverload):
        return target.namespace == "aten"
    module = getattr(target, "__module__", None)
    if module is None:  # methods of Tensor, such as torch.Tensor.le
        return getattr(target, "__objclass__", None) is not None
    return module in {"_operator", "builtins", "math"} or module == "torch" or module.startswith("torch.")


def function_name(node: fx.Node) -> str:
    """What a node calls, in one spelling (``le`` for ``operator.le``, ``torch.less_equal``, ``Tensor.__le__``, ...).

    Empty for anything but a call of Python's or torch's own functions. In-place variants lose their underscore too:
    ask `Mutations` first.
    """
    if node.op == "call_method":
        name = str(node.target)
    elif node.op == "call_function" and is_understood(node.target):
        packet = node.target.overloadpacket if isinstance(node.target, torch._ops.OpOverload) else node.target
        name = getattr(packet, "__name__", "")
    else:
        return ""
    name = name.strip("_")
    return _SYNONYMS.get(name, name)


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


def choice(node: fx.Node) -> tuple[Any, Any, Any] | None:
    """Condition, chosen and otherwise of a ``where``; None if it is spelt in a way that is not read."""
    method = node.op == "call_method"
    first, second, third = arguments(
        node, *(("input", "condition") if method else ("condition", "input|self")), "other"
    )
    if second is None or third is None or "out" in node.kwargs:
        return None
    return (second, first, third) if method else (first, second, third)


def written_arguments(node: fx.Node) -> list[fx.Node]:
    """The argument nodes that a node writes to, or may write to if it is not known what it does."""
    inputs = node.all_input_nodes
    target = node.target
    if node.op == "call_method":
        name = str(target)
        writes = name in _METHOD_WRITES or (name.endswith("_") and not name.endswith("__"))
        return _leading(node) if writes else []
    if node.op == "call_module":
        return inputs
    if node.op != "call_function":
        return []
    if isinstance(target, torch._ops.OpOverload):
        arguments = zip(target._schema.arguments, node.args, strict=False)
        written = [value for argument, value in arguments if argument.alias_info and argument.alias_info.is_write]
        written += [
            node.kwargs[argument.name]
            for argument in target._schema.arguments
            if argument.name in node.kwargs and argument.alias_info and argument.alias_info.is_write
        ]
        return [value for value in written if isinstance(value, fx.Node)]
    if target is torch.ops.higher_order.flex_attention:
        return []  # Dynamo refuses functions that write to what they capture
    if isinstance(target, torch._ops.HigherOrderOperator) or not is_understood(target):
        return inputs
    name = getattr(target, "__name__", "")
    if getattr(target, "__module__", None) == "_operator":
        return _leading(node) if name in _OPERATOR_WRITES else []
    written = _leading(node) if name.endswith("_") and not name.endswith("__") else []
    out = node.kwargs.get("out")
    return written + [
        value for value in (out if isinstance(out, tuple | list) else (out,)) if isinstance(value, fx.Node)
    ]


def _leading(node: fx.Node) -> list[fx.Node]:
    return [node.args[0]] if node.args and isinstance(node.args[0], fx.Node) else []
