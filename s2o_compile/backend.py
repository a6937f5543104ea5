"""The torch.compile backend ``"s2o"``: rewrite the Dynamo graph, then hand it to Inductor (or another backend).

Found by the ``torch_dynamo_backends`` entry point, so ``torch.compile(model, backend="s2o")`` needs no import. The
rewrite happens before Inductor and before AOTAutograd: there SDPA is still one node with its mask, scale and groups,
and everything behind (training, caches, ``mode=``) works on the rewritten graph as on any other.
"""

from __future__ import annotations

import dataclasses
import logging
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from s2o_compile.config import S2OConfig, unknown_name
from s2o_compile.errors import NothingRewrittenWarning, OptionError, UnknownSiteWarning
from s2o_compile.kernels.support.arguments import shown
from s2o_compile.passes import pipeline
from s2o_compile.passes.site import SiteRecord
from s2o_compile.recording import notify

logger = logging.getLogger(__name__)

PREFIX = "s2o."


def split_options(options: Mapping[str, object] | None) -> tuple[S2OConfig, dict[str, object]]:
    """Separate ``s2o.*`` options from those of the inner backend.

    Raises:
        OptionError: An option that S2O does not have, nor Inductor, if that is the inner backend.
    """
    if options is not None and not isinstance(options, Mapping):
        raise OptionError(
            f'options: expected a mapping such as {{"s2o.tau": 0.25}}, got {shown(options)}. Write a dict.'
        )
    options = dict(options or {})
    for name in options:
        if not isinstance(name, str):
            raise OptionError(f'options: expected names such as "s2o.tau", got {shown(name)}. Write names as text.')
    ours = {name.removeprefix(PREFIX): value for name, value in options.items() if name.startswith(PREFIX)}
    fields = [field.name for field in dataclasses.fields(S2OConfig)]
    for name in ours:
        if name not in fields:
            raise OptionError(unknown_name("option", PREFIX + name, [PREFIX + field for field in fields]))
    config = S2OConfig.from_dict(ours)
    others = {name: value for name, value in options.items() if not name.startswith(PREFIX)}
    if config.inner_backend != "inductor":
        return config, others
    inductor = {name.replace("-", "_"): value for name, value in others.items()}
    known = torch._inductor.list_options()
    for name in inductor:
        if name not in known:
            nearest = unknown_name("option", name, known).rpartition("Did you mean")[2]
            hint = f" Did you mean{nearest}" if nearest.startswith(" '") else ""
            raise OptionError(
                f"unknown option {name!r}: expected an Inductor option (torch._inductor.list_options()) or one of "
                f"{', '.join(PREFIX + field for field in fields)}.{hint}"
            )
    return config, inductor


def s2o(
    gm: torch.fx.GraphModule,
    example_inputs: list[torch.Tensor],
    *,
    mode: str | None = None,
    options: Mapping[str, object] | None = None,
) -> Any:  # noqa: ANN401 (a callable; every torch version types what Inductor returns differently)
    """Compile one captured graph.

    Args:
        gm: A Dynamo graph; rewritten in place.
        example_inputs: Its example inputs.
        mode: Inductor's mode, as ``torch.compile(mode=...)``.
        options: ``s2o.*`` options (the fields of S2OConfig) and any option of Inductor, which wins over ``mode``; with
            ``inner_backend="tensorrt"`` any setting of torch-tensorrt.
    """
    config, others = split_options(options)
    rewrite(gm, config)
    if config.inner_backend == "inductor":
        from torch._inductor.compile_fx import compile_fx

        patches = {**(torch._inductor.list_mode_options(mode) if mode else {}), **others}
        return compile_fx(gm, example_inputs, config_patches=patches)
    for_tensorrt = config.inner_backend == "tensorrt"
    if mode or (others and not for_tensorrt):
        raise OptionError(
            f"inner_backend={config.inner_backend!r}: expected no mode and no Inductor options, got mode={mode!r} "
            f'and {sorted(others)}. Drop them, or use inner_backend="inductor".'
        )
    if for_tensorrt:
        from s2o_compile.tensorrt import compile_graph

        return compile_graph(gm, example_inputs, others)
    return torch._dynamo.lookup_backend(config.inner_backend)(gm, example_inputs)


def rewrite(gm: torch.fx.GraphModule, config: S2OConfig) -> tuple[SiteRecord, ...]:
    """Run the passes over one captured graph, tell open recordings, and warn of what the user would not expect.

    Args:
        gm: A Dynamo graph, or that of an exported program (inside ``exported.opened``); rewritten in place.
        config: What to rewrite, and to what.
    """
    start = time.perf_counter()
    records = pipeline.run(
        gm,
        config.operator_options(),
        assume_causal_mask=config.assume_causal_mask,
        assume_block_masks=config.assume_block_masks,
        check_assumptions=config.check_assumptions,
        read_masks=config.read_masks,
        training=config.training,
        dense_heads=config.dense_heads,
        site_tau=config.site_tau,
    )
    settings = {"dense_heads": config.dense_heads, "site_tau": config.site_tau}
    notify(records, time.perf_counter() - start, [name for sites in settings.values() for name in sites])
    _warn_if_nothing(records)
    for field, sites in settings.items():
        _warn_of_unknown_sites(records, field, sites)
    return records


def _warn_if_nothing(records: Sequence[SiteRecord]) -> None:
    """Say aloud when attention was found and all of it stays dense; decode graphs are meant to."""
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
    """Say aloud that a name in a field is none of the graph's; a graph without attention holds nobody's."""
    names = [record.name for record in records]
    for name in marked if names else ():
        if name not in names:
            warnings.warn(
                f"{field}: {unknown_name('site', name, names)} If the model is captured in several graphs, it may "
                "be in another one: s2o_compile.explain(model, *inputs) sees them all.",
                UnknownSiteWarning,
                stacklevel=3,
            )
