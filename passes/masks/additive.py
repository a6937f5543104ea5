"""Float masks that are added to the scores: 0 where a key is visible, and a number that hides where it is not.

The number matters for a fully masked row, one that sees no key. Under -inf its output is zero. Beside a finite number
as large as ``finfo(float32).min`` all scores vanish. All keys then weigh the same, and the output is the mean of all
values, padding included. Two such masks added up hide some keys by that number and others by twice as much, which
overflows. The output is then neither the mean nor zero, so every row must see a key. So it must under -1e9, which
hides a key unless scores differ by a billion, but does not absorb its score. -1e4 hides nothing for certain.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from s2o_compile.kernels.core.mask_band import ABSORBS
from s2o_compile.passes.graph.calls import function_name
from s2o_compile.passes.graph.mutations import Mutations
from s2o_compile.passes.graph.nodes import choice, value_of
from s2o_compile.passes.graph.rejected import Refused, attempt
from s2o_compile.passes.masks import joins, views
from s2o_compile.passes.masks.index_tensor import IndexTensor, broadcast_indices
from s2o_compile.passes.masks.term import Term, Terms
from s2o_compile.passes.masks.terms import TermEvaluator, is_bool_of, spread, written_in_part

ABSORBING = (torch.float32, torch.bfloat16)
"""In these dtypes a score vanishes beside the smallest number; float16's -65504 plus a score is another number."""
# The one numeric assumption of the passes: no score that a row sees lies a billion below one that it does not see. Then
# exp(hidden - seen) is zero in every dtype. -1e9 in its coarsest dtype.
_OUTWEIGHS = torch.tensor(-1e9, dtype=torch.bfloat16).item()


def hides(number: float, dtype: torch.dtype) -> bool:
    """Whether a number, added to a score of a dtype or put in its place, hides it behind every score that is seen."""
    return number <= (_OUTWEIGHS if dtype in ABSORBING else torch.finfo(dtype).min)


@dataclass(frozen=True, eq=False)
class AdditiveMask:
    """A float tensor that is 0 where all terms hold.

    Attributes:
        terms: The terms that make a key visible.
        hidden: The numbers that may be added elsewhere; empty if no key is hidden.
        dtype: Its dtype.
    """

    terms: Terms
    hidden: frozenset[float]
    dtype: torch.dtype

    @property
    def fully_masked(self) -> str | None:
        """The output of a fully masked row: "zeros", "mean" of all values, or None, neither."""
        if self.hidden <= {-math.inf}:
            return "zeros"
        return "mean" if len(self.hidden) == 1 and max(self.hidden) <= ABSORBS and self.dtype in ABSORBING else None

    def at(self, indices: Sequence[IndexTensor], value: torch.Tensor) -> AdditiveMask:
        """The mask seen through a view or a cast."""
        terms = tuple(term.at(indices, value.shape) for term in self.terms)
        return AdditiveMask(terms, rounded(self.hidden, value.dtype), value.dtype)


class AdditiveEvaluator:
    """Evaluates float nodes to `AdditiveMask`, or raises `Refused`."""

    def __init__(self, terms: TermEvaluator, mutations: Mutations) -> None:
        self._terms = terms
        self._mutations = mutations
        self._indices = terms.indices
        self._fill = terms.indices.fill

    def evaluate(self, node: fx.Node) -> AdditiveMask:
        """The mask that a float node is."""
        settled = self._mutations.settled(node)
        name = function_name(settled)
        value = value_of(settled.args[0] if name == "setitem" else settled)
        if not isinstance(value, torch.Tensor) or not value.dtype.is_floating_point:
            raise _numbers(settled, name)
        fill = self._indices.filled(settled)
        if fill is not None:
            if fill != 0:
                raise _numbers(settled, name)
            return AdditiveMask((), frozenset(), value.dtype)
        with self._mutations.before(settled):
            if name not in ("triu", "tril") or not settled.args:
                return self._take_apart(settled, name, value)
            hidden = self._hiding(settled.args[0], value.dtype)
        return self._choice(settled, hidden, value, negated=True)

    def _take_apart(self, node: fx.Node, name: str, value: torch.Tensor) -> AdditiveMask:
        try:
            source = views.source(node, self._indices.evaluate)
        except Refused:
            if isinstance(node.args[0], fx.Node):
                self.evaluate(node.args[0])  # what it views may be no mask at all
            raise
        if source is not None:
            return self.evaluate(source.node).at(source.indices, value)
        if name == "where" and (arms := choice(node)) is not None:
            condition, chosen, otherwise = arms
            for kept, fill, negated in ((chosen, otherwise, False), (otherwise, chosen, True)):
                hidden = self._hiding(fill, value.dtype)
                if hidden is not None:
                    return self._hide(kept, condition, hidden, value, negated)
            raise self._outweighed(node, arms[1:], name)
        if name in ("masked_fill", "setitem") and len(node.args) == 3 and not node.kwargs:
            base, condition, fill = node.args
            hidden = self._hiding(fill, value.dtype)
            if hidden is None:
                raise self._outweighed(node, (fill,), name)
            if name == "setitem" and not is_bool_of(value_of(condition), value.shape):
                raise written_in_part(base, node)
            if self._is_truth_of(condition, base):
                return self._choice(condition, hidden, value, negated=True)
            return self._hide(base, condition, hidden, value, True)
        if name == "mul" and len(node.args) == 2:
            for factor, fill in (node.args, node.args[::-1]):
                number, hidden = self._fill(fill), self._hiding(fill, value.dtype)  # 0 * -inf is NaN
                bits = self._indices.less_one(factor)
                if number is not None and bits is not None and self._indices.is_bits(bits):  # (mask - 1) * 1e9
                    hidden = self._hiding(-number, value.dtype)
                    if hidden is None or hidden == -math.inf:
                        raise self._outweighed(node, (-number,), name)
                    return self._choice(bits, hidden, value, negated=False)
                if number is None or hidden == -math.inf or not self._indices.is_bits(factor):
                    continue
                if hidden is not None:
                    return self._choice(factor, hidden, value, negated=True)
                if isinstance(factor, fx.Node) and attempt(self._terms.terms, factor, negated=True) == ():
                    return AdditiveMask((), frozenset(), value.dtype)  # 0 everywhere
                raise self._outweighed(node, (fill,), name)
        if name == "log" and len(node.args) == 1 and self._indices.is_bits(node.args[0]):
            return self._choice(node.args[0], -math.inf, value, negated=False)
        joined = joins.read(node)
        if joined is not None:
            return self._joined(joined, value)
        if name in ("add", "minimum", "min") and len(node.args) == 2 and not node.kwargs:
            left, right = (self._operand(argument, value) for argument in node.args)
            hidden = left.hidden | right.hidden
            if name == "add" and left.hidden and right.hidden:
                hidden |= rounded({a + b for a in left.hidden for b in right.hidden}, value.dtype)
            return AdditiveMask((*left.terms, *right.terms), hidden, value.dtype)
        raise _numbers(node, name)

    def _outweighed(self, node: fx.Node, fills: Sequence[object], name: str) -> Refused:
        """Why a mask whose numbers are not low enough proves nothing."""
        numbers = [number for fill in fills if (number := self._fill(fill)) is not None and number < -1]
        if not numbers:
            return _numbers(node, name)
        return Refused(
            "%s hides keys by %s, which large scores outweigh; use -inf or torch.finfo(dtype).min", node, min(numbers)
        )

    def _hiding(self, fill: object, dtype: torch.dtype) -> float | None:
        """A number that hides a key, as the dtype holds it; None if the argument is no such number."""
        number = self._fill(fill)
        if number is None or isinstance(number, bool):
            return None
        (number,) = rounded((number,), dtype)
        return number if hides(number, dtype) else None

    def _choice(self, condition: object, hidden: float | None, value: torch.Tensor, *, negated: bool) -> AdditiveMask:
        """0 where the condition holds (or, if negated, does not), a number that hides elsewhere."""
        if hidden is None or not isinstance(condition, fx.Node) or not isinstance(value_of(condition), torch.Tensor):
            raise Refused(
                "%s adds numbers to the scores; only 0 where a key is visible and -inf where it is not is a mask",
                condition,
            )
        terms = self._terms.terms(condition, negated=negated)
        indices = broadcast_indices(value_of(condition).shape, value.shape)
        terms = tuple(term.at(indices, value.shape) for term in terms)
        return AdditiveMask(terms, frozenset((hidden,)), value.dtype)

    def _hide(
        self, base: object, condition: object, hidden: float | None, value: torch.Tensor, negated: bool
    ) -> AdditiveMask:
        """A mask in which a condition hides more keys: they get the number, whatever they had."""
        inner = self._operand(base, value)
        chosen = self._choice(condition, hidden, value, negated=negated)
        return AdditiveMask((*inner.terms, *chosen.terms), inner.hidden | chosen.hidden, value.dtype)

    def _joined(self, joined: joins.Join, value: torch.Tensor) -> AdditiveMask:
        """A mask of parts that stand behind one another."""
        terms: list[Term] = []
        hidden: frozenset[float] = frozenset()
        for part in joined.parts:
            if self._fill(part.source) == 0:
                continue
            if self._hiding(part.source, value.dtype) is not None or not isinstance(part.source, fx.Node):
                raise Refused("%s joins a mask and keys that nobody sees, or that numbers are added to", joined.node)
            mask = self.evaluate(part.source)
            terms += spread(joined, part, mask.terms)
            hidden |= rounded(mask.hidden, value.dtype)
        return AdditiveMask(tuple(terms), hidden, value.dtype)

    def _operand(self, argument: object, value: torch.Tensor) -> AdditiveMask:
        """An operand broadcast and promoted to a result."""
        if self._fill(argument) == 0:
            return AdditiveMask((), frozenset(), value.dtype)
        if not isinstance(argument, fx.Node) or not isinstance(value_of(argument), torch.Tensor):
            raise Refused("%s adds numbers to the scores", argument)
        return self.evaluate(argument).at(broadcast_indices(value_of(argument).shape, value.shape), value)

    def _is_truth_of(self, condition: object, base: object) -> bool:
        """Whether a condition is ``base != 0``: then base is 0 wherever the condition does not hold."""
        if not isinstance(condition, fx.Node) or not isinstance(base, fx.Node) or condition.args[:1] != (base,):
            return False
        if value_of(condition).dtype is not torch.bool or any(map(self._indices.is_written, (condition, base))):
            return False
        name = function_name(condition)
        return name in views.CASTS or (name == "ne" and len(condition.args) == 2 and self._fill(condition.args[1]) == 0)


def _numbers(node: fx.Node, name: str) -> Refused:
    if node.op in ("placeholder", "get_attr"):
        return Refused(
            "%s enters the graph as it is and adds numbers to the scores: a position bias, or a mask that was made "
            "elsewhere; let the model make its mask of a 2-D attention_mask, inside the compiled region",
            node,
        )
    return Refused(
        "%s (%s) adds numbers to the scores, as ALiBi and other position biases do, which the sparse operator does not "
        "have; a float mask holds only 0 where a key is visible and -inf where it is not",
        node,
        name or node.op,
    )


def rounded(numbers: Iterable[float], dtype: torch.dtype) -> frozenset[float]:
    """Numbers as a tensor of a floating dtype holds them."""
    return frozenset(torch.tensor(number, dtype=torch.float64).to(dtype).item() for number in numbers)
