"""Operators that are one opaque node to compilers and tracers, and cost little beside their function elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce, wraps
from inspect import signature
from operator import or_
from typing import Any

import torch
from torch import Tensor

from s2o_compile.kernels.support import derivatives, torch_compat
from s2o_compile.kernels.support.arguments import check_device
from s2o_compile.kernels.support.dtensors import is_dtensor
from s2o_compile.kernels.support.errors import NoGradientError
from s2o_compile.kernels.support.torch_compile import never_captured

_OF_EVERY_CALL = ("ADInplaceOrView", "BackendSelect")
_NEEDED = (
    *("DispatchKey", "DispatchKeySet", "below_autograd", "after_autograd", "any_requires_grad", "eval_frame_callback"),
    *("torch_functions", "any_autocast", "profiler_enabled", "included_keys", "keys_of"),
)


def _plain_keys() -> tuple[int, ...]:
    """The dispatch keys of a call on plain tensors, by device; none where this torch does not say them.

    Every mode, transform, tracer and subclass, and a conjugation or negation that is still to be done, has a key of its
    own.
    """
    if any(getattr(torch_compat, name) is None for name in _NEEDED):
        return ()
    key, key_set = torch_compat.DispatchKey, torch_compat.DispatchKeySet
    devices = [[device, f"Autograd{device}", f"Autocast{device}", *_OF_EVERY_CALL] for device in ("CPU", "CUDA")]
    if not all(hasattr(key, name) for names in devices for name in names):
        return ()
    return tuple(reduce(or_, (key_set(getattr(key, name)) for name in names)).raw_repr() for names in devices)


_PLAIN = _plain_keys()


def _is_plain(keys: int) -> bool:
    return any(keys | plain == plain for plain in _PLAIN)


def _on_one_device(function: Callable[..., Any], names: tuple[str, ...], host_too: tuple[str, ...]) -> Any:  # noqa: ANN401
    """A function that raises InputError unless its tensors, the first of these names included, are on one device."""

    @wraps(function)
    def checked(*arguments: Any, **keywords: Any) -> Any:  # noqa: ANN401 (as the function)
        given = dict(zip(names, arguments, strict=False), **keywords)
        for name, x in given.items():
            if isinstance(x, Tensor):
                check_device(name, x, given[names[0]], host_too=name in host_too, of=names[0])
        return function(*arguments, **keywords)

    return checked


def define_operator(
    library: torch.library.Library,
    function: Callable[..., Any],
    fake: Callable[..., Any] | None = None,
    differentiable: Callable[..., Any] | None = None,
    *,
    tags: tuple[torch.Tag, ...] = (),
    on_dtensors: Callable[..., Any] | None = None,
    host_too: tuple[str, ...] = (),
) -> Any:  # noqa: ANN401 (an overload of an operator)
    """Define an operator with the name and the signature of a function that mutates nothing and returns no input.

    ``fake`` answers calls with a tensor that has no data. One is enough, so it is checked here that all tensors are on
    one device; the function checks that for itself. Without ``fake`` the function serves such calls, too, and is
    checked here. Tensors named in ``host_too`` may lie on the CPU beside others elsewhere.
    ``differentiable`` takes the same arguments and consists of torch's own operators; None if nobody differentiates the
    results. It runs where a derivative is taken for sure (`derivatives.is_taken`). Elsewhere ``requires_grad`` may be a
    forgotten ``no_grad``: the function runs, and a backward raises NoGradientError. ``on_dtensors`` takes the arguments
    instead where one of them is a DTensor. A call costs less than half of what it costs with
    ``torch.library.custom_op``, which looks for aliases in every output and always dispatches twice.
    """
    name = function.__name__
    schema = name + torch.library.infer_schema(function, mutates_args=())
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag, *tags))
    overload = getattr(getattr(torch.ops, library.ns), name).default
    names = tuple(signature(function).parameters)
    checked = _on_one_device(fake or function, names, host_too)
    function = function if fake is not None else checked
    torch.library.register_fake(f"{library.ns}::{name}", checked, lib=library)
    # Dynamo would trace these functions where it skips a frame that calls the operator.
    library.impl(name, never_captured(function), "CompositeExplicitAutograd")
    if not _PLAIN:
        torch.library.register_autograd(f"{library.ns}::{name}", _refuse, lib=library)
        return overload

    def redispatch(keys: Any, *arguments: Any, **keywords: Any) -> Any:  # noqa: ANN401
        with torch_compat.below_autograd():  # pyright: ignore[reportOptionalCall]
            return overload.redispatch(keys & torch_compat.after_autograd, *arguments, **keywords)

    def below_autograd(keys: Any, *arguments: Any, **keywords: Any) -> Any:  # noqa: ANN401
        if differentiable is not None and derivatives.is_taken(*arguments):
            with derivatives.every_derivative(forward=derivatives.has_tangent(*arguments)):
                return differentiable(*arguments, **keywords)
        plain = _is_plain(keys.raw_repr())
        if not plain and on_dtensors is not None and any(map(is_dtensor, arguments)):
            return on_dtensors(*arguments, **keywords)
        if torch.is_grad_enabled() and torch_compat.any_requires_grad(*arguments):
            return _WithoutGradient.apply(redispatch, keywords, keys, *arguments)
        if plain:
            return function(*arguments, **keywords)
        return redispatch(keys, *arguments, **keywords)

    library.impl(name, never_captured(below_autograd), "Autograd", with_keyset=True)
    return overload


def _refuse(ctx: object, *gradients: object) -> None:
    raise NoGradientError


class _WithoutGradient(torch.autograd.Function):
    """Joins the autograd graph and refuses a backward."""

    @staticmethod
    def forward(ctx: Any, call: Callable[..., Any], keywords: dict[str, Any], *arguments: Any) -> Any:  # noqa: ANN401
        """Make the call."""
        return call(*arguments, **keywords)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:  # noqa: ANN401
        """Raise."""
        _refuse(ctx)


def can_skip_dispatcher(*tensors: Tensor | None) -> bool:
    """Whether these are plain tensors and nothing compiles, traces, transforms, casts, profiles, intercepts or derives.

    Then an operator's function may be called without the operator around it: the results are the same.
    """
    if (
        not _PLAIN
        or torch.compiler.is_compiling()
        or torch_compat.eval_frame_callback() is not None
        or torch_compat.torch_functions()
        or torch_compat.any_autocast()
        or torch_compat.profiler_enabled()
        or derivatives.in_forward_mode()
    ):
        return False
    keys = torch_compat.included_keys().raw_repr()
    for x in tensors:
        if x is not None:
            if type(x) is not Tensor:
                return False
            keys |= torch_compat.keys_of(x).raw_repr()
    return _is_plain(keys)
