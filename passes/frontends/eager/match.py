"""The frontend for hand-written ("eager") attention: product, softmax, product, in all forms.

    softmax(mask(scale * q @ k^T)) @ v

A site is anchored at its softmax. A softmax is attention if its scores are a product and its probabilities are the
left side of one; routers of experts and classifiers are not. `scores` reads the steps before the softmax,
`probabilities` those behind it. A row that -inf masks fully is NaN in hand-written attention. The operator gives zeros,
as ``nan_to_num`` does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from s2o_compile.passes.frontends import repeat_kv
from s2o_compile.passes.frontends.checks import check_tensors
from s2o_compile.passes.frontends.eager import probabilities, product
from s2o_compile.passes.frontends.eager.probabilities import Probabilities
from s2o_compile.passes.frontends.eager.product import Product
from s2o_compile.passes.frontends.eager.scores import ScoreChain, ScoreReader, leads_to_product
from s2o_compile.passes.frontends.head_layout import Axes, axes, broadcasts, to_heads
from s2o_compile.passes.graph.calls import function_name
from s2o_compile.passes.graph.nodes import Size, arguments, known, same_sizes, value_of
from s2o_compile.passes.graph.operand import Operand
from s2o_compile.passes.graph.rejected import Refused, Rejected, attempt
from s2o_compile.passes.masks import views
from s2o_compile.passes.masks.proof import MaskProof
from s2o_compile.passes.masks.prover import MaskProver
from s2o_compile.passes.site import AttentionSite


def is_attention(node: fx.Node) -> bool:
    """Whether a node is the softmax of an attention."""
    return (
        function_name(node) == "softmax"
        and isinstance(value_of(node), torch.Tensor)
        and value_of(node).ndim >= 2
        and probabilities.feed_product(node)
        and leads_to_product(_softmax_input(node))
    )


def operands(node: fx.Node) -> dict[str, Any]:
    """Query and key of the product behind the softmax, as far as they can be found, for the report."""
    matmul = _first_product(_softmax_input(node))
    if matmul is None:
        return {}
    if matmul.tied:
        return {"query": matmul.left.value, "key": matmul.right.value}
    return {"query": matmul.left.value, "key": product.transposed(matmul.right).value}


def match(node: fx.Node, prover: MaskProver) -> AttentionSite | Rejected:
    """The attention around a softmax (`is_attention` holds), or why it must stay dense."""
    return attempt(site_around, node, prover)


def site_around(node: fx.Node, prover: MaskProver) -> AttentionSite:
    """As `match`, for other frontends: raises `Refused`."""
    scores, dim = arguments(node, "input|self", "dim")
    if not isinstance(dim, int):
        raise Refused("its softmax runs over dimension %s, expected a number", dim)
    chain = ScoreReader(prover).read(node, scores, dim)
    cut = None if chain.sinks is None else chain.sinks_first
    behind = probabilities.follow(node, prover, cut=cut, order=chain.order)
    _check_private(chain, behind, prover)
    return _site(node, chain, behind, prover)


def _site(node: fx.Node, chain: ScoreChain, behind: Probabilities, prover: MaskProver) -> AttentionSite:
    values = behind.product
    query, key, value = chain.product.left, product.transposed(chain.product.right), values.right
    query, key = (_without_upcast(operand, value, values.node, prover) for operand in (query, key))
    scores, weights = value_of(chain.product.node).shape, values.left.value.shape
    scores = scores if chain.order is None else [scores[dim] for dim in chain.order]
    sizes = [shape[1:-2] for shape in (scores, weights) if len(shape) > 3]
    split = [math.prod(heads) for heads in sizes if all(isinstance(size, int) for size in heads)]
    count = next(iter(split), None) if chain.heads is None else chain.heads
    query, key, value, restore = to_heads(query, key, value, count, scores, weights)
    restore = (*restore, *values.restore)
    check_tensors(query.value, key.value, value.value, values.node)
    _check_unchanged(chain, (query, key, value), values.node, prover)
    _check_views(((query.node, chain.product), (key.node, chain.product), (value.node, values)), prover)
    _check_casts((*chain.nodes, *behind.nodes), value.value.dtype)
    shape = (*query.value.shape[:3], value.value.shape[-1])
    output = value_of(values.node).shape
    if not restore and not same_sizes(output, shape):
        raise Refused("its output %s is broadcast to %s", shape, tuple(output))
    runs: dict[fx.Node, Axes | None] = {}
    for node_met, scores_met in chain.met:
        along = axes(value_of(node_met), scores_met, query.value.shape[:2], split=count is not None, order=chain.order)
        if along is None:
            if any(part.hidden is None and part.node is node_met for part in chain.masks):
                prover.check_no_bias(node_met)
            if all(part.node is not node_met for part in chain.masks):
                raise Refused("%s meets the scores at %s, another split into heads", node_met, tuple(scores_met))
        runs[node_met] = along
    for factor, function in chain.factors:
        query = _scaled(query, factor, function, runs[factor])
    if value_of(chain.product.node).dtype != value_of(chain.product.left.node).dtype:
        raise Refused("autocast computes its scores in %s", value_of(chain.product.node).dtype)
    sinks = None if chain.sinks is None else _sinks(chain.sinks, query.value.shape[1], values.node, prover)
    mask = _mask(chain, behind, runs, (*query.value.shape[:3], key.value.shape[-2]), query.value.dtype, prover)
    for part in () if mask.read is None else mask.read.parts:
        if prover.mutations.last_write(part.node, after=chain.nodes[0], before=values.node):
            raise Refused("%s is changed in place before the values are read (%s)", part.node, mask.read.why)
    key, value = repeat_kv.unwrapped(key, value, values.node, prover)
    return AttentionSite(
        node=values.node,
        query=query,
        key=key,
        value=value,
        mask=mask,
        scale=chain.scale,
        softcap=chain.softcap,
        sinks=sinks,
        restore=restore,
        interior=(*chain.nodes, *behind.nodes),
    )


def _mask(
    chain: ScoreChain, behind: Probabilities, runs: Mapping[fx.Node, Axes | None], shape: Sequence[Size],
    dtype: torch.dtype, prover: MaskProver,
) -> MaskProof:  # fmt: skip
    parts = []
    for part in reversed(chain.masks):  # as the scores meet them
        along = runs[part.node]
        if along is None:
            along = ()  # it fits nothing, and is rejected for what it is or for its shape
        elif broadcasts(along):
            along = None
        parts.append(replace(part, axes=along))
    for zeroed, probabilities_shape in behind.zeroed:
        filled = [part for part in chain.masks if part.hidden is not None and part.node is zeroed.node]
        alike = any(part.negated == zeroed.negated for part in filled) and not prover.mutations.writers(zeroed.node)
        met = [scores for node, scores in chain.met if node is zeroed.node]
        if not alike or not all(same_sizes(scores, probabilities_shape) for scores in met):
            raise Refused("%s hides probabilities behind the softmax, and not in its scores alike", zeroed.node)
        if len(parts) > 1 and chain.floored:
            raise Refused("several masks hide scores above a floor, and one of them probabilities")
    # What hides a key, and nothing else does, makes zeros of a row without any, whatever its scores were filled with.
    zeroed = bool(behind.zeroed) and len(parts) == 1
    floored = chain.floored and not behind.zeroed
    proof = prover.prove_parts(parts, shape, dtype, factor=chain.tail, floored=floored, zeroed=zeroed)
    if proof.read is not None and behind.zeroed and not zeroed:
        # Read as one mask, they do not say which keys a row without any loses behind the softmax.
        raise Refused.because(proof.read.why)
    return proof


def _softmax_input(node: fx.Node) -> fx.Node | None:
    (source,) = arguments(node, "input|self")
    return source if isinstance(source, fx.Node) else None


def _first_product(node: object, depth: int = 16) -> Product | None:
    """The nearest product that scores are made of."""
    matmul = product.read(node)
    if matmul is not None or depth == 0 or not isinstance(node, fx.Node):
        return matmul
    for source in node.all_input_nodes:
        if leads_to_product(source, depth):
            return _first_product(source, depth - 1)
    return None


def _check_private(chain: ScoreChain, behind: Probabilities, prover: MaskProver) -> None:
    """Refuses other readers of tensors that in-place steps of the chain overwrite."""
    nodes = (*chain.nodes, *behind.nodes)
    interior = set(nodes)
    for node in nodes:
        if node.kwargs.get("out") is not None:
            raise Refused("its scores %s are written to a tensor of the user's", node)
        writers = prover.mutations.writers(node)
        outside = next((writer for writer in writers if writer not in interior), None)
        if outside is not None:
            raise Refused("its scores %s are changed in place by %s", node, outside)
        readers = (user for user in node.users if user not in interior and not _reads_shape(user, node))
        stranger = next((user for user in readers if user is not behind.product.node), None)
        if writers and stranger is not None:
            raise Refused("its scores %s are changed in place, and read by %s", node, stranger)


def _reads_shape(user: fx.Node, node: fx.Node) -> bool:
    """Whether a user asks a tensor for nothing but its shape or dtype."""
    name = function_name(user)
    if name in ("expand_as", "view_as", "reshape_as", "type_as"):
        return user.args[0] is not node
    return name in ("size", "dim", "numel") or (name == "getattr" and user.args[1] in ("shape", "dtype", "device"))


def _check_unchanged(chain: ScoreChain, operands: Sequence[Operand], site: fx.Node, prover: MaskProver) -> None:
    """Refuses writes to operands between the product of the scores and the reading of the values.

    The operator reads all operands where the values are read.
    """
    read_early = [*(operand.node for operand in operands[:2]), *(factor for factor, _ in chain.factors)]
    if chain.sinks is not None:
        read_early.append(chain.sinks)
    for node in read_early:
        if prover.mutations.last_write(node, after=chain.nodes[0], before=site):
            raise Refused("%s is changed in place before the values are read", node)


def _check_views(operands: Sequence[tuple[fx.Node, Product]], prover: MaskProver) -> None:
    """Refuses writes to an operand between its view and the product, and every write that reshapes it."""
    for operand, matmul in operands:
        prover.mutations.check_shape(operand)
        for view in matmul.node.all_input_nodes:
            seen = view is not operand and operand in view.all_input_nodes
            if seen and prover.mutations.last_write(operand, after=view, before=matmul.node):
                raise Refused("%s is changed in place behind its view %s", operand, view)


def _check_casts(nodes: Sequence[fx.Node], dtype: torch.dtype) -> None:
    """Refuses casts to fewer bits than the operands have: the operator does not round there."""
    for node in nodes:
        value = value_of(node)
        floating = isinstance(value, torch.Tensor) and value.dtype.is_floating_point
        if floating and value.dtype not in (dtype, torch.float32, torch.float64):
            raise Refused("%s rounds to %s between operands of %s", node, value.dtype, dtype)


def _scaled(query: Operand, factor: fx.Node, function: Callable[..., Any], runs: Axes | None) -> Operand:
    """The query times, or over, a factor of the scores: one for all keys that changes neither shape nor dtype."""
    value = value_of(factor)
    if runs is None or not broadcasts(runs):
        raise Refused("%s scales scores of another split into heads", factor)
    several = isinstance(value, torch.Tensor) and value.ndim > 0
    if several and not known(value.shape[-1] == 1):
        raise Refused(
            "%s scales scores by a tensor that varies along the keys; if it hides some, write masked_fill(condition, "
            "-inf)",
            factor,
        )
    misfit = Refused("%s scales scores by a tensor of another shape or dtype than the query's", factor)
    if several and query.steps:
        raise misfit
    before, scaled = query.value, query.then(function, factor)
    after = scaled.value
    if not same_sizes(after.shape, before.shape) or after.dtype != before.dtype:
        raise misfit
    return scaled


def _without_upcast(operand: Operand, value: Operand, site: fx.Node, prover: MaskProver) -> Operand:
    """Queries or keys before a cast to a wider type than the values': products are summed in float32 anyway."""
    source = operand.node.args[0] if operand.node.args else None
    if operand.steps or function_name(operand.node) not in views.CASTS or not isinstance(source, fx.Node):
        return operand
    base, wanted = value_of(source), value.value
    same = isinstance(base, torch.Tensor) and isinstance(wanted, torch.Tensor) and base.dtype == wanted.dtype
    if not same or base.dtype == value_of(operand.node).dtype:
        return operand
    return Operand(source) if repeat_kv.is_untouched(operand.node, source, site, prover) else operand


def _sinks(node: fx.Node, heads: object, site: fx.Node, prover: MaskProver) -> fx.Node:
    """The [Hq] tensor that is spread over the batch and the queries of [B, Hq, Nq, 1]."""
    source = repeat_kv.read_along(node, (1,), (heads,), prover) if value_of(node).ndim == 4 else None
    if source is None or not repeat_kv.is_untouched(node, source, site, prover):
        raise Refused("%s is no tensor of one sink a head", node)
    return source
