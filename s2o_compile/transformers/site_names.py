"""Names of attentions that no graph holds: their path in the outermost module that was called, as in a captured graph.

A module does not know where it is. So the first call of an attention looks for the modules in the frames around it.
"""

from __future__ import annotations

import sys
from weakref import WeakKeyDictionary

from torch import nn

from s2o_compile.kernels.support.torch_compile import names_of_modules

_names: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


def name_of(module: nn.Module) -> str:
    """The name of a module whose forward runs; its class and layer if nothing called it."""
    if module not in _names:
        for caller in _callers():
            names = names_of_modules(caller)
            if names.get(module):
                for part, name in names.items():
                    _names.setdefault(part, name)
                break
        else:
            return _class_and_layer(module)
    return _names[module] or _class_and_layer(module)


def _callers() -> list[nn.Module]:
    """The modules that are called in this thread, outermost first."""
    found: dict[nn.Module, None] = {}
    frame = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module):
            found.pop(owner, None)
            found[owner] = None
        frame = frame.f_back
    return list(reversed(found))


def _class_and_layer(module: nn.Module) -> str:
    layer = getattr(module, "layer_idx", None)
    return type(module).__name__ if layer is None else f"{type(module).__name__}.{layer}"
