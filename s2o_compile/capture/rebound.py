"""Attributes that refer to modules, referring to their copies: hooks of offloading, bound methods, lists of layers."""

from __future__ import annotations

import functools
import types
from collections.abc import Mapping
from typing import Any

from torch import nn


def rebound(value: Any, copies: Mapping[int, nn.Module]) -> Any:  # noqa: ANN401 (any attribute of a module)
    """An attribute with copies in the place of modules, looked up by their ids; the very same one if it has none.

    Functions that it binds get code objects of their own: hooks put one function into the place of every module's
    forward.
    """
    if isinstance(value, nn.Module):
        return copies.get(id(value), value)
    if isinstance(value, types.MethodType):
        owner = copies.get(id(value.__self__))
        return value if owner is None else types.MethodType(with_own_code(value.__func__), owner)
    if type(value) is functools.partial:
        args, keywords = rebound(value.args, copies), rebound(value.keywords, copies)
        if args is value.args and keywords is value.keywords:
            return value
        changed = functools.partial(with_own_code(value.func), *args, **keywords)
        vars(changed).update(rebound(vars(value), copies))
        return changed
    if type(value) in (list, tuple):
        parts = [rebound(x, copies) for x in value]
        return type(value)(parts) if any(new is not old for new, old in zip(parts, value, strict=True)) else value
    if type(value) is dict:
        table = {key: rebound(x, copies) for key, x in value.items()}
        return table if any(table[key] is not x for key, x in value.items()) else value
    return value


def with_own_code(function: Any) -> Any:  # noqa: ANN401 (any callable)
    """A function under a code object of its own, which Dynamo counts recompilations by; another callable as it is."""
    if not isinstance(function, types.FunctionType):
        return function
    rest = function.__globals__, function.__name__, function.__defaults__, function.__closure__
    own = types.FunctionType(function.__code__.replace(), *rest)
    own.__kwdefaults__ = function.__kwdefaults__
    vars(own).update(vars(function))
    return own
