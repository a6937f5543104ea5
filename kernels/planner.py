"""Plans of attention calls: keys ranked, queries ordered; whole or slice by slice."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from s2o_compile.kernels.core import plan
from s2o_compile.kernels.core.mask import AttentionMask
from s2o_compile.kernels.core.plan import Plan, ScoreKeys, default_chunk_len, default_segment_len, n_segments
from s2o_compile.kernels.ranking import mean_query as ranking_mean_query
from s2o_compile.kernels.ranking import per_query as ranking_per_query
from s2o_compile.kernels.ranking import tail, unvisited

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


_PREPARE: dict[str, Callable[..., ScoreKeys]] = {
    "per_query": ranking_per_query.prepare,
    "mean_query": _slice_by_slice(ranking_mean_query.score_keys),
}
_PREPARE_BY_TRITON: dict[str, Callable[..., ScoreKeys]] = {}
if triton_ranking is not None and triton_mean_query is not None:
    _PREPARE_BY_TRITON["per_query"] = triton_ranking.prepare
    _PREPARE_BY_TRITON["mean_query"] = _slice_by_slice(triton_mean_query.score_keys)


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
        ranking: One of RANKINGS.
        ranking_per: One of RANKING_PER: a ranking for each query head, or one for all heads of a group.
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
        ranking_per: str = "group",
        segment_len: int | None = None,
        implementation: str = "torch",
    ) -> None:
        self.segment_len = segment_len or default_segment_len(query.shape[2])
        self._chunk_len = default_chunk_len(key.shape[2])
        prepare, self._order_keys, non_finite = _PREPARE[ranking], plan.order_keys, plan.non_finite_keys
        if implementation == "triton":
            prepare = _PREPARE_BY_TRITON.get(ranking, prepare)
            self._order_keys, non_finite = triton_order.order_keys, triton_order.find_non_finite
        group = query.shape[1] // key.shape[1]
        self.shared = group if ranking_per == "group" else 1  # query heads that share a list
        self._score_keys = prepare(query, key, scale=scale, segment_len=self.segment_len, shared=self.shared)
        self._non_finite, self._lists = non_finite(key, value), group // self.shared
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
        non_finite = self._non_finite[:, heads, :n_keys]
        non_finite = non_finite.repeat_interleave(self._lists, 1) if self._lists > 1 else non_finite
        key_index, prefix_count = self._order_keys(
            scores, non_finite, mask, n_queries=n_queries, segment_len=self.segment_len
        )
        return Plan(
            segment_len=self.segment_len,
            chunk_len=self._chunk_len,
            key_index=key_index,
            prefix_count=prefix_count,
            tail_value=self._tail_value[:, heads, first : first + n_segments(n_queries, self.segment_len)],
        )


def build_plan(query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask, **options: object) -> Plan:
    """Plan of a whole call; options as those of ``Planner``."""
    return Planner(query, key, value, mask, **options).plan(query, key, mask)  # pyright: ignore[reportArgumentType]
