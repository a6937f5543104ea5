"""An operand of an attention: a tensor of the graph, and the view functions that the rewriter applies to it.

A frontend must not change the graph before all proofs are made, but bmm's operands are [B * H, N, D]. Those of an
einsum may be [B, N, H, D]. So a frontend describes the steps to [B, H, N, D], and the rewriter inserts them.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from s2o_compile.kernels.support.torch_compat import FakeTensor, is_wrapper, tensors_within
from s2o_compile.passes.graph.nodes import value_of

Step = tuple[Callable[..., Any], tuple[Any, ...]]


@dataclass(frozen=True, eq=False)
class Operand:
    """A tensor of the graph, and the steps ``(function, further arguments)`` after it; arguments may be nodes."""

    node: fx.Node
    steps: tuple[Step, ...] = ()

    def then(self, function: Callable[..., Any], *args: object) -> Operand:
        """This operand with one more step."""
        return Operand(self.node, (*self.steps, (function, args)))

    @property
    def value(self) -> Any:  # noqa: ANN401 (a fake tensor, or what the node holds)
        """The fake value after all steps; None if the graph has none."""
        value = value_of(self.node)
        for function, args in self.steps:
            value = computed(value, function, (value, *args))
        return value


def _fake_mode(value: Any) -> Any:  # noqa: ANN401 (a FakeTensorMode)
    """The mode of a captured value; None if it is no fake tensor, nor made of one, as a DTensor is."""
    if isinstance(value, FakeTensor):
        return value.fake_mode
    return _fake_mode(tensors_within(value)[0]) if is_wrapper(value) else None


def computed(
    like: object, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
) -> Any:  # noqa: ANN401 (whatever the function returns)
    """The fake value of a call, in the fake mode of a captured value; None if that is no fake tensor."""
    # Not torch._guards.detect_fake_mode: Dynamo gives its backends a fresh mode, which refuses the captured values.
    mode = _fake_mode(like)
    if mode is None:
        return None
    environment = mode.shape_env
    unguarded = nullcontext() if environment is None else environment.suppress_guards()
    # Checks inside compare sizes (does a slice end within a buffer?). They must not add guards.
    with mode, torch.no_grad(), unguarded:
        return function(*fx.map_arg(args, value_of), **fx.map_arg(kwargs or {}, value_of))
