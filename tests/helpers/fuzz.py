"""Random modules compiled at ``tau=0`` and compared with themselves in float64; a failure is cut down line by line."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from s2o_compile.passes import pipeline
from tests.helpers.fuzz_modules import Module, draw

__all__ = ["Outcome", "draw", "judge", "minimal"]

_FACTOR = 8  # of the error that the module itself makes in its dtype
_FLOOR = {torch.float32: 2e-5, torch.bfloat16: 3e-2}


@dataclass
class Outcome:
    """What became of a module.

    Attributes:
        problem: What differs; empty if nothing does.
        rewritten: Attentions that were.
        left: Attentions that were not.
        skipped: Why it says nothing: eager refuses it, or torch.compile alone already differs.
    """

    problem: str = ""
    rewritten: int = 0
    left: int = 0
    skipped: str = ""


def judge(module: Module) -> Outcome:
    """Runs a module compiled and in eager, at all of its lengths."""
    outcome = Outcome()
    try:
        built = module.build()
        exact = [_call(built.double(), module.inputs(call)) for call in range(len(module.lengths))]
        built = built.to(module.dtype)
        eager = [_call(built, _cast(module.inputs(call), module.dtype)) for call in range(len(module.lengths))]
    except Exception as error:
        return Outcome(skipped=f"eager: {type(error).__name__}: {error}")

    def backend(gm: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        records = pipeline.run(gm, {"tau": 0.0, "min_seq_len": 0}, read_masks=module.read_masks)
        outcome.rewritten += sum(record.rewritten for record in records)
        outcome.left += sum(not record.rewritten for record in records)
        return gm.forward

    outcome.problem = _compare(module, built, backend, exact, eager)
    if outcome.problem and _compare(module, built, "eager", exact, eager):
        return Outcome(skipped="torch.compile alone")
    return outcome


def _compare(module: Module, built: nn.Module, backend: Any, exact: list[Any], eager: list[Any]) -> str:
    torch._dynamo.reset()
    compiled = torch.compile(built, backend=backend)
    for call, lengths in enumerate(module.lengths):
        inputs = _cast(module.inputs(call), module.dtype)
        for tensor in inputs[:2] if module.dynamic else ():
            torch._dynamo.maybe_mark_dynamic(tensor, 1)
        try:
            actual = _call(compiled, inputs)
        except Exception as error:
            return f"lengths {lengths}: {type(error).__name__}: {error}"
        for at, (found, wanted, plain) in enumerate(zip(actual, exact[call], eager[call], strict=True)):
            problem = _differ(found, wanted, plain, module.dtype)
            if problem:
                return f"lengths {lengths}, output {at}: {problem}"
    return ""


def _call(module: Callable[..., Any], inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The outputs of a module, and its inputs afterwards."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [*module(*inputs), *inputs[:2]]


def _cast(inputs: Sequence[torch.Tensor], dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    x, cache, pad, _ = inputs
    cache = cache.to(dtype)
    return x.to(dtype), cache, pad, cache[:, :1]


def _differ(found: torch.Tensor, wanted: torch.Tensor, plain: torch.Tensor, dtype: torch.dtype) -> str:
    """How an output differs from float64 by more than the same module does in eager; empty if it does not.

    What is NaN in eager says nothing: rows that -inf hides as a whole are zeros in the operator.
    """
    if found.shape != wanted.shape or found.dtype != plain.dtype:
        return f"{found.dtype} {tuple(found.shape)}, expected {plain.dtype} {tuple(plain.shape)}"
    says = wanted.isfinite() & plain.isfinite()
    own = (plain.double() - wanted)[says].abs().max().item() if says.any() else 0.0
    size = wanted[says].abs().max().item() if says.any() else 0.0
    off = (found.double() - wanted)[says].abs().nan_to_num(nan=float("inf"))
    beside = (found.double() - plain.double())[says].abs().nan_to_num(nan=float("inf"))
    worst = torch.minimum(off, beside).max().item() if says.any() else 0.0
    allowed = _FACTOR * own + _FLOOR[dtype] * max(1.0, size)
    return f"off by {worst:.3g}, allowed {allowed:.3g}" if worst > allowed else ""


def minimal(module: Module) -> Module:
    """A failing module without the lines, calls and options that it fails without."""

    def fails(candidate: Module) -> bool:
        return bool(judge(candidate).problem)

    changed = True
    while changed:
        changed = False
        for at in reversed(range(len(module.lines) - 1)):
            lines = [*module.lines[:at], *module.lines[at + 1 :]]
            candidate = replace(module, lines=lines)
            if fails(candidate):
                module, changed = candidate, True
        for at in range(len(module.lengths)):
            if len(module.lengths) > 1:
                candidate = replace(module, lengths=[*module.lengths[:at], *module.lengths[at + 1 :]])
                if fails(candidate):
                    module, changed = candidate, True
                    break
    return module
