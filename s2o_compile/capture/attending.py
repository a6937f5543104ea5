"""Methods that attend in their own body: optimized modules compile these, too, where they are called from outside.

``optimize`` cannot compile every method: ``generate`` is a loop that calls forward. It compiles those whose code names
an attention: a fused one, or a softmax and a matrix product. Plain functions that the code calls by name count along.
"""

from __future__ import annotations

import dis
import functools
import inspect
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn
from torch.compiler import is_dynamo_compiling
from torch.fx.traceback import annotate

from s2o_compile.capture.entry import ENTRY
from s2o_compile.kernels.statistics import running
from s2o_compile.kernels.support.torch_compile import constant_result, is_exporting, skip_frame

PART = "s2o_part"
"""Under this name a node of a graph holds the number of the entry whose method made it."""

_FUSED = frozenset({"scaled_dot_product_attention", "flex_attention"})
_PRODUCTS = frozenset({"matmul", "bmm", "baddbmm", "einsum", "@"})


def attending_methods(kind: type) -> Mapping[str, Callable[..., Any]]:
    """The methods of a class of modules that attend in their own body, forward among them; none of torch's own."""
    found: dict[str, Callable[..., Any]] = {}
    for base in reversed(kind.__mro__):
        if issubclass(base, nn.Module) and not base.__module__.startswith("torch."):
            found |= {name: x for name, x in vars(base).items() if isinstance(x, types.FunctionType)}
    return {name: method for name, method in found.items() if not name.startswith("__") and _attends(method)}


def entered(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    """A method that compiles itself where it is called from outside, and shows whose it is where others inline it."""

    @functools.wraps(method)
    def entering(self: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 (as the method)
        if is_dynamo_compiling():
            entry = None if _within_own_call() else getattr(self, ENTRY)
            if entry is None:
                return method(self, *args, **kwargs)
            with annotate({PART: entry.number}):
                return method(self, *args, **kwargs)
        entry = None if running.call is not None or is_exporting() else vars(self).get(ENTRY)
        return method(self, *args, **kwargs) if entry is None else entry.run(self, args, kwargs, name)

    return skip_frame(entering)


@constant_result
def _within_own_call() -> bool:
    return running.call is not None


def _attends(function: Callable[..., Any]) -> bool:
    names = set(_names(inspect.unwrap(function), set()))
    return not _FUSED.isdisjoint(names) or ("softmax" in names and not _PRODUCTS.isdisjoint(names))


def _names(function: Callable[..., Any], seen: set[types.CodeType]) -> Iterator[str]:
    """Names and products in the code of a function and of the plain functions that it calls, torch's left out."""
    code: types.CodeType = function.__code__
    if code in seen:
        return
    seen.add(code)
    pending = [code]
    while pending:
        part = pending.pop()
        pending += [x for x in part.co_consts if isinstance(x, types.CodeType)]
        yield from part.co_names
        yield from ("@" for step in dis.get_instructions(part) if "@" in step.argrepr or "MATRIX" in step.opname)
        for name in part.co_names:
            called = function.__globals__.get(name)
            if callable(called):
                yield getattr(called, "__name__", name)  # imported under another name
            if isinstance(called, types.FunctionType) and not called.__module__.startswith("torch"):
                yield from _names(inspect.unwrap(called), seen)
