"""The results of an executor, and the state of tiles that may go on from theirs."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from s2o_compile.kernels.core.layout import empty_output
from s2o_compile.kernels.core.plan import n_tiles


class Result(NamedTuple):
    """The results that every executor returns.

    Attributes:
        output: [B, Hq, Nq, Dv], zeros for a query that sees no key.
        lse: float32 [B, Hq, Nq], natural log-sum-exp of the visited logits and of the tail, -inf for a query that sees
            no key.
        computed: int32 [B, Hq, tiles], keys that the tile computed in both passes; density follows from it.
    """

    output: Tensor
    lse: Tensor
    computed: Tensor


def empty_result(query: Tensor, value_dim: int, layout: str = "auto") -> Result:
    """Uninitialised results for a query [B, Hq, Nq, D]; the layout of the output as for `empty_output`."""
    return empty_state(query, empty_output(query, value_dim, layout))


def empty_state(query: Tensor, output: Tensor) -> Result:
    """Uninitialised results for a query [B, Hq, Nq, D] beside an output that is there."""
    batch, heads, n_queries, _ = query.shape
    lse = query.new_empty(batch, heads, n_queries, dtype=torch.float32)
    return Result(output, lse, query.new_empty(batch, heads, n_tiles(n_queries), dtype=torch.int32))


class Progress(NamedTuple):
    """What a tile that may go on with a lower tau keeps beside its results.

    Attributes:
        tail: float32 [B, Hq, Nq], mass added for keys left out, over the mass visited.
        unvisited: float32 [B, Hq, tiles], the estimate that met the stop rule; -1 for a tile that left no key out.
    """

    tail: Tensor
    unvisited: Tensor


def empty_progress(query: Tensor) -> Progress:
    """Uninitialised state for a query [B, Hq, Nq, D]."""
    batch, heads, n_queries, _ = query.shape
    tail = query.new_empty(batch, heads, n_queries, dtype=torch.float32)
    return Progress(tail, tail.new_empty(batch, heads, n_tiles(n_queries)))
