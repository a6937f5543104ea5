"""Which of the model's heads an attention of a graph has: all, or this rank's share under tensor parallelism.

Settings by head (``dense_heads``, ``site_tau``, tau by head) hold the model's numbers. The projection in front of the
query and of the key says whose heads these are: under tensor parallelism its weight, or its output, is a DTensor that
is sharded along the features.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from s2o_compile.kernels.core.head_shards import WHOLE, HeadShard
from s2o_compile.kernels.support.dtensors import is_dtensor, place_among
from s2o_compile.passes.graph.calls import function_name, moves_shards
from s2o_compile.passes.graph.nodes import value_of
from s2o_compile.passes.graph.rejected import Refused
from s2o_compile.passes.site import AttentionSite

_PRODUCTS = frozenset({"linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "einsum"})
_EXCHANGES = ("_c10d_functional", "c10d_functional", "_c10d_functional_autograd", "c10d")
"""Namespaces of the operators by which ranks exchange tensors."""

_UNKNOWN = (
    "its settings by head (dense_heads, site_tau or tau) are for the model's heads, and which of them this rank has is "
    "not known (%s): leave them out for this site"
)


def head_shard(site: AttentionSite) -> HeadShard:
    """This rank's share of the model's heads; raises `Refused` where that cannot be told."""
    if is_dtensor(site.query.value):
        return WHOLE  # the operator slices what is said of all heads
    found = {_shard_at(operand.node) for operand in (site.query, site.key)}
    if len(found) > 1:
        raise Refused(_UNKNOWN, "query and key have shards of other sizes")
    (shard,) = found
    exchanges = [node for node in site.node.graph.nodes if str(node.target).partition(".")[0] in _EXCHANGES]
    if shard == WHOLE and exchanges:
        raise Refused(_UNKNOWN, f"the graph exchanges tensors by {exchanges[0]}, and its weights are plain tensors")
    return shard


def _shard_at(node: fx.Node) -> HeadShard:
    """The share of the features of a node's value, from the nearest projections and DTensors above it."""
    found, seen, todo = set(), {node}, [node]
    while todo:
        at = todo.pop()
        value = value_of(at)
        if is_dtensor(value):
            found.add(_of_activation(value))
            continue
        if function_name(at) in _PRODUCTS:
            weights = [weight for part in at.all_input_nodes if (weight := _weight(part)) is not None]
            found |= {_along(weight, 0) for weight in weights}  # [features, inputs], as nn.Linear has it
            continue
        for above in at.all_input_nodes:
            if above not in seen:
                seen.add(above)
                todo.append(above)
    shards = found - {WHOLE}
    if len(shards) > 1:
        raise Refused(_UNKNOWN, "it is made of several shards")
    return shards.pop() if shards else WHOLE


def _weight(node: fx.Node) -> Any:  # noqa: ANN401 (a fake DTensor)
    """The DTensor of two dimensions that a node is, or is the local part of; None for any other."""
    while node is not None:
        value = value_of(node)
        if is_dtensor(value):
            return value if value.dim() == 2 and node.op in ("placeholder", "get_attr") else None
        inputs = node.all_input_nodes
        node = inputs[0] if len(inputs) == 1 and moves_shards(node) else None  # pyright: ignore
    return None


def _of_activation(value: Any) -> HeadShard:  # noqa: ANN401 (a fake DTensor)
    """[.., features], or heads as a dimension of their own: [B, N, H, D] or [B, H, N, D]."""
    if value.dim() == 4:
        shards = {_along(value, dim) for dim in (1, 2)} - {WHOLE}
        return shards.pop() if len(shards) == 1 else WHOLE
    return _along(value, value.dim() - 1)


def _along(value: Any, dim: int) -> HeadShard:  # noqa: ANN401 (a fake DTensor)
    dims = [number for number, placement in enumerate(value.placements) if placement.is_shard(dim)]
    if any(type(value.placements[number]).__name__ != "Shard" for number in dims):
        raise Refused(_UNKNOWN, f"they are placed as {tuple(value.placements)}")
    return HeadShard(*place_among(value.device_mesh, dims))
