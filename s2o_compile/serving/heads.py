"""Settings of single heads on a rank of tensor parallelism, which holds a part of the model's heads."""

from __future__ import annotations

import dataclasses
from typing import Any

from s2o_compile.config import S2OConfig
from s2o_compile.errors import OptionError
from s2o_compile.kernels.core.head_shards import HeadShard


def has_heads(config: S2OConfig) -> bool:
    """Whether the configuration says anything about single heads."""
    return bool(config.site_tau or config.dense_heads) or isinstance(config.tau, tuple)


def for_rank(config: S2OConfig, site: str, heads: int, kv_heads: int, all_kv_heads: int, rank: HeadShard) -> S2OConfig:
    """The configuration of one attention, with the settings of the heads that a rank holds.

    Configurations number the model's heads. Each rank holds as many, in order. If there are more ranks than key/value
    heads, neighbours hold copies of one.

    Args:
        config: Of the whole model.
        site: The attention, as `s2o_compile.explain` names it.
        heads: Query heads that the rank holds.
        kv_heads: Key/value heads that the rank holds.
        all_kv_heads: Key/value heads of the model.
        rank: The rank.

    Raises:
        OptionError: The numbers are of other heads than the model has.
    """
    model_heads = heads * rank.count
    own = slice(rank.index * heads, (rank.index + 1) * heads)
    first = rank.index * all_kv_heads // rank.count
    fields: dict[str, Any] = {"site_tau": {}, "dense_heads": {}}
    for taus in (config.site_tau.get(site, ()), config.tau if isinstance(config.tau, tuple) else ()):
        if taus and len(taus) != model_heads:
            raise OptionError(
                f"tau of {site or 'every site'}: expected {model_heads} numbers, one for each query head of the model, "
                f"got {len(taus)}. Calibrate this model again."
            )
    if site in config.site_tau:
        fields["site_tau"] = {site: config.site_tau[site][own]}
    if isinstance(config.tau, tuple):
        fields["tau"] = config.tau[own]
    if site in config.dense_heads:
        marked = config.dense_heads[site]
        if marked[-1] >= all_kv_heads:
            raise OptionError(
                f"dense_heads of {site}: expected key/value heads below {all_kv_heads}, got {marked[-1]}. Name heads "
                "that the model has."
            )
        held = [head - first for head in marked if first <= head < first + kv_heads]
        fields["dense_heads"] = {site: held}
    return dataclasses.replace(config, **fields)
