"""Exact attention in C++: every visible key of every query, or of sampled ones, under any mask of a call."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from s2o_compile.kernels.core.call import AttentionCall
from s2o_compile.kernels.core.plan import TILE_LEN
from s2o_compile.kernels.core.result import Result, empty_result
from s2o_compile.kernels.exact.sampled import SAMPLED, ExactRows, sample_rows
from s2o_compile.kernels.impl.cpp.segments import Segments, products_dtype, writable
from s2o_compile.kernels.support.cpp_library import address
from s2o_compile.kernels.support.parallel import for_each


def attend_exact(call: AttentionCall) -> Result:
    """Exact attention over every visible key."""
    result = empty_result(call.query, call.value.shape[3])
    output = writable(result.output, products_dtype(call))
    ranges = call.mask.row_ranges(call.n_queries, call.n_keys, call.query.device)
    _attend(call, None, Result(output, result.lse, result.computed), ranges, TILE_LEN)
    if output is not result.output:
        result.output.copy_(output)
    return result


def attend_rows(call: AttentionCall, count: int = SAMPLED) -> ExactRows:
    """As ``exact.sampled.attend_rows``."""
    rows = sample_rows(call.n_queries, call.query.device, count)
    query = call.query[:, :, rows]
    output = query.new_empty(*query.shape[:3], call.value.shape[3], dtype=torch.float32)
    lse = output.new_empty(output.shape[:3])
    starts, stops = (x[rows] for x in call.mask.row_ranges(call.n_queries, call.n_keys, rows.device))
    computed = query.new_empty(*query.shape[:2], len(rows), dtype=torch.int32)
    _attend(call, query, Result(output, lse, computed), (starts, stops), len(rows))
    return ExactRows(rows, output, lse)


def _attend(
    call: AttentionCall, query: Tensor | None, into: Result, ranges: tuple[Tensor, Tensor], together: int
) -> None:
    """Queries, ``together`` of them at a time, each on the keys of its range; what a key mask hides is left out."""
    segments, group = Segments(call, query, *into), call.group
    # A query that sees no key has a range that is empty, and may lie anywhere.
    starts, stops = (x.clamp(0, call.n_keys).contiguous() for x in ranges)
    stops = torch.maximum(starts, stops)
    tau = call.query.new_zeros(group, dtype=torch.float32)

    def block(place: tuple[int, int, int]) -> None:
        first, b, kv = place
        rows = slice(first, min(first + together, len(starts)))
        seen = starts[rows] < stops[rows]
        own = (int(starts[rows][seen].min()), int(stops[rows][seen].max())) if seen.any() else (0, 0)
        segments.attend(
            b, slice(kv * group, (kv + 1) * group), kv, rows, first // TILE_LEN, tau=address(tau), own_start=own[0],
            own_stop=own[1], **{"from": address(starts, first), "below": address(stops, first)},
        )  # fmt: skip

    last_first = reversed(range(0, len(starts), together))  # the longest rows first
    for_each(block, itertools.product(last_first, range(into.output.shape[0]), range(call.key.shape[1])), starts.device)
