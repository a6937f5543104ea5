"""S2O for some heads and some queries at a time: ranked, attended, forgotten.

Scores and lists grow with segments times keys. Held for the whole call they would take as much memory as key and value;
held for as many heads, or segments of one head, as keep the card busy they stay a fraction of them. How a call is cut
changes no bit of its result.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from types import ModuleType

from torch import Tensor

from s2o_compile.kernels import streams
from s2o_compile.kernels.core import head_tau
from s2o_compile.kernels.core.mask import AttentionMask
from s2o_compile.kernels.core.options import OperatorOptions
from s2o_compile.kernels.core.plan import TILE_LEN, n_segments, n_tiles
from s2o_compile.kernels.core.result import Result, empty_result
from s2o_compile.kernels.exact.dense_heads import attend_dense, query_heads, runs
from s2o_compile.kernels.impl.torch import forward as torch_forward
from s2o_compile.kernels.planner import Planner

SCRATCH_SHARE = 5
SCRATCH_BYTES = 96 * 2**20
"""Scores and lists that are held at once, of one slice a stream, take at most 1/5 of the memory of key and value, or 96
MiB."""

BYTES_A_SCORE = 7
"""A score in float16, an entry of int32 in a list, and the counts of classes that order it."""


def slices(
    query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask, segment_len: int, lists: int, heads: Iterable[int]
) -> Iterator[tuple[slice, slice]]:
    """Key/value heads and queries that are ranked at a time, so that scores and lists stay small beside key and value.

    Queries are cut between segments and only under a causal mask: the others' in-segment keys go by the whole call's
    length, and the lists of one head are the least that is held for them.
    """
    n_queries = query.shape[2]
    held = max((key.numel() + value.numel()) * key.element_size() // SCRATCH_SHARE, SCRATCH_BYTES)
    segments = n_segments(n_queries, segment_len)
    together = held // streams.STREAMS // (key.shape[0] * lists * key.shape[2] * BYTES_A_SCORE)  # segments, of any head
    length = n_queries if not mask.causal else max(min(together, segments), 1) * segment_len
    for some in runs(heads, max(together // segments, 1)):
        for first in range(0, n_queries, length):
            yield some, slice(first, min(first + length, n_queries))


def cut(
    query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask, heads: slice, rows: slice
) -> tuple[Tensor, Tensor, Tensor, AttentionMask]:
    """Query, key, value and mask of one slice: the keys that its queries see."""
    some = query[:, query_heads(heads, query.shape[1] // key.shape[1]), rows], key[:, heads], value[:, heads]
    if not mask.causal:
        return *some, mask
    stop = min(max(rows.stop + mask.offset, 1), key.shape[2])
    key_mask = None if mask.key_mask is None else mask.key_mask[:, :stop]
    mask = replace(mask, offset=mask.offset + rows.start, key_mask=key_mask)
    return some[0], some[1][:, :, :stop], some[2][:, :, :stop], mask


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: AttentionMask,
    *,
    scale: float,
    softcap: float | None,
    options: OperatorOptions,
    executor: ModuleType,
    exact: ModuleType,
    dense_heads: Sequence[int] = (),
    wants_lse: bool = True,
) -> Result:
    """Attention over plans, but for heads marked dense; arguments and results as ``definition.attend``.

    Args:
        query: [B, Hq, Nq, D].
        key: [B, Hkv, Nk, D].
        value: [B, Hkv, Nk, Dv].
        mask: The proven mask, without a window.
        scale: Softmax scale.
        softcap: Bound of the logits, None for none.
        options: How to rank, order and stop.
        executor: `torch_forward` or `triton_forward`.
        exact: The same implementation's executor in position order.
        dense_heads: Key/value heads that run densely (``dense_heads.py``), ascending.
        wants_lse: Whether the log-sum-exp is wanted; if not, that of dense heads may be uninitialised.
    """
    group = query.shape[1] // key.shape[1]
    result = empty_result(query, value.shape[3])
    if dense_heads:
        attend_dense(
            query,
            key,
            value,
            mask,
            result,
            dense_heads,
            scale=scale,
            softcap=softcap,
            wants_lse=wants_lse,
            exact=exact,
        )
    planner = Planner(
        query,
        key,
        value,
        mask,
        scale=scale,
        ranking=options.ranking,
        ranking_per=options.ranking_per,
        segment_len=options.segment_len,
        implementation="torch" if executor is torch_forward else "triton",
    )
    tau = options.tau if isinstance(options.tau, float | int) else head_tau.on_device(options.tau, query.device)
    sparse = (head for head in range(key.shape[1]) if head not in dense_heads)
    lists = group // planner.shared
    places = list(slices(query, key, value, mask, planner.segment_len, lists, sparse))
    # Tiles that never stop take as long as hundreds that do: the next slice fills the card beside them.
    with streams.side_by_side(query.device, len(places)) as turn:
        for number, (heads, rows) in enumerate(places):
            with turn(number):
                some_query, some_key, some_value, some_mask = cut(query, key, value, mask, heads, rows)
                plan = planner.plan(some_query, some_key, some_mask, heads, rows.start)
                members, tiles = query_heads(heads, group), slice(rows.start // TILE_LEN, n_tiles(rows.stop))
                executor.attend(
                    some_query,
                    some_key,
                    some_value,
                    some_mask,
                    plan,
                    scale=scale,
                    tau=tau[members] if isinstance(tau, Tensor) else tau,
                    softcap=softcap,
                    into=Result(
                        result.output[:, members, rows],
                        result.lse[:, members, rows],
                        result.computed[:, members, tiles],
                    ),
                )
                del plan  # before the next is made
    return result
