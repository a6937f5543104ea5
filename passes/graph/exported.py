"""Graphs of torch.export, made ready for the passes and made whole behind them.

Such a graph holds operators only, and beside every cast an ``_assert_tensor_metadata(x, dtype, device)``. That reads
nothing of a tensor but what it is, yet is a user of it: probabilities would look as if somebody read them, and masks
would never be dead. The passes write ``torch.narrow``, ``torch.Tensor.expand`` and their kin, as Dynamo's graphs do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from s2o_compile.kernels.support.torch_compat import HigherOrderOperator, OpOverload, is_erased
from s2o_compile.passes.graph.inlining import inline
from s2o_compile.passes.graph.nodes import value_of

_ASSERTION = torch.ops.aten._assert_tensor_metadata.default


@contextmanager
def opened(program: ExportedProgram) -> Iterator[None]:
    """A block in which the passes may change an exported graph; behind it, it holds operators only again.

    Assertions are set aside, and those about tensors that outlive the block are put back.
    """
    graph = program.graph
    _write_numbers(program)
    found = graph.find_nodes(op="call_function", target=_ASSERTION)
    about = [(node.args[0], node.args, node.kwargs, node.meta) for node in found]
    for node in found:
        graph.erase_node(node)
    before = {node: node.target for node in graph.nodes}
    try:
        yield
    finally:
        for tensor, args, kwargs, meta in about:
            if not is_erased(tensor):
                with graph.inserting_after(tensor):
                    graph.call_function(_ASSERTION, args, kwargs).meta = meta
        _spell(graph, before)


def _write_numbers(program: ExportedProgram) -> None:
    """Put ``full`` in the place of numbers that were tensors: torch 2.11 lifts ``torch.tensor(0.0)`` out of a graph."""
    graph, held = program.graph, program.graph_signature.inputs_to_lifted_tensor_constants
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.lift_fresh_copy.default):
        constant = program.constants.get(held.get(getattr(node.args[0], "name", ""), ""))
        if not isinstance(constant, Tensor) or constant.ndim:
            continue
        place = {"dtype": constant.dtype, "device": constant.device}
        with graph.inserting_before(node):
            number = graph.call_function(torch.ops.aten.full.default, ([], constant.item()), place)
        number.meta = dict(node.meta)
        for copy in (*(user for user in node.users if user.target is torch.ops.aten.detach_.default), node):
            if not any(user.op == "output" for user in copy.users):
                copy.replace_all_uses_with(number)
                graph.erase_node(copy)


def _spell(graph: fx.Graph, before: Mapping[fx.Node, object]) -> None:
    """Put operators in the place of every Python function that the passes call on tensors.

    Functions that were there before are export's own, such as those of vmap.
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
