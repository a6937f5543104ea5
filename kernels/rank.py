"""Build the plan of one attention call: rank the keys, order the queries."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from s2o_compile.kernels import ranking_mean_query, ranking_per_query, ranking_sub_mean
from s2o_compile.kernels.mask import AttentionMask
from s2o_compile.kernels.plan import Plan, default_chunk_len, default_segment_len, n_segments, order_keys
from s2o_compile.kernels.query_order import order_queries

try:
    from s2o_compile.kernels import triton_mean_query, triton_order, triton_ranking
except ImportError:  # no triton here: build_plan is then never asked for it
    triton_mean_query = triton_order = triton_ranking = None

RANKINGS: dict[str, Callable[..., Tensor]] = {
    "per_query": ranking_per_query.score_keys,
    "sub_mean": ranking_sub_mean.score_keys,
    "mean_query": ranking_mean_query.score_keys,
}
QUERY_ORDERS = ("none", "mean_query")

SCRATCH_SHARE = 8
SCRATCH_BYTES = 64 * 2**20
"""Scores that are held at once take at most 1/8 of the memory of key and value, or 64 MiB, or those of one head."""


def heads_together(key: Tensor, value: Tensor, segments: int) -> int:
    """Key/value heads that are ranked at a time, so that their scores stay small beside key and value."""
    held = max((key.numel() + value.numel()) * key.element_size() // SCRATCH_SHARE, SCRATCH_BYTES)
    of_one_head = key.shape[0] * segments * key.shape[2] * 2
    return max(1, min(key.shape[1], held // of_one_head))


def build_plan(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: AttentionMask,
    *,
    scale: float,
    tau: float,
    ranking: str,
    query_order: str,
    segment_len: int | None = None,
    implementation: str = "torch",
) -> Plan:
    """Plan of one attention call.

    Args:
        query: [B, Hq, Nq, D].
        key: [B, Hkv, Nk, D].
        value: [B, Hkv, Nk, Dv].
        mask: The proven mask, without a window (a window is computed exactly and needs no plan).
        scale: Softmax scale.
        tau: Stop threshold, 0 for never.
        ranking: A key of RANKINGS.
        query_order: One of QUERY_ORDERS.
        segment_len: Queries per segment, a multiple of TILE_LEN; None chooses by length.
        implementation: "triton" or "torch": who scores the keys where both can.
    """
    n_queries, n_keys = query.shape[2], key.shape[2]
    segment_len = segment_len or default_segment_len(n_queries)
    score_keys, order = RANKINGS[ranking], order_keys
    if implementation == "triton":
        order = triton_order.order_keys
        written = {"per_query": triton_ranking, "mean_query": triton_mean_query}
        score_keys = written[ranking].score_keys if ranking in written else score_keys
    kv_heads, group = key.shape[1], query.shape[1] // key.shape[1]
    together = heads_together(key, value, n_segments(n_queries, segment_len))
    parts = []
    for first in range(0, kv_heads, together):
        heads = slice(first, first + together)
        some_queries = query[:, first * group : (first + together) * group]
        scores = score_keys(some_queries, key[:, heads], mask, scale=scale, segment_len=segment_len)
        parts.append(
            order(scores, key[:, heads], value[:, heads], mask, n_queries=n_queries, segment_len=segment_len, tau=tau)
        )
        del scores  # before the next are made
    key_index, key_count, prefix_count = zip(*parts, strict=True)
    return Plan(
        segment_len=segment_len,
        chunk_len=default_chunk_len(n_keys),
        key_index=key_index[0] if len(parts) == 1 else torch.cat(key_index, 1),
        key_count=key_count[0] if len(parts) == 1 else torch.cat(key_count, 1),
        prefix_count=prefix_count[0],
        query_order=order_queries(query, segment_len) if query_order == "mean_query" else None,
    )
