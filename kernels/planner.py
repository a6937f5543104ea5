"""Plans attention calls, whole or slice by slice, and chooses the functions that score and order keys."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from s2o_compile.kernels.core import plan
from s2o_compile.kernels.core.call import AttentionCall
from s2o_compile.kernels.core.options import OperatorOptions
from s2o_compile.kernels.core.plan import Plan, ScoreKeys, default_chunk_len, default_segment_len, n_segments
from s2o_compile.kernels.impl.cpp import order as cpp_order
from s2o_compile.kernels.impl.cpp import rank_per_query as cpp_per_query
from s2o_compile.kernels.ranking import mean_query, per_query, tail, unvisited
from s2o_compile.kernels.ranking.basis import Basis, FewKeys

try:
    from s2o_compile.kernels.impl.triton import order as triton_order
    from s2o_compile.kernels.impl.triton import rank_mean_query as triton_mean_query
    from s2o_compile.kernels.impl.triton import rank_per_query as triton_per_query
    from s2o_compile.kernels.impl.triton import tail as triton_tail
    from s2o_compile.kernels.impl.triton import unvisited as triton_unvisited
except ImportError:  # no triton here: Planner is then never asked for it
    triton_mean_query = triton_order = triton_per_query = triton_tail = triton_unvisited = None


def _slice_by_slice(score_keys: Callable[[AttentionCall, int, int], Tensor]) -> Callable[..., ScoreKeys]:
    """``prepare`` of a ranking that has nothing to prepare."""

    def prepare(_call: AttentionCall, segment_len: int, shared: int, _made: FewKeys | None = None) -> ScoreKeys:
        return lambda part, _heads: score_keys(part, segment_len, shared)

    return prepare


PREPARE: dict[str, Callable[[AttentionCall, int, int, FewKeys | None], ScoreKeys]] = {
    "per_query": per_query.prepare,
    "mean_query": _slice_by_slice(mean_query.score_keys),
}
PREPARE_BY_CPP = {**PREPARE, "per_query": partial(per_query.prepare, score=cpp_per_query.score_keys)}
PREPARE_BY_TRITON = dict(PREPARE)
if triton_per_query is not None and triton_mean_query is not None:
    PREPARE_BY_TRITON["per_query"] = triton_per_query.prepare
    PREPARE_BY_TRITON["mean_query"] = _slice_by_slice(triton_mean_query.score_keys)


def tail_values(call: AttentionCall, segment_len: int, implementation: str) -> Tensor:
    """``tail.tail_values`` by "triton", or by torch for all others."""
    by_triton = implementation == "triton" and triton_tail is not None
    return (triton_tail if by_triton else tail).tail_values(call, segment_len)  # pyright: ignore[reportOptionalMemberAccess]


def estimate_unvisited(call: AttentionCall, plan: Plan, implementation: str) -> Tensor:
    """``unvisited.estimate_unvisited`` by "triton", or by torch for all others."""
    by_triton = implementation == "triton" and triton_unvisited is not None
    return (triton_unvisited if by_triton else unvisited).estimate_unvisited(call, plan)  # pyright: ignore


def _non_finite_keys(key: Tensor, value: Tensor, _pages: None, first: int) -> Tensor:
    return plan.non_finite_keys(key[:, :, first:], value[:, :, first:])


def _kept_flags(call: AttentionCall, find: Callable[..., Tensor]) -> Tensor:
    """Which keys are not finite, bool [B, Hkv, Nk]; of keys of earlier chunks of a prefill that is known."""
    if call.lengths is not None:
        return find(call.key, call.value, call.pages, 0, call.sizes.n_keys)
    if call.kept is None:
        return find(call.key, call.value, call.pages, 0)
    first = call.kept.known("non-finite keys", call.earlier_keys)
    return call.kept.extend("non-finite keys", call.n_keys, first, find(call.key, call.value, call.pages, first))


class KnownKeys(NamedTuple):
    """What a `Planner` finds out about all keys of a call, each key by itself, if that was done before.

    Attributes:
        few: What "per_query" compares; None for other rankings.
        non_finite: bool [B, Hkv, Nk], keys that are not finite.
        tail_value: float32 [B, Hkv, P, Dv], mean values of prefixes.
    """

    few: FewKeys | None
    non_finite: Tensor
    tail_value: Tensor

    def of_heads(self, heads: slice) -> KnownKeys:
        """Of some key/value heads."""
        few = None if self.few is None else self.few.of_heads(heads)
        return KnownKeys(few, self.non_finite[:, heads], self.tail_value[:, heads])


class KeyShard:
    """What `KnownKeys` are made of, for some keys of a call, by "triton", or by torch for all others.

    Every number is made of one key, or of one block of keys, so shards of keys give those of the whole call.
    """

    def __init__(self, options: OperatorOptions, implementation: str) -> None:
        by_triton = implementation == "triton"
        self.compares_few = options.ranking == "per_query"
        self._ranking: ModuleType = triton_per_query if by_triton else per_query  # pyright: ignore
        self._tail: ModuleType = triton_tail if by_triton else tail  # pyright: ignore
        self._non_finite = triton_order.find_non_finite if by_triton else plan.non_finite_keys  # pyright: ignore

    def basis(self, samples: AttentionCall) -> Basis:
        """The basis of a call whose every few queries and keys these are (``ranking.basis.dim_stride``)."""
        return self._ranking.basis_of_samples(samples)

    def few_keys(self, shard: AttentionCall, basis: Basis) -> Tensor:
        """The keys in few dimensions, [B, Hkv, n, R]."""
        return self._ranking.few_keys_of(shard, basis)

    def non_finite(self, shard: AttentionCall) -> Tensor:
        """Which keys are not finite, bool [B, Hkv, n]."""
        return self._non_finite(shard.key, shard.value)

    def value_sums(self, shard: AttentionCall, block_len: int) -> tuple[Tensor, ...]:
        """Sums over blocks of keys, float32 [B, Hkv, blocks, ..]; the shard holds whole blocks."""
        return self._tail.sums_of(shard, block_len)

    def tail_values(self, whole: AttentionCall, segment_len: int, sums: tuple[Tensor, ...]) -> Tensor:
        """Mean values of prefixes from the sums of all blocks; of the call's tensors only sizes are looked at."""
        return self._tail.means_of(whole, segment_len, *sums)


class Planner:
    """Plans the slices of one call, which has no window, by "triton", "cpp" or "torch".

    The decisions of the whole call are made once: no result depends on how a call is cut. With ``known`` keys only the
    sizes of the call's tensors are looked at.
    """

    def __init__(
        self,
        call: AttentionCall,
        options: OperatorOptions,
        implementation: str = "torch",
        known: KnownKeys | None = None,
    ) -> None:
        self.segment_len = options.segment_len or default_segment_len(max(call.n_queries, call.n_keys))
        self._chunk_len = default_chunk_len(call.n_keys)
        prepare, self._order_keys, non_finite = PREPARE, plan.order_keys, _non_finite_keys
        if implementation == "triton":
            assert triton_order is not None
            prepare, self._order_keys = PREPARE_BY_TRITON, triton_order.order_keys
            non_finite = triton_order.find_non_finite
        elif implementation == "cpp":
            prepare, self._order_keys = PREPARE_BY_CPP, cpp_order.order_keys
        self.shared = call.group if options.ranking_per == "group" else 1  # query heads that share a ranking
        if call.kept is not None:
            shapes = call.query.shape[1], *call.key.shape[1::2], call.value.shape[3]
            how = implementation, self.shared, options.ranking, call.mask.causal, call.scale
            call.kept.check((*shapes, call.key.dtype, call.key.device, *how))
        self._score_keys = prepare[options.ranking](
            call, self.segment_len, self.shared, None if known is None else known.few
        )
        self._rankings = call.group // self.shared
        self._non_finite = _kept_flags(call, non_finite) if known is None else known.non_finite
        self._tail_value = tail_values(call, self.segment_len, implementation) if known is None else known.tail_value

    def plan(self, part: AttentionCall, heads: slice = slice(None), first_query: int = 0) -> Plan:
        """Plan of some key/value heads, some queries and the keys that these see (``schedule.cut``).

        The queries of the part begin at ``first_query`` of the call, where a segment does.
        """
        first = first_query // self.segment_len
        scores = self._score_keys(part, heads)
        non_finite = self._non_finite[:, heads, : part.n_keys]
        non_finite = non_finite.repeat_interleave(self._rankings, 1) if self._rankings > 1 else non_finite
        more: dict[str, Any] = {} if part.pages is None else {"pages": part.pages}
        if part.lengths is not None:
            more["sizes"] = part.sizes
        key_index, prefix_count = self._order_keys(
            scores, non_finite, part.mask, n_queries=part.n_queries, segment_len=self.segment_len, **more
        )
        return Plan(
            segment_len=self.segment_len,
            chunk_len=self._chunk_len,
            key_index=key_index,
            prefix_count=prefix_count,
            tail_value=self._tail_value[:, heads, first : first + n_segments(part.n_queries, self.segment_len)],
        )


def build_plan(call: AttentionCall, options: OperatorOptions, implementation: str = "torch") -> Plan:
    """Plan of a whole call; arguments as `Planner`."""
    return Planner(call, options, implementation).plan(call)


def plan_visits(call: AttentionCall, options: OperatorOptions) -> tuple[Plan, Tensor]:
    """The plan of a call and int32 [B, Hq, P], how many blocks of each ranking its tau visits: for FlexAttention.

    Scores and indices are held for the whole call: 7 bytes a key, key/value head and segment.
    """
    implementation = "triton" if call.query.is_cuda else "torch"
    made = build_plan(call, options, implementation)
    unvisited_mass = estimate_unvisited(call, made, implementation)
    visits = unvisited.blocks_to_visit(unvisited_mass, options.tau_on(call.query.device))
    if call.dense_heads:
        marked = [head // call.group in call.dense_heads for head in range(call.query.shape[1])]
        marked = torch.tensor(marked, device=call.query.device)[:, None]
        visits = torch.where(marked, torch.iinfo(torch.int32).max // unvisited.BLOCK_LEN, visits)
    return made, visits
