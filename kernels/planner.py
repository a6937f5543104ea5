"""Plans of attention calls: keys ranked, queries ordered; whole or slice by slice."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from s2o_compile.kernels.core import plan
from s2o_compile.kernels.core.mask import AttentionMask
from s2o_compile.kernels.core.plan import Plan, ScoreKeys, default_chunk_len, default_segment_len, n_segments
from s2o_compile.kernels.ranking import mean_query as ranking_mean_query
from s2o_compile.kernels.ranking import per_query as ranking_per_query
from s2o_compile.kernels.ranking import sub_mean as ranking_sub_mean
from s2o_compile.kernels.ranking import tail, unvisited
from s2o_compile.kernels.ranking.query_order import order_queries

try:
    from s2o_compile.kernels.impl.triton import order as triton_order
    from s2o_compile.kernels.impl.triton import rank_mean_query as triton_mean_query
    from s2o_compile.kernels.impl.triton import rank_per_query as triton_ranking
    from s2o_compile.kernels.impl.triton import tail as triton_tail
    from s2o_compile.kernels.impl.triton import unvisited as triton_unvisited
except ImportError:  # no triton here: Planner is then never asked for it
    triton_mean_query = triton_order = triton_ranking = triton_tail = triton_unvisited = None


def _slice_by_slice(score_keys: Callable[..., Tensor]) -> Callable[..., ScoreKeys]:
    """``prepare`` of a ranking that has nothing to prepare."""

    def prepare(_query: Tensor, _key: Tensor, **given: object) -> ScoreKeys:
        return lambda query, key, mask, _heads: score_keys(query, key, mask, **given)

    return prepare


RANKINGS: dict[str, Callable[..., ScoreKeys]] = {
    "per_query": ranking_per_query.prepare,
    "sub_mean": _slice_by_slice(ranking_sub_mean.score_keys),
    "mean_query": _slice_by_slice(ranking_mean_query.score_keys),
}
TRITON_RANKINGS: dict[str, Callable[..., ScoreKeys]] = {}
if triton_ranking is not None and triton_mean_query is not None:
    TRITON_RANKINGS["per_query"] = triton_ranking.prepare
    TRITON_RANKINGS["mean_query"] = _slice_by_slice(triton_mean_query.score_keys)
QUERY_ORDERS = ("none", "mean_query")
LISTS = ("head", "group")


def tail_values(value: Tensor, mask: AttentionMask, *, n_queries: int, segment_len: int, implementation: str) -> Tensor:
    """``tail.tail_values`` by "triton" or "torch"."""
    sums_by = triton_tail if implementation == "triton" and triton_tail is not None else tail
    return tail.tail_values(value, mask, n_queries=n_queries, segment_len=segment_len, sums_by=sums_by)


def estimate_unvisited(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: AttentionMask,
    plan: Plan,
    *,
    scale: float,
    softcap: float | None = None,
    implementation: str,
) -> Tensor:
    """``unvisited.estimate_unvisited`` by "triton" or "torch"."""
    by = triton_unvisited if implementation == "triton" and triton_unvisited is not None else unvisited
    return by.estimate_unvisited(query, key, value, mask, plan, scale=scale, softcap=softcap)


class Planner:
    """Plans the slices of one call.

    What the whole call decides is made once: no result depends on how a call is cut.

    Args:
        query: [B, Hq, Nq, D].
        key: [B, Hkv, Nk, D].
        value: [B, Hkv, Nk, Dv].
        mask: The proven mask of the whole call, without a window (a window is computed exactly and needs no plan).
        scale: Softmax scale.
        ranking: A key of RANKINGS.
        query_order: One of QUERY_ORDERS.
        list_per: One of LISTS: whether each query head has lists of its own, or the heads of a group share them.
        segment_len: Queries per segment, a multiple of TILE_LEN; None chooses by length.
        implementation: "triton" or "torch": who ranks where both can.
    """

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: AttentionMask,
        *,
        scale: float,
        ranking: str,
        query_order: str,
        list_per: str = "group",
        segment_len: int | None = None,
        implementation: str = "torch",
    ) -> None:
        self.segment_len = segment_len or default_segment_len(query.shape[2])
        self._chunk_len = default_chunk_len(key.shape[2])
        self._query_order = query_order
        prepare, self._order_keys, poisoned = RANKINGS[ranking], plan.order_keys, plan.poisoned_keys
        if implementation == "triton":
            prepare = TRITON_RANKINGS.get(ranking, prepare)
            self._order_keys, poisoned = triton_order.order_keys, triton_order.find_poisoned
        group = query.shape[1] // key.shape[1]
        self.shared = group if list_per == "group" else 1  # query heads that share a list
        self._score_keys = prepare(query, key, scale=scale, segment_len=self.segment_len, shared=self.shared)
        self._poisoned, self._lists = poisoned(key, value), group // self.shared
        self._tail_value = tail_values(
            value, mask, n_queries=query.shape[2], segment_len=self.segment_len, implementation=implementation
        )

    def plan(
        self, query: Tensor, key: Tensor, mask: AttentionMask, heads: slice = slice(None), first_query: int = 0
    ) -> Plan:
        """Plan of some key/value heads, some queries and the keys that these see (``slices.cut``).

        Args:
            query: [B, h, n, D], queries from the start of a segment on.
            key: [B, h_kv, n_k, D], the first n_k keys.
            mask: The mask of these.
            heads: Which key/value heads of the call these are.
            first_query: Which query of the call is the first of these.
        """
        n_queries, n_keys = query.shape[2], key.shape[2]
        first = first_query // self.segment_len
        scores = self._score_keys(query, key, mask, heads)
        poisoned = self._poisoned[:, heads, :n_keys]
        poisoned = poisoned.repeat_interleave(self._lists, 1) if self._lists > 1 else poisoned
        key_index, prefix_count = self._order_keys(
            scores, poisoned, mask, n_queries=n_queries, segment_len=self.segment_len
        )
        return Plan(
            segment_len=self.segment_len,
            chunk_len=self._chunk_len,
            key_index=key_index,
            prefix_count=prefix_count,
            query_order=order_queries(query, self.segment_len) if self._query_order == "mean_query" else None,
            tail_value=self._tail_value[:, heads, first : first + n_segments(n_queries, self.segment_len)],
        )


def build_plan(query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask, **options: object) -> Plan:
    """Plan of a whole call; options as those of ``Planner``."""
    return Planner(query, key, value, mask, **options).plan(query, key, mask)  # pyright: ignore[reportArgumentType]
