"""Runs the passes over one captured graph and reports what became of every attention in it."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Mapping, Sequence
from types import ModuleType

from torch import fx

from s2o_compile.kernels.support.torch_compat import is_erased
from s2o_compile.passes.frontends import decompose as expansion
from s2o_compile.passes.frontends import sdpa
from s2o_compile.passes.frontends import third_party as third_party
from s2o_compile.passes.frontends.eager import match as eager
from s2o_compile.passes.frontends.flex import match as flex
from s2o_compile.passes.graph.nodes import value_of
from s2o_compile.passes.graph.rejected import Rejected
from s2o_compile.passes.masks.prover import MaskProver
from s2o_compile.passes.rewrite import Rewriter
from s2o_compile.passes.site import AttentionSite, SiteRecord, module_path, record, unique_names

logger = logging.getLogger(__name__)

FRONTENDS = (
    sdpa,  # torch's fused call: mask, scale and groups are operands of one node
    flex,  # the higher-order operator, written out for the next one
    eager,  # product, softmax, product
    third_party,  # kernels of other packages: named, never rewritten
)


def run(
    gm: fx.GraphModule,
    op_options: Mapping[str, object],
    *,
    assume_causal_mask: bool = False,
    assume_block_masks: bool = False,
    check_assumptions: bool = False,
    read_masks: bool = False,
    dense_heads: Mapping[str, Sequence[int]] | None = None,
    site_tau: Mapping[str, Sequence[float]] | None = None,
) -> tuple[SiteRecord, ...]:
    """Rewrites every attention whose mask is proven to ``s2o::attention``.

    Args:
        gm: A Dynamo graph, changed in place and recompiled.
        op_options: Keyword arguments for every call of the operator, such as ``tau``.
        assume_causal_mask: Whether masks that enter the graph are taken as causal where nothing can be proven.
        assume_block_masks: Whether block masks that enter the graph are taken as those of their mask_mods.
        check_assumptions: Whether the rewritten graph compares such masks with what was promised.
        read_masks: Whether masks of which nothing is proven are left to the operator, which reads them when it runs.
        dense_heads: By site name, key/value heads that run dense.
        site_tau: By site name, tau of each query head.

    Returns:
        One record per attention found, in graph order; attentions inside sub-graphs last.
    """
    start = time.perf_counter()
    expansions = [(node, expansion.expand(node)) for node in gm.graph.nodes if expansion.is_opaque(node)]
    opaque = {node for node, _ in expansions}
    found = [
        (node, frontend) for node in gm.graph.nodes if node not in opaque and (frontend := _frontend(node)) is not None
    ]
    names = unique_names([module_path(node) for node, _ in found])
    prover = MaskProver(
        gm.graph, assume_causal=assume_causal_mask, assume_block_masks=assume_block_masks, read=read_masks
    )
    # Every proof comes before the first change: the prover's positions and writes are those of the captured graph.
    matches = _apart([_match(frontend, node, prover) for node, frontend in found])
    calls = [frontend.operands(node) for node, frontend in found]
    rewriter = Rewriter(gm.graph, op_options, check_assumptions=check_assumptions)
    # In the order of what is replaced: later sites share the key masks that earlier ones made.
    position = {node: at for at, node in enumerate(gm.graph.nodes)}
    sites = sorted(
        zip((node for node, _ in found), calls, matches, names, strict=True),
        key=lambda site: position[site[2].node if isinstance(site[2], AttentionSite) else site[0]],
    )
    marked, taus = dense_heads or {}, site_tau or {}
    rewritten = {
        node: _rewrite(node, call, match, name, rewriter, tuple(marked.get(name, ())), tuple(taus.get(name, ())))
        for node, call, match, name in sites
    }
    records = {node: rewritten[node] for node, _ in found}
    for node, opened in expansions:
        _close(node, opened, records)
        if not is_erased(node) and flex.is_call(node):
            _make_sparse(node, opened, records, op_options, marked, taus)
    if any(entry.rewritten for entry in records.values()):
        gm.graph.lint()
        gm.recompile()
    result = (*records.values(), *_inside(gm))
    logger.info(
        "%d of %d attentions rewritten in %.1f ms",
        sum(entry.rewritten for entry in result),
        len(result),
        1e3 * (time.perf_counter() - start),
    )
    return result


def _frontend(node: fx.Node) -> ModuleType | None:
    """The first frontend that takes a node for an attention."""
    return next((frontend for frontend in FRONTENDS if frontend.is_attention(node)), None)


def _match(frontend: ModuleType, node: fx.Node, prover: MaskProver) -> AttentionSite | Rejected:
    """A frontend's answer; a failure of the pass itself must not fail the user's compilation."""
    try:
        return frontend.match(node, prover)
    except Exception as error:
        logger.exception("%s: the pass failed", node)
        return Rejected("the pass failed on it (%s: %s), please report that", type(error).__name__, error)


def _apart(matches: Sequence[AttentionSite | Rejected]) -> list[AttentionSite | Rejected]:
    """The matches without those that take another one's output for their scores: its operands would be gone."""
    outputs = {match.node for match in matches if isinstance(match, AttentionSite)}
    return [
        Rejected("its scores %s are the output of another attention", shared[0])
        if isinstance(match, AttentionSite) and (shared := [node for node in match.interior if node in outputs])
        else match
        for match in matches
    ]


def _close(node: fx.Node, opened: expansion.Expansion | Rejected, records: dict[fx.Node, SiteRecord]) -> None:
    """Keep what was inlined for an opaque node if its attentions are rewritten, else take it out again."""
    if isinstance(opened, Rejected):
        frontend = _frontend(node)
        call = {} if frontend is None else frontend.operands(node)
        query, key = value_of(call.get("query")), value_of(call.get("key"))
        records[node] = record(node, query=query, key=key, reason=opened.reason)
        return
    inside = [records[inner] for inner in opened.nodes if inner in records]
    if inside and all(entry.rewritten for entry in inside):
        opened.keep()
        return
    opened.erase()
    if not inside:
        records[node] = record(node, query=None, key=None, reason="no attention was found in its code")


def _make_sparse(
    node: fx.Node,
    opened: expansion.Expansion | Rejected,
    records: dict[fx.Node, SiteRecord],
    options: Mapping[str, object],
    dense_heads: Mapping[str, Sequence[int]],
    head_tau: Mapping[str, Sequence[float]],
) -> None:
    """Let a call of flex_attention that could not be replaced keep its functions, and be sparse all the same."""
    from s2o_compile.passes.frontends.flex import sparse as flex_sparse  # loads the sampling of keys

    inner = () if isinstance(opened, Rejected) else opened.nodes
    place = next(place for place in (node, *inner) if place in records)
    left = records[place]
    try:
        refused = flex_sparse.lower(
            node,
            options,
            dense_heads=dense_heads.get(left.name, ()),
            head_tau=head_tau.get(left.name, ()),
        )
    except Exception as error:
        logger.exception("%s: the pass failed", node)
        refused = Rejected("the pass failed on it (%s: %s), please report that", type(error).__name__, error)
    if refused is None:
        records[place] = dataclasses.replace(
            left, rewritten=True, reason="", mask=flex_sparse.MASK, dense_heads=tuple(dense_heads.get(left.name, ()))
        )
    else:
        logger.debug("%s keeps its functions and stays dense: %s", left.name, refused)
        records[place] = dataclasses.replace(left, reason=f"{left.reason} (sparse FlexAttention: {refused})")


def _rewrite(
    node: fx.Node,
    operands: Mapping[str, object],
    match: AttentionSite | Rejected,
    name: str,
    rewriter: Rewriter,
    dense_heads: tuple[int, ...],
    head_tau: tuple[float, ...],
) -> SiteRecord:
    query, key = value_of(operands.get("query")), value_of(operands.get("key"))
    if isinstance(match, Rejected):
        logger.debug("%s stays dense: %s", name, match)
        return record(node, query=query, key=key, reason=match.reason, name=name)
    query, key, mask, read = match.query.value, match.key.value, str(match.mask), match.mask.read
    # The record is made first: rewriting erases the node.
    unproven = "" if read is None else read.why.reason
    rewritten = record(node, query=query, key=key, mask=mask, name=name, unproven=unproven, dense_heads=dense_heads)
    refused = rewriter.rewrite(dataclasses.replace(match, name=name, dense_heads=dense_heads, head_tau=head_tau))
    if refused is not None:
        logger.debug("%s stays dense: %s", name, refused)
        return record(node, query=query, key=key, reason=refused.reason, mask=mask, name=name)
    logger.debug("%s rewritten: %s", name, mask)
    return rewritten


def _inside(gm: fx.GraphModule) -> list[SiteRecord]:
    """Attentions in the bodies of higher-order operators, which are left as they are."""
    records = []
    for child, body in gm.named_children():
        if not isinstance(body, fx.GraphModule):
            continue
        users = [user for node in gm.graph.find_nodes(op="get_attr", target=child) for user in node.users]
        holder = getattr(users[0].target, "__name__", str(users[0].target)) if users else child
        reason = f"it is inside {holder}, whose body is left as it is"
        for node in body.graph.nodes:
            frontend = _frontend(node)
            if frontend is not None:
                call = frontend.operands(node)
                query, key = value_of(call.get("query")), value_of(call.get("key"))
                records.append(record(node, query=query, key=key, reason=reason))
        records += _inside(body)
    return records
