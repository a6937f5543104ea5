"""Prepares graphs of torch.export for the passes, and converts inserted calls back to operators.

Such a graph holds operators only, and an ``_assert_tensor_metadata(x, dtype, device)`` beside every cast. The assertion
reads no values, yet it is a user: probabilities would look as if somebody read them, and masks would never be dead. The
passes insert ``torch.narrow``, ``torch.Tensor.expand`` and others, as Dynamo's graphs hold them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from s2o_compile.kernels.support.torch_compat import HigherOrderOperator, OpOverload, is_erased
from s2o_compile.passes.graph.inlining import inline
from s2o_compile.passes.graph.nodes import WEIGHT, value_of

_ASSERTION = torch.ops.aten._assert_tensor_metadata.default


@contextmanager
def opened(program: ExportedProgram) -> Iterator[None]:
    """A block in which the passes may change an exported graph. After it, the graph holds operators only again.

    Assertions are removed for the block, and put back where they stood if their tensor outlives it.
    """
    graph = program.graph
    _write_numbers(program)
    order = list(graph.nodes)
    about = {node: (node.args, node.kwargs) for node in graph.find_nodes(op="call_function", target=_ASSERTION)}
    for node in about:
        graph.erase_node(node)
    before = {node: node.target for node in graph.nodes}
    signature = program.graph_signature
    held = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    weights = [node for node in graph.find_nodes(op="placeholder") if node.name in held]
    for node in weights:
        node.meta[WEIGHT] = True
    try:
        yield
    finally:
        for node in weights:
            node.meta.pop(WEIGHT)
        _put_back(graph, order, about)
        _to_operators(graph, before)


def _put_back(graph: fx.Graph, order: Sequence[fx.Node], about: Mapping[fx.Node, tuple[Any, Any]]) -> None:
    """Inserts assertions, each with its arguments, behind the nearest node of the old order that is still there.

    Elsewhere an assertion would part the placeholders, or the nodes of one module's call: ``unflatten`` fails on both.
    """
    last = order[0]
    for node in order:
        if node in about and not is_erased(about[node][0][0]):
            with graph.inserting_after(last):
                last = graph.call_function(_ASSERTION, *about[node])
            last.meta = node.meta
        elif not is_erased(node):
            last = node


def _write_numbers(program: ExportedProgram) -> None:
    """Replaces numbers that became tensors by ``full``: torch 2.11 lifts ``torch.tensor(0.0)`` out of a graph."""
    graph, constants = program.graph, program.graph_signature.inputs_to_lifted_tensor_constants
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.lift_fresh_copy.default):
        constant = program.constants.get(constants.get(getattr(node.args[0], "name", ""), ""))
        if not isinstance(constant, Tensor) or constant.ndim:
            continue
        options = {"dtype": constant.dtype, "device": constant.device}
        with graph.inserting_before(node):
            number = graph.call_function(torch.ops.aten.full.default, ([], constant.item()), options)
        number.meta = dict(node.meta)
        for copy in (*(user for user in node.users if user.target is torch.ops.aten.detach_.default), node):
            if not any(user.op == "output" for user in copy.users):
                copy.replace_all_uses_with(number)
                graph.erase_node(copy)


def _to_operators(graph: fx.Graph, before: Mapping[fx.Node, object]) -> None:
    """Replaces every Python function that the passes call on tensors by operators.

    Functions from before the passes stay. They are export's own, such as those of vmap.
    """
    for node in list(graph.nodes):
        operator = isinstance(node.target, (OpOverload, HigherOrderOperator))
        if node.op != "call_function" or operator or before.get(node) == node.target:
            continue
        if any(isinstance(value_of(source), Tensor) for source in node.all_input_nodes):  # else it computes sizes
            inserted, output = inline(node, node.target)
            # The node stays and becomes the last operator: the program knows its outputs by their names.
            node.target, node.args, node.kwargs = torch.ops.aten.alias.default, (output,), {}
            if inserted and output is inserted[-1]:
                node.target, node.args, node.kwargs = output.target, output.args, output.kwargs
                graph.erase_node(output)
