"""The ways into an optimized model: every module with parts is compiled where a call comes in from outside.

``generate`` of a wrapped model, ``encode``, ``get_image_features`` or an offloading hook call inner modules, past the
model's own forward. So each of them has an entry. The outermost one that is called compiles, and Dynamo inlines the
modules below it. Where Dynamo breaks the graph, the modules that Python calls then are captured one by one, also those
that torch's own files call, whose frames Dynamo would skip.

Every entry compiles a function with a code object of its own: Dynamo counts recompilations by code object, for all
models together, and runs uncompiled after eight.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import nn

from s2o_compile.capture.rebound import with_own_code
from s2o_compile.kernels.statistics import ModelCall, running
from s2o_compile.kernels.support.torch_compile import (
    captured_code,
    graph_breaks,
    lookup_backend,
    names_of_modules,
    skip_frame,
    skip_frames,
    wraps_one_module,
)
from s2o_compile.passes.site import SHARED

ENTRY = "_s2o_entry"
"""The attribute of an optimized module that holds its entry."""

Backend = Callable[[torch.fx.GraphModule, list[torch.Tensor]], Callable[..., object]]


class Account(Protocol):
    """What an optimized model tells about its calls; see ``recording.Account``."""

    def compiling(self, path: str, frame: str) -> AbstractContextManager[None]:
        """A block that compiles one graph, captured in a call of the module at a path, in the frame of another."""
        ...

    def add(self, call: ModelCall, args: Sequence[object], kwargs: Mapping[str, object]) -> None:
        """A call that has ended, and its inputs."""
        ...


class Compilation:
    """How the modules of one optimized model are compiled, and the account of it. It is what Dynamo takes for backend.

    A deep copy, or what comes out of a pickle, has an account of its own.
    """

    def __init__(self, backend: str | Backend, account: Account | None, dynamic: bool | None, fullgraph: bool) -> None:
        self._given = backend, account, dynamic, fullgraph
        self.account = account
        self.options: dict[str, Any] = {"dynamic": dynamic, "fullgraph": fullgraph}
        self.lock = threading.Lock()

    def __reduce__(self) -> tuple[object, ...]:
        return Compilation, self._given

    def __call__(self, gm: torch.fx.GraphModule, example_inputs: list[torch.Tensor]) -> Callable[..., object]:
        """Compiles one graph of a running call."""
        backend = self._given[0]
        compile_graph: Backend = lookup_backend(backend) if isinstance(backend, str) else backend
        call = running.call
        if call is None:
            return compile_graph(gm, example_inputs)
        frame = _name_modules(gm, call)
        gm.meta[SHARED] = _may_be_shared(call)
        if self.account is None:
            return compile_graph(gm, example_inputs)
        with self.account.compiling(call.path, frame):
            return compile_graph(gm, example_inputs)


class CompiledEntry:
    """Compiles the module that it is called with; shared by shallow copies and replicas, which share everything else.

    Attributes:
        path: The module's name in the optimized model, empty for the model itself.
    """

    def __init__(self, compilation: Compilation, path: str) -> None:
        self.compilation, self.path = compilation, path
        self._function: Any = with_own_code(_call)
        self._compiled: Any = None

    def __reduce__(self) -> tuple[object, ...]:
        return CompiledEntry, (self.compilation, self.path)

    @skip_frame
    def run(self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
        """Call a module: compiled from outside, as one more frame of the compilation inside of another entry."""
        outer = running.call
        if outer is not None:
            before, outer.frame = outer.frame, module
            try:
                return self._function(module, *args, **kwargs)
            finally:
                outer.frame = before
        compiled, breaks = self._compiled, None
        if compiled is None:
            compiled, breaks = self._compile(), graph_breaks()
        running.call = call = ModelCall()
        call.path = self.path
        call.module = call.frame = module
        try:
            result = compiled(module, *args, **kwargs)
        finally:
            running.call = None
        account = self.compilation.account
        if account is not None:
            if breaks is not None:
                call.breaks = [reason for reason, n in graph_breaks().items() if n > breaks.get(reason, 0)]
            account.add(call, args, kwargs)
        return result

    def _compile(self) -> Any:  # noqa: ANN401 (a callable)
        """The compiled function, made at the first call."""
        skip_frames()
        with self.compilation.lock:
            if self._compiled is None:
                self._compiled = torch.compile(self._function, backend=self.compilation, **self.compilation.options)
            return self._compiled


def _call(self: Any, /, *args: object, **kwargs: Any) -> object:  # noqa: ANN401 (an optimized module)
    """What is compiled; ``self`` is Dynamo's name for the module, so it stands in no site's name."""
    if not torch.compiler.is_dynamo_compiling():
        _ran_uncompiled(self)
    return self._call_impl(*args, **self._s2o_arguments(kwargs))


@skip_frame
def _ran_uncompiled(module: nn.Module) -> None:
    call, entry = running.call, vars(module).get(ENTRY)
    if call is not None and entry is not None:
        call.uncompiled = (*call.uncompiled, entry.path)


def _may_be_shared(call: ModelCall) -> str:
    """The class of the module whose frame is captured, if Dynamo may run the graph for others of it; else empty.

    Behind a graph break, such as a hook of FSDP, Dynamo captures the forward of a class, not the code of an entry.
    """
    code = captured_code()
    if code is None or _call.__name__ in code.co_name:  # an entry's own code, or what resumes it
        return ""
    kind = type(call.frame)
    several = sum(type(module) is kind for module in call.module.modules()) > 1
    return kind.__name__ if several else ""


def _name_modules(gm: torch.fx.GraphModule, call: ModelCall) -> str:
    """Gives the modules in a graph the names that they have in the model; returns that of the frame's module."""
    names = {
        str(id(module)): ".".join(part for part in (call.path, name) if part)
        for module, name in names_of_modules(call.module).items()
    }
    frame = names.get(str(id(call.frame)), call.path)
    for node in gm.graph.nodes:
        stack = node.meta.get("nn_module_stack") or {}
        named = {
            f"module {key}": (names.get(key.partition("@")[0], path), kind)  # keys of ids would be looked up once more
            for key, (path, kind) in stack.items()
            if not wraps_one_module(kind)  # in no name
        }
        if named or frame:
            node.meta["nn_module_stack"] = named or {"module": (frame, type(call.frame))}
    return frame
