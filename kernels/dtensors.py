"""The operators on DTensors: attention is independent by batch and by head, so shards of these attend by themselves.

``attend`` runs an operator on the local tensors and slices what is said by head. A sequence in shards is refused: its
shards may be in any order (a load balancer), and a shard of the keys is no operand.
``s2o_compile.distributed.context_parallel`` is the way for these.
"""

from __future__ import annotations

import sys
from functools import cache
from typing import Any

import torch

from s2o_compile.kernels.core.head_shards import HeadShard
from s2o_compile.kernels.support.arguments import check_device
from s2o_compile.kernels.support.dtensors import is_dtensor, is_sharded_inside, place_among
from s2o_compile.kernels.support.errors import InputError

BATCH, HEADS = 0, 1


def _check_placements(*tensors: Any) -> None:  # noqa: ANN401 (DTensors, or what stands for them)
    if is_sharded_inside(*tensors):
        raise InputError(
            "placements of query, key and value",
            expected="Replicate, or Shard by batch or heads",
            got="; ".join(str(tuple(x.placements)) for x in tensors),
            remedy="Redistribute them. For long sequences use s2o_compile.distributed.context_parallel.",
        )


def attend(operator: Any, query: Any, key: Any, value: Any, *rest: Any, **keywords: Any) -> tuple[Any, Any]:  # noqa: ANN401
    """An operator of ``torch.ops.s2o`` on DTensors, as it is on their whole tensors.

    Key and value are brought to the query's placements; masks and sinks may be DTensors or whole tensors.

    Raises:
        InputError: They are sharded along the sequence, on different meshes, or by heads that do not divide.
    """
    from torch.distributed.tensor import DTensor, Replicate, Shard

    tensors = [query, key, value]
    if not all(map(is_dtensor, tensors)) or any(x.device_mesh != query.device_mesh for x in tensors):
        raise InputError(
            "query, key and value",
            expected="all of them DTensors on one mesh, or none",
            got=", ".join(type(x).__name__ for x in tensors),
            remedy="Make them with torch.distributed.tensor.distribute_tensor.",
        )
    _check_placements(*tensors)
    _register()
    mesh = query.device_mesh
    plain = all(type(p) in (Replicate, Shard) for p in query.placements)
    heads, batch = ([n for n, p in enumerate(query.placements) if p.is_shard(dim)] for dim in (HEADS, BATCH))
    shard, rows = HeadShard(*place_among(mesh, heads)), place_among(mesh, batch)[1]
    placements = list(query.placements)
    if not plain or key.shape[HEADS] % shard.count or query.shape[HEADS] % shard.count or query.shape[BATCH] % rows:
        placements, shard = [Replicate()] * mesh.ndim, HeadShard()
    local = [x.redistribute(mesh, placements).to_local() for x in tensors]
    others = [None if x is None else _placed(x, mesh, placements, query).to_local() for x in rest]
    kept = dict(keywords)
    if kept.get("dense_heads"):
        kept["dense_heads"] = shard.dense_heads(kept["dense_heads"], local[1].shape[HEADS])
    if kept.get("head_tau"):
        kept["head_tau"] = shard.head_tau(kept["head_tau"], local[0].shape[HEADS])
    output, lse = operator(*local, *others, **kept)
    spread = placements if keywords.get("return_lse") else [Replicate()] * mesh.ndim
    return tuple(DTensor.from_local(x, mesh, p, run_check=False) for x, p in ((output, placements), (lse, spread)))  # pyright: ignore


def _placed(x: Any, mesh: Any, placements: list[Any], query: Any) -> Any:  # noqa: ANN401 (tensors, a mesh)
    """A mask or sinks, placed beside a query of these placements."""
    from torch.distributed.tensor import DTensor, Replicate

    if not is_dtensor(x):
        check_device("mask or sinks", x, query, host_too=True)  # torch makes memory out of a tensor without data
        x = DTensor.from_local(x, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return x.redistribute(mesh, [_beside(p, tuple(x.shape), tuple(query.shape)) for p in placements])


def _beside(placement: Any, shape: tuple[int, ...], query: tuple[int, ...]) -> Any:  # noqa: ANN401 (a Placement)
    """The placement of sinks [Hq], a key mask [B or 1, Nk] or a mask [.., Nq, Nk] beside a query's."""
    from torch.distributed.tensor import Replicate, Shard

    if not placement.is_shard():
        return Replicate()
    if len(shape) == 1:
        return Shard(0) if placement.dim == HEADS else Replicate()
    if len(shape) == 2:  # the batch of a key mask; [Nq, Nk] has neither
        return Shard(0) if placement.dim == BATCH and shape[0] == query[BATCH] else Replicate()
    dim = placement.dim - (4 - len(shape))
    return Shard(dim) if dim >= 0 and shape[dim] == query[placement.dim] else Replicate()


def attention(*given: Any, **keywords: Any) -> tuple[Any, Any]:  # noqa: ANN401 (as the operator)
    """``s2o::attention`` on DTensors, for captured graphs."""
    return attend(torch.ops.s2o.attention.default, *given, **keywords)


def masked_attention(*given: Any, **keywords: Any) -> tuple[Any, Any]:  # noqa: ANN401 (as the operator)
    """``s2o::masked_attention`` on DTensors, for captured graphs."""
    return attend(torch.ops.s2o.masked_attention.default, *given, **keywords)


def register_if_used() -> None:
    """Tell torch the placements of DTensors, if their package is loaded; Dynamo, which makes graphs, loads it."""
    if "torch.distributed.tensor" in sys.modules:
        _register()


@cache
def _register() -> None:
    """Tell torch the placements of a call of ``torch.ops.s2o`` that does not come here: of tensors of inference mode.

    By batch alone: torch remembers placements without the keywords of a call, and settings by head are keywords.
    """
    from torch.distributed.tensor.experimental import register_sharding

    register_sharding([torch.ops.s2o.attention.default, torch.ops.s2o.masked_attention.default])(_placements)


def _placements(query: Any, key: Any, value: Any, *rest: Any, **keywords: Any) -> list[tuple[list[Any], list[Any]]]:  # noqa: ANN401
    """For torch: by one dimension of the mesh, placements of the outputs, and of the inputs that give them."""
    from torch.distributed.tensor import Replicate, Shard

    _check_placements(query, key, value)
    found: list[tuple[list[Any], list[Any]]] = []
    for placement in (Replicate(), Shard(BATCH)):
        others = [None if x is None else _beside(placement, tuple(x.shape), tuple(query.shape)) for x in rest]
        found.append(([placement] * 2, [placement] * 3 + others + [None] * len(keywords)))
    return found
