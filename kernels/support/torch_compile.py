"""Private names of torch around ``torch.compile``: Dynamo, and Inductor as a backend."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, fx, nn

from s2o_compile.kernels.support.torch_compat import NAMES, _attribute, _later, _named, _Nothing, _on_use

Function = TypeVar("Function", bound=Callable[..., object])

COMPILED = _attribute("torch.nn.Module._compiled_call_impl", "compiled modules")
_ORIGINAL = _attribute("torch._dynamo.OptimizedModule._orig_mod", "refusing compiled modules")
_optimized_module = _on_use("torch._dynamo.OptimizedModule", "refusing compiled modules", _Nothing)


def is_compiled(model: object) -> bool:
    """Whether a model is the result of `torch.compile`, or was compiled in place."""
    return isinstance(model, _optimized_module()) or getattr(model, COMPILED, None) is not None


def uncompiled(model: Any) -> Any:  # noqa: ANN401 (a module or function)
    """The module behind the result of `torch.compile`; everything else as it is."""
    return getattr(model, _ORIGINAL, model) if isinstance(model, _optimized_module()) else model


_WRAPPERS = (
    "torch._dynamo.eval_frame.OptimizedModule",
    "torch.distributed.algorithms._checkpoint.checkpoint_wrapper.CheckpointWrapper",
    "torch.distributed.fsdp.fully_sharded_data_parallel.FullyShardedDataParallel",
    "torch.nn.parallel.data_parallel.DataParallel",
    "torch.nn.parallel.distributed.DistributedDataParallel",
)
NAMES |= dict.fromkeys(_WRAPPERS, "names of sites behind wrappers of torch")


def wraps_one_module(kind: object) -> bool:
    """Whether a class of modules, or its name in an exported graph, is one of torch's around a single module."""
    names = (
        (kind,) if isinstance(kind, str) else (f"{x.__module__}.{x.__qualname__}" for x in getattr(kind, "__mro__", ()))
    )
    return any(name in _WRAPPERS for name in names)


def names_of_modules(root: nn.Module) -> dict[nn.Module, str]:
    """Every module of a model and its path, such as ``model.layers.0``, without the steps into wrappers of torch."""
    names: dict[nn.Module, str] = {}

    def learn(module: nn.Module, path: str) -> None:
        if module in names:
            return
        names[module] = path
        for child, part in module.named_children():
            learn(part, path if wraps_one_module(type(module)) else f"{path}.{child}".removeprefix("."))

    learn(root, "")
    return names


_translator = _later(
    "torch._dynamo.symbolic_convert.InstructionTranslator.current_tx", "names of sites behind wrappers", lambda: None
)


def captured_frame() -> dict[str, Mapping[str, Any]]:
    """Locals "L" and globals "G" of the frame that Dynamo captures in this thread; empty tables where there is none."""
    try:
        translator = _translator()
    except AttributeError:  # this thread has never captured one
        translator = None
    return {"L": getattr(translator, "f_locals", {}), "G": getattr(translator, "f_globals", {})}


_CODE = _attribute("torch._dynamo.symbolic_convert.InstructionTranslator.f_code", "frames that modules share")


def captured_code() -> types.CodeType | None:
    """The code object that Dynamo captures in this thread, which other modules may run, too; None where it has none."""
    try:
        return getattr(_translator(), _CODE, None)
    except AttributeError:
        return None


_skip_code = _later(
    "torch._dynamo.eval_frame.skip_code", "frames of optimized modules that Dynamo passes over", lambda _: None
)
_to_tell: list[Callable[[], object]] = []


def skip_frame(function: Function) -> Function:
    """A decorator: once `tell_dynamo` was called, Dynamo captures what a function calls, but no frame of its own.

    One frame that all modules run through would reach Dynamo's limit of recompilations at once.
    """
    _to_tell.append(partial(_skip_code, function.__code__))
    return function


_TAKES_A_LIMIT = "recompile_limit" in inspect.signature(torch.compile).parameters


def recompile_limit() -> dict[str, Any]:
    """An option of ``torch.compile``: 32 graphs of one function for Dynamo's 8, unless the user set another by now."""
    if torch.compiler.is_dynamo_compiling() or not _TAKES_A_LIMIT:  # inside another compilation, whose limit holds
        return {}
    return {"recompile_limit": 32} if torch.compiler.config.recompile_limit == 8 else {}


def constant_result(function: Function) -> Function:
    """A decorator: once `tell_dynamo` was called, graphs hold what a function answers while they are captured."""
    _to_tell.append(partial(torch.compiler.assume_constant_result, function))
    return function


_disable = _named("torch._compile._disable_dynamo", "imports that do not wait for Dynamo", torch.compiler.disable)


@constant_result
@skip_frame
def is_exporting() -> bool:
    """As ``torch.compiler.is_exporting``, which the Dynamo of torch 2.11 takes for true in every graph."""
    return torch.compiler.is_exporting()


def never_captured(function: Function) -> Function:
    """A decorator: Dynamo captures neither a function nor what it calls, whoever compiles the code around it.

    ``torch.compiler.disable`` with Dynamo, which takes long to import, loaded at the first call.
    """
    return cast("Function", _disable(function))


_canonical_mask = _named("torch.nn.functional._canonical_mask", "mixed masks in MultiheadAttention", lambda: None)


def _float_mask(mask: Tensor | None, target_type: torch.dtype, **_: object) -> Tensor | None:
    """What torch's layers make of a mask, without their warning about masks of two dtypes: Dynamo would leave there."""
    if mask is None or mask.is_floating_point():
        return mask
    return torch.zeros_like(mask, dtype=target_type).masked_fill_(mask, -torch.inf)


_to_tell.append(lambda: torch.compiler.substitute_in_graph(_canonical_mask, skip_signature_check=True)(_float_mask))


def tell_dynamo() -> None:
    """Tell Dynamo of the functions under these decorators; not at their import, since Dynamo takes long to import."""
    while _to_tell:
        _to_tell.pop()()


_INLINED = "sparse attention of optimized models in graphs of other backends"
_output_graph = _on_use("torch._dynamo.output_graph.OutputGraph", _INLINED, _Nothing)
_call_backend = _on_use("torch._dynamo.output_graph.OutputGraph.call_user_compiler", _INLINED, None)
_BACKEND = _attribute("torch._dynamo.output_graph.OutputGraph.compiler_fn", _INLINED)

Backend = Callable[[fx.GraphModule, list[Any]], Callable[..., Any]]


def wrap_backends(change: Callable[[fx.GraphModule, Backend], Backend]) -> None:
    """Have a function see every graph of this process and its backend, and say which backend gets the graph.

    A later function takes the place of an earlier one.
    """
    call_unchanged = _call_backend()  # looked up once, ahead of all changes
    if call_unchanged is None:
        return

    def call_backend(self: Any, gm: fx.GraphModule, *inputs: object) -> object:  # noqa: ANN401 (Dynamo's)
        given = getattr(self, _BACKEND, None)
        if given is None:
            return call_unchanged(self, gm, *inputs)
        setattr(self, _BACKEND, change(gm, given))
        try:
            return call_unchanged(self, gm, *inputs)
        finally:
            setattr(self, _BACKEND, given)

    _output_graph().call_user_compiler = call_backend


def innermost_backend(backend: Any) -> Any:  # noqa: ANN401 (any callable)
    """The backend that a user gave, out of torch's wrappers around it."""
    while (inner := getattr(backend, _BACKEND, None)) is not None:
        backend = inner
    return backend


class _NotRaised(Exception):
    """An exception that this torch does not have."""


user_error = _on_use("torch._dynamo.exc.UserError", "exporting repeated heads", _NotRaised)
user_error_type = _on_use("torch._dynamo.exc.UserErrorType", "exporting repeated heads", _Nothing)

lookup_backend = _later("torch._dynamo.lookup_backend", "inner backends other than inductor and eager")
mark_dynamic = _later(
    "torch._dynamo.maybe_mark_dynamic", "one compilation for all chunks of a prefill", lambda *_: None
)
_counters = _on_use("torch._dynamo.utils.counters", "graph breaks in reports", {"graph_break": {}})
_compile_metrics = _on_use("torch._dynamo.utils.compilation_time_metrics", "compile time in reports", {})


def graph_breaks() -> dict[str, int]:
    """The number of graph breaks of this process by reason."""
    return dict(_counters()["graph_break"])


def compile_seconds() -> float:
    """Seconds that Dynamo and the backends behind it have taken in this process, capture included."""
    return sum(_compile_metrics().get("_compile.compile_inner", ()))


_INDUCTOR = "options of the inner backend inductor"
compile_fx = _later(
    "torch._inductor.compile_fx.compile_fx",
    "the inner backend inductor",
    lambda gm, inputs, config_patches: lookup_backend("inductor")(gm, inputs, config_patches=config_patches),
)
inductor_options = _later("torch._inductor.list_options", _INDUCTOR, lambda: None)
inductor_mode_options = _later("torch._inductor.list_mode_options", _INDUCTOR)
