"""The frontend for hand-written ("eager") attention: product, softmax, product, in all spellings.

    softmax(mask(scale * q @ k^T)) @ v

A site is anchored at its softmax. A softmax is attention if its scores are a product and its probabilities are the
left side of one; routers of experts and classifiers are not. `score_chain` reads what lies before the softmax, this
file what lies behind it. A row that -inf hides completely is NaN in hand-written attention, and zeros in the operator.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from s2o_compile.passes import product, repeat_kv, views
from s2o_compile.passes.checks import check_tensors
from s2o_compile.passes.graph_values import Size, function_name, known, same_sizes, value_of
from s2o_compile.passes.mask_proof import MaskPart
from s2o_compile.passes.mask_prover import MaskProver
from s2o_compile.passes.operand import Operand
from s2o_compile.passes.product import Product
from s2o_compile.passes.score_chain import Bias, ScoreChain, ScoreReader, leads_to_product
from s2o_compile.passes.site import AttentionSite, Rejected, module_path

_PASSED_ON = frozenset({"contiguous", "clone", "view", "reshape", "unflatten", "flatten", *views.CASTS})


def is_attention(node: fx.Node) -> bool:
    """Whether a node is the softmax of an attention."""
    return (
        function_name(node) == "softmax"
        and isinstance(value_of(node), torch.Tensor)
        and value_of(node).ndim >= 2
        and _feeds_product(node)
        and leads_to_product(_softmax_input(node))
    )


def operands(node: fx.Node) -> dict[str, Any]:
    """Query and key of the product behind the softmax, as far as they can be found, for the report."""
    found = _first_product(_softmax_input(node))
    if found is None:
        return {}
    return {"query": found.left.value, "key": product.transposed(found.right).value}


def match(node: fx.Node, prover: MaskProver) -> AttentionSite | Rejected:
    """The attention around a softmax, or why it must stay dense.

    Args:
        node: A node for which `is_attention` holds.
        prover: The mask prover of the graph.
    """
    scores = _softmax_input(node)
    rank = value_of(node).ndim
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    if dim not in (-1, rank - 1):
        return Rejected("its softmax runs over dimension %s, expected the keys, the last one", dim)
    assert scores is not None
    chain = ScoreReader(prover.indices, prover.mutations).read(node, scores)
    if isinstance(chain, Rejected):
        return chain
    rejected = _check_private(chain, prover)
    if rejected is not None:
        return rejected
    behind = _behind(node, has_sinks=chain.sinks is not None)
    if isinstance(behind, Rejected):
        return behind
    values, nodes = behind
    return _site(node, chain, values, nodes, prover)


def _site(
    node: fx.Node, chain: ScoreChain, values: Product, behind: list[fx.Node], prover: MaskProver
) -> AttentionSite | Rejected:
    query, key, value = chain.product.left, product.transposed(chain.product.right), values.right
    query, key = (_without_upcast(operand, value, values.node, prover) for operand in (query, key))
    rows = [operand.value.shape[0] for operand in (query, key, value) if _rank(operand) == 3]
    if not all(known(count == rows[0]) for count in rows):
        return Rejected("its products broadcast %s rows of heads to one another", ", ".join(map(str, rows)))
    restore = values.restore
    if _rank(value) == 3:
        restore = ((torch.flatten, (0, 1)), *restore)
    if _rank(value) == 3 or chain.heads is not None:
        query, key, value = (_in_heads(operand, chain.heads or 1) for operand in (query, key, value))
    rejected = check_tensors(query.value, key.value, value.value, values.node)
    if rejected is None:
        rejected = _check_unchanged(chain, (query, key, value), values.node, prover)
    if rejected is None:
        rejected = _check_casts((*chain.nodes, *behind), value.value.dtype)
    if rejected is not None:
        return rejected
    shape = (*query.value.shape[:3], value.value.shape[-1])
    output = value_of(values.node).shape
    if not restore and not (len(output) == 4 and all(known(a == b) for a, b in zip(output, shape, strict=True))):
        return Rejected("its output %s is broadcast to %s", shape, tuple(output))
    for node_met, scores_met in chain.met:
        if not _is_aligned(value_of(node_met), scores_met, query.value.shape[:2]):
            split = Rejected("%s meets the scores at %s, another split into heads", node_met, tuple(scores_met))
            added = any(isinstance(part, Bias) and part.node is node_met for part in chain.masks)
            bias = prover.bias(node_met) if added else None
            return split if bias is None else bias
    for factor in chain.factors:
        scaled = _scaled(query, factor)
        if isinstance(scaled, Rejected):
            return scaled
        query = scaled
    if value_of(chain.product.node).dtype != value_of(chain.product.left.node).dtype:
        return Rejected("autocast computes its scores in %s", value_of(chain.product.node).dtype)
    sinks = None if chain.sinks is None else _sinks(chain.sinks, query.value.shape[1], values.node, prover)
    if isinstance(sinks, Rejected):
        return sinks
    parts = [
        MaskPart(part.node) if isinstance(part, Bias) else MaskPart(part.node, part.hidden, part.negated)
        for part in chain.masks
    ]
    mask = prover.prove_parts(parts, (*query.value.shape[:3], key.value.shape[-2]), query.value.dtype)
    if isinstance(mask, Rejected):
        return mask
    unwrapped = [
        Operand(repeat_kv.unwrap(operand.node, values.node, prover)) if not operand.steps else operand
        for operand in (key, value)
    ]
    if known(unwrapped[0].value.shape[1] == unwrapped[1].value.shape[1]):
        key, value = unwrapped
    return AttentionSite(
        name=module_path(node),
        node=values.node,
        query=query,
        key=key,
        value=value,
        mask=mask,
        scale=chain.scale,
        softcap=chain.softcap,
        sinks=sinks,
        restore=restore,
        interior=(*chain.nodes, *behind),
    )


def _rank(operand: Operand) -> int:
    return operand.value.ndim if isinstance(operand.value, torch.Tensor) else 0


def _in_heads(operand: Operand, heads: int) -> Operand:
    """[B * H, N, D] as [B, H, N, D]; other ranks as they are."""
    return operand.then(torch.unflatten, 0, (-1, heads)) if _rank(operand) == 3 else operand


def _softmax_input(node: fx.Node) -> fx.Node | None:
    source = node.args[0] if node.args else node.kwargs.get("input")
    return source if isinstance(source, fx.Node) else None


def _live_users(node: fx.Node) -> list[fx.Node]:
    """Users, without views that nobody reads."""
    return [user for user in node.users if user.users or not _is_passed_on(user)]


def _is_passed_on(node: fx.Node) -> bool:
    return function_name(node) in (*_PASSED_ON, "dropout", "getitem")


def _feeds_product(node: fx.Node, depth: int = 6) -> bool:
    """Whether some user multiplies these probabilities, or what becomes of them element by element, with values."""
    for user in node.users:
        found = product.read(user)
        if found is not None and found.left.node is node:
            return True
        value = value_of(user)
        same_rows = isinstance(value, torch.Tensor) and same_sizes(value.shape[-2:-1], value_of(node).shape[-2:-1])
        if depth and found is None and same_rows and _feeds_product(user, depth - 1):
            return True
    return False


def _first_product(node: object, depth: int = 16) -> Product | None:
    """The nearest product that scores are made of."""
    found = product.read(node)
    if found is not None or depth == 0 or not isinstance(node, fx.Node):
        return found
    for source in node.all_input_nodes:
        if leads_to_product(source, depth):
            return _first_product(source, depth - 1)
    return None


def _check_private(chain: ScoreChain, prover: MaskProver) -> Rejected | None:
    """In-place steps are part of the chain: then nobody else may read what they overwrite."""
    interior = set(chain.nodes)
    for node in chain.nodes:
        if node.kwargs.get("out") is not None:
            return Rejected("its scores %s are written to a tensor of the user's", node)
        writers = prover.mutations.writers(node)
        outside = next((writer for writer in writers if writer not in interior), None)
        if outside is not None:
            return Rejected("its scores %s are changed in place by %s", node, outside)
        stranger = next((user for user in node.users if user not in interior), None)
        if writers and stranger is not None:
            return Rejected("its scores %s are changed in place, and read by %s", node, stranger)
    return None


def _check_unchanged(
    chain: ScoreChain, operands: Sequence[Operand], site: fx.Node, prover: MaskProver
) -> Rejected | None:
    """The operator reads its operands where the values are read, later than the product of the scores did."""
    read_early = [*(operand.node for operand in operands[:2]), *chain.factors]
    if chain.sinks is not None:
        read_early.append(chain.sinks)
    for node in read_early:
        if prover.mutations.changed(node, after=chain.nodes[0], before=site):
            return Rejected("%s is changed in place before the values are read", node)
    return None


def _check_casts(nodes: Sequence[fx.Node], dtype: torch.dtype) -> Rejected | None:
    """A detour through fewer bits than the operands have is a rounding that the operator does not make."""
    for node in nodes:
        value = value_of(node)
        if isinstance(value, torch.Tensor) and value.dtype not in (dtype, torch.float32, torch.float64):
            return Rejected("%s rounds to %s between operands of %s", node, value.dtype, dtype)
    return None


def _is_aligned(operand: object, scores: Sequence[Size], lead: Sequence[Size]) -> bool:
    """Whether a mask or factor that met scores of some shape means the same to scores [B, Hq, Nq, Nk]."""
    if len(scores) == 4:
        return all(known(a == b) for a, b in zip(scores[:2], lead, strict=True))
    one = not isinstance(operand, torch.Tensor) or operand.ndim < 3 or known(operand.shape[0] == 1)
    return len(scores) == 3 and one


def _scaled(query: Operand, factor: fx.Node) -> Operand | Rejected:
    """The query times a factor of the scores, which must be one for all keys and change neither shape nor dtype."""
    value = value_of(factor)
    if isinstance(value, torch.Tensor) and value.ndim and not known(value.shape[-1] == 1):
        return Rejected("%s scales scores by a tensor that varies along the keys", factor)
    if query.steps and isinstance(value, torch.Tensor) and value.ndim:
        return Rejected("%s scales scores by a tensor of another shape or dtype than the query's", factor)
    before, scaled = query.value, query.then(torch.mul, factor)
    after = scaled.value
    same = after.ndim == before.ndim and all(known(a == b) for a, b in zip(after.shape, before.shape, strict=True))
    if not same or after.dtype != before.dtype:
        return Rejected("%s scales scores by a tensor of another shape or dtype than the query's", factor)
    return scaled


def _behind(softmax: fx.Node, *, has_sinks: bool) -> tuple[Product, list[fx.Node]] | Rejected:
    """The product of probabilities and values, and the nodes between it and the softmax."""
    node, nodes = softmax, []
    while True:
        users = _live_users(node)
        if len(users) != 1:
            others = [user for user in users if product.read(user) is None]
            return Rejected(
                "its probabilities are read by %s as well, as output_attentions and need_weights ask",
                ", ".join(map(str, others or users)),
            )
        user = users[0]
        found = product.read(user)
        if found is not None and found.left.node is node and not found.left.steps:
            if has_sinks:
                return Rejected("the probabilities of its sinks are not cut off before %s", user)
            if found.added is not None or found.alpha != 1:
                return Rejected("%s adds a tensor to the output, or scales it", user)
            return found, nodes
        name = function_name(user)
        if name == "getitem" and has_sinks and _cuts_last(user):
            has_sinks = False
        elif name == "dropout":
            if _drops(user):
                return Rejected("dropout is active: call model.eval()")
        elif name not in _PASSED_ON or not _keeps_rows(user, node):
            return Rejected("its probabilities pass %s (%s) before they meet the values", user, name or user.op)
        nodes.append(user)
        node = user


def _keeps_rows(node: fx.Node, source: fx.Node) -> bool:
    value, before = value_of(node), value_of(source)
    if not isinstance(value, torch.Tensor) or value.ndim < 3 or before.ndim < 3 or not value.dtype.is_floating_point:
        return False
    return all(known(a == b) for a, b in zip(value.shape[-2:], before.shape[-2:], strict=True))


def _cuts_last(node: fx.Node) -> bool:
    items = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    whole = all(item is Ellipsis or item == slice(None) for item in items[:-1])
    return whole and items[-1] in (slice(None, -1), slice(0, -1)) and value_of(node).ndim == value_of(node.args[0]).ndim


def _drops(node: fx.Node) -> bool:
    """Whether a call of ``F.dropout(x, p, training)`` or ``aten.dropout(x, p, train)`` drops anything."""
    options = {**dict(zip(("p", "training"), node.args[1:], strict=False)), **node.kwargs}
    training = options.get("training", options.get("train", True))
    return not (options.get("p", 0.5) == 0 or training is False)


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


def _sinks(node: fx.Node, heads: object, site: fx.Node, prover: MaskProver) -> fx.Node | Rejected:
    """The [Hq] tensor that is spread over the batch and the queries of [B, Hq, Nq, 1]."""
    source = repeat_kv.read_along(node, (1,), (heads,), prover) if value_of(node).ndim == 4 else None
    if source is None or not repeat_kv.is_untouched(node, source, site, prover):
        return Rejected("%s is no tensor of one sink a head", node)
    return source
