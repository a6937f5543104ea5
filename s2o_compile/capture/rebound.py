"""Attributes that refer to modules, referring to their copies: hooks of offloading, bound methods, lists of layers."""

from __future__ import annotations

import functools
import types
from collections import OrderedDict, defaultdict, deque
from collections.abc import Mapping
from typing import Any

from torch import nn

_TABLES, _ROWS = (dict, OrderedDict, defaultdict), (list, tuple, deque, set, frozenset)


def rebound(value: Any, copies: Mapping[int, nn.Module]) -> Any:  # noqa: ANN401 (any attribute of a module)
    """An attribute with copies in the place of modules, looked up by their ids; the very same one if it has none.

    It looks into containers of Python, bound methods, partial functions, and the modules and methods that functions
    close over. Functions that it binds get code objects of their own: hooks put one function into the place of every
    module's forward.
    """
    if isinstance(value, nn.Module):
        return copies.get(id(value), value)
    if isinstance(value, types.MethodType):
        owner = copies.get(id(value.__self__))
        return value if owner is None else types.MethodType(with_own_code(value.__func__), owner)
    if isinstance(value, types.FunctionType):
        return _closed_over(value, copies)
    if type(value) is functools.partial:
        function, args, keywords = (rebound(x, copies) for x in (value.func, value.args, value.keywords))
        if function is value.func and args is value.args and keywords is value.keywords:
            return value
        changed = functools.partial(with_own_code(function), *args, **keywords)
        vars(changed).update(rebound(vars(value), copies))
        return changed
    if isinstance(value, dict) and type(value) in _TABLES:
        table = {key: rebound(x, copies) for key, x in value.items()}
        if all(table[key] is x for key, x in value.items()):
            return value
        changed = value.copy()  # a defaultdict keeps what it makes
        changed.update(table)
        return changed
    if type(value) in _ROWS or (isinstance(value, tuple) and hasattr(value, "_make")):
        parts = [rebound(x, copies) for x in value]
        if all(new is old for new, old in zip(parts, value, strict=True)):
            return value
        if type(value) is deque:
            return deque(parts, value.maxlen)
        return getattr(value, "_make", type(value))(parts)
    return value


def _closed_over(function: types.FunctionType, copies: Mapping[int, nn.Module]) -> types.FunctionType:
    """The function, over copies of the modules that it closes over and of those whose methods it does."""
    cells = function.__closure__ or ()
    if not any(_filled(cell) and _is_bound(cell.cell_contents, copies) for cell in cells):
        return function
    own = tuple(
        types.CellType(rebound(cell.cell_contents, copies))
        if _filled(cell) and _is_bound(cell.cell_contents, copies)
        else cell
        for cell in cells
    )
    return with_own_code(function, own)


def _is_bound(value: object, copies: Mapping[int, nn.Module]) -> bool:
    return id(getattr(value, "__self__", value)) in copies


def _filled(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018 (it raises)
    except ValueError:
        return False
    return True


def with_own_code(function: Any, closure: tuple[types.CellType, ...] | None = None) -> Any:  # noqa: ANN401 (callables)
    """A function under a code object of its own, which Dynamo counts recompilations by; another callable as it is.

    It closes over what the function does, or over another ``closure``.
    """
    if not isinstance(function, types.FunctionType):
        return function
    rest = function.__globals__, function.__name__, function.__defaults__, closure or function.__closure__
    own = types.FunctionType(function.__code__.replace(), *rest)
    own.__kwdefaults__ = function.__kwdefaults__
    vars(own).update(vars(function))
    return own
