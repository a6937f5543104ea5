"""Runs the passes over one captured graph, and warns of attentions that stay dense and of unknown site names."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Sequence

import torch

from s2o_compile.config import S2OConfig, unknown_name
from s2o_compile.errors import NothingRewrittenWarning, UnknownSiteWarning
from s2o_compile.passes import pipeline
from s2o_compile.passes.site import SiteRecord
from s2o_compile.recording import notify

logger = logging.getLogger(__name__)


def rewrite(gm: torch.fx.GraphModule, config: S2OConfig) -> tuple[SiteRecord, ...]:
    """Run the passes over one captured graph, tell open recordings, and warn of what stays dense.

    Args:
        gm: A Dynamo graph, or that of an exported program (inside ``exported.opened``); rewritten in place.
        config: The configuration.
    """
    seconds: dict[str, float] = {}
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
    )
    settings = {"dense_heads": config.dense_heads, "site_tau": config.site_tau}
    notify(records, seconds, [name for sites in settings.values() for name in sites])
    _warn_if_nothing(records)
    for field, sites in settings.items():
        _warn_of_unknown_sites(records, field, sites)
    return records


def _warn_if_nothing(records: Sequence[SiteRecord]) -> None:
    """Warn if attention was found and all of it stays dense, except in decode graphs."""
    left = [record for record in records if not record.rewritten]
    logger.info("%d of %d attentions rewritten", len(records) - len(left), len(records))
    if left and len(left) == len(records) and not all("decode" in record.reason for record in left):
        reasons = sorted({record.reason for record in left})
        warnings.warn(
            f"none of {len(left)} attentions could be rewritten to S2O, they stay dense: {'; '.join(reasons)}. "
            "s2o_compile.explain(model, *inputs) lists them.",
            NothingRewrittenWarning,
            stacklevel=3,
        )


def _warn_of_unknown_sites(records: Sequence[SiteRecord], field: str, marked: Iterable[str]) -> None:
    """Warn of a name in a field that no site of the graph has, unless the graph has no attention."""
    names = [record.name for record in records]
    for name in marked if names else ():
        if name not in names:
            warnings.warn(
                f"{field}: {unknown_name('site', name, names)} If the model is captured in several graphs, it may "
                "be in another one: s2o_compile.explain(model, *inputs) sees them all.",
                UnknownSiteWarning,
                stacklevel=3,
            )
