"""Names attention in forms that no frontend knows: talking heads, other functions than a softmax, linear attention.

They stay as they are. Without a line in the report their user would believe that all attention is sparse.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import Any

import torch
from torch import fx

from s2o_compile.kernels.support.torch_compat import tree_leaves
from s2o_compile.passes.frontends.eager import product
from s2o_compile.passes.graph.calls import function_name, written_nodes
from s2o_compile.passes.graph.nodes import arguments, is_weight, value_of
from s2o_compile.passes.masks import views
from s2o_compile.passes.site import sizes_of
from s2o_compile.passes.trail import Scores, Trail

_VIEWS = frozenset(
    {
        *("view", "reshape", "unflatten", "flatten", "unsqueeze", "squeeze", "expand", "expand_as", "view_as", "clone"),
        *("contiguous", "detach", "alias", "split", "chunk", "unbind", "select", "getitem", "slice", "movedim", "mT"),
        *(*views.PERMUTATIONS, *views.CASTS),
    }
)
# Functions whose value holds scores if an input does, whatever its shape. Of all others, the shape tells.
_KEEPING = _VIEWS | {"setitem", "cat", "pad", "dropout", "where", "masked_fill", "add", "sub", "mul", "truediv", "div"}
_SOFTMAXES = frozenset({"softmax", "log_softmax", "softmin", "gumbel_softmax", "exp"})
# Those that `product.read` does not know, or not with every argument.
_PRODUCTS = frozenset({"linear", "matmul", "bmm", "mm", "baddbmm", "addbmm", "addmm", "inner", "tensordot"})
_CHOICES = frozenset({"getitem", "index_select", "gather"})


def find(nodes: Iterable[fx.Node], known: Collection[fx.Node]) -> Iterator[tuple[fx.Node, Scores]]:
    """Attentions in unknown forms among the nodes of a graph: the product with the values, and the scores.

    Args:
        nodes: Those that are looked at, in graph order.
        known: Attentions that a frontend knows; scores are not followed through them.
    """
    trail: Trail[fx.Node] = Trail({})
    learned: set[fx.Node] = set()
    theirs: set[fx.Node] = set()  # probabilities of known attentions
    for node in nodes:
        value = value_of(node)
        if node.op not in ("call_function", "call_method"):
            if is_weight(node):
                learned.add(node)
            continue
        _learn(node, learned)
        if not theirs.isdisjoint(node.all_input_nodes) or (node in known and function_name(node) == "softmax"):
            if product.read(node) is None:
                theirs.add(node)
        elif node not in known:
            scores = _followed(node, value, trail, learned)
            if scores is not None and scores.depth is not None:
                yield node, scores


def _learn(node: fx.Node, learned: set[fx.Node]) -> None:
    """Adds a node whose value is made of weights alone, takes out those that another value is written to."""
    sources = [source for source in node.all_input_nodes if isinstance(value_of(source), torch.Tensor)]
    if sources and learned.issuperset(sources):
        learned.add(node)
        return
    # An expert's weights are chosen from those of all; of a table of embeddings rows are.
    if sources and sources[0] in learned and function_name(node) in _CHOICES and value_of(sources[0]).ndim > 2:
        learned.add(node)
        return
    # A cache of keys is a buffer, too, until keys are written to it or to a view of it. Unknown functions do not write.
    written = written_nodes(node)[:1] if function_name(node) else []
    while written and written[0] in learned:
        learned.discard(written[0])
        written = written[0].all_input_nodes


def _followed(node: fx.Node, value: Any, trail: Trail[fx.Node], learned: set[fx.Node]) -> Scores | None:  # noqa: ANN401
    """The scores that a node multiplies with values, or None; its value is followed."""
    name, sources = function_name(node), node.all_input_nodes
    value = next((x for x in tree_leaves(value) if isinstance(x, torch.Tensor) and x.is_floating_point()), None)
    if name == "setitem" and isinstance(node.args[0], fx.Node):
        output, value = node.args[0], value_of(node.args[0])
    else:
        output = node
    if value is None:
        return None
    sizes = sizes_of(value)
    matmul = product.read(node)
    if matmul is not None:
        left, right = matmul.left, matmul.right
        depth = (value_of(left.node) if matmul.tied else left.value).shape[-1]
        shape = sizes if matmul.tied else (*left.value.shape[:-1], right.value.shape[-1])
        given = left.node in learned, right.node in learned
        return trail.product(left.node, right.node, node, shape, depth, given)
    if name in _PRODUCTS and len(sources) > 1:
        left, right = sources[-2:] if "add" in name else sources[:2]
        given = left in learned, right in learned
        return trail.product(left, right, node, sizes, value_of(left).shape[-1], given)
    if name in _SOFTMAXES and (name != "exp" or sources[0] in trail.table):
        dim = -1 if name == "exp" else arguments(node, "input|self", "dim")[1]
        if isinstance(dim, int) and dim in (-1, len(sizes) - 1):
            trail.softmax(name, sources[0], node, sizes)
        return None
    trail.step(name or str(node.target), sources, output, sizes, view=name in _VIEWS, keeps=name in _KEEPING)
    return None
