"""Runs the passes over one captured graph and reports what became of every attention in it."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Mapping

from torch import fx

from s2o_compile.passes import sdpa
from s2o_compile.passes.graph_values import value_of
from s2o_compile.passes.mask_prover import MaskProver
from s2o_compile.passes.rewrite import Rewriter
from s2o_compile.passes.site import AttentionSite, Rejected, SiteRecord, module_path, record, unique_names

logger = logging.getLogger(__name__)

FRONTENDS = (
    sdpa,  # torch's fused call: mask, scale and groups are operands of one node
)


def run(
    gm: fx.GraphModule,
    op_options: Mapping[str, object],
    *,
    assume_causal_mask: bool = False,
    check_assumptions: bool = False,
) -> tuple[SiteRecord, ...]:
    """Rewrites every attention whose mask is proven to ``s2o::attention``.

    Args:
        gm: A Dynamo graph, changed in place and recompiled.
        op_options: Keyword arguments for every call of the operator, such as ``tau``.
        assume_causal_mask: Whether masks that enter the graph are taken as causal where nothing can be proven.
        check_assumptions: Whether the rewritten graph compares such masks with the causal mask.

    Returns:
        One record per attention found, in graph order; attentions inside sub-graphs last.
    """
    start = time.perf_counter()
    found = [(node, frontend) for node in gm.graph.nodes for frontend in FRONTENDS if frontend.is_attention(node)]
    names = unique_names([module_path(node) for node, _ in found])
    prover = MaskProver(gm.graph, assume_causal=assume_causal_mask)
    # Every proof comes before the first change: the prover's positions and writes are those of the captured graph.
    matches = [frontend.match(node, prover) for node, frontend in found]
    rewriter = Rewriter(gm.graph, op_options, check_assumptions=check_assumptions)
    records = [
        _rewrite(node, frontend.operands(node), match, name, rewriter)
        for (node, frontend), match, name in zip(found, matches, names, strict=True)
    ]
    if any(entry.rewritten for entry in records):
        gm.graph.lint()
        gm.recompile()
    records += _inside(gm)
    logger.info(
        "%d of %d attentions rewritten in %.1f ms",
        sum(entry.rewritten for entry in records),
        len(records),
        1e3 * (time.perf_counter() - start),
    )
    return tuple(records)


def _rewrite(
    node: fx.Node, operands: Mapping[str, object], match: AttentionSite | Rejected, name: str, rewriter: Rewriter
) -> SiteRecord:
    query, key = value_of(operands.get("query")), value_of(operands.get("key"))
    if isinstance(match, Rejected):
        logger.debug("%s stays dense: %s", name, match)
        return record(node, query=query, key=key, reason=match.reason, name=name)
    key, mask = value_of(match.key), str(match.mask)
    # The record is made first: rewriting erases the node.
    rewritten = record(node, query=query, key=key, mask=mask, name=name)
    refused = rewriter.rewrite(dataclasses.replace(match, name=name))
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
            for frontend in FRONTENDS:
                if frontend.is_attention(node):
                    call = frontend.operands(node)
                    query, key = value_of(call["query"]), value_of(call["key"])
                    records.append(record(node, query=query, key=key, reason=reason))
        records += _inside(body)
    return records
