"""Numbers that are provably 0 or 1: a bool tensor turned into numbers, its complement, its products.

``1 - mask`` is the opposite of a mask, and ``mask * x`` is a choice, only for these. An integer attention mask that
enters the graph may hold any number.
"""

from __future__ import annotations

import torch
from torch import fx

from s2o_compile.passes.graph.calls import function_name
from s2o_compile.passes.graph.nodes import value_of
from s2o_compile.passes.graph.rejected import attempt
from s2o_compile.passes.masks import views
from s2o_compile.passes.masks.index_arithmetic import IndexEvaluator
from s2o_compile.passes.masks.index_tensor import COMPARISONS


def is_bits(argument: object, indices: IndexEvaluator) -> bool:
    """Whether a tensor holds nothing but 0 and 1 (False and True)."""
    fill = indices.fill(argument)
    if fill is not None:
        return fill in (0, 1)
    if not isinstance(argument, fx.Node) or not isinstance(value_of(argument), torch.Tensor):
        return False
    if value_of(argument).dtype is torch.bool:
        return True
    if indices.is_written(argument):
        return False
    name = function_name(argument)
    if name in COMPARISONS:
        return True
    complemented = complement(argument, indices)
    if complemented is not None:
        return is_bits(complemented, indices)
    if name == "mul" and len(argument.args) == 2:
        return all(is_bits(factor, indices) for factor in argument.args)
    if name in ("tril", "triu") and argument.args:
        return is_bits(argument.args[0], indices)
    source = attempt(views.source, argument, indices)
    return bool(source) and is_bits(source.node, indices)


def complement(node: fx.Node, indices: IndexEvaluator) -> fx.Node | None:
    """``x`` of ``1 - x``, if the node is that."""
    name = function_name(node)
    if name not in ("sub", "rsub") or len(node.args) != 2 or node.kwargs:
        return None
    one, other = node.args if name == "sub" else node.args[::-1]
    return other if isinstance(other, fx.Node) and indices.fill(one) == 1 else None
