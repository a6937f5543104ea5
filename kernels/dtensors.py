"""The operators on DTensors: attention is independent by batch and by head, so shards of these attend by themselves.

``attend`` runs an operator on the local tensors and slices what is said by head. Operators over packed tokens and over
pages have heads alone. A sequence in shards is refused: its shards may be in any order (a load balancer), and a shard
of the keys is no operand.
``s2o_compile.distributed.context_parallel`` is the way for these.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch

from s2o_compile.kernels.core.head_shards import HeadShard
from s2o_compile.kernels.support.arguments import check_device
from s2o_compile.kernels.support.dtensors import is_dtensor, is_sharded_inside, place_among
from s2o_compile.kernels.support.errors import InputError

BATCH, HEADS = 0, 1


def _check_placements(*tensors: Any, dims: Sequence[int] | None = None) -> None:  # noqa: ANN401 (or what stands for DTensors)
    """Raise InputError unless tensors are sharded by batch or heads; by heads, their dimensions ``dims``, if given."""
    if dims is None:
        refused = is_sharded_inside(*tensors)
    else:
        each = zip(tensors, dims, strict=True)
        refused = any(p.is_shard() and p.dim % x.ndim != dim for x, dim in each for p in x.placements)
    if refused:
        raise InputError(
            "placements of query, key and value",
            expected=f"Replicate, or Shard by {'batch or ' if dims is None else ''}heads",
            got="; ".join(str(tuple(x.placements)) for x in tensors),
            remedy="Redistribute them. For long sequences use s2o_compile.distributed.context_parallel.",
        )


def attend(operator: Any, query: Any, key: Any, value: Any, *rest: Any, **keywords: Any) -> tuple[Any, Any]:  # noqa: ANN401
    """An operator of ``torch.ops.s2o`` on DTensors, as it is on their whole tensors.

    Key and value are brought to the query's placements; masks, documents, lengths and sinks may be DTensors or whole
    tensors. A query of three dimensions is one of packed tokens [T, Hq, D]; the heads of its keys are their last
    dimension but one, in pages, too.

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
    dims = [HEADS] * 3 if query.ndim == 4 else [HEADS, key.ndim - 2, value.ndim - 2]
    _check_placements(*tensors, dims=None if query.ndim == 4 else dims)
    _register()
    mesh = query.device_mesh
    plain = all(type(p) in (Replicate, Shard) for p in query.placements)
    heads, batch = ([n for n, p in enumerate(query.placements) if p.is_shard(dim)] for dim in (HEADS, BATCH))
    shard, rows = HeadShard(*place_among(mesh, heads)), place_among(mesh, batch)[1]
    placements = list(query.placements)
    if not plain or key.shape[dims[1]] % shard.count or query.shape[HEADS] % shard.count or query.shape[BATCH] % rows:
        placements, shard = [Replicate()] * mesh.ndim, HeadShard()

    def by_heads(dim: int) -> list[Any]:
        return [Shard(dim) if p.is_shard(HEADS) else p for p in placements]

    local = [x.redistribute(mesh, by_heads(dim)).to_local() for x, dim in zip(tensors, dims, strict=True)]
    masked = operator is torch.ops.s2o.masked_attention.default
    others = [None if x is None else _placed(x, mesh, placements, query, masked).to_local() for x in rest]
    kept = dict(keywords)
    if kept.get("dense_heads"):
        kept["dense_heads"] = shard.dense_heads(kept["dense_heads"], local[1].shape[dims[1]])
    if kept.get("head_tau"):
        kept["head_tau"] = shard.head_tau(kept["head_tau"], local[0].shape[HEADS])
    output, lse = operator(*local, *others, **kept)
    spread = by_heads(query.ndim - 3) if keywords.get("return_lse") else [Replicate()] * mesh.ndim
    return tuple(DTensor.from_local(x, mesh, p, run_check=False) for x, p in ((output, placements), (lse, spread)))  # pyright: ignore


def _placed(x: Any, mesh: Any, placements: list[Any], query: Any, masked: bool) -> Any:  # noqa: ANN401 (tensors, a mesh)
    """A mask, documents, lengths or sinks, placed beside a query of these placements; see `_beside`."""
    from torch.distributed.tensor import DTensor, Replicate

    if not is_dtensor(x):
        check_device("mask or sinks", x, query, host_too=True)  # torch makes memory out of a tensor without data
        x = DTensor.from_local(x, mesh, [Replicate()] * mesh.ndim, run_check=False)
    beside = [_beside(p, tuple(x.shape), tuple(query.shape), masked) for p in placements]
    return x.redistribute(mesh, beside if x.is_floating_point() or x.ndim > 1 else [Replicate()] * mesh.ndim)


def _beside(placement: Any, shape: tuple[int, ...], query: tuple[int, ...], masked: bool) -> Any:  # noqa: ANN401
    """The placement beside a query's of sinks [Hq], ids or a key mask [B or 1, N], or (``masked``) a mask [.., Nq, Nk].

    A mask [Nq, Nk] has neither batch nor heads, also if there are as many queries as entries of the batch.
    """
    from torch.distributed.tensor import Replicate, Shard

    if not placement.is_shard():
        return Replicate()
    if len(shape) == 1:
        return Shard(0) if placement.dim == HEADS else Replicate()
    if len(shape) == 2:
        return Shard(0) if placement.dim == BATCH and shape[0] == query[BATCH] and not masked else Replicate()
    dim = placement.dim - (4 - len(shape))
    return Shard(dim) if dim >= 0 and shape[dim] == query[placement.dim] else Replicate()


def _on_dtensors(name: str) -> Callable[..., tuple[Any, Any]]:
    def operator(*given: Any, **keywords: Any) -> tuple[Any, Any]:  # noqa: ANN401 (as the operator)
        """An operator on DTensors, for captured graphs, too."""
        return attend(getattr(torch.ops.s2o, name).default, *given, **keywords)

    operator.__name__ = operator.__qualname__ = name  # as graphs write it
    return operator


attention, masked_attention, packed_attention = map(_on_dtensors, ("attention", "masked_attention", "packed_attention"))
attention_varlen, attention_paged = map(_on_dtensors, ("attention_varlen", "attention_paged"))


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

    operators = [torch.ops.s2o.attention.default, torch.ops.s2o.packed_attention.default]
    register_sharding(operators)(partial(_placements, False))
    register_sharding(torch.ops.s2o.masked_attention.default)(partial(_placements, True))


def _placements(
    masked: bool, query: Any, key: Any, value: Any, *rest: Any, **keywords: Any  # noqa: ANN401
) -> list[tuple[list[Any], list[Any]]]:  # fmt: skip
    """For torch: by one dimension of the mesh, placements of the outputs, and of the inputs that give them."""
    from torch.distributed.tensor import Replicate, Shard

    _check_placements(query, key, value)
    found: list[tuple[list[Any], list[Any]]] = []
    for placement in (Replicate(), Shard(BATCH)):
        others = [None if x is None else _beside(placement, tuple(x.shape), tuple(query.shape), masked) for x in rest]
        found.append(([placement] * 2, [placement] * 3 + others + [None] * len(keywords)))
    return found
