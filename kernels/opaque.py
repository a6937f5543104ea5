"""An operator that is one opaque node to whoever looks on, and costs little more than its function where nobody does.

``torch.library.custom_op`` gives the first. Its calls cost three times as much, for it looks for aliases in every
output and dispatches twice where autograd has nothing to do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet

from s2o_compile.kernels.errors import NoGradientError

_BELOW_AUTOGRAD = torch._C._after_autograd_keyset.raw_repr()
_BACKENDS = {DispatchKeySet(key).raw_repr() for key in (DispatchKey.CPU, DispatchKey.CUDA)}
"""What is left of a call's keys below autograd if its tensors are plain: every mode, transform, subclass and pending
conjugation or negation adds a key of its own."""

_OF_EVERY_CALL = (DispatchKeySet(DispatchKey.BackendSelect) | DispatchKeySet(DispatchKey.ADInplaceOrView)).raw_repr()


def define_operator(
    library: torch.library.Library, function: Callable[..., Any], tags: tuple[torch.Tag, ...] = ()
) -> torch._ops.OpOverload:
    """Define an operator with the name and the signature of a function that mutates nothing and returns no input.

    It has no gradient: a backward through it raises NoGradientError.
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
        if keys.raw_repr() & _BELOW_AUTOGRAD in _BACKENDS:
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


def nobody_looks(*tensors: Tensor) -> bool:
    """Whether these are plain tensors and nothing compiles, traces, transforms, casts, profiles or intercepts.

    Then what a call is made of cannot be told from its result, and it needs no node around it.
    """
    return (
        not torch.compiler.is_compiling()
        and torch._C._dynamo.eval_frame.get_eval_frame_callback() is None
        and torch._C._dispatch_tls_local_include_set().raw_repr() | _OF_EVERY_CALL == _OF_EVERY_CALL
        and not torch._C._len_torch_function_stack()
        and not torch._C._is_any_autocast_enabled()
        and not torch.autograd._profiler_enabled()
        and all(type(x) is Tensor for x in tensors)
    )
