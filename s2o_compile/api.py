"""``optimize`` and ``explain``: the two calls that most users need."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import nn

from s2o_compile.backend import PREFIX, s2o, split_options
from s2o_compile.config import S2OConfig
from s2o_compile.errors import NothingRewrittenWarning, OptionError
from s2o_compile.recording import record
from s2o_compile.report import Report

Model = TypeVar("Model", bound=nn.Module)


def optimize(
    model: Model,
    config: S2OConfig | None = None,
    *,
    mode: str | None = None,
    dynamic: bool | None = None,
    fullgraph: bool = False,
    options: Mapping[str, object] | None = None,
) -> Model:
    """Return the model with its long attention made sparse, ready to call.

    The result is a new module of the same class that shares every parameter, buffer and submodule with the original:
    ``generate``, ``state_dict`` and all other methods work, and ``generate`` prefills through S2O. The original stays
    dense, so both can be compared. Compilation happens at the first call, as with ``torch.compile``.

    Args:
        model: Any module. Call the result under ``torch.no_grad()``: with gradients wanted, attention stays dense.
        config: Quality and implementation; None for the defaults.
        mode: As ``torch.compile(mode=...)``.
        dynamic: As ``torch.compile(dynamic=...)``.
        fullgraph: As ``torch.compile(fullgraph=...)``.
        options: Any Inductor option.

    Raises:
        TypeError: The model is no ``nn.Module``, or is already the result of ``torch.compile``.
        OptionError: An option that does not exist, or an ``s2o.*`` option, which belongs into ``config``.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"optimize: expected a torch.nn.Module, got {type(model).__name__}. For a function use "
            'torch.compile(fn, backend="s2o").'
        )
    if isinstance(model, torch._dynamo.OptimizedModule):
        raise TypeError(
            "optimize: expected an uncompiled module, got the result of torch.compile. Pass the original module, or "
            'give torch.compile backend="s2o".'
        )
    for name in options or {}:
        if name.startswith(PREFIX):
            raise OptionError(
                f"optimize: expected Inductor options, got {name!r}. Pass config=S2OConfig("
                f"{name.removeprefix(PREFIX)}=...) instead."
            )
    ours = {PREFIX + name: value for name, value in dataclasses.asdict(config or S2OConfig()).items()}
    merged = {**(options or {}), **ours}
    split_options(merged)  # a wrong option fails here, not at the first call
    optimized = copy.copy(model)  # drops compiled state, shares everything else

    def backend(gm: torch.fx.GraphModule, example_inputs: list[torch.Tensor]) -> Callable[..., object]:
        return s2o(gm, example_inputs, mode=mode, options=merged)  # torch.compile itself takes only one of the two

    optimized.compile(backend=backend, dynamic=dynamic, fullgraph=fullgraph)
    return optimized


def explain(model: Callable[..., object], *args: object, config: S2OConfig | None = None, **kwargs: object) -> Report:
    """Run a model once and report every attention: rewritten, its proven mask and density, or why it stays dense.

    The rewritten graphs run without Inductor, so this costs a capture and one forward. Grad mode is the caller's: under
    enabled gradients the report says that sites stay dense because of them. Like ``torch._dynamo.explain`` it resets
    Dynamo: code compiled before is compiled anew at its next call.

    Args:
        model: A module or function.
        *args: Its inputs.
        config: Quality and implementation; None for the defaults.
        **kwargs: Its keyword inputs.
    """
    config = dataclasses.replace(config or S2OConfig(), inner_backend="eager")
    options = {PREFIX + name: value for name, value in dataclasses.asdict(config).items()}
    torch._dynamo.reset()
    try:
        with record() as recording, warnings.catch_warnings():
            warnings.simplefilter("ignore", NothingRewrittenWarning)  # the report says it
            torch.compile(model, backend=s2o, options=options)(*args, **kwargs)
        return recording.report
    finally:
        torch._dynamo.reset()
