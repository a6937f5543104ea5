"""Reading the scores of hand-written attention: from a softmax back to the product of queries and keys.

    softmax( [x - max x]  [cat(x, sinks)]  mask(x)...  [cap * tanh(x)]  [x * scale]...  q @ k^T )

Brackets are optional, the order is fixed: a scale behind the mask, say, is another function. Casts between floating
dtypes and reshapes of leading dimensions may stand anywhere: the operator keeps its scores in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import fx

from s2o_compile.passes import product, views
from s2o_compile.passes.graph_values import choice, function_name, known, same_sizes, value_of
from s2o_compile.passes.index_arithmetic import IndexEvaluator
from s2o_compile.passes.mutations import Mutations
from s2o_compile.passes.product import Product
from s2o_compile.passes.site import Rejected

_COPIES = frozenset({"contiguous", "clone", "detach", "alias"})
_RESHAPES = frozenset({"view", "reshape", "unflatten", "flatten", "view_as"})
_ADDS = frozenset({"add", "iadd", "radd"})
_FACTORS = frozenset({"mul", "imul", "rmul", "div", "truediv", "itruediv", "divide", "true_divide"})
_SEARCH_DEPTH = 16


@dataclass(frozen=True, eq=False)
class Bias:
    """A mask added to the scores."""

    node: fx.Node


@dataclass(frozen=True, eq=False)
class Fill:
    """Scores replaced by a number where a condition holds (or, if ``negated``, where it does not)."""

    node: fx.Node
    hidden: float
    negated: bool


@dataclass(eq=False)
class ScoreChain:
    """What lies between the product and the softmax.

    Attributes:
        product: Queries times keys.
        heads: Heads of the 4-d scores, where the product itself is [B * H, Nq, Nk]; else None.
        scale: Constant factor of the product.
        factors: Further factors: 0-d tensors, tensors that are constant along the keys, or symbolic numbers.
        softcap: Cap of ``softcap * tanh(x)``.
        masks: In no order: all must let a key through.
        sinks: The tensor [..., Nq, 1] joined to the scores as one more key.
        nodes: Every node of the chain, the product included, first to last.
        met: Every mask, factor and sinks tensor, with the shape of the scores that it met.
    """

    product: Product
    heads: int | None = None
    scale: float = 1.0
    factors: list[fx.Node] = field(default_factory=list)
    softcap: float | None = None
    masks: list[Bias | Fill] = field(default_factory=list)
    sinks: fx.Node | None = None
    nodes: list[fx.Node] = field(default_factory=list)
    met: list[tuple[fx.Node, torch.Size]] = field(default_factory=list)


def _keeps_shape(node: fx.Node, source: object) -> bool:
    before, after = value_of(source), value_of(node)
    return (
        isinstance(before, torch.Tensor)
        and before.ndim == after.ndim
        and all(known(a == b) for a, b in zip(before.shape, after.shape, strict=True))
    )


def leads_to_product(node: object, depth: int = _SEARCH_DEPTH) -> bool:
    """Whether a tensor is made, element by element, of a product of its own last two dimensions: of scores."""
    if not isinstance(node, fx.Node) or depth == 0:
        return False
    found = product.read(node)
    if found is not None:
        # A projection's product reads a parameter; scores are a product of two activations.
        return not any(operand.node.op == "get_attr" or _is_parameter(operand.node) for operand in _sides(found))
    value = value_of(node)
    if not isinstance(value, torch.Tensor) or value.ndim < 2 or node.op not in ("call_function", "call_method"):
        return False
    if function_name(node) == "cat":
        tensors = node.args[0] if isinstance(node.args[0], tuple | list) else ()
        return any(leads_to_product(tensor, depth - 1) for tensor in tensors)
    return any(
        leads_to_product(source, depth - 1)
        for source in node.all_input_nodes
        if isinstance(value_of(source), torch.Tensor) and same_sizes(value_of(source).shape[-1:], value.shape[-1:])
    )


def _sides(found: Product) -> Iterator[product.Operand]:
    yield found.left
    yield found.right


def _is_parameter(node: fx.Node) -> bool:
    return isinstance(value_of(node), torch.nn.Parameter)


class ScoreReader:
    """Reads the scores behind softmaxes.

    Args:
        indices: Knows constants.
        mutations: Knows which tensors are written in place.
    """

    def __init__(self, indices: IndexEvaluator, mutations: Mutations) -> None:
        self._indices = indices
        self._mutations = mutations

    def read(self, softmax: fx.Node, scores: fx.Node) -> ScoreChain | Rejected:
        """The chain behind ``softmax(scores)``, or the first thing in it that is not understood."""
        nodes, met = [softmax], []
        node, heads = self._plain(scores, nodes)
        node, heads = self._without_maximum(node, nodes, heads)
        sinks = None
        if function_name(node) == "cat":
            tensors = node.args[0] if isinstance(node.args[0], tuple | list) else ()
            dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
            if len(tensors) != 2 or not isinstance(dim, int) or dim % value_of(node).ndim != value_of(node).ndim - 1:
                return Rejected("%s joins more than scores and sinks", node)
            if not all(isinstance(tensor, fx.Node) for tensor in tensors) or not known(
                value_of(tensors[1]).shape[-1] == 1
            ):
                return Rejected("%s joins more than one column of sinks to the scores", node)
            nodes.append(node)
            sinks = tensors[1]
            met.append((sinks, value_of(tensors[0]).shape))
            node, heads = self._plain(tensors[0], nodes, heads)
        masks: list[Bias | Fill] = []
        while (step := self._mask(node)) is not None:
            if isinstance(step, Rejected):
                return step
            if not _keeps_shape(node, step[0]):
                return Rejected("%s broadcasts the scores to another shape", node)
            nodes.append(node)
            masks.append(step[1])
            met.append((step[1].node, value_of(node).shape))
            node, heads = self._plain(step[0], nodes, heads)
        scale, factors = 1.0, []
        softcap = None
        while (found := product.read(node)) is None:
            name = function_name(node)
            if name == "tanh" and softcap is None and not factors:
                softcap, scale = scale, 1.0
                source = node.args[0]
            elif name in _FACTORS:
                taken = self._factor(node, name)
                if isinstance(taken, Rejected):
                    return taken
                source, factor = taken
                if not _keeps_shape(node, source):
                    return Rejected("%s broadcasts the scores to another shape", node)
                if isinstance(factor, fx.Node):
                    factors.append(factor)
                    met.append((factor, value_of(node).shape))
                else:
                    scale *= factor
            else:
                return Rejected("%s (%s) stands between the scores and the softmax", node, name or node.op)
            nodes.append(node)
            node, heads = self._plain(source, nodes, heads)
        nodes.append(found.node)
        if found.restore:
            return Rejected("%s leaves the scores in another order than [..., queries, keys]", found.node)
        if softcap is not None and softcap <= 0:
            return Rejected("its scores are capped at %s, expected a positive number", softcap)
        if found.added is not None:
            if softcap is not None or scale != 1.0 or factors:
                return Rejected("%s is scaled after a tensor was added to it", found.node)
            masks.append(Bias(found.added))
            met.append((found.added, value_of(found.node).shape))
        scale *= found.alpha * (softcap or 1.0)  # cap * tanh(x * s) is the operator's cap * tanh(x * (s * cap) / cap)
        return ScoreChain(found, heads, scale, factors, softcap, masks, sinks, nodes[::-1], met)

    def _plain(self, node: object, nodes: list[fx.Node], heads: int | None = None) -> tuple[fx.Node, int | None]:
        """The node behind casts, copies and reshapes of leading dimensions, and the heads the reshapes split off."""
        assert isinstance(node, fx.Node)
        while node.args and isinstance(node.args[0], fx.Node):
            name, value, source = function_name(node), value_of(node), value_of(node.args[0])
            if not isinstance(value, torch.Tensor) or not isinstance(source, torch.Tensor):
                break
            cast = name in views.CASTS and value.dtype.is_floating_point and source.dtype.is_floating_point
            reshape = (
                name in _RESHAPES
                and value.ndim >= 3
                and source.ndim >= 3
                and all(known(a == b) for a, b in zip(value.shape[-2:], source.shape[-2:], strict=True))
            )
            if not (cast or reshape or name in _COPIES):
                break
            if reshape and value.ndim == 4 and source.ndim == 3 and isinstance(value.shape[1], int):
                heads = value.shape[1]
            nodes.append(node)
            node = node.args[0]
        return node, heads

    def _without_maximum(self, node: fx.Node, nodes: list[fx.Node], heads: int | None) -> tuple[fx.Node, int | None]:
        """The node behind ``x - max(x)``, which softmax does not see."""
        if function_name(node) not in ("sub", "isub") or len(node.args) != 2:
            return node, heads
        scores, maximum = node.args
        between = []
        while isinstance(maximum, fx.Node) and function_name(maximum) in ("getitem", "detach", "getattr"):
            between.append(maximum)
            maximum = maximum.args[0]
        if not isinstance(maximum, fx.Node) or function_name(maximum) not in ("max", "amax"):
            return node, heads
        options = {**dict(zip(("dim", "keepdim"), maximum.args[1:], strict=False)), **maximum.kwargs}
        dims = options.get("dim")
        last = dims[0] if isinstance(dims, tuple | list) and len(dims) == 1 else dims
        if maximum.args[0] is not scores or last not in (-1, value_of(scores).ndim - 1) or not options.get("keepdim"):
            return node, heads
        if any(function_name(step) == "getitem" and step.args[1] != 0 for step in between):
            return node, heads  # the positions of the maxima
        nodes += [node, *between, maximum]
        return self._plain(scores, nodes, heads)

    def _mask(self, node: fx.Node) -> tuple[fx.Node, Bias | Fill] | Rejected | None:
        """The scores and the mask of ``scores + mask``, ``masked_fill`` or ``where``; None if the node is none."""
        name = function_name(node)
        if name in _ADDS and len(node.args) == 2:
            left, right = node.args
            if node.kwargs.get("alpha", 1) != 1:
                return Rejected("%s scales what it adds (alpha)", node)
            if not leads_to_product(left):
                left, right = right, left
            if not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
                return Rejected("%s adds a number to the scores", node)
            return left, Bias(right)
        if name == "masked_fill" and len(node.args) == 3:
            scores, condition, fill = node.args
            return self._filled(node, scores, condition, fill, negated=False)
        if name == "where" and (arms := choice(node)) is not None:
            condition, scores, fill = arms
            if self._indices.fill(fill) is None:
                return self._filled(node, fill, condition, scores, negated=False)
            return self._filled(node, scores, condition, fill, negated=True)
        return None

    def _filled(
        self, node: fx.Node, scores: object, condition: object, fill: object, *, negated: bool
    ) -> tuple[fx.Node, Fill] | Rejected:
        hidden = self._indices.fill(fill)
        if hidden is None or not isinstance(condition, fx.Node) or not isinstance(scores, fx.Node):
            return Rejected("%s fills scores with values that are no constant", node)
        return scores, Fill(condition, float(hidden), negated)

    def _factor(self, node: fx.Node, name: str) -> tuple[fx.Node, float | fx.Node] | Rejected:
        """The scores and the factor of a multiplication or division."""
        if len(node.args) != 2 or node.kwargs.get("rounding_mode") is not None:
            return Rejected("%s (%s) has an unexpected signature", node, name)
        left, right = node.args
        if "div" not in name and not leads_to_product(left):
            left, right = right, left
        number = self._indices.fill(right)
        if number is not None and isinstance(left, fx.Node):
            if "div" in name and number == 0:
                return Rejected("%s divides by zero", node)
            return left, (1 / number if "div" in name else float(number))
        if not isinstance(left, fx.Node) or not isinstance(right, fx.Node) or "div" in name:
            return Rejected("%s divides the scores by %s, which is no constant", node, right)
        return left, right
