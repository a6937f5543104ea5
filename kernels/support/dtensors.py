"""Tensors that ranks hold in shards (torch's DTensor), without importing their package before somebody else does."""

from __future__ import annotations

import sys
from typing import Any


def is_dtensor(x: object) -> bool:
    """Whether this is a DTensor."""
    package = sys.modules.get("torch.distributed.tensor")
    return package is not None and isinstance(x, package.DTensor)


def is_sharded_inside(*tensors: Any) -> bool:  # noqa: ANN401 (DTensors, or what stands for them)
    """Whether one of query, key and value [B, H, N, D] is sharded along the sequence or the head dim."""
    return any(p.is_shard() and p.dim % 4 >= 2 for x in tensors for p in x.placements)


def place_among(mesh: Any, dims: list[int]) -> tuple[int, int]:  # noqa: ANN401 (a DeviceMesh)
    """This rank's number among the shards that some dimensions of a mesh cut, in their order, and how many there are.

    A rank outside of the mesh counts as the first.
    """
    coordinate = mesh.get_coordinate() or [0] * mesh.ndim
    index, count = 0, 1
    for dim in dims:
        index, count = index * mesh.size(dim) + coordinate[dim], count * mesh.size(dim)
    return index, count
