"""The class of an optimized module: that of the original, whose instances compile themselves when they are called.

Nothing in an instance refers to its owner. The class brings ``_compiled_call_impl``, the hook of ``nn.Module.__call__``
that ``module.compile()`` fills, as a method, so it is given the module that is really called. An instance holds a
`CompiledEntry`, which every form of copying takes along: ``copy``, ``deepcopy``, ``pickle``, replicas of
``nn.DataParallel``, a changed ``__class__``. So a copy is optimized too, and computes with its own weights.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch.compiler import is_dynamo_compiling

from s2o_compile.capture.attending import attending_methods, entered
from s2o_compile.capture.entry import ENTRY, CompiledEntry
from s2o_compile.capture.generation_masks import mask_methods
from s2o_compile.capture.inlined import refuse_export, watch_graphs
from s2o_compile.capture.rebound import rebound
from s2o_compile.kernels.support.torch_compile import is_exporting, skip_frame


class Optimized:
    """What the class of an optimized module adds to that of the original. It comes first among the bases."""

    _s2o_entry: CompiledEntry | None = None

    def __init_subclass__(cls, **_: object) -> None:
        """Keeps the original's ``__init_subclass__`` from registering a second class of its name."""

    @skip_frame
    def _compiled_call_impl(self: Any, *args: object, **kwargs: object) -> object:
        """Called by ``nn.Module.__call__`` in the place of ``_call_impl``."""
        refuse_export()
        # A module that its own class made, such as a slice of an nn.Sequential, has no entry.
        entry = None if is_dynamo_compiling() or is_exporting() else vars(self).get(ENTRY)
        return self._call_impl(*args, **kwargs) if entry is None else entry.run(self, args, kwargs)

    def _s2o_arguments(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The keyword arguments of a call, as its compiled frame passes them on."""
        return kwargs

    def __prepare_scriptable__(self) -> object:
        """Raises TypeError: ``torch.jit.script`` asks here, and its program would be the dense model."""
        raise TypeError(
            "torch.jit.script: expected an uncompiled module, got the result of s2o_compile.optimize, whose program "
            "would be dense. Pass the original module; s2o_compile.export makes a sparse program of it."
        )

    def compile(self, *_: object, **__: object) -> None:
        """Raises TypeError: an optimized module is compiled already."""
        raise TypeError(
            f"compile: expected a module that is not compiled, got an optimized {type(self).__name__}, which compiles "
            "itself at its first call. Give mode, dynamic, fullgraph and options to s2o_compile.optimize."
        )

    def __reduce_ex__(self, protocol: Any) -> Any:  # noqa: ANN401 (as object's, typed anew in every version)
        """By the original's class, which pickle finds by its name."""
        base = _base(type(self))
        if base is None:  # somebody derived a class from this one
            return super().__reduce_ex__(protocol)
        if base.__reduce_ex__ is not object.__reduce_ex__ or base.__reduce__ is not object.__reduce__:
            return _optimized, (_plain(self), vars(self).get(ENTRY))
        return _new, (base,), *super().__reduce_ex__(max(protocol, 2))[2:]


def optimized_class(base: type) -> type:
    """The class of optimized instances of a class: one and the same as long as anybody holds it."""
    if issubclass(base, Optimized):
        return base
    for known in type.__subclasses__(base):
        if _base(known) is base:
            return known
    watch_graphs()
    fields: dict[str, object] = {name: getattr(base, name) for name in ("__module__", "__qualname__", "__doc__")}
    fields |= {name: entered(name, method) for name, method in attending_methods(base).items()}
    fields |= {name: _copying(getattr(base, name)) for name in ("__copy__", "__deepcopy__") if hasattr(base, name)}
    return type(base.__name__, (Optimized, base), fields | mask_methods(base))


def _base(kind: type) -> type | None:
    """The class that `optimized_class` made a class of; None for every other class."""
    return kind.__bases__[1] if kind.__bases__[0] is Optimized else None


def _new(base: type) -> object:
    return object.__new__(optimized_class(base))


def _plain(module: Any) -> Any:  # noqa: ANN401 (a module)
    """The same module under its original class: it shares all that the optimized one holds."""
    base = _base(type(module))
    assert base is not None
    plain = object.__new__(base)
    fields = {name: value for name, value in vars(module).items() if name != ENTRY}
    vars(plain).update({name: rebound(value, {id(module): plain}) for name, value in fields.items()})
    return plain


def _optimized(module: Any, entry: CompiledEntry | None) -> Any:  # noqa: ANN401 (a module)
    module.__class__ = optimized_class(type(module))
    if entry is not None:
        vars(module)[ENTRY] = entry
    return module


def _copying(original: Callable[..., Any]) -> Callable[..., Any]:
    """The copying method of a class that has its own, such as ``fx.GraphModule``: what it makes is optimized, too."""

    def copied(self: Any, *memo: dict[int, Any]) -> Any:  # noqa: ANN401 (a module)
        entry = vars(self).get(ENTRY)
        return _optimized(original(_plain(self), *memo), copy.deepcopy(entry, *memo) if memo else entry)

    return copied
