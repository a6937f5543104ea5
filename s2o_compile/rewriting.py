"""Runs the passes over one captured graph, and warns of attentions that stay dense and of unknown site names."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from s2o_compile.config import S2OConfig, unknown_name
from s2o_compile.errors import InputError, NothingRewrittenWarning, UnknownSiteWarning
from s2o_compile.kernels import dtensors
from s2o_compile.kernels.core.shards import held_sequence
from s2o_compile.kernels.support.errors import warn
from s2o_compile.passes.site import ELSEWHERE, SHARED, SiteRecord
from s2o_compile.recording import notify


def rewrite(
    gm: torch.fx.GraphModule, config: S2OConfig, nodes: Collection[torch.fx.Node] | None = None
) -> tuple[SiteRecord, ...]:
    """Run the passes over one captured graph, tell open recordings, and warn of what stays dense.

    ``gm``, a Dynamo graph or that of an exported program (inside ``exported.opened``), is rewritten in place. Of
    ``nodes`` alone, if they are given: everything else stays as it is, and nobody hears of it.
    """
    from s2o_compile.passes import pipeline  # 40 files that nobody needs before the first graph

    dtensors.register_if_used()
    seconds: dict[str, float] = {}
    settings = {"dense_heads": config.dense_heads, "site_tau": config.site_tau}
    shared = gm.meta.get(SHARED)
    if shared and any(settings.values()):
        raise InputError(
            "settings by site (dense_heads, site_tau)",
            expected="a model that is captured whole, so that each site is known",
            got=f"a graph break around a {shared}, whose graph other modules of its class share",
            remedy="Remove the break, which a hook may make, or leave the settings out.",
        )
    records = pipeline.run(
        gm,
        config.operator_options(),
        assume_causal_mask=config.assume_causal_mask,
        assume_block_masks=config.assume_block_masks,
        check_assumptions=config.check_assumptions,
        read_masks=config.read_masks,
        dense_heads=config.dense_heads,
        site_tau=config.site_tau,
        step_seconds=seconds,
        nodes=nodes,
    )
    notify(records, seconds, [name for sites in settings.values() for name in sites])
    if held_sequence() is not None:
        _refuse_shards(records)
    reasons = [record.reason for record in records if not record.rewritten]
    is_known = any(record.certain and "decode" not in record.reason for record in records)
    if len(reasons) == len(records) and is_known:
        warn(
            f"none of {len(reasons)} attentions could be rewritten to S2O, they stay dense: "
            f"{'; '.join(sorted(set(reasons)))}. s2o_compile.explain(model, *inputs) lists them.",
            NothingRewrittenWarning,
        )
    names = [record.name for record in records]
    known = {*names, *gm.meta.get(ELSEWHERE, ())}
    unknown = [(field, name) for field, sites in settings.items() for name in sites if name not in known]
    for field, name in unknown if names else ():  # a graph without attention knows no name
        warn(
            f"{field}: {unknown_name('site', name, names)} If the model is captured in several graphs, it may "
            "be in another one: s2o_compile.explain(model, *inputs) sees them all.",
            UnknownSiteWarning,
        )
    return records


def _refuse_shards(records: Sequence[SiteRecord]) -> None:
    """Raise InputError if a graph of shards holds an attention that stays as it is: it would see its shard alone."""
    left = [record for record in records if not record.rewritten or record.unproven]
    if left:
        why = (f"{record.name}: {record.reason or f'mask read at run time ({record.unproven})'}" for record in left)
        raise InputError(
            "context parallel",
            expected="attentions whose masks are proven, which are rewritten",
            got="; ".join(why),
            remedy="See docs/troubleshooting.md, or run this model on one rank.",
        )
