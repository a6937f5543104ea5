"""The ways into an optimized model: every module with parts is compiled where a call comes in from outside.

``generate`` of a wrapped model, ``encode``, ``get_image_features`` or an offloading hook call inner modules, past the
model's own forward. So each of them has an entry. The outermost one that is called compiles, and Dynamo inlines the
modules below it. Where Dynamo breaks the graph, the modules that Python calls then are captured one by one, also those
that torch's own files call, whose frames Dynamo would skip.

Every entry compiles a function with a code object of its own: by these Dynamo counts compilations, up to a limit.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import count
from types import MethodType
from typing import Any, ClassVar, Protocol
from weakref import WeakValueDictionary

import torch
from torch import nn

from s2o_compile.capture.rebound import with_own_code
from s2o_compile.kernels.statistics import ModelCall, running
from s2o_compile.kernels.support.derivatives import every_derivative, in_forward_mode
from s2o_compile.kernels.support.torch_compat import dynamo_options, in_dispatch_mode, interpreter_stack
from s2o_compile.kernels.support.torch_compile import (
    captured_code,
    graph_breaks,
    lookup_backend,
    names_of_modules,
    never_captured,
    recompile_limit,
    skip_frame,
    wraps_one_module,
)
from s2o_compile.passes.site import ELSEWHERE, SHARED

ENTRY = "_s2o_entry"
"""The attribute of an optimized module that holds its entry."""

Backend = Callable[[torch.fx.GraphModule, list[torch.Tensor]], Callable[..., object]]


class Account(Protocol):
    """What an optimized model tells about its calls; see ``recording.Account``."""

    def compiling(self, path: str) -> AbstractContextManager[None]:
        """A block that compiles one graph, captured in a call of the module at a path."""
        ...

    def add(self, call: ModelCall, args: Sequence[object], kwargs: Mapping[str, object]) -> None:
        """A call that has ended, and its inputs."""
        ...

    def count(self, call: ModelCall) -> None:
        """The same, of which recordings and the user have heard."""
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
        if call is None or call.module is None or call.frame is None:
            return compile_graph(gm, example_inputs)
        if call.options is None:
            # Dynamo makes its guards behind this call. Without these it would not see a hook that comes later.
            call.options = dynamo_options(skip_nnmodule_hook_guards=False)
            call.options.__enter__()
        name_modules(gm.graph.nodes, call.path, call.module, call.frame)
        gm.meta[SHARED] = _may_be_shared(call.module, call.frame)
        if call.frame is not call.module:  # behind a graph break
            gm.meta[ELSEWHERE] = frozenset(_names_in(call.path, call.module).values())
        if self.account is None:
            return compile_graph(gm, example_inputs)
        with self.account.compiling(call.path):
            return _heard(compile_graph(gm, example_inputs))

    def compile_part(
        self, nodes: Sequence[torch.fx.Node], backend: Backend, path: str, gm: torch.fx.GraphModule,
        example_inputs: list[torch.Tensor],
    ) -> Callable[..., object]:  # fmt: skip
        """Compiles a graph of another backend's by that, with a part of the model in it: the nodes of a module."""
        compile_part = getattr(self._given[0], "compile_part", None)
        if compile_part is None or self.account is None:
            return backend(gm, example_inputs)
        with self.account.compiling(path):
            return compile_part(gm, example_inputs, nodes, backend)


_numbers = count()


class CompiledEntry:
    """Compiles the module that it is called with; shared by shallow copies and replicas, which share everything else.

    Attributes:
        path: The module's name in the optimized model, empty for the model itself.
        number: It stands for this entry in graphs of other backends.
    """

    numbered: ClassVar[WeakValueDictionary[int, CompiledEntry]] = WeakValueDictionary()

    def __init__(self, compilation: Compilation, path: str) -> None:
        self.compilation, self.path = compilation, path
        self._function: Any = with_own_code(_call)
        self._forward: Any = with_own_code(_call_forward)
        self._compiled: dict[tuple[str, ...], Any] = {}  # by the name of a method, "" for the module, and options
        self.number = next(_numbers)
        self.numbered[self.number] = self

    def __reduce__(self) -> tuple[object, ...]:
        return CompiledEntry, (self.compilation, self.path)

    @skip_frame
    def run(self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], method: str = "") -> object:
        """Call a module: compiled from outside, as one more frame of the compilation inside of another entry.

        A method of it, if one is named, from outside only.
        """
        outer = running.call
        if outer is not None:
            before, outer.frame = outer.frame, module
            outer.called = (*outer.called, self.path)
            try:
                with self._behind_hooks(module):
                    return self._function(module, *args, **kwargs)
            finally:
                outer.frame = before
        limit, breaks, derivatives = recompile_limit(), None, nullcontext()  # a limit that the user has set since holds
        compiled = self._compiled.get((method, *limit))
        passed_over = interpreter_stack() or in_dispatch_mode() or in_forward_mode()
        if passed_over and not self.compilation.options["fullgraph"]:
            # Dynamo would pass over this code, and never look at it again.
            compiled, derivatives = _call_of(method) if method else _call, every_derivative()
        elif compiled is None:
            compiled, breaks = self._compile(method, limit)
        running.call = call = ModelCall()
        call.path, call.called = self.path, (self.path,)
        call.module = call.frame = module
        try:
            with derivatives:
                result = compiled(module, *args, **kwargs)
        finally:
            running.call = None
            if call.options is not None:
                call.options.__exit__(None, None, None)
        account = self.compilation.account
        if account is not None:
            if breaks is not None:
                call.breaks = _since(breaks)
            account.add(call, args, kwargs)
        return result

    @contextmanager
    def _behind_hooks(self, module: Any) -> Iterator[None]:  # noqa: ANN401 (an optimized module)
        """A block in which the module's forward has a code object of its own: a hook, such as FSDP's, breaks the graph.

        Python then calls the forward, whose code all modules of the class share. Dynamo would run the graph of the
        first of them for all, with its settings. Nothing stays in the module that a copy could take along.
        """
        fields, hooked = vars(module), bool(module._forward_pre_hooks or module._forward_hooks)
        if not hooked or "forward" in fields:
            yield
            return
        fields["forward"] = MethodType(self._forward, module)
        try:
            yield
        finally:
            fields.pop("forward", None)

    @never_captured
    def _compile(self, method: str, limit: dict[str, Any]) -> tuple[Any, dict[str, int]]:
        """The compiled function, made at the first call, and the graph breaks ahead of that."""
        key, options = (method, *limit), self.compilation.options | limit
        with self.compilation.lock:
            if key not in self._compiled:
                function = with_own_code(_call_of(method)) if method else self._function
                self._compiled[key] = torch.compile(function, backend=self.compilation, **options)
            return self._compiled[key], graph_breaks()


def _call(self: Any, /, *args: object, **kwargs: Any) -> object:  # noqa: ANN401 (an optimized module)
    """What is compiled; ``self`` is Dynamo's name for the module, so it stands in no site's name."""
    return self._call_impl(*args, **self._s2o_arguments(kwargs))


def _call_forward(self: Any, /, *args: object, **kwargs: object) -> object:  # noqa: ANN401 (an optimized module)
    """What stands for the forward of a module with hooks."""
    return type(self).forward(self, *args, **kwargs)


def _call_of(method: str) -> Callable[..., object]:
    """The same for a method of the module."""

    def call(self: Any, /, *args: object, **kwargs: object) -> object:  # noqa: ANN401 (an optimized module)
        return getattr(self, method)(*args, **kwargs)

    return call


@never_captured
def _since(breaks: Mapping[str, int]) -> list[str]:
    """Reasons of the graph breaks since these."""
    return [reason for reason, n in graph_breaks().items() if n > breaks.get(reason, 0)]


def _heard(compiled: Callable[..., object]) -> Callable[..., object]:
    """A compiled graph that tells the call around it in which module it ran."""

    def run(*inputs: object) -> object:
        if (call := running.call) is not None and call.frame is not None:
            call.compiled |= {vars(call.frame)[ENTRY].path}
        return compiled(*inputs)

    return run


def _may_be_shared(whole: nn.Module, frame: nn.Module) -> str:
    """The class of the module whose frame is captured, if Dynamo may run the graph for others of it; else empty.

    Behind a graph break, such as a hook of FSDP, Dynamo captures the forward of a class, not the code of an entry.
    """
    code = captured_code()
    if code is None or code.co_name == "call" or "_call" in code.co_name:  # an entry's own code, or what resumes it
        return ""
    kind = type(frame)
    return kind.__name__ if sum(type(module) is kind for module in whole.modules()) > 1 else ""


def _names_in(path: str, module: nn.Module) -> dict[str, str]:
    """The names in the model of a module at a path and of those in it, by their ids."""
    return {
        str(id(part)): ".".join(name for name in (path, inner) if name)
        for part, inner in names_of_modules(module).items()
    }


def name_modules(nodes: Iterable[torch.fx.Node], path: str, module: nn.Module, frame: nn.Module) -> None:
    """Gives the modules of some nodes the names that they have in the model.

    The path is that of the module which was called from outside. Its frame is that of a module in it.
    """
    names = _names_in(path, module)
    name = names.get(str(id(frame)), path)
    for node in nodes:
        stack = node.meta.get("nn_module_stack") or {}
        named = {
            # Keys of ids would be looked up once more.
            f"module {key}": (names.get(key.partition("@")[0], source), kind)
            for key, (source, kind) in stack.items()
            if not wraps_one_module(kind)  # in no name
        }
        if named or name:
            node.meta["nn_module_stack"] = named or {"module": (name, type(frame))}
