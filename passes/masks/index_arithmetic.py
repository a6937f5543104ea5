"""Symbolic values of integer index tensors: ``value[i0, i1, ...] = const + step0 * i0 + step1 * i1 + ...``.

Masks are made of such tensors: an ``arange`` seen through additions, broadcasts, views and look-ups. Their values are
derived from the graph's *structure* and from sizes that may be symbolic. No sub-graph is run on an example, so the
values hold for every length that the graph accepts. Tensors with values from elsewhere (an input, a parameter, a
function not listed here) are `Refused`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import fx

from s2o_compile.passes.graph.calls import function_name
from s2o_compile.passes.graph.mutations import Mutations
from s2o_compile.passes.graph.nodes import Size, arguments, choice, is_size, known, value_of
from s2o_compile.passes.graph.rejected import Refused, Rejected, accepted, attempt
from s2o_compile.passes.masks import views
from s2o_compile.passes.masks.index_tensor import COMPARISONS, IndexTensor, always_differ, compare

# Narrower integers wrap around at lengths this package is made for, and floats stop counting at 2**24.
INDEX_DTYPES = (torch.int64, torch.int32)


class IndexEvaluator:
    """Evaluates nodes to `IndexTensor`, or raises `Refused`; remembers both."""

    def __init__(self, mutations: Mutations) -> None:
        self._mutations = mutations
        self._values: dict[fx.Node, IndexTensor | Rejected] = {}

    def evaluate(self, argument: object) -> IndexTensor:
        """Value of a node or of a Python number, as a tensor of its shape."""
        value = value_of(argument)
        if is_size(value):
            return IndexTensor.constant(value)
        if isinstance(value, torch.SymInt):
            raise Refused("%s is a number computed at run time", argument)
        if not isinstance(argument, fx.Node) or not isinstance(value, torch.Tensor):
            raise Refused("%s is not an integer", argument)
        if argument not in self._values:
            self._values[argument] = attempt(self._checked, argument, value)
        return accepted(self._values[argument])

    def _checked(self, node: fx.Node, value: torch.Tensor) -> IndexTensor:
        tensor = self._evaluate(node, value)
        # Last, because the value is the node's own: its operands are checked by now.
        if not tensor.fits(value.dtype):
            raise _may_wrap(node, value.dtype)
        return tensor

    def _evaluate(self, node: fx.Node, value: torch.Tensor) -> IndexTensor:
        writer = self._mutations.writer(node)
        if writer is not None:
            raise Refused("%s is changed in place by %s", node, writer)
        if node.op in ("placeholder", "get_attr"):
            raise unknown_values(node)
        name, fill = function_name(node), self.fill(node)
        if is_floor_division(node):
            raise Refused("%s (%s) cuts positions into chunks, which only a comparison of two may do", node, name)
        if fill is None and name not in _HANDLERS and name not in views.VIEWS and name not in COMPARISONS:
            raise Refused("%s (%s) is not index arithmetic", node, name or node.op)
        if value.dtype not in (*INDEX_DTYPES, torch.bool):
            raise Refused("%s has dtype %s; only int64 and int32 count exactly", node, value.dtype)
        if isinstance(fill, int):
            return IndexTensor.constant(bool(fill) if value.dtype is torch.bool else fill, value.shape)
        if name in COMPARISONS:
            return self._constant_comparison(node, name, value)
        source = views.source(node, self.evaluate)
        if source is not None:
            return self._view(source, value)
        if name not in _HANDLERS or value.dtype is torch.bool:
            raise Refused("%s (%s) is not index arithmetic", node, name or node.op)
        return _HANDLERS[name](self, node, value)

    def _view(self, source: views.Source, value: torch.Tensor) -> IndexTensor:
        base = self.evaluate(source.node)
        viewed = base.at(source.indices, value.shape)
        if value.dtype is torch.bool and value_of(source.node).dtype is not torch.bool:
            if viewed.is_constant and isinstance(viewed.const, int):
                return IndexTensor.constant(bool(viewed.const), value.shape)
            raise Refused("%s is not a constant", source.node)
        return viewed

    def _constant_comparison(self, node: fx.Node, name: str, value: torch.Tensor) -> IndexTensor:
        operands = self.operands(node, value.shape)
        for result, comparison in ((True, name), (False, COMPARISONS[name])):
            bounds = compare(comparison, *operands)
            if bounds and all(known(bound.minimum >= 0) for bound in bounds):
                return IndexTensor.constant(result, value.shape)
        if name in ("eq", "ne") and always_differ(*operands):
            return IndexTensor.constant(name == "ne", value.shape)
        raise Refused("%s (%s) is not a constant", node, name)

    def fill(self, argument: object) -> float | int | bool | None:
        """The number that fills a tensor (``ones``, ``new_full``, ``zeros_like``), or a plain number; else None."""
        if isinstance(argument, bool | int | float):
            return argument
        settled = attempt(self._mutations.settled, argument) if isinstance(argument, fx.Node) else None
        return self.filled(settled) if settled else None

    def is_written(self, node: fx.Node) -> bool:
        """Whether a tensor is changed in place."""
        return self._mutations.writer(node) is not None

    def filled(self, argument: fx.Node) -> float | int | bool | None:
        """The number that a node itself fills its tensor with, whatever is written there later."""
        name = function_name(argument)
        if name in ("ones", "new_ones", "ones_like"):
            return 1
        if name in ("zeros", "new_zeros", "zeros_like", "zero"):
            return 0
        if name not in ("full", "new_full", "full_like", "tensor", "scalar_tensor", "fill"):
            return None
        position = {"new_full": 2, "full": 1, "full_like": 1, "fill": 1}.get(name, 0)
        fill = argument.args[position] if len(argument.args) > position else argument.kwargs.get("fill_value")
        return held(fill, value_of(argument).dtype)

    def is_bits(self, argument: object) -> bool:
        """Whether a tensor provably holds nothing but 0 and 1 (False and True).

        ``1 - mask`` is the opposite of a mask, and ``mask * x`` is a choice, only for these. An integer attention mask
        that enters the graph may hold any number.
        """
        fill = self.fill(argument)
        if fill is not None:
            return fill in (0, 1)
        value = value_of(argument)
        if not isinstance(argument, fx.Node) or not isinstance(value, torch.Tensor):
            return False
        if value.dtype is torch.bool:
            return True
        if self.is_written(argument):
            return False
        name, complemented = function_name(argument), self.complement(argument)
        if name in COMPARISONS:
            return True
        if complemented is not None:
            return self.is_bits(complemented)
        if name == "mul" and len(argument.args) == 2:
            return all(map(self.is_bits, argument.args))
        if name == "where" and (arms := choice(argument)) is not None:
            return all(map(self.is_bits, arms[1:]))
        if name in ("tril", "triu") and argument.args:
            return self.is_bits(argument.args[0])
        source = attempt(views.source, argument, self.evaluate)
        return bool(source) and self.is_bits(source.node)

    def complement(self, node: fx.Node) -> fx.Node | None:
        """``x`` of ``1 - x``, if the node is that."""
        name = function_name(node)
        if name not in ("sub", "rsub") or len(node.args) != 2 or node.kwargs:
            return None
        one, other = node.args if name == "sub" else node.args[::-1]
        return other if isinstance(other, fx.Node) and self.fill(one) == 1 else None

    def less_one(self, node: object) -> fx.Node | None:
        """``x`` of ``x - 1``, if the node is that."""
        if not isinstance(node, fx.Node) or function_name(node) != "sub" or len(node.args) != 2 or node.kwargs:
            return None
        other, one = node.args
        if self.fill(one) != 1 or self.is_written(node) or not value_of(node).dtype.is_signed:
            return None  # 0 - 1 is 255 in uint8
        return other if isinstance(other, fx.Node) else None

    def operands(self, node: fx.Node, shape: Sequence[Size]) -> tuple[IndexTensor, IndexTensor]:
        """The two operands of a node, broadcast to its shape."""
        arguments = (*node.args, *(node.kwargs[key] for key in ("input", "other") if key in node.kwargs))
        if len(arguments) < 2:
            raise Refused("%s has an unexpected signature", node)
        left, right = self.evaluate(arguments[0]), self.evaluate(arguments[1])
        dtype = promoted(*arguments[:2])
        if dtype is not None and not (left.fits(dtype) and right.fits(dtype)):
            raise _may_wrap(node, dtype)
        return left.broadcast(shape), right.broadcast(shape)


def held(number: object, dtype: torch.dtype) -> float | int | bool | None:
    """A number as a tensor of a dtype holds it: 0.3 in bfloat16 is another one; None if it is not known."""
    if not isinstance(number, bool | int | float) or dtype.is_complex:
        return None
    integer = dtype is not torch.bool and not dtype.is_floating_point
    rounds = integer and (isinstance(number, float) or not IndexTensor.constant(number).fits(dtype))
    underflows = 0 < abs(number) < 1e-4  # may be zero in half precision
    if rounds or underflows:
        return None
    return torch.tensor(number, dtype=torch.float64).to(dtype).item() if dtype.is_floating_point else number


def promoted(left: object, right: object) -> torch.dtype | None:
    """The dtype in which torch computes with two arguments, at least one of them a tensor; None for two numbers.

    A tensor without dimensions counts like a number there: int64 beside an int32 tensor, it is cast to int32.
    """
    tensors = [value for value in (value_of(left), value_of(right)) if isinstance(value, torch.Tensor)]
    if len(tensors) == 2:
        return torch.result_type(*tensors)
    return tensors[0].dtype if tensors and tensors[0].dtype is not torch.bool else None


def _may_wrap(node: fx.Node, dtype: torch.dtype) -> Refused:
    return Refused("%s may leave the range of %s, where numbers wrap around", node, dtype)


def is_floor_division(node: fx.Node) -> bool:
    """Whether a node divides and rounds down."""
    name = function_name(node)
    return name in ("floordiv", "floor_divide") or (name == "div" and node.kwargs.get("rounding_mode") == "floor")


def unknown_values(node: fx.Node) -> Refused:
    """The reason why an input's values prove nothing."""
    kind = "graph input" if node.op == "placeholder" else "stored tensor"
    if "position" in str(node.target):
        return Refused(
            "it depends on the values of the %s %s; position ids may pack several sequences into one row: leave them "
            "unset if each row is one sequence",
            kind,
            node.target,
        )
    return Refused("it depends on the values of the %s %s, unknown at compile time", kind, node.target)


def _arange(evaluator: IndexEvaluator, node: fx.Node, value: torch.Tensor) -> IndexTensor:
    arguments = list(node.args) + [node.kwargs[key] for key in ("start", "end", "step") if key in node.kwargs]
    if len(node.args) == 1 and "start" in node.kwargs:
        raise Refused("%s (arange) has an unexpected signature", node)
    start = arguments[0] if len(arguments) > 1 else 0
    step = arguments[2] if len(arguments) > 2 else 1
    first = evaluator.evaluate(start)
    if not isinstance(step, int):
        raise Refused("%s (arange) has a step that is no constant integer", node)
    return IndexTensor(tuple(value.shape), first.const, (step,))


def _add(evaluator: IndexEvaluator, node: fx.Node, value: torch.Tensor) -> IndexTensor:
    operands = evaluator.operands(node, value.shape)
    if node.kwargs.get("alpha", 1) != 1 or len(node.args) > 2:
        raise Refused("%s scales its operand (alpha)", node)
    name = function_name(node)
    left, right = operands[::-1] if name == "rsub" else operands
    return left.plus(right, 1 if name in ("add", "radd") else -1)


def _mul(evaluator: IndexEvaluator, node: fx.Node, value: torch.Tensor) -> IndexTensor:
    operands = evaluator.operands(node, value.shape)
    for factor, other in (operands, operands[::-1]):
        if factor.is_constant and isinstance(factor.const, int):
            return other.times(factor.const)
    raise Refused("%s multiplies two index tensors", node)


def _neg(evaluator: IndexEvaluator, node: fx.Node, value: torch.Tensor) -> IndexTensor:
    return evaluator.evaluate(node.args[0]).times(-1)


def _cumsum(evaluator: IndexEvaluator, node: fx.Node, value: torch.Tensor) -> IndexTensor:
    operand = evaluator.evaluate(node.args[0])
    _, dim = arguments(node, "input", "dim")
    if not operand.is_constant or not isinstance(operand.const, int) or not isinstance(dim, int):
        raise Refused("%s sums values that are not one constant", node)
    count = IndexTensor.axis(value.shape, dim % value.ndim).plus(IndexTensor.constant(1, value.shape))
    return count.times(operand.const)


def _diff(evaluator: IndexEvaluator, node: fx.Node, value: torch.Tensor) -> IndexTensor:
    operand = evaluator.evaluate(node.args[0])
    _, count, dim, prepend, append = arguments(node, "input", "n", "dim", "prepend", "append")
    dim = -1 if dim is None else dim
    if count not in (None, 1) or append is not None or not isinstance(dim, int):
        raise Refused("%s (diff) is not a plain first difference", node)
    dim %= value.ndim
    step = operand.steps[dim]
    if prepend is not None:  # [f - step, f, f + step, ...] keeps one difference everywhere
        first = evaluator.evaluate(prepend)
        size_one = len(first.shape) == value.ndim and known(first.shape[dim] == 1)
        others = all(a == b for d, (a, b) in enumerate(zip(first.steps, operand.steps, strict=False)) if d != dim)
        if not (size_one and others and known(operand.const - first.const == step)):
            raise Refused("%s (diff) prepends a value that does not continue the sequence", node)
    return IndexTensor.constant(step, value.shape)


_HANDLERS: dict[str, Callable[[IndexEvaluator, fx.Node, torch.Tensor], IndexTensor]] = {
    "arange": _arange,
    **dict.fromkeys(("add", "radd", "sub", "rsub"), _add),
    **dict.fromkeys(("mul", "rmul"), _mul),
    "neg": _neg,
    "cumsum": _cumsum,
    "diff": _diff,
}
