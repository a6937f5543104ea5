"""Optimized models that Dynamo inlines into graphs of other backends: their attention is rewritten ahead of these.

Dynamo inlines whatever a compiled function calls, also modules that are compiled themselves, and forgets their backend.
The graph still says which module each node came from. So the part of an optimized model is rewritten by its own
configuration, and the backend of the outer ``torch.compile`` compiles the whole. Code around the model stays as it is.
A graph that holds several optimized models counts in the accounts of all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx, nn

from s2o_compile.capture.attending import PART
from s2o_compile.capture.entry import ENTRY, Account, Backend, Compilation, CompiledEntry, name_modules
from s2o_compile.capture.generation_masks import PREPARE
from s2o_compile.kernels.statistics import ModelCall, running
from s2o_compile.kernels.support.torch_compile import (
    innermost_backend,
    is_exporting,
    skip_frame,
    tell_dynamo,
    wrap_backends,
)
from s2o_compile.passes.site_names import module_at


@skip_frame
def refuse_export() -> None:
    """Raises under ``torch.export``, which passes over what is compiled: its program would be the dense model.

    ONNX, which knows no other, gets that.
    """
    if is_exporting() and not torch.onnx.is_in_onnx_export():
        raise TypeError(
            "torch.export: expected an uncompiled module, got the result of s2o_compile.optimize, whose program would "
            "be dense. Pass the original module; s2o_compile.export makes a sparse program of it."
        )


def watch_graphs() -> None:
    """Look at every graph that Dynamo captures in this process from now on, and have it pass over the ways in."""
    tell_dynamo()
    wrap_backends(_around)


def _around(gm: fx.GraphModule, backend: Backend) -> Backend:
    """The backend of a graph, behind the passes over the optimized models in it."""
    if isinstance(innermost_backend(backend), Compilation):
        return backend
    found = _optimized_in(gm)
    if not found:
        return backend
    refuse_export()
    return partial(_compile, found, backend)


def _optimized_in(gm: fx.GraphModule) -> Mapping[CompiledEntry, list[fx.Node]]:
    """The entries of optimized modules in a graph, outermost ones, with their nodes, which are named by the model."""
    called: dict[nn.Module, list[fx.Node]] = {}
    found: dict[CompiledEntry, list[fx.Node]] = {}
    known: dict[str, nn.Module | None] = {}
    for node in _nodes(gm):
        entries = list((node.meta.get("nn_module_stack") or {}).items())
        at = next((at for at, (_, (_, kind)) in enumerate(entries) if hasattr(kind, PREPARE)), None)
        if at is None:  # a method that somebody else's code calls
            entry = CompiledEntry.numbered.get((node.meta.get("custom") or {}).get(PART, -1))
            if entry is not None:
                node.meta["nn_module_stack"] = {"module": (entry.path, nn.Module)} if entry.path else {}
                found.setdefault(entry, []).append(node)
            continue
        key, (source, _) = entries[at]
        if key not in known:
            known[key] = module_at(key, source)
        module = known[key]
        if module is not None and ENTRY in vars(module):
            node.meta["nn_module_stack"] = dict(entries[at:])
            called.setdefault(module, []).append(node)
    for module, nodes in called.items():
        entry = vars(module)[ENTRY]
        name_modules(nodes, entry.path, module, module)
        found.setdefault(entry, []).extend(nodes)
    return found


def _nodes(gm: fx.GraphModule) -> Iterator[fx.Node]:
    """The nodes of a graph, and those in the bodies of its higher-order operators."""
    yield from gm.graph.nodes
    for _, body in gm.named_children():
        if isinstance(body, fx.GraphModule):
            yield from _nodes(body)


def _compile(
    found: Mapping[CompiledEntry, list[fx.Node]], backend: Backend, gm: fx.GraphModule, example_inputs: list[Tensor]
) -> Callable[..., Any]:
    """Compile a graph by a backend, once the nodes of optimized modules are rewritten; count what then runs."""
    accounts: dict[int, tuple[Account, str]] = {}
    for compilation in {entry.compilation: None for entry in found}:
        parts = {entry.path: nodes for entry, nodes in found.items() if entry.compilation is compilation}
        path = next(iter(parts)) if len(parts) == 1 else ""
        backend = partial(compilation.compile_part, list(chain.from_iterable(parts.values())), backend, path)
        if compilation.account is not None:
            accounts[id(compilation.account)] = compilation.account, path
    compiled = backend(gm, example_inputs)

    @skip_frame
    def run(*inputs: object) -> Any:  # noqa: ANN401 (what the graph returns)
        if running.call is not None:
            return compiled(*inputs)
        running.call = call = ModelCall()
        try:
            result = compiled(*inputs)
        finally:
            running.call = None
        for at, (account, path) in enumerate(accounts.values()):
            call.path = path
            account.add(call, (), {}) if at == 0 else account.count(call)  # what all share is recorded once
        return result

    return run
