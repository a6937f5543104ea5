"""An operator that is one opaque node to whoever looks on, and costs little beside its function where nobody does."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from operator import or_
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet

from s2o_compile.kernels.errors import NoGradientError

_OF_EVERY_CALL = ("ADInplaceOrView", "BackendSelect")
_PLAIN_CPU, _PLAIN_CUDA = (
    reduce(or_, (DispatchKeySet(getattr(DispatchKey, key)) for key in keys)).raw_repr()
    for keys in (
        ("CPU", "AutogradCPU", "AutocastCPU", *_OF_EVERY_CALL),
        ("CUDA", "AutogradCUDA", "AutocastCUDA", *_OF_EVERY_CALL),
    )
)
"""The dispatch keys of a call on plain tensors. Every mode, transform, tracer and subclass, and a conjugation or
negation that is still to be done, has a key of its own."""


def _is_plain(keys: int) -> bool:
    return keys | _PLAIN_CPU == _PLAIN_CPU or keys | _PLAIN_CUDA == _PLAIN_CUDA


def define_operator(
    library: torch.library.Library, function: Callable[..., Any], tags: tuple[torch.Tag, ...] = ()
) -> torch._ops.OpOverload:
    """Define an operator with the name and the signature of a function that mutates nothing and returns no input.

    It has no gradient: a backward through it raises NoGradientError. A call costs less than half of what it costs with
    ``torch.library.custom_op``, which looks for aliases in every output and always dispatches twice.
    """
    name = function.__name__
    schema = name + torch.library.infer_schema(function, mutates_args=())
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag, *tags))
    overload = getattr(getattr(torch.ops, library.ns), name).default

    def redispatch(keys: DispatchKeySet, *given: Any, **keywords: Any) -> Any:  # noqa: ANN401
        with torch._C._AutoDispatchBelowAutograd():
            return overload.redispatch(keys & torch._C._after_autograd_keyset, *given, **keywords)

    def below_autograd(keys: DispatchKeySet, *given: Any, **keywords: Any) -> Any:  # noqa: ANN401
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*given):
            return _WithoutGradient.apply(redispatch, keywords, keys, *given)
        if _is_plain(keys.raw_repr()):
            return function(*given, **keywords)
        return redispatch(keys, *given, **keywords)

    # Not for Dynamo: where it skips a frame that calls the operator, it would look into these.
    library.impl(name, torch.compiler.disable(function), "CompositeExplicitAutograd")
    library.impl(name, torch.compiler.disable(below_autograd), "Autograd", with_keyset=True)
    return overload


class _WithoutGradient(torch.autograd.Function):
    """Joins the autograd graph and refuses to be walked back through."""

    @staticmethod
    def forward(ctx: Any, call: Callable[..., Any], keywords: dict[str, Any], *given: Any) -> Any:  # noqa: ANN401
        """Make the call."""
        return call(*given, **keywords)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:  # noqa: ANN401
        """Raise."""
        raise NoGradientError


def nobody_looks(*tensors: Tensor | None) -> bool:
    """Whether these are plain tensors and nothing compiles, traces, transforms, casts, profiles or intercepts.

    Then an operator's function may be called without the operator around it: no result tells.
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._dynamo.eval_frame.get_eval_frame_callback() is not None
        or torch._C._len_torch_function_stack()
        or torch._C._is_any_autocast_enabled()
        or torch.autograd._profiler_enabled()
    ):
        return False
    keys = torch._C._dispatch_tls_local_include_set().raw_repr()
    for x in tensors:
        if x is not None:
            if type(x) is not Tensor:
                return False
            keys |= torch._C._dispatch_keys(x).raw_repr()
    return _is_plain(keys)
