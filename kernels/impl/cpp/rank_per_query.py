"""Scores of the "per_query" ranking in C++: what ``ranking.per_query`` defines, one segment a thread."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from s2o_compile.kernels.core.call import AttentionCall
from s2o_compile.kernels.core.plan import in_segment_starts_stops
from s2o_compile.kernels.ranking.per_query import FIRST_KEYS, scored_positions
from s2o_compile.kernels.support import cpp_library
from s2o_compile.kernels.support.cpp_library import ALL, address, run, with_unit_stride
from s2o_compile.kernels.support.parallel import for_each

_Ranking = cpp_library.structure(
    "query factor key positions key_mask scores",
    "query_head query_row group heads rows first dim few n_queries n_keys end own_start own_stop stride first_keys "
    "sees",
    "scale sample_weight",
    "half_query halves",
)
"""``struct Ranking`` of rank.cpp."""


def score_keys(
    call: AttentionCall, factor: Tensor, few_key: Tensor, stride: int, segment_len: int, shared: int
) -> Tensor:
    """Importance of every key for every segment; arguments as of ``ranking.per_query.score_keys``."""
    functions = cpp_library.load()
    assert functions is not None
    half_query = call.query.dtype == torch.bfloat16
    query = with_unit_stride(call.query if half_query else call.query.float())
    factor, halves = factor.contiguous(), cpp_library.has_halves()
    batch, heads, n_queries, dim = query.shape
    mask, (kv_heads, n_keys, few) = call.mask, few_key.shape[1:]
    # Tiles of keys end behind the last one.
    key = pad(few_key.bfloat16(), (0, -few % 32, 0, 16)) if halves else pad(few_key, (0, 0, 0, 16))
    rankings = heads // kv_heads // shared  # of each key/value head
    ranges = in_segment_starts_stops(mask, n_queries, n_keys, segment_len, torch.device("cpu"))
    starts, stops = (x.tolist() for x in ranges)
    scores = few_key.new_empty(batch, kv_heads * rankings, len(starts), n_keys, dtype=torch.float32)
    key_mask = None if mask.key_mask is None else with_unit_stride(mask.key_mask)
    positions = scored_positions(call.query, segment_len, shared).contiguous()

    def segment(place: tuple[int, int, int]) -> None:
        b, ranking, s = place
        own = starts[s], stops[s]
        end, kv = own[0] if mask.causal else n_keys, ranking // rankings
        argument = _Ranking(
            query=address(query, b, ranking * shared), factor=address(factor, b, kv), key=address(key, b, kv),
            positions=address(positions), key_mask=address(key_mask, b),
            scores=address(scores, b, ranking, s), query_head=query.stride(1),
            query_row=query.stride(2), group=shared, heads=len(positions), rows=positions.shape[1],
            first=s * segment_len, dim=dim, few=few,
            n_queries=n_queries, n_keys=n_keys, end=end, own_start=own[0], own_stop=own[1], stride=stride,
            first_keys=FIRST_KEYS,
            sees=mask.offset + 1 if mask.causal else ALL, scale=call.scale / math.log(2),
            sample_weight=math.log2(stride), half_query=half_query, halves=halves,
        )  # fmt: skip
        run(functions.s2o_rank, argument)

    last_first = reversed(range(len(starts)))
    for_each(segment, itertools.product(range(batch), range(scores.shape[1]), last_first), query.device)
    return scores
