"""Taking a boolean mask apart: the conjunction of terms that says which elements of a tensor are True.

A term is either a comparison of index tensors, kept as ``index >= 0``, or a look-up in a tensor whose values are
unknown (a padding mask, say), kept as that tensor and the position read. Anything not understood is a look-up in itself
with the reason remembered: whether that matters is for the prover to decide, from what the look-up varies along.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from s2o_compile.passes import views
from s2o_compile.passes.graph_values import Mutations, Size, function_name, known, value_of
from s2o_compile.passes.index_arithmetic import IndexEvaluator, unknown_values
from s2o_compile.passes.index_tensor import COMPARISONS, IndexTensor, always_differ, broadcast_indices, compare
from s2o_compile.passes.site import Rejected


@dataclass(frozen=True, eq=False)
class Comparison:
    """True where ``index >= 0``."""

    node: fx.Node
    index: IndexTensor

    def at(self, indices: Sequence[IndexTensor], shape: Sequence[Size]) -> Comparison:
        """The term seen through a view."""
        return Comparison(self.node, self.index.at(indices, shape))


@dataclass(frozen=True, eq=False)
class LookUp:
    """True where ``node[indices]`` is (or, if ``negated``, is not).

    Attributes:
        node: A bool tensor of the graph.
        indices: The position read in each of its dimensions.
        negated: Whether the values are inverted.
        why: Why the tensor was not taken apart further.
    """

    node: fx.Node
    indices: tuple[IndexTensor, ...]
    negated: bool
    why: Rejected

    def at(self, indices: Sequence[IndexTensor], shape: Sequence[Size]) -> LookUp:
        """The term seen through a view."""
        return LookUp(self.node, tuple(index.at(indices, shape) for index in self.indices), self.negated, self.why)


Terms = tuple[Comparison | LookUp, ...]


class TermEvaluator:
    """Evaluates bool nodes to conjunctions of terms, or `Rejected`; remembers what it has evaluated.

    Args:
        mutations: The in-place writes of the graph.
    """

    def __init__(self, mutations: Mutations) -> None:
        self._mutations = mutations
        self.indices = IndexEvaluator(mutations)
        self._terms: dict[tuple[fx.Node, bool], Terms | Rejected] = {}

    def terms(self, node: fx.Node, *, negated: bool = False) -> Terms | Rejected:
        """The terms that make a tensor (or, if ``negated``, its inverse) true; numbers count as ``!= 0``."""
        if (node, negated) not in self._terms:
            self._terms[node, negated] = self._evaluate(node, negated)
        return self._terms[node, negated]

    def _evaluate(self, node: fx.Node, negated: bool) -> Terms | Rejected:
        value = value_of(node)
        if not isinstance(value, torch.Tensor):
            return Rejected("%s is not a tensor", node)
        writer = self._mutations.writer(node)
        if writer is not None:
            return Rejected("%s is changed in place by %s", node, writer)
        if node.op in ("placeholder", "get_attr"):
            return self._leaf(node, negated, unknown_values(node))
        fill = self.indices.fill(node)
        if fill is not None:
            return () if bool(fill) != negated else Rejected("%s is False everywhere", node)
        taken_apart = self._take_apart(node, value, negated)
        return self._leaf(node, negated, taken_apart) if isinstance(taken_apart, Rejected) else taken_apart

    def _leaf(self, node: fx.Node, negated: bool, why: Rejected) -> Terms | Rejected:
        shape = value_of(node).shape
        if value_of(node).dtype is not torch.bool:
            return why  # its consumer, which makes it bool, becomes the leaf
        return (LookUp(node, tuple(IndexTensor.axis(shape, dim) for dim in range(len(shape))), negated, why),)

    def _take_apart(self, node: fx.Node, value: torch.Tensor, negated: bool) -> Terms | Rejected:
        name = function_name(node)
        source = views.source(node, self.indices)
        if source is not None:
            return self._view(source, name, value, negated)
        if name == "invert" and value.dtype is torch.bool:
            return self._argument(node.args[0], value.shape, not negated)
        if name in ("and", "or") or (name == "mul" and value.dtype is torch.bool):
            if value.dtype is not torch.bool:
                return Rejected("%s works on the bits of integers", node)
            if (name == "or") != negated:  # De Morgan: only the inverse of a union is a conjunction
                return Rejected("%s (%s) is a union of masks", node, name)
            return self._conjunction([(argument, negated) for argument in node.args[:2]], value.shape)
        if name in COMPARISONS:
            return self._comparison(node, name, value, negated)
        if name in ("tril", "triu"):
            return self._triangle(node, name, value, negated)
        if name == "where" and len(node.args) == 3 and value.dtype is torch.bool:
            return self._where(node, value.shape, negated)
        if name == "masked_fill" and value.dtype is torch.bool and not node.kwargs:
            base, condition, fill = node.args
            if self.indices.fill(fill) is None or bool(self.indices.fill(fill)) != negated:
                return Rejected("%s (masked_fill) is a union of masks", node)
            return self._conjunction([(base, negated), (condition, True)], value.shape)
        return Rejected("%s (%s) is not a mask this pass understands", node, name or node.op)

    def _view(self, source: views.Source | Rejected, name: str, value: torch.Tensor, negated: bool) -> Terms | Rejected:
        if isinstance(source, Rejected):
            return source
        base = value_of(source.node)
        if base.dtype is not torch.bool and value.dtype not in (base.dtype, torch.bool):
            return Rejected("%s rounds its values", source.node)  # a cast from 0.5 to int makes a zero
        terms = self.terms(source.node, negated=negated)
        return terms if isinstance(terms, Rejected) else tuple(term.at(source.indices, value.shape) for term in terms)

    def _argument(self, argument: object, shape: Sequence[Size], negated: bool) -> Terms | Rejected:
        if isinstance(argument, bool):
            return () if argument != negated else Rejected("the mask is False everywhere")
        if not isinstance(argument, fx.Node) or not isinstance(value_of(argument), torch.Tensor):
            return Rejected("%s is not a tensor", argument)
        terms = self.terms(argument, negated=negated)
        if isinstance(terms, Rejected):
            return terms
        indices = broadcast_indices(value_of(argument).shape, shape)
        return tuple(term.at(indices, shape) for term in terms)

    def _conjunction(self, arguments: Sequence[tuple[object, bool]], shape: Sequence[Size]) -> Terms | Rejected:
        found: list[Comparison | LookUp] = []
        for argument, negated in arguments:
            terms = self._argument(argument, shape, negated)
            if isinstance(terms, Rejected):
                return terms
            found += terms
        return tuple(found)

    def _comparison(self, node: fx.Node, name: str, value: torch.Tensor, negated: bool) -> Terms | Rejected:
        operands = self.indices.operands(node, value.shape)
        if isinstance(operands, Rejected):
            if name in ("eq", "ne") and len(node.args) == 2 and self.indices.fill(node.args[1]) == 0:
                truth = self._argument(node.args[0], value.shape, negated != (name == "eq"))  # tril(ones) == 0
                return operands if isinstance(truth, Rejected) else truth
            return operands
        spelling = COMPARISONS[name] if negated else name
        bounds = compare(spelling, *operands)
        if spelling == "ne":
            if always_differ(*operands):
                return ()
            return Rejected("%s (%s) is a union of masks", node, name)
        if any(known(bound.maximum < 0) for bound in bounds):
            return Rejected("%s is False everywhere", node)
        return tuple(Comparison(node, bound) for bound in bounds if not known(bound.minimum >= 0))

    def _triangle(self, node: fx.Node, name: str, value: torch.Tensor, negated: bool) -> Terms | Rejected:
        if not node.args or not self.indices.fill(node.args[0]):
            return Rejected("%s (%s) is not the triangle of a constant", node, name)
        diagonal = self.indices.evaluate(node.args[1] if len(node.args) > 1 else node.kwargs.get("diagonal", 0))
        if isinstance(diagonal, Rejected):
            return diagonal
        row, column = (IndexTensor.axis(value.shape, value.ndim + dim) for dim in (-2, -1))
        limit = row.plus(diagonal.broadcast(value.shape))
        kept = "le" if name == "tril" else "ge"
        bounds = compare(COMPARISONS[kept] if negated else kept, column, limit)
        return tuple(Comparison(node, bound) for bound in bounds if not known(bound.minimum >= 0))

    def _where(self, node: fx.Node, shape: Sequence[Size], negated: bool) -> Terms | Rejected:
        condition, chosen, otherwise = node.args
        first, second = self.indices.fill(chosen), self.indices.fill(otherwise)
        if second is not None and bool(second) == negated:  # where(c, x, False) = c & x
            return self._conjunction([(condition, False), (chosen, negated)], shape)
        if first is not None and bool(first) == negated:  # where(c, False, x) = ~c & x
            return self._conjunction([(condition, True), (otherwise, negated)], shape)
        return Rejected("%s (where) is a union of masks", node)
