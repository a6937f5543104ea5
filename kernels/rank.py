"""Build the plan of one attention call: rank the keys, order the queries."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from s2o_compile.kernels import ranking_mean_query, ranking_per_query, ranking_sub_mean
from s2o_compile.kernels.mask import AttentionMask
from s2o_compile.kernels.plan import Plan, default_chunk_len, default_segment_len, order_keys
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


def build_plan(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: AttentionMask,
    *,
    scale: float,
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
    scores = score_keys(query, key, mask, scale=scale, segment_len=segment_len)
    key_index, prefix_count = order(scores, key, value, mask, n_queries=n_queries, segment_len=segment_len)
    return Plan(
        segment_len=segment_len,
        chunk_len=default_chunk_len(n_keys),
        key_index=key_index,
        prefix_count=prefix_count,
        query_order=order_queries(query, segment_len) if query_order == "mean_query" else None,
    )
