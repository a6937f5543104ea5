"""The torch.compile backend ``"s2o"``: rewrite the Dynamo graph, then hand it to Inductor (or another backend).

Found by the ``torch_dynamo_backends`` entry point, so ``torch.compile(model, backend="s2o")`` needs no import. The
rewrite happens before Inductor and before AOTAutograd: there SDPA is still one node with its mask, scale and groups,
and everything behind (training, caches, ``mode=``) works on the rewritten graph as on any other.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any

import torch

from s2o_compile.config import REMOVED, RENAMED, S2OConfig, did_you_mean, unknown_name
from s2o_compile.errors import OptionError
from s2o_compile.kernels import ops
from s2o_compile.kernels.statistics import count
from s2o_compile.kernels.support.arguments import is_one_of, shown
from s2o_compile.kernels.support.derivatives import every_derivative, in_forward_mode, may_run_again
from s2o_compile.kernels.support.torch_compile import (
    compile_fx,
    inductor_mode_options,
    inductor_options,
    lookup_backend,
)
from s2o_compile.passes.site import OWN_FUNCTIONS
from s2o_compile.rewriting import rewrite

logger = logging.getLogger(__name__)

PREFIX = "s2o."

FLEX_UNCOMPILED = (
    "FlexAttention with functions of its own is sparse only where the graph is compiled: choose another inner_backend "
    'than "eager"'
)
"""Why such a call ran dense."""


@cache
def _schemas() -> str:
    """A part of Inductor's cache keys, because cached code calls the operators by the schema that they had."""
    operators = (ops.attention, ops.masked_attention, ops.packed_attention)
    schemas = (torch.library.infer_schema(operator, mutates_args=()) for operator in operators)
    return hashlib.sha256("".join(schemas).encode()).hexdigest()


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
        if name not in (*fields, *RENAMED, *REMOVED):
            raise OptionError(unknown_name("option", PREFIX + name, [PREFIX + field for field in fields]))
    config = S2OConfig.from_dict(ours)
    others = {name: value for name, value in options.items() if not name.startswith(PREFIX)}
    if config.inner_backend != "inductor":
        return config, others
    inductor = {name.replace("-", "_"): value for name, value in others.items()}
    known = inductor_options()
    for name in inductor:
        if known is not None and name not in known:
            raise OptionError(
                f"unknown option {name!r}: expected an Inductor option (torch._inductor.list_options()) or one of "
                f"{', '.join(PREFIX + field for field in fields)}.{did_you_mean(name, known)}"
            )
    return config, inductor


@dataclasses.dataclass(frozen=True, eq=False)
class Backend:
    """The backend of one optimized model: `s2o` with both mode and options, of which torch.compile takes only one."""

    mode: str | None
    options: Mapping[str, object]

    def __call__(self, gm: torch.fx.GraphModule, example_inputs: list[torch.Tensor]) -> Any:  # noqa: ANN401 (as `s2o`)
        """Compile one captured graph."""
        return s2o(gm, example_inputs, mode=self.mode, options=self.options)

    def compile_part(
        self,
        gm: torch.fx.GraphModule,
        example_inputs: list[torch.Tensor],
        nodes: Sequence[torch.fx.Node],
        backend: Callable[..., Callable[..., Any]],
    ) -> Callable[..., Any]:
        """Compile a graph by another backend, the attentions among some nodes made sparse."""
        return _rewritten(gm, example_inputs, split_options(self.options)[0], backend, nodes)


def check_inner(config: S2OConfig, others: Mapping[str, object], mode: object) -> None:
    """Raise OptionError unless the inner backend has this mode, and takes options that are not ours if there are some.

    ``config`` and ``others`` are of `split_options`.
    """
    inner = config.inner_backend
    if inner == "inductor":
        if mode is not None and not is_one_of(mode, known := sorted(inductor_mode_options())):
            raise OptionError(unknown_name("mode", mode, known))
    elif mode is not None or (others and inner != "tensorrt"):
        raise OptionError(
            f"inner_backend={inner!r}: expected no mode and no Inductor options, got mode={shown(mode)} and "
            f'{sorted(others)}. Drop them, or use inner_backend="inductor".'
        )


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
    check_inner(config, others, mode)
    return _rewritten(gm, example_inputs, config, partial(_compiled, config=config, mode=mode, others=others))


def _rewritten(
    gm: torch.fx.GraphModule,
    example_inputs: list[torch.Tensor],
    config: S2OConfig,
    compile_graph: Callable[..., Callable[..., Any]],
    nodes: Sequence[torch.fx.Node] | None = None,
) -> Callable[..., Any]:
    """A graph, compiled behind the passes over all of it, or over some nodes."""
    captured = _graph_of(gm)
    records = rewrite(gm, config, nodes)
    settings: Any = torch.compiler.config
    with settings.patch(cache_key_tag=settings.cache_key_tag + _schemas()):
        compiled = compile_graph(gm, example_inputs)
    flex_calls = sum(record.rewritten and record.mask == OWN_FUNCTIONS for record in records)
    path = ("dense", FLEX_UNCOMPILED) if config.inner_backend == "eager" else ("s2o",)
    return _or_as_captured(gm, captured, _counted(compiled, [path] * flex_calls) if flex_calls else compiled)


def _counted(compiled: Callable[..., Any], calls: Sequence[tuple[str, ...]]) -> Callable[..., Any]:
    """A compiled graph that counts calls which run in it without the operator, as arguments of ``statistics.count``."""

    def run(*inputs: object) -> Any:  # noqa: ANN401 (what the graph returns)
        for call in calls:
            count(*call)
        return compiled(*inputs)

    return run


def _compiled(
    gm: torch.fx.GraphModule,
    example_inputs: list[torch.Tensor],
    config: S2OConfig,
    mode: str | None,
    others: dict[str, object],
) -> Callable[..., Any]:
    """The rewritten graph, compiled by the inner backend with the options that are not ours."""
    if config.inner_backend == "inductor":
        patches = {**(inductor_mode_options(mode) if mode else {}), **others}
        return compile_fx(gm, example_inputs, config_patches=patches)
    if config.inner_backend == "tensorrt":
        from s2o_compile.tensorrt import compile_graph

        return compile_graph(gm, example_inputs, others)
    if config.inner_backend == "eager":
        return gm.forward
    return lookup_backend(config.inner_backend)(gm, example_inputs)


def _graph_of(gm: torch.fx.GraphModule) -> torch.fx.Graph:
    """A copy of a graph, without the values that its nodes had."""
    graph = torch.fx.Graph()
    output = graph.graph_copy(gm.graph, {})
    graph.output(output)
    for node in graph.nodes:
        node.meta = {}
    return graph


def _or_as_captured(
    gm: torch.fx.GraphModule, captured: torch.fx.Graph, compiled: Callable[..., Any]
) -> Callable[..., Any]:
    """The compiled graph; where it would lose derivatives, the graph as it was captured, uncompiled and dense.

    Compiled code drops tangents without a word, and no guard of Dynamo's sees the forward of an ``autograd.Function``,
    which is run again with gradients by another graph.
    """

    @cache
    def as_captured() -> torch.fx.GraphModule:
        return torch.fx.GraphModule(gm, captured)

    def run(*inputs: object) -> Any:  # noqa: ANN401 (what the graph returns)
        if in_forward_mode() or may_run_again():
            with every_derivative():
                return as_captured()(*inputs)
        return compiled(*inputs)

    return run
