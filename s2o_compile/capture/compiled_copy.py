"""A compiled module beside the original: the same weights, modules of its own, compiled at its first call."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from s2o_compile.capture.attending import attending_methods
from s2o_compile.capture.entry import ENTRY, Account, Backend, Compilation, CompiledEntry
from s2o_compile.capture.optimized_class import optimized_class
from s2o_compile.capture.rebound import rebound
from s2o_compile.kernels.support.torch_compile import COMPILED, names_of_modules, uncompiled

Model = TypeVar("Model", bound=nn.Module)

_SHARED = frozenset({"_parameters", "_buffers", "_modules"})


def _is_shared(module: nn.Module) -> bool:
    """Whether a copy would not do: no Python, a module to be, one that is compiled, or more than its attributes."""
    if isinstance(module, (torch.jit.ScriptModule, LazyModuleMixin)) or uncompiled(module) is not module:
        return True
    return type(module).__basicsize__ != nn.Module.__basicsize__  # slots, or the fields of another builtin class


def compiled_copy(
    model: Model, backend: str | Backend, *, account: Account | None = None, dynamic: bool | None = None,
    fullgraph: bool = False,
) -> Model:  # fmt: skip
    """A copy of a module and of all modules in it, those with parts compiled where they are called from outside.

    The tables of parameters and buffers are the original's. Everything else stays as it is in the original, and changes
    of attributes, modes, hooks or submodules reach one of the two only. A module that was optimized before, or compiled
    in place, is compiled anew.

    Args:
        model: The original; it stays as it is.
        backend: As of ``torch.compile``.
        account: Is told about compilations and calls.
        dynamic: As of ``torch.compile``.
        fullgraph: As of ``torch.compile``.
    """
    copies: dict[int, nn.Module] = {}
    compilation, names = Compilation(backend, account, dynamic, fullgraph), names_of_modules(model)
    copied = _copied(model, lambda module: CompiledEntry(compilation, names[module]), copies)
    for module in copies.values():
        fields = vars(module)
        fields.update({name: rebound(x, copies) for name, x in fields.items() if name not in _SHARED})
    return cast("Model", copied)


def _copied(
    module: nn.Module, entry_of: Callable[[nn.Module], CompiledEntry], copies: dict[int, nn.Module]
) -> nn.Module:
    if id(module) in copies:
        return copies[id(module)]
    has_ways_in = any(child is not None for child in module.children()) or attending_methods(type(module))
    if copies and _is_shared(module):
        return module
    has_forward = "forward" in vars(module) or type(module).forward is not nn.Module.forward
    callable_itself = has_forward and (has_ways_in or not copies)
    copied = object.__new__(optimized_class(type(module)) if callable_itself else type(module))
    copies[id(module)] = copied
    fields = vars(copied)
    if callable_itself or len(copies) == 1:  # a container has its account, too
        fields[ENTRY] = entry_of(module)
    fields.update({name: value for name, value in vars(module).items() if name not in (COMPILED, ENTRY)})
    # A model that registers hooks when it is called, as those of transformers do, must not do so for the other, too.
    fields.update({name: x.copy() for name, x in fields.items() if "_hooks" in name and isinstance(x, dict)})
    fields["_modules"] = {
        name: None if child is None else _copied(child, entry_of, copies) for name, child in fields["_modules"].items()
    }
    return copied


def account_of(model: object) -> Account | None:
    """The account of an optimized module; None for every other object."""
    entry = vars(model).get(ENTRY) if isinstance(model, nn.Module) else None
    return None if entry is None else entry.compilation.account
