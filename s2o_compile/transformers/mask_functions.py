"""Masks that are functions ``(batch, head, query, key) -> bool``, as transformers makes them, proven like graphs.

The function is traced once over index tensors without data, and the mask prover reads its graph. So its form and the
version of transformers do not matter, and an unproven mask is never guessed.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from s2o_compile.kernels.core.documents import Documents
from s2o_compile.kernels.core.mask import AttentionMask
from s2o_compile.kernels.support.torch_compat import FakeTensorMode, make_fx
from s2o_compile.passes.graph.nodes import value_of
from s2o_compile.passes.graph.rejected import Rejected
from s2o_compile.passes.masks.proof import TokenTable
from s2o_compile.passes.masks.prover import MaskProver

logger = logging.getLogger(__name__)

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class ProvenMask:
    """A mask that is proven: the operator's, and the documents that it keeps apart, if any."""

    mask: AttentionMask
    documents: Documents | None = None


def prove_function(
    function: MaskFunction, *, batch: int, queries: tuple[int, int], keys: tuple[int, int]
) -> ProvenMask | Rejected:
    """The mask that a function is over a range of queries and keys, or why it is none of the operator's.

    The tensors that it reads must not change as long as the mask is used: their numbers may be part of the proof.

    Args:
        function: Takes positions that broadcast against each other, int64, and returns bool. It must mean the same for
            whole tensors as for single positions.
        batch: B.
        queries: Position of the first query, and how many there are.
        keys: Position of the first key, and how many there are.
    """
    try:
        graph = _traced(function, batch, queries, keys)
    except Exception as error:  # whatever a user's function raises where it looks at values
        logger.debug("%s cannot be traced", function, exc_info=True)
        return Rejected("the mask function cannot be traced (%s: %s)", type(error).__name__, error)
    (mask,) = graph.graph.output_node().args
    if not isinstance(mask, fx.Node):
        return Rejected("the mask function returns %s, expected a bool tensor", mask)
    _join_constants(graph.graph)
    _write_constants_out(graph)
    proof = MaskProver(graph.graph, stored=lambda node: _stored(graph, node)).prove(mask, queries[1], keys[1])
    if isinstance(proof, Rejected):
        return proof
    if proof.key_masks or not all(isinstance(size, int | None) for size in (proof.offset, proof.window)):
        return Rejected("the mask function looks keys up in %s", [part.node for part in proof.key_masks])
    offset = keys[1] - queries[1] if proof.offset is None else proof.offset
    documents = None
    if proof.documents is not None:
        tables = proof.documents.query, proof.documents.key
        both = zip(tables, (queries[1], keys[1]), strict=True)
        query_ids, key_ids = (_tokens(graph, table, length, batch) for table, length in both)  # pyright: ignore
        itself = proof.documents.of_itself and queries[1] == keys[1]
        documents = Documents.of(query_ids, None if itself else key_ids)
    mask = AttentionMask(
        causal=proof.causal,
        offset=int(offset) if proof.causal else 0,
        window=None if proof.window is None else int(proof.window),
        attention_chunk=proof.chunk,
    )
    return ProvenMask(mask, documents)


def _stored(graph: fx.GraphModule, node: fx.Node) -> Tensor | None:
    return operator.attrgetter(str(node.target))(graph) if node.op == "get_attr" else None


def _tokens(graph: fx.GraphModule, table: TokenTable, length: int, batch: int) -> Tensor:
    """The numbers of a row's tokens, [B or 1, N]."""
    numbers = _stored(graph, table.node)
    if numbers is None:
        numbers = _computed(graph, table.node)
    for step, arguments in table.steps(batch, length):
        numbers = step(numbers, *map(int, arguments))
    return numbers


def _computed(graph: fx.GraphModule, node: fx.Node) -> Tensor:
    """The value of a node of a graph without inputs."""
    part, copies = fx.Graph(), {}
    for other in graph.graph.nodes:
        if other.op == "output":
            break
        copies[other] = part.node_copy(other, copies.__getitem__)
    part.output(copies[node])
    return fx.GraphModule(graph, part)()


def _traced(function: MaskFunction, batch: int, queries: tuple[int, int], keys: tuple[int, int]) -> fx.GraphModule:
    def mask() -> Tensor:
        ranges = ((0, batch), (0, 1), queries, keys)
        positions = (torch.arange(start, start + length) for start, length in ranges)
        b, h, q, k = (x.view([-1 if axis == dim else 1 for dim in range(4)]) for axis, x in enumerate(positions))
        return function(b, h, q, k).expand(batch, -1, queries[1], keys[1])

    with FakeTensorMode(allow_non_fake_inputs=True):
        return make_fx(mask, pre_dispatch=True)()


def _join_constants(graph: fx.Graph) -> None:
    """One node for each captured tensor: the prover tells tensors apart by their nodes."""
    first: dict[object, fx.Node] = {}
    for node in graph.find_nodes(op="get_attr"):  # in graph order
        if first.setdefault(node.target, node) is not node:
            node.replace_all_uses_with(first[node.target])
            graph.erase_node(node)


def _write_constants_out(graph: fx.GraphModule) -> None:
    """Captured tensors of one number, such as a left padding of no tokens, as that number; waits for the device."""
    for stored in graph.graph.find_nodes(op="get_attr"):
        tensor = operator.attrgetter(str(stored.target))(graph)
        if tensor.numel() == 0 or tensor.is_floating_point() or bool((tensor != tensor.flatten()[0]).any()):
            continue
        with graph.graph.inserting_before(stored):
            arguments = list(tensor.shape), tensor.flatten()[0].item()
            filled = graph.graph.call_function(torch.ops.aten.full.default, arguments, {"dtype": tensor.dtype})
        filled.meta["val"] = value_of(stored)
        stored.replace_all_uses_with(filled)
