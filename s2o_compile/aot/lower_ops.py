"""Replaces s2o operators in Inductor's joint graph by a decomposition; calls that differ only in inputs share a trace.

Most of the time that a package takes goes into its attentions: their branches and loops are traced several times over,
lowered and written. So the operators stay whole until Inductor has the graph, and each trace is made and lowered once.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Mapping
from typing import Any

import sympy
import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from s2o_compile.errors import PackageError
from s2o_compile.kernels.core.options import taus_by_head
from s2o_compile.kernels.support.torch_compat import fake_mode_of
from s2o_compile.kernels.support.torch_inductor import (
    CustomGraphPass,
    TracingContext,
    aot_export_module,
    select_decomp_table,
    tracing,
)

Function = Callable[..., Any]


class DecomposeS2OOps(CustomGraphPass):
    """Replaces calls of operators by their decompositions, in Inductor's operators.

    Args:
        decompositions: For every operator a function of the same arguments that computes it. The function gets
            ``head_tau`` as a tensor, float32 [Hq].

    Attributes:
        ran: Whether Inductor has run it.
    """

    def __init__(self, decompositions: Mapping[Any, Function]) -> None:
        self._decompositions = decompositions
        self._traced: dict[object, tuple[str, fx.GraphModule]] = {}
        self.ran = False

    def __call__(self, graph: fx.Graph) -> None:
        """Replaces the operators of one graph."""
        self.ran = True
        for node in [node for node in graph.nodes if node.target in self._decompositions]:
            _give_taus(node)
            key = graph, _key(node)  # a branch of the model's own has branches of its own
            if key not in self._traced:
                trace = _trace(self._decompositions[node.target], node)
                self._traced[key] = f"s2o_{len(self._traced)}", trace
            _replace(node, *self._traced[key])

    def __deepcopy__(self, _: object) -> DecomposeS2OOps:
        """Itself. Inductor copies its options, and ``ran`` is read from the original."""
        return self

    def uuid(self) -> None:
        """None, so that Inductor caches nothing that it compiled with this pass."""


def _give_taus(node: fx.Node) -> None:
    """Makes the taus of a call an input, because calibrated attentions differ in nothing else."""
    keywords: dict[str, Any] = dict(node.kwargs)
    query = node.all_input_nodes[0].meta["val"]
    taus = taus_by_head(query.shape[1], *(keywords.pop(name, None) for name in ("tau", "head_tau", "error")))
    with node.graph.inserting_before(node), query.fake_mode:
        made = {"dtype": torch.float32, "device": query.device}
        each = [_call(node.graph, torch.ops.aten.full.default, ([1], float(tau)), **made) for tau in taus]
        together = _call(node.graph, torch.ops.aten.cat.default, (each,))
    keywords["head_tau"] = together
    node.kwargs = dict(sorted(keywords.items()))  # in whatever order they were written


def _call(graph: fx.Graph, target: Function, args: tuple[Any, ...], **keywords: Any) -> fx.Node:  # noqa: ANN401
    node = graph.call_function(target, args, keywords)
    node.meta["val"] = target(*map_arg(args, lambda given: given.meta["val"]), **keywords)
    return node


def _key(node: fx.Node) -> object:
    """A key that two calls share exactly if one trace serves both."""
    places = {given: place for place, given in enumerate(node.all_input_nodes)}
    keywords = {name: value for name, value in node.kwargs.items() if name != "site"}  # a name decides nothing
    call = map_arg((node.args, keywords), lambda given: f"input {places[given]}")
    return node.target, repr(call), tuple(_described(given.meta["val"]) for given in places)


def _described(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {value.device} {tuple(value.shape)} {value.stride()}"
    return f"{type(value).__name__} {value}"


def _trace(function: Function, node: fx.Node) -> fx.GraphModule:
    """The decomposition of a call, functional and in Inductor's operators."""

    def forward(*values: Any) -> tuple[Tensor, ...]:  # noqa: ANN401
        given = dict(zip(node.all_input_nodes, values, strict=True))
        args, keywords = map_arg((node.args, node.kwargs), lambda x: given[x])
        return tuple(function(*args, **keywords))

    call = nn.Module()
    call.forward = forward
    values = [given.meta["val"] for given in node.all_input_nodes]
    fake_mode = fake_mode_of(values)
    assert fake_mode is not None
    shape_env = fake_mode.shape_env
    known = len(shape_env.guards) if shape_env else 0
    ranges = dict(shape_env.var_to_range) if shape_env else {}  # a guard narrows them
    with fake_mode, tracing(TracingContext(fake_mode)):  # the graph around it is being traced in another context
        # New tensors, because the given ones may share memory, and the inputs of a branch may not.
        values = [
            torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device) if isinstance(x, Tensor) else x
            for x in values
        ]
        traced, _ = aot_export_module(call, values, trace_joint=False, decompositions=select_decomp_table())
    if shape_env:
        name = str(node.kwargs.get("site") or node.name)
        for guard in shape_env.guards[known:]:
            check_open(guard.expr, dict(shape_env.var_to_range) | ranges, name)
    return traced  # pyright: ignore[reportReturnType] (a graph module, unless it is a joint one)


def check_open(condition: sympy.Basic, ranges: Mapping[Any, Any], name: str) -> None:
    """Raise PackageError if a condition that a trace took for granted fails for some size.

    Torch records every condition that it cannot prove, tautologies too. The condition is tried at the sizes where it
    would fail first, in the ranges that they had before the trace. A size from 2 on is tried at 1, too: torch traces no
    size of 1 that may be larger, but promises it.
    """
    sizes: list[Any] = sorted(condition.free_symbols, key=str)
    near = {2**k + rest for k in range(18) for rest in (-1, 0, 1)} if len(sizes) <= 2 else {100, 5000}
    tried = []
    for size in sizes:
        lower, upper = ranges[size].lower, ranges[size].upper
        ends = {1 if end == 2 else int(end) for end in (lower, upper) if end.is_Integer}
        tried.append(ends | {value for value in near if lower <= value <= upper})
    for values in itertools.product(*tried):
        try:
            holds = condition.subs(dict(zip(sizes, values, strict=True))) == sympy.true
        except ZeroDivisionError:
            holds = False
        if not holds:
            raise PackageError(
                f"package: {name}: expected a decomposition for every length, got one traced for {condition} alone. "
                "This is a fault of s2o_compile. Report it with the model's shapes."
            )


def _replace(node: fx.Node, name: str, traced: fx.GraphModule) -> None:
    """Puts a trace in the place of a call. Its branches become attributes of the graph's module."""
    graph = node.graph
    inputs = traced.graph.find_nodes(op="placeholder")
    values: dict[fx.Node, Any] = dict(zip(inputs, node.all_input_nodes, strict=True))
    with graph.inserting_before(node):
        results: Any = graph.graph_copy(traced.graph, values)
    for inner in traced.graph.find_nodes(op="get_attr"):
        values[inner].target = f"{name}_{inner.target}"
        setattr(graph.owning_module, values[inner].target, getattr(traced, inner.target))
    for user in list(node.users):
        assert user.target is operator.getitem, user
        _, place = user.args
        user.replace_all_uses_with(results[place])
        graph.erase_node(user)
    graph.erase_node(node)
