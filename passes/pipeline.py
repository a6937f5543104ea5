"""Runs the passes over one captured graph and reports the outcome of every attention in it."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from types import ModuleType

from torch import fx

from s2o_compile.kernels.support.torch_compat import is_erased
from s2o_compile.passes import decompose, unknown_forms
from s2o_compile.passes import dump as dumps
from s2o_compile.passes.frontends import sdpa, third_party, varlen
from s2o_compile.passes.frontends.checks import check_tangents
from s2o_compile.passes.frontends.eager import match as eager
from s2o_compile.passes.frontends.flex import match as flex
from s2o_compile.passes.graph.nodes import value_of
from s2o_compile.passes.graph.rejected import Rejected, attempt
from s2o_compile.passes.masks.prover import MaskProver
from s2o_compile.passes.rewrite import Rewriter
from s2o_compile.passes.site import OWN_FUNCTIONS, AttentionSite, SiteRecord, record
from s2o_compile.passes.site_names import module_paths, unique_names

logger = logging.getLogger(__name__)

FRONTENDS = (
    sdpa,  # torch's fused call: mask, scale and groups are operands of one node
    flex,  # the higher-order operator, written out for the next one
    eager,  # product, softmax, product
    varlen,  # packed sequences by their bounds: flash-attn's functions, and torch's
    third_party,  # kernels of other packages: named, never rewritten
)


@dataclasses.dataclass(eq=False, kw_only=True)
class _Run:
    """One graph on its way through the steps: the arguments of `run`, and what the steps found.

    Attributes:
        prover_options: How masks are proven, as keyword arguments of `MaskProver`.
        scope: The captured nodes that are looked at; None for all of them.
        expansions: Opaque nodes, each with the nodes that were inlined for it.
        paths: Of the modules that hold opaque nodes and attentions.
        sites: In graph order, each node that a frontend takes for an attention, its match, and its record if it stays.
        records: By the node of an attention, its line in the report.
        unknown: The report lines of attentions in forms that no frontend knows.
        inner: The report lines of attentions in sub-graphs.
    """

    gm: fx.GraphModule
    options: Mapping[str, object]
    prover_options: Mapping[str, bool]
    check_assumptions: bool
    dense_heads: Mapping[str, Sequence[int]]
    site_tau: Mapping[str, Sequence[float]]
    scope: frozenset[fx.Node] | None
    expansions: list[tuple[fx.Node, decompose.Expansion | Rejected]] = dataclasses.field(default_factory=list)
    paths: dict[fx.Node, str] = dataclasses.field(default_factory=dict)
    sites: list[tuple[fx.Node, AttentionSite | Rejected, SiteRecord]] = dataclasses.field(default_factory=list)
    records: dict[fx.Node, SiteRecord] = dataclasses.field(default_factory=dict)
    unknown: list[SiteRecord] = dataclasses.field(default_factory=list)
    inner: list[SiteRecord] = dataclasses.field(default_factory=list)

    def looks_at(self, node: fx.Node) -> bool:
        """Whether a captured node is one of those that are looked at."""
        return self.scope is None or node in self.scope


def run(
    gm: fx.GraphModule, op_options: Mapping[str, object], *, assume_causal_mask: bool = False,
    assume_block_masks: bool = False, check_assumptions: bool = False, read_masks: bool = False,
    dense_heads: Mapping[str, Sequence[int]] | None = None, site_tau: Mapping[str, Sequence[float]] | None = None,
    step_seconds: dict[str, float] | None = None, nodes: Collection[fx.Node] | None = None,
) -> tuple[SiteRecord, ...]:  # fmt: skip
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
        step_seconds: Gets the seconds of each step, by its name.
        nodes: Where attentions are looked for, if not in the whole graph.

    Returns:
        One record per attention found, in graph order; attentions inside sub-graphs last.

    Raises:
        DumpError: ``S2O_DUMP`` names a folder that cannot be used.
    """
    state = _Run(
        gm=gm,
        options=op_options,
        prover_options={
            "assume_causal": assume_causal_mask, "assume_block_masks": assume_block_masks, "read": read_masks
        },
        check_assumptions=check_assumptions,
        dense_heads=dense_heads or {},
        site_tau=site_tau or {},
        scope=None if nodes is None else frozenset(nodes),
    )  # fmt: skip
    seconds = {} if step_seconds is None else step_seconds
    dump = dumps.from_environment()
    text = "" if dump is None else gm.print_readable(print_output=False)
    for number, (name, step) in enumerate(STEPS, 1):
        start = time.perf_counter()
        step(state)
        seconds[name] = time.perf_counter() - start
        if dump is not None:
            before, text = text, gm.print_readable(print_output=False)
            dump.write(number, name, before, text)
    result = (*state.records.values(), *state.unknown, *state.inner)
    logger.info(
        "%d of %d attentions rewritten in %.1f ms (%s)",
        sum(entry.rewritten for entry in result),
        len(result),
        1e3 * sum(seconds.values()),
        ", ".join(f"{name} {1e3 * spent:.1f}" for name, spent in seconds.items()),
    )
    return result


def _open_all(run: _Run) -> None:
    opaque = [node for node in run.gm.graph.nodes if run.looks_at(node) and decompose.is_opaque(node)]
    run.expansions = [(node, decompose.expand(node)) for node in opaque]


def _match_all(run: _Run) -> None:
    graph, opaque = run.gm.graph, {node for node, _ in run.expansions}
    parts = {
        inner: decompose.attending_part(node) for node, opened in run.expansions for inner in _within(node, opened)
    }
    looked_at = [node for node in graph.nodes if node not in opaque and (node in parts or run.looks_at(node))]
    attentions = [(node, found) for node in looked_at if (found := _frontend(node))]
    run.paths = module_paths({node: parts.get(node, "") for node in (*opaque, *(node for node, _ in attentions))})
    names = unique_names([run.paths[node] for node, _ in attentions])
    prover = MaskProver(graph, **run.prover_options)
    matches = _apart([_match(frontend, node, prover) for node, frontend in attentions])
    run.sites = [
        (node, match, _left(node, frontend, "" if isinstance(match, AttentionSite) else match.reason, name))
        for (node, frontend), name, match in zip(attentions, names, matches, strict=True)
    ]


def _name_unknown(run: _Run) -> None:
    known = [node for node, _, _ in run.sites]
    run.unknown = _unknown(run.gm.graph, run.looks_at, known, [run.paths[node] for node in known])


def _rewrite_all(run: _Run) -> None:
    rewriter = Rewriter(run.gm.graph, run.options, check_assumptions=run.check_assumptions)
    # In the order of the replaced nodes: later sites share the key masks that earlier ones made.
    position = {node: at for at, node in enumerate(run.gm.graph.nodes)}
    replaced = {node: match.node if isinstance(match, AttentionSite) else node for node, match, _ in run.sites}
    ordered = sorted(run.sites, key=lambda site: position[replaced[site[0]]])
    rewritten = {node: _rewrite(match, left, rewriter, run) for node, match, left in ordered}
    run.records = {node: rewritten[node] for node, _, _ in run.sites}


def _close_all(run: _Run) -> None:
    """Replaces opaque nodes by their inlined ones if the attentions of these are rewritten, else erases these."""
    for node, opened in run.expansions:
        if isinstance(opened, Rejected):
            run.records[node] = _left(node, _frontend(node), opened.reason, run.paths[node])
            continue
        inside = [run.records[inner] for inner in opened.nodes if inner in run.records]
        if inside and all(entry.rewritten for entry in inside):
            opened.keep()
            continue
        opened.erase()
        if not inside:
            run.records[node] = _left(node, None, "no attention was found in its code", run.paths[node])


def _make_sparse_all(run: _Run) -> None:
    for node, opened in run.expansions:
        if not is_erased(node) and flex.is_call(node):
            _make_sparse(node, opened, run)


def _recompile(run: _Run) -> None:
    if any(entry.rewritten for entry in run.records.values()):
        run.gm.graph.lint()
        run.gm.recompile()


def _report_inner(run: _Run) -> None:
    run.inner = _inside(run.gm, run.looks_at)


STEPS: tuple[tuple[str, Callable[[_Run], None]], ...] = (
    ("open", _open_all),  # first, so that the frontends see the attention inside opaque calls
    ("match", _match_all),  # ahead of every change: the prover's positions and writes are the captured graph's
    ("name_unknown", _name_unknown),  # behind the matching: the rest; ahead of every change
    ("rewrite", _rewrite_all),  # behind every proof; what it replaces may be an operand of a later site
    ("close", _close_all),  # behind the rewriting: an opened call stays open if its attention was rewritten
    ("sparse_flex", _make_sparse_all),  # behind the closing: it takes the flex calls that no frontend replaced
    ("recompile", _recompile),  # behind the last change
    ("report_inner", _report_inner),  # any time: bodies of higher-order operators are read, never changed
)
"""The passes in their order, each with the name that logs, dumps and times show."""


def _within(node: fx.Node, opened: decompose.Expansion | Rejected) -> tuple[fx.Node, ...]:
    """An opaque node, and the nodes that were inlined for it."""
    return node, *(() if isinstance(opened, Rejected) else opened.nodes)


def _frontend(node: fx.Node) -> ModuleType | None:
    """The first frontend that takes a node for an attention."""
    return next((frontend for frontend in FRONTENDS if frontend.is_attention(node)), None)


def _match(frontend: ModuleType, node: fx.Node, prover: MaskProver) -> AttentionSite | Rejected:
    """A frontend's answer; a failure of the pass itself must not fail the user's compilation."""
    try:
        refused = attempt(check_tangents, node)
        return frontend.match(node, prover) if refused is None else refused
    except Exception as error:
        return _pass_failed(node, error)


def _pass_failed(node: fx.Node, error: Exception) -> Rejected:
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


def _left(node: fx.Node, frontend: ModuleType | None, reason: str, name: str) -> SiteRecord:
    """The report line of an attention that stays as it is, with the operands that its frontend finds."""
    call = {} if frontend is None else frontend.operands(node)
    query, key = value_of(call.get("query")), value_of(call.get("key"))
    return record(name, query, key, reason=reason)


def _make_sparse(node: fx.Node, opened: decompose.Expansion | Rejected, run: _Run) -> None:
    """Make a call of flex_attention sparse that no frontend could replace; it keeps its functions."""
    from s2o_compile.passes.frontends.flex import sparse as flex_sparse  # loads the sampling of keys

    recorded = next(candidate for candidate in _within(node, opened) if candidate in run.records)
    left = run.records[recorded]
    dense_heads, head_tau = run.dense_heads.get(left.name, ()), run.site_tau.get(left.name, ())
    try:
        refused = attempt(flex_sparse.lower, node, run.options, dense_heads=dense_heads, head_tau=head_tau)
    except Exception as error:
        refused = _pass_failed(node, error)
    if refused is None:
        run.records[recorded] = dataclasses.replace(
            left,
            rewritten=True,
            reason="",
            mask=OWN_FUNCTIONS,
            dense_heads=tuple(dense_heads),
            unheld_error=flex_sparse.quality_of(run.options, head_tau).ceiling,
        )
    else:
        logger.debug("%s keeps its functions and stays dense: %s", left.name, refused)
        run.records[recorded] = dataclasses.replace(left, reason=f"{left.reason} (sparse FlexAttention: {refused})")


def _rewrite(match: AttentionSite | Rejected, left: SiteRecord, rewriter: Rewriter, run: _Run) -> SiteRecord:
    name = left.name
    if isinstance(match, Rejected):
        logger.debug("%s stays dense: %s", name, match)
        return left
    query, key, mask, read = match.query.value, match.key.value, str(match.mask), match.mask.read
    dense_heads, head_tau = tuple(run.dense_heads.get(name, ())), tuple(run.site_tau.get(name, ()))
    named = dataclasses.replace(match, name=name, dense_heads=dense_heads, head_tau=head_tau)
    refused = rewriter.rewrite(named)
    if refused is not None:
        logger.debug("%s stays dense: %s", name, refused)
        return record(name, query, key, mask=mask, reason=refused.reason)
    logger.debug("%s rewritten: %s", name, mask)
    unproven = "" if read is None else read.why.reason
    return record(name, query, key, mask=mask, unproven=unproven, dense_heads=dense_heads)


def _unknown(
    graph: fx.Graph, looks_at: Callable[[fx.Node], bool], known: Sequence[fx.Node], paths: Sequence[str]
) -> list[SiteRecord]:
    """The report lines of attentions in unknown forms, of those without a softmax one a module.

    ``paths`` are those of the known ones, whose names theirs must differ from. A failure of the search must not fail
    the user's compilation.
    """
    try:
        found = {node: scores for node, scores in unknown_forms.find(graph.nodes, frozenset(known)) if looks_at(node)}
    except Exception:
        logger.exception("the search for attention in unknown forms failed, please report that")
        return []
    of_modules = module_paths(dict.fromkeys(found, ""))
    first: dict[str, fx.Node] = {}
    for node, path in of_modules.items():
        first.setdefault(node.name if found[node].softmax else "" if path == node.name else path, node)
    names = unique_names([*paths, *map(of_modules.__getitem__, first.values())])[len(paths) :]
    return [found[node].record(name, value_of(node)) for node, name in zip(first.values(), names, strict=True)]


def _inside(gm: fx.GraphModule, looks_at: Callable[[fx.Node], bool]) -> list[SiteRecord]:
    """Attentions in the bodies of higher-order operators, which are left as they are."""
    records = []
    for child, body in gm.named_children():
        if not isinstance(body, fx.GraphModule):
            continue
        users = [user for node in gm.graph.find_nodes(op="get_attr", target=child) for user in node.users]
        holder = getattr(users[0].target, "__name__", str(users[0].target)) if users else child
        reason = f"it is inside {holder}, whose body is left as it is"
        nodes = [node for node in body.graph.nodes if looks_at(node)]
        attentions = {node: found for node in nodes if (found := _frontend(node))}
        paths = module_paths(dict.fromkeys(attentions, ""))
        records += [_left(node, frontend, reason, paths[node]) for node, frontend in attentions.items()]
        unknown = _unknown(body.graph, looks_at, list(attentions), list(paths.values()))
        records += (dataclasses.replace(record, reason=reason) for record in unknown)
        records += _inside(body, looks_at)
    return records
