"""Reads the scores of hand-written attention from a softmax back to the product of queries and keys.

    softmax( [max(x, lowest)] [x - max x] [x * c] [cat(x, sinks)] mask(x)... [cap * tanh(x)] [x * scale]... q @ k^T )

Brackets are optional. The first three may stand in any order; the order of the others is fixed. A positive constant
among the first three scales the numbers of the masks, too. Casts between floating dtypes, reshapes of leading
dimensions and additions of zero may stand anywhere, because the operator keeps its scores in float32. A tensor that is
written in place is read as the last write before the reader left it. The dimensions of all of them may stand in
another order, as an einsum leaves them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import fx

from s2o_compile.passes.frontends.checks import fixed
from s2o_compile.passes.frontends.eager import product
from s2o_compile.passes.frontends.eager.product import Order, Product
from s2o_compile.passes.graph.calls import function_name
from s2o_compile.passes.graph.nodes import arguments, choice, known, same_sizes, value_of
from s2o_compile.passes.graph.rejected import Refused, attempt
from s2o_compile.passes.masks import views
from s2o_compile.passes.masks.proof import MaskPart
from s2o_compile.passes.masks.prover import MaskProver

_COPIES = frozenset({"contiguous", "clone", "detach", "alias"})
_RESHAPES = frozenset({"view", "reshape", "unflatten", "flatten", "view_as", "unsqueeze", "squeeze"})
_ADDS = frozenset({"add", "iadd", "radd"})
_FACTORS = frozenset({"mul", "imul", "rmul", "div", "truediv", "itruediv", "divide", "true_divide"})
_FLOORS = {"max": "other", "maximum": "other", "clamp": "min", "clip": "min", "clamp_min": "min"}
_SEARCH_DEPTH = 16


@dataclass(eq=False)
class ScoreChain:
    """The steps between the product and the softmax.

    Attributes:
        product: Queries times keys.
        dim: That the softmax runs over, counted from the end.
        order: Where the scores have queries and keys.
        heads: Heads of the 4-d scores, where the product itself is [B * H, Nq, Nk]; else None.
        scale: Constant factor of the product.
        tail: The part of it that stands behind the masks and so scales their numbers, too.
        floored: Whether hidden scores are raised to the dtype's lowest number.
        factors: Further factors, each with `torch.mul` or `torch.div`: tensors constant along keys, symbolic numbers.
        softcap: Cap of ``softcap * tanh(x)``.
        masks: From the softmax back; all must let a key through. Each with the dtype of the scores that it makes.
        sinks: The tensor [..., Nq, 1] joined to the scores as one more key.
        sinks_first: Whether it stands before the keys.
        nodes: Every node of the chain, the product included, first to last.
        met: Every mask, factor and sinks tensor, with the shape of the scores that it met.
    """

    product: Product = field(init=False)
    dim: int = -1
    order: Order = None
    heads: int | None = None
    scale: float = 1.0
    tail: float = 1.0
    floored: bool = False
    factors: list[tuple[fx.Node, Callable[..., torch.Tensor]]] = field(default_factory=list)
    softcap: float | None = None
    masks: list[MaskPart] = field(default_factory=list)
    sinks: fx.Node | None = None
    sinks_first: bool = False
    nodes: list[fx.Node] = field(default_factory=list)
    met: list[tuple[fx.Node, torch.Size]] = field(default_factory=list)

    def cast(self, node: fx.Node) -> torch.dtype | None:
        """The dtype of the smallest range that scores are cast to between a node and the softmax; None if its own."""
        values = [value_of(node), *map(value_of, self.nodes)]
        dtypes = [value.dtype for value in values if isinstance(value, torch.Tensor) and value.is_floating_point()]
        least = min(dtypes, key=lambda dtype: torch.finfo(dtype).max)
        return None if least == dtypes[0] else least


def _keeps_shape(node: fx.Node, source: object) -> bool:
    before = value_of(source)
    return isinstance(before, torch.Tensor) and same_sizes(before.shape, value_of(node).shape)


def leads_to_product(node: object, depth: int = _SEARCH_DEPTH) -> bool:
    """Whether a tensor is made, element by element, of a product of its own last two dimensions: of scores."""
    if not isinstance(node, fx.Node) or depth == 0:
        return False
    matmul = product.read(node)
    if matmul is not None:
        # A projection's product reads a parameter; scores are a product of two activations.
        sides = (matmul.left.node, matmul.right.node)
        return not any(side.op == "get_attr" or isinstance(value_of(side), torch.nn.Parameter) for side in sides)
    value = value_of(node)
    if not isinstance(value, torch.Tensor) or value.ndim < 2 or node.op not in ("call_function", "call_method"):
        return False
    if function_name(node) == "cat":
        (tensors,) = arguments(node, "tensors")
        return isinstance(tensors, tuple | list) and any(leads_to_product(tensor, depth - 1) for tensor in tensors)
    return any(
        leads_to_product(source, depth - 1)
        for source in node.all_input_nodes
        if isinstance(value_of(source), torch.Tensor) and same_sizes(value_of(source).shape[-1:], value.shape[-1:])
    )


class ScoreReader:
    """Reads the scores behind softmaxes; the prover knows constants, and which tensors are written in place."""

    def __init__(self, prover: MaskProver) -> None:
        self._indices, self._mutations = prover.indices, prover.mutations

    def read(self, softmax: fx.Node, scores: fx.Node, dim: int) -> ScoreChain:
        """The chain behind ``softmax(scores, dim)``, or the first thing in it that is not understood."""
        rank = value_of(softmax).ndim
        chain = ScoreChain(nodes=[softmax], dim=dim % rank - rank)
        node = self._tail(self._plain(scores, chain), chain)
        node = self._sinks(node, chain)
        while (step := self._mask(node)) is not None:
            if not _keeps_shape(node, step[0]):
                raise Refused("%s broadcasts the scores to another shape", node)
            if chain.tail <= 0:
                raise Refused("the masked scores %s are multiplied by %s", node, chain.tail)
            chain.masks.append(replace(step[1], cast=chain.cast(node)))
            chain.nodes.append(node)
            chain.met.append((step[1].node, value_of(node).shape))
            node = self._plain(step[0], chain)
        self._scaled_product(node, chain)
        self._turn(softmax, chain)
        return chain

    def _scaled_product(self, node: fx.Node, chain: ScoreChain) -> None:
        """The rest of the chain, from the masks to the product."""
        scale, softcap = chain.tail, None
        while (matmul := product.read(node)) is None:
            name = function_name(node)
            if name == "tanh" and softcap is None:
                for factor, way in chain.factors:  # the operator's cap is a constant
                    number = fixed(factor, node)
                    if isinstance(number, fx.Node):
                        raise self._obstacle(node, name, chain)
                    scale = scale / number if way is torch.div else scale * number
                softcap, scale, chain.factors = scale, 1.0, []
                source = node.args[0]
            elif name in _FACTORS:
                source, factor = self._factor(node, name)
                if not _keeps_shape(node, source):
                    raise Refused("%s broadcasts the scores to another shape", node)
                if isinstance(factor, fx.Node):
                    chain.factors.append((factor, torch.div if "div" in name else torch.mul))
                    chain.met.append((factor, value_of(node).shape))
                else:
                    scale *= factor
            else:
                raise self._obstacle(node, name, chain)
            chain.nodes.append(node)
            node = self._plain(source, chain)
        chain.nodes.append(matmul.node)
        if matmul.tied:
            raise Refused(
                "its scores %s are summed over several dimensions, as attention that is tied over the rows of an "
                "alignment; make one dimension of them (flatten) ahead of the product",
                matmul.node,
            )
        if softcap is not None and softcap <= 0:
            raise Refused("its scores are capped at %s, expected a positive number", softcap)
        if matmul.added is not None and self._indices.fill(matmul.added) != 0:
            if softcap is not None or scale != chain.tail or chain.factors or chain.tail <= 0:
                raise Refused("%s is scaled after a tensor was added to it", matmul.node)
            dtype, cast = value_of(matmul.node).dtype, chain.cast(matmul.node)
            chain.masks.append(MaskPart(matmul.added, dtype=dtype, cast=cast))
            chain.met.append((matmul.added, value_of(matmul.node).shape))
        # cap * tanh(x * s) is the operator's cap * tanh(x * (s * cap) / cap)
        chain.scale = scale * matmul.alpha * (softcap or 1.0)
        chain.softcap, chain.product, chain.nodes = softcap, matmul, chain.nodes[::-1]

    def _turn(self, softmax: fx.Node, chain: ScoreChain) -> None:
        """Makes the dimension that the softmax runs over the keys, in whatever order the product leaves its own."""
        matmul, shape = chain.product, value_of(chain.product.node).shape
        order = product.order_of(matmul) or tuple(range(len(shape)))
        if chain.dim == order[-2] - len(shape):
            matmul = chain.product = product.turned(matmul)
            order = product.order_of(matmul) or tuple(range(len(shape)))
        if chain.dim != order[-1] - len(shape):
            raise Refused("its softmax runs over dimension %s, which is neither queries nor keys", chain.dim)
        chain.order = product.order_of(matmul)
        alike = all(same_sizes(shape, met) for met in (value_of(softmax).shape, *(met for _, met in chain.met)))
        if chain.order is not None and (not alike or chain.sinks is not None or matmul.added is not None):
            raise Refused("%s leaves the scores in another order than [..., queries, keys]", matmul.node)

    def _obstacle(self, node: fx.Node, name: str, chain: ScoreChain) -> Refused:
        """Why a step cannot stand between the product and the masks."""
        if chain.factors and self._mask(node) is not None:
            return Refused("%s masks scores before %s scales them; scale them first", node, chain.factors[-1][0])
        if name in _ADDS:
            return Refused(
                "%s (%s) adds numbers to the scores before they are scaled, a position bias or a second product, which "
                "the sparse operator does not have; two products are one of queries and keys joined along the head dim",
                node,
                name,
            )
        if name == "setitem":
            return Refused("%s writes to some of the scores; hide keys by masked_fill(condition, -inf)", node)
        if name == "getitem":
            return Refused("%s takes a part of the scores for its softmax; compute that of all scores at once", node)
        return Refused("%s (%s) stands between the scores and the softmax", node, name or node.op)

    def _tail(self, node: fx.Node, chain: ScoreChain) -> fx.Node:
        """The node behind the steps between masks and softmax: constant factors, a floor, ``x - max(x)``."""
        while True:
            name = function_name(node)
            source = None
            if name in _FACTORS:
                taken = attempt(self._factor, node, name)
                if taken and not isinstance(taken[1], fx.Node) and _keeps_shape(node, taken[0]):
                    source = taken[0]
                    chain.tail *= taken[1]
            elif name in ("sub", "isub"):
                source = self._without_maximum(node, chain)
            elif name in _FLOORS:
                source = None if chain.cast(node) else self._floored(node, name)  # cast, its floor may be -inf
                chain.floored |= source is not None
            if source is None:
                return node
            if node not in chain.nodes:
                chain.nodes.append(node)
            node = self._plain(source, chain)

    def _sinks(self, node: fx.Node, chain: ScoreChain) -> fx.Node:
        """The scores of ``cat(scores, sinks)`` or ``cat(sinks, scores)``; any other node as it is."""
        if function_name(node) != "cat":
            return node
        tensors, dim = arguments(node, "tensors", "dim|axis")
        if chain.tail != 1 or chain.floored:
            raise Refused("%s is scaled or clamped after sinks were joined to the scores", node)
        if not isinstance(tensors, tuple | list) or len(tensors) != 2 or dim not in (-1, value_of(node).ndim - 1):
            raise Refused("%s joins more than scores and sinks", node)
        first = not leads_to_product(tensors[0])
        scores, sinks = tensors[::-1] if first else tensors
        are_nodes = isinstance(scores, fx.Node) and isinstance(sinks, fx.Node)
        if not are_nodes or not known(value_of(sinks).shape[-1] == 1):
            raise Refused("%s joins more than one column of sinks to the scores", node)
        chain.nodes.append(node)
        chain.sinks, chain.sinks_first = sinks, first
        chain.met.append((sinks, value_of(scores).shape))
        return self._plain(scores, chain)

    def _plain(self, node: object, chain: ScoreChain) -> fx.Node:
        """The node behind casts, copies, additions of zero and reshapes of leading dimensions."""
        assert isinstance(node, fx.Node)
        node = self._settled(node, chain.nodes[-1])
        while (source := self._same(node)) is not None:
            before, after = value_of(source), value_of(node)
            if before.ndim == 3 and after.ndim in (4, 5):
                sizes = after.shape[1:-2]
                chain.heads = math.prod(sizes) if all(isinstance(size, int) for size in sizes) else chain.heads
            chain.nodes.append(node)
            node = self._settled(source, node)
        return node

    def _same(self, node: fx.Node) -> fx.Node | None:
        """The tensor whose elements a node passes on as they are, or None."""
        unchanged = self._nothing_added(node)
        source = unchanged or (node.args[0] if node.args else None)
        value, before = value_of(node), value_of(source)
        if not isinstance(source, fx.Node) or not all(isinstance(x, torch.Tensor) for x in (value, before)):
            return None
        name = function_name(node)
        cast = name in views.CASTS and value.dtype.is_floating_point and before.dtype.is_floating_point
        reshape = name in _RESHAPES and value.ndim >= 2 and same_sizes(value.shape[-2:], before.shape[-2:])
        return source if unchanged or cast or reshape or name in _COPIES else None

    def _nothing_added(self, node: fx.Node) -> fx.Node | None:
        """The scores of ``scores + 0``."""
        if function_name(node) not in _ADDS:
            return None
        left, right = arguments(node, "input|self", "other")
        for scores, other in ((left, right), (right, left)):
            if isinstance(scores, fx.Node) and self._indices.fill(other) == 0 and _keeps_shape(node, scores):
                return scores
        return None

    def _settled(self, node: fx.Node, reader: fx.Node) -> fx.Node:
        """The write that left a tensor as a reader sees it, the tensor itself if there is none.

        Or if it is written through another view: then the write is no node of the chain, and the site is rejected.
        """
        writer = self._mutations.last_write(node, before=reader)
        return writer if writer is not None and writer.args[:1] == (node,) else node

    def _without_maximum(self, node: fx.Node, chain: ScoreChain) -> fx.Node | None:
        """The scores of ``x - max(x)``, which softmax does not see; None if the node is something else."""
        scores, maximum = arguments(node, "input|self", "other")
        between = []
        while isinstance(maximum, fx.Node) and function_name(maximum) in ("getitem", "detach", "getattr", "unsqueeze"):
            between.append(maximum)
            maximum = maximum.args[0]
        if not isinstance(maximum, fx.Node) or function_name(maximum) not in ("max", "amax"):
            return None
        values, dim, keepdim = arguments(maximum, "input|self", "dim", "keepdim")
        last = dim[0] if isinstance(dim, tuple | list) and len(dim) == 1 else dim
        along = isinstance(last, int) and last in (chain.dim, value_of(scores).ndim + chain.dim)
        if values is not scores or not along or node.kwargs.get("alpha", 1) != 1:
            return None
        if self._settled(scores, node) is not self._settled(scores, maximum):
            return None
        added = [step.args[1:] for step in between if function_name(step) == "unsqueeze"]
        if added not in ([], [(chain.dim,)]) or bool(added) == bool(keepdim):
            return None
        if any(function_name(step) == "getitem" and step.args[1] != 0 for step in between):
            return None  # the positions of the maxima
        if any(function_name(step) == "getattr" and step.args[1] != "values" for step in between):
            return None  # transposed, they vary along the keys
        chain.nodes += [node, *between, maximum]
        return scores

    def _floored(self, node: fx.Node, name: str) -> fx.Node | None:
        """The scores of ``max(scores, lowest)``, ``lowest`` the lowest number of their dtype."""
        scores, floor = arguments(node, "input|self", _FLOORS[name])
        if name in ("max", "maximum") and not leads_to_product(scores):
            scores, floor = floor, scores
        is_tensor = isinstance(value_of(node), torch.Tensor)
        if not isinstance(scores, fx.Node) or not is_tensor or not _keeps_shape(node, scores):
            return None
        ceiling = arguments(node, "input|self", "min", "max")[2] if name in ("clamp", "clip") else None
        lowest = self._indices.fill(floor) == torch.finfo(value_of(node).dtype).min
        return scores if lowest and ceiling is None else None

    def _mask(self, node: fx.Node) -> tuple[fx.Node, MaskPart] | None:
        """The scores and the mask of ``scores + mask``, ``masked_fill`` or ``where``; None if the node is none."""
        name = function_name(node)
        if name in _ADDS:
            left, right = arguments(node, "input|self", "other")
            if node.kwargs.get("alpha", 1) != 1 or len(node.args) > 2:
                raise Refused("%s scales what it adds (alpha)", node)
            if not leads_to_product(left):
                left, right = right, left
            if not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
                raise Refused("%s adds a number to the scores", node)
            return left, MaskPart(right, dtype=value_of(node).dtype)
        if name == "masked_fill":
            return self._filled(node, *arguments(node, "input|self", "mask", "value"), negated=False)
        if name == "where" and (arms := choice(node)) is not None:
            condition, scores, fill = arms
            if self._indices.fill(fill) is None:
                return self._filled(node, fill, condition, scores, negated=False)
            return self._filled(node, scores, condition, fill, negated=True)
        return None

    def _filled(
        self, node: fx.Node, scores: object, condition: object, fill: object, *, negated: bool
    ) -> tuple[fx.Node, MaskPart]:
        hidden = self._indices.fill(fill)
        if hidden is None or not isinstance(condition, fx.Node) or not isinstance(scores, fx.Node):
            raise Refused("%s fills scores with values that are no constant", node)
        dtype = value_of(node).dtype
        # As the scores hold it: float32's lowest number is -inf in bfloat16.
        hidden = torch.tensor(hidden, dtype=torch.float64).to(dtype).item()
        return scores, MaskPart(condition, hidden, negated, dtype=dtype)

    def _factor(self, node: fx.Node, name: str) -> tuple[fx.Node, float | fx.Node]:
        """The scores and the factor of a multiplication or division."""
        left, right = arguments(node, "input|self", "other")
        if len(node.args) > 2 or node.kwargs.get("rounding_mode") is not None:
            raise Refused("%s (%s) has an unexpected signature", node, name)
        if "div" not in name and not leads_to_product(left):
            left, right = right, left
        number = self._indices.fill(right)
        if number is not None and isinstance(left, fx.Node):
            if "div" in name and number == 0:
                raise Refused("%s divides by zero", node)
            return left, (1 / number if "div" in name else float(number))
        if not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
            raise Refused("%s (%s) has an unexpected signature", node, name)
        if "div" in name and not leads_to_product(left):
            raise Refused("%s divides %s by the scores", node, left)
        return left, right
