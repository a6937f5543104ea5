"""Traces a function into a graph, ahead of the node whose arguments it gets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from s2o_compile.kernels.support.torch_compat import FakeTensor, make_fx, tree_flatten, tree_unflatten
from s2o_compile.passes.graph.nodes import inherit, value_of


def inline(node: fx.Node, function: Callable[..., Any]) -> tuple[list[fx.Node], Any]:
    """Trace ``function`` on the arguments of a node, fake tensors among them, ahead of it.

    Returns the inserted nodes, and the function's result with nodes instead of tensors. Where the function raises,
    nothing is inserted.
    """
    leaves, spec = tree_flatten((node.args, node.kwargs))
    inputs = [leaf for leaf in dict.fromkeys(leaves) if isinstance(leaf, fx.Node)]
    values = [value_of(leaf) for leaf in inputs]
    fake_mode = next(value.fake_mode for value in values if isinstance(value, FakeTensor))

    def call(*tensors: object) -> object:
        tensor_of = dict(zip(inputs, tensors, strict=True))
        args, kwargs = tree_unflatten([tensor_of.get(x, x) if isinstance(x, fx.Node) else x for x in leaves], spec)
        return function(*args, **kwargs)

    with fake_mode, torch.no_grad():
        body = make_fx(call, pre_dispatch=True)(*values)
    copies: dict[fx.Node, Any] = dict(zip(body.graph.find_nodes(op="placeholder"), inputs, strict=True))
    nodes = []
    outputs: Any = None
    with node.graph.inserting_before(node):
        for inner in body.graph.nodes:
            if inner.op == "output":
                outputs = fx.map_arg(inner.args[0], copies.__getitem__)
            elif inner.op != "placeholder":
                copy = node.graph.node_copy(inner, copies.__getitem__)
                copy.meta = {}
                inherit(copy, node, inner.meta.get("val"))
                copies[inner] = copy
                nodes.append(copy)
    return nodes, tuple(outputs) if isinstance(outputs, list | tuple) else outputs
