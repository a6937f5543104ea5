"""Copies of arguments that do not change when the originals do.

A cache advances its length in place, a caller writes into a padding mask, a function sees its closure change. A mask
that is described now and made later needs copies.
"""

from __future__ import annotations

import builtins
import functools
from collections.abc import Iterator
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor

from s2o_compile.kernels.support.torch_compat import OpOverload, OpOverloadPacket
from s2o_compile.passes.graph.rejected import Refused, Rejected, attempt

_CONSTANTS = (int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
_OPERATORS = (OpOverload, OpOverloadPacket)
# Their modules, classes and functions are code, which nobody assigns to; other modules may hold settings.
_LIBRARIES = frozenset({"torch", "math", "operator", "builtins"})


def snapshot(arguments: dict[str, Any]) -> dict[str, Any] | Rejected:
    """The same arguments, made of nothing that can change, or the reason why they cannot be copied.

    Tensors are cloned, without gradients. Functions are made anew over copies of all that they read: closure, defaults,
    attributes, and the globals that their code names. Lists, tuples and dicts are copied with their items. Numbers,
    strings, dtypes, devices and torch itself stay. Any other object may change at any time, and ends the attempt.
    """
    return attempt(_copied, arguments, {})


def _copied(value: Any, copies: dict[int, Any]) -> Any:  # noqa: ANN401 (any argument)
    if id(value) in copies:
        return copies[id(value)]
    if isinstance(value, Tensor):
        copies[id(value)] = value.detach().clone()
        return copies[id(value)]
    if type(value) is functools.partial:
        function, given = value.func, value.keywords
        return functools.partial(_copied(function, copies), *_copied(value.args, copies), **_copied(given, copies))
    if type(value) in (list, tuple):
        return type(value)(_copied(item, copies) for item in value)
    if type(value) is dict:
        return {key: _copied(item, copies) for key, item in value.items()}
    if isinstance(value, _CONSTANTS + _OPERATORS) or _is_of_a_library(value):
        return value
    if type(value) is FunctionType:
        return _copied_function(value, copies)
    raise Refused("it is made of a %s, which may change later", type(value).__name__)


def _copied_function(function: FunctionType, copies: dict[int, Any]) -> FunctionType:
    cells = tuple(CellType() for _ in function.__closure__ or ())
    scope: dict[str, Any] = {"__builtins__": builtins, "__name__": function.__module__}
    copy = copies[id(function)] = FunctionType(function.__code__, scope, function.__name__, None, cells)
    for name in _names(function.__code__):  # a function may name itself, so its copy comes first
        if name in function.__globals__:
            scope[name] = _copied(function.__globals__[name], copies)
    for cell, own in zip(cells, function.__closure__ or (), strict=True):
        try:
            held = own.cell_contents
        except ValueError:  # still empty
            continue
        cell.cell_contents = _copied(held, copies)
    copy.__defaults__ = _copied(function.__defaults__, copies)
    copy.__kwdefaults__ = _copied(function.__kwdefaults__, copies)
    copy.__dict__.update(_copied(function.__dict__, copies))
    return copy


def _names(code: CodeType) -> Iterator[str]:
    """Every global that code may read; attributes are among the names, too."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _is_of_a_library(value: object) -> bool:
    """Whether a value is code of torch or of Python itself; a method of an object is none."""
    if isinstance(value, BuiltinFunctionType) and not isinstance(value.__self__, type | ModuleType | None):
        return False  # table.index_select reads its table
    if isinstance(value, ModuleType):
        name = value.__name__
    elif isinstance(value, type | FunctionType | BuiltinFunctionType):
        name = value.__module__ or ""
    else:
        return False
    return name.partition(".")[0].lstrip("_") in _LIBRARIES
