"""Takes a boolean mask apart into a conjunction of terms, which says which elements of a tensor are True.

A term compares index tensors (``index >= 0``), or the chunks that two of them lie in. Or it looks up a tensor of
unknown values, such as a padding mask. An unrecognised tensor becomes an opaque `LookUp` term that carries the reason.
Whether the reason matters depends on the axes that the look-up varies along, and the prover decides it.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence

import torch
from torch import fx

from s2o_compile.kernels.core.shards import held_sequence
from s2o_compile.passes.graph.calls import function_name
from s2o_compile.passes.graph.mutations import Mutations
from s2o_compile.passes.graph.nodes import Size, choice, known, same_sizes, value_of
from s2o_compile.passes.graph.rejected import Refused, Rejected, accepted, attempt
from s2o_compile.passes.masks import documents, joins, views
from s2o_compile.passes.masks.index_arithmetic import (
    INDEX_DTYPES,
    IndexEvaluator,
    held,
    is_floor_division,
    promoted,
    unknown_values,
)
from s2o_compile.passes.masks.index_tensor import COMPARISONS, IndexTensor, always_differ, broadcast_indices, compare
from s2o_compile.passes.masks.term import Comparison, LookUp, SameChunk, SameDocument, Term, Terms

_MIRRORED = {"le": "ge", "lt": "gt", "ge": "le", "gt": "lt", "eq": "eq", "ne": "ne"}  # a < b is b > a


class TermEvaluator:
    """Evaluates bool nodes to conjunctions of terms, or raises `Refused`; remembers both."""

    def __init__(self, mutations: Mutations) -> None:
        self._mutations = mutations
        self.indices = IndexEvaluator(mutations)
        self._terms: dict[tuple[fx.Node, bool], Terms | Rejected] = {}

    def terms(self, node: fx.Node, *, negated: bool = False) -> Terms:
        """The terms that make a tensor (or, if ``negated``, its inverse) true; numbers count as ``!= 0``."""
        settled = self._mutations.settled(node)
        if (settled, negated) not in self._terms:
            self._terms[settled, negated] = attempt(self._evaluate, settled, negated)
        return accepted(self._terms[settled, negated])

    def _evaluate(self, node: fx.Node, negated: bool) -> Terms:
        value = value_of(node.args[0] if function_name(node) == "setitem" else node)
        if not isinstance(value, torch.Tensor):
            raise Refused("%s is not a tensor", node)
        if node.op in ("placeholder", "get_attr"):
            return self._leaf(node, negated, unknown_values(node))
        fill = self.indices.filled(node)
        if fill is not None:
            if bool(fill) == negated:
                raise Refused("%s is False everywhere", node)
            return ()
        try:
            with self._mutations.before(node):
                return self._take_apart(node, value, negated)
        except Refused as error:
            return self._leaf(node, negated, error)

    def _leaf(self, node: fx.Node, negated: bool, error: Refused) -> Terms:
        # Written to, it would be read in a later state; of numbers, the consumer that makes them bool is the leaf.
        if self.indices.is_written(node) or value_of(node).dtype is not torch.bool:
            raise error
        shape, along = value_of(node).shape, self._along(node)
        positions = (
            IndexTensor.axis(shape, dim) if dim in along else IndexTensor.constant(0, shape)
            for dim in range(len(shape))
        )
        return (LookUp(node, tuple(positions), negated, error.why),)

    def _along(self, node: fx.Node) -> set[int]:
        """The dimensions that a tensor may vary along.

        One that was repeated varies as its source (a padding mask that was repeated for the heads), and so does an
        expanded one that is compared with a number.
        """
        name, shape = function_name(node), value_of(node).shape
        dims = set(range(len(shape)))
        if name in ("repeat", "tile") and isinstance(node.args[0], fx.Node):
            terms = attempt(self.terms, node.args[0])
            if isinstance(terms, Rejected):
                return dims
            lead = len(shape) - value_of(node.args[0]).ndim
            return {
                dim for dim in dims - set(range(lead)) if any(i.steps[dim - lead] for t in terms for i in t.indices)
            }
        if name not in COMPARISONS or len(node.args) != 2 or self.indices.fill(node.args[1]) is None:
            return dims
        compared = node.args[0]
        if not isinstance(compared, fx.Node) or not same_sizes(value_of(compared).shape, shape):
            return dims
        seen = None
        for source in views.chain(compared, self.indices.evaluate):
            if self.indices.is_written(source.node):  # in a part of it, maybe: a copy varies as it was written
                break
            seen = source
        return dims if seen is None else {dim for dim in dims if any(index.steps[dim] for index in seen.indices)}

    def _take_apart(self, node: fx.Node, value: torch.Tensor, negated: bool) -> Terms:
        name = function_name(node)
        source = views.source(node, self.indices.evaluate)
        if source is not None:
            base = value_of(source.node)
            kept = base.dtype is torch.bool or value.dtype in (base.dtype, torch.bool)
            if not kept and not self.indices.is_bits(source.node):
                raise Refused("%s rounds its values", source.node)  # a cast from 0.5 to int makes a zero
            return tuple(term.at(source.indices, value.shape) for term in self.terms(source.node, negated=negated))
        if name == "invert" and value.dtype is torch.bool:
            return self._argument(node.args[0], value.shape, not negated)
        complemented = self.indices.complement(node)
        if complemented is not None and self.indices.is_bits(complemented):
            return self._argument(complemented, value.shape, not negated)
        if name in ("and", "or") or (name == "mul" and self.indices.is_bits(node)):
            if value.dtype is not torch.bool and name != "mul":
                raise Refused("%s works on the bits of integers", node)
            if (name == "or") != negated:  # De Morgan: only the inverse of a union is a conjunction
                raise _union(node, name)
            return self._conjunction([(argument, negated) for argument in node.args[:2]], value.shape)
        if name in COMPARISONS:
            return self._comparison(node, name, value, negated)
        if name in ("tril", "triu"):
            return self._triangle(node, name, value, negated)
        joined = joins.read(node)
        if joined is not None:
            return self._joined(joined, negated)
        if name == "where" and choice(node) is not None and self.indices.is_bits(node):
            return self._where(node, value.shape, negated)
        if name == "masked_fill" and value.dtype is torch.bool and not node.kwargs:
            base, condition, fill = node.args
            if self.indices.fill(fill) is None or bool(self.indices.fill(fill)) != negated:
                raise _union(node, name)
            return self._conjunction([(base, negated), (condition, True)], value.shape)
        if name == "setitem" and value.dtype is torch.bool:
            return self._setitem(node, value.shape, negated)
        if name == "remove_batch_dim":
            raise Refused("%s is made under torch.vmap, which hides its pattern; make it by broadcasting instead", node)
        raise Refused("%s (%s) is not a mask this pass understands", node, name or node.op)

    def _argument(self, argument: object, shape: Sequence[Size], negated: bool) -> Terms:
        if isinstance(argument, bool | int | float):  # of bits
            if bool(argument) == negated:
                raise Refused("the mask is False everywhere")
            return ()
        if not isinstance(argument, fx.Node) or not isinstance(value_of(argument), torch.Tensor):
            raise Refused("%s is not a tensor", argument)
        indices = broadcast_indices(value_of(argument).shape, shape)
        return tuple(term.at(indices, shape) for term in self.terms(argument, negated=negated))

    def _conjunction(self, arguments: Sequence[tuple[object, bool]], shape: Sequence[Size]) -> Terms:
        return tuple(term for argument, negated in arguments for term in self._argument(argument, shape, negated))

    def _setitem(self, node: fx.Node, shape: Sequence[Size], negated: bool) -> Terms:
        """``mask[...] = value`` and ``mask[condition] = value``, for the whole tensor."""
        base, index, value = node.args
        items = index if isinstance(index, tuple) else (index,)
        if all(item is Ellipsis or item == slice(None) for item in items if not isinstance(item, fx.Node)):
            if not any(isinstance(item, fx.Node) for item in items):
                return self._argument(value, shape, negated)
            fill = self.indices.fill(value)
            chosen = len(items) == 1 and is_bool_of(value_of(items[0]), shape)
            if chosen and fill is not None and bool(fill) == negated:
                return self._conjunction([(base, negated), (items[0], True)], shape)
        raise written_in_part(base, node)

    def _comparison(self, node: fx.Node, name: str, value: torch.Tensor, negated: bool) -> Terms:
        comparison = COMPARISONS[name] if negated else name
        try:
            operands = self.indices.operands(node, value.shape)
        except Refused as error:
            return self._other_comparison(node, comparison, value.shape, negated, error)
        if comparison == "ne":
            if always_differ(*operands):
                return ()
            raise _union(node, name)
        return self._bounds(node, compare(comparison, *operands))

    def _bounds(self, node: fx.Node, bounds: Sequence[IndexTensor]) -> Terms:
        if any(known(bound.maximum < 0) for bound in bounds):
            raise Refused("%s is False everywhere", node)
        # A shard is shorter than its sequence: what hides none of its own keys may hide others.
        whole = held_sequence() is None
        idle = [known(bound.minimum >= 0) and (whole or not any(bound.steps)) for bound in bounds]
        return tuple(Comparison(node, (bound,)) for bound, is_idle in zip(bounds, idle, strict=True) if not is_idle)

    def _other_comparison(
        self, node: fx.Node, comparison: str, shape: Sequence[Size], negated: bool, error: Refused
    ) -> Terms:
        """A comparison of tensors that are no index tensors, one of which may be a distance or a zero."""
        if len(node.args) != 2:
            raise error
        left, right = node.args
        number = self.indices.fill(right)
        bits = number is not None and self.indices.is_bits(left)
        if bits:  # torch rounds the number first: 1 > 0.999 is False in bfloat16
            number = held(number, torch.result_type(value_of(left), value_of(right)))
        if number is not None and (bits or (number == 0 and comparison in ("eq", "ne"))):
            if_zero, if_one = (getattr(operator, comparison)(bit, number) for bit in (0, 1))
            if if_zero == if_one:
                raise Refused("%s is the same everywhere", node)
            try:
                return self._argument(left, shape, if_zero)  # tril(ones) == 0
            except Refused:
                raise error from None
        asked = comparison
        distance, limit = self._distance(left), right
        if distance is None:
            distance, limit, comparison = self._distance(right), left, _MIRRORED[comparison]
        if distance is None and comparison == "eq":
            # Both first: where one side is no quotient, the other's reason does not matter.
            first, second = attempt(self._chunk, left), attempt(self._chunk, right)
            if first is not None and second is not None:
                if isinstance(first, Rejected) and isinstance(second, Rejected):  # ids that a quotient numbers
                    tokens = documents.comparison(node, asked, shape, self.indices, negated=negated, why=error.why)
                    if isinstance(tokens, SameDocument) and tokens.tables[0] is tokens.tables[1]:
                        return (tokens,)
                (first, size), (second, other) = accepted(first), accepted(second)
                if size != other:
                    raise Refused("%s compares chunks of %s keys with chunks of %s", node, size, other)
                dtype = promoted(left, right)
                if dtype is not None and not (first.fits(dtype) and second.fits(dtype)):
                    raise Refused("%s compares chunks in %s, where their positions wrap around", node, dtype)
                return (SameChunk(node, (first.broadcast(shape), second.broadcast(shape)), size),)
        if distance is None:
            tokens = documents.comparison(node, asked, shape, self.indices, negated=negated, why=error.why)
            if tokens is None:
                raise error
            return (tokens,)
        bound = self.indices.evaluate(limit)
        if comparison not in ("le", "lt"):
            raise Refused("%s (%s of a distance) is a union of masks", node, comparison)
        dtype = promoted(left, right)
        if dtype is not None and not (distance.fits(dtype) and distance.times(-1).fits(dtype) and bound.fits(dtype)):
            raise error
        distance, bound = distance.broadcast(shape), bound.broadcast(shape)
        bounds = (*compare(comparison, distance, bound), *compare(comparison, distance.times(-1), bound))
        return self._bounds(node, bounds)

    def _counted(self, argument: object) -> Iterator[views.Source]:
        """An integer tensor and those that it is a view of, up to the first that is written to."""
        if isinstance(argument, fx.Node) and isinstance(value_of(argument), torch.Tensor):
            for seen in views.chain(argument, self.indices.evaluate):
                if value_of(seen.node).dtype not in INDEX_DTYPES or self.indices.is_written(seen.node):
                    return
                yield seen

    def _chunk(self, argument: object) -> tuple[IndexTensor, int] | None:
        """``x`` and ``c`` of ``x // c``, possibly seen through views; None if it is no such quotient."""
        for seen in self._counted(argument):
            if not is_floor_division(seen.node):
                continue
            dividend, size = seen.node.args if len(seen.node.args) == 2 else (None, None)
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise Refused("%s divides by %s, expected a positive constant", seen.node, size)
            try:
                return self.indices.evaluate(dividend).at(seen.indices, value_of(argument).shape), size
            except Refused as error:
                raise Refused(
                    "chunked attention whose chunks begin where only the inputs say (%s), as behind left padding, is a "
                    "mask that the sparse operator does not have; leave attention_mask unset where no row is padded",
                    error.why,
                ) from None
        return None

    def _distance(self, argument: object) -> IndexTensor | None:
        """``x`` of ``abs(x)``, possibly seen through views, for an index tensor x."""
        for seen in self._counted(argument):
            if function_name(seen.node) == "abs":
                distance = attempt(self.indices.evaluate, seen.node.args[0])
                return distance.at(seen.indices, value_of(argument).shape) if distance else None
        return None

    def _joined(self, joined: joins.Join, negated: bool) -> Terms:
        """A mask of parts that stand behind one another."""
        terms: list[Term] = []
        for part in joined.parts:
            if isinstance(part.source, fx.Node):
                terms += spread(joined, part, self.terms(part.source, negated=negated))
            elif bool(part.source) == negated:
                raise Refused("%s is False in a part", joined.node)
        return tuple(terms)

    def _triangle(self, node: fx.Node, name: str, value: torch.Tensor, negated: bool) -> Terms:
        if not node.args or (not self.indices.fill(node.args[0]) and negated):
            raise Refused("%s (%s) is not the triangle of a constant", node, name)
        # A triangle of another mask lets through what both do.
        inner = () if self.indices.fill(node.args[0]) else self._argument(node.args[0], value.shape, False)
        diagonal = self.indices.evaluate(node.args[1] if len(node.args) > 1 else node.kwargs.get("diagonal", 0))
        row, column = (IndexTensor.axis(value.shape, value.ndim + dim) for dim in (-2, -1))
        limit = row.plus(diagonal.broadcast(value.shape))
        kept = "le" if name == "tril" else "ge"
        bounds = compare(COMPARISONS[kept] if negated else kept, column, limit)
        return (*inner, *self._bounds(node, bounds))

    def _where(self, node: fx.Node, shape: Sequence[Size], negated: bool) -> Terms:
        condition, chosen, otherwise = choice(node) or node.args
        first, second = self.indices.fill(chosen), self.indices.fill(otherwise)
        if second is not None and bool(second) == negated:  # where(c, x, False) = c & x
            return self._conjunction([(condition, False), (chosen, negated)], shape)
        if first is not None and bool(first) == negated:  # where(c, False, x) = ~c & x
            return self._conjunction([(condition, True), (otherwise, negated)], shape)
        raise _union(node, "where")


def spread(joined: joins.Join, part: joins.Part, terms: Terms) -> Terms:
    """The terms of one part of a joined mask as terms of the whole; raises `Refused`."""
    whole = tuple(term.at(joined.indices(part), joined.shape) for term in terms)
    for term in whole:
        for other in joined.parts:
            holds = isinstance(term, Comparison) and known(joined.of(other, term.indices[0]).minimum >= 0)
            if other is not part and not holds:
                raise Refused("%s joins masks, and the bound of %s does not hold in the rest", joined.node, part.source)
    return whole


def is_bool_of(value: object, shape: Sequence[Size]) -> bool:
    """Whether a fake value is a bool tensor of a shape, for every length."""
    return isinstance(value, torch.Tensor) and value.dtype is torch.bool and same_sizes(value.shape, shape)


def written_in_part(base: object, node: fx.Node) -> Refused:
    """Says why a mask that is assembled from parts proves nothing."""
    return Refused(
        "%s is changed in place by %s, in a part of it, as masks of images or sequences packed into one row are; give "
        "each a row of its own, with padding",
        base,
        node,
    )


def _union(node: fx.Node, name: str) -> Refused:
    return Refused(
        "%s (%s) is a union of masks, as prefix-bidirectional ones are (a prefix or an image that sees all of itself, "
        "causal behind it); the sparse operator has intersections only",
        node,
        name,
    )
