"""Decides whether an unproven mask is worth reading at run time.

A tensor that enters the graph may hold anything, and a bool tensor can hold nothing but a mask. Float tensors are
followed to their sources. Position biases are learned, or are products of numbers (ALiBi), so reading them is in vain.
"""

from __future__ import annotations

import torch
from torch import fx

from s2o_compile.kernels.core.mask_band import HIDES
from s2o_compile.passes.graph.calls import function_name
from s2o_compile.passes.graph.nodes import arguments, choice, value_of
from s2o_compile.passes.masks import joins, views
from s2o_compile.passes.masks.index_arithmetic import IndexEvaluator

_PASSED_ON = frozenset({"pad", "triu", "tril", "masked_fill", "setitem"})
_JOINED = frozenset({"add", "minimum", "maximum", "min", "max"})


def is_readable(node: fx.Node, indices: IndexEvaluator) -> bool:
    """Whether a tensor that decides which keys are seen may hold a mask, judged by the nodes that make it."""
    pending, seen = [node], set()
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        sources = _sources(node, indices)
        if sources is None:
            return False
        pending += [source for source in sources if isinstance(source, fx.Node) and indices.fill(source) is None]
    return True


def _sources(node: fx.Node, indices: IndexEvaluator) -> tuple[object, ...] | None:
    """The tensors that must hold masks so that a tensor may hold one; None if it cannot."""
    name, value = function_name(node), value_of(node)
    if name == "setitem":
        value = value_of(node.args[0])
    if not isinstance(value, torch.Tensor) or isinstance(value, torch.nn.Parameter):
        return None
    if value.dtype is torch.bool:
        return ()
    if not value.dtype.is_floating_point:
        return None
    if node.op in ("placeholder", "get_attr") or indices.filled(node) is not None:
        return ()  # a tensor filled with a number may be written to later
    if name in views.VIEWS or name in _PASSED_ON:
        return node.args[:1]
    if name == "where" and (arms := choice(node)) is not None:
        return arms[1:]
    if name in _JOINED and len(node.args) == 2:
        return node.args
    if name in joins.NAMES or name == "stack":
        (tensors,) = arguments(node, "tensors")
        return tuple(tensors) if isinstance(tensors, tuple | list) else None
    if name == "mul" and len(node.args) == 2:  # (1 - mask) * -10000, (mask - 1) * 10000
        numbers = [number for factor in node.args if (number := indices.fill(factor)) is not None]
        return () if numbers and max(map(abs, numbers)) >= -HIDES else None
    return () if name == "log" else None
