"""``plan.order_keys`` in C++: the same order, by two passes of counting, one segment a thread."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from s2o_compile.kernels.core.mask import AttentionMask
from s2o_compile.kernels.core.plan import in_segment_starts_stops, longest_prefix
from s2o_compile.kernels.support import cpp_library
from s2o_compile.kernels.support.cpp_library import address, run, with_unit_stride
from s2o_compile.kernels.support.parallel import for_each

_Order = cpp_library.structure(
    "scores non_finite key_mask index count",
    "score_head non_finite_head index_head rankings end own_start own_stop",
    "",
)
"""``struct Order`` of order.cpp."""


def order_keys(
    scores: Tensor, non_finite: Tensor, mask: AttentionMask, *, n_queries: int, segment_len: int
) -> tuple[Tensor, Tensor]:
    """As ``core.plan.order_keys``; entries of ``key_index`` that do not count are not written."""
    functions = cpp_library.load()
    assert functions is not None
    scores, non_finite = with_unit_stride(scores.float()), with_unit_stride(non_finite)
    batch, rankings, segments, n_keys = scores.shape
    ranges = in_segment_starts_stops(mask, n_queries, n_keys, segment_len, torch.device("cpu"))
    starts, stops = (x.tolist() for x in ranges)
    key_mask = None if mask.key_mask is None else with_unit_stride(mask.key_mask)
    longest = longest_prefix(mask, n_queries, n_keys, segment_len)
    key_index = scores.new_empty(batch, rankings, segments, longest, dtype=torch.int32)
    prefix_count = key_index.new_empty(batch, segments)

    def segment(place: tuple[int, int]) -> None:
        b, s = place
        argument = _Order(
            scores=address(scores, b, 0, s), non_finite=address(non_finite, b), key_mask=address(key_mask, b),
            index=address(key_index, b, 0, s), count=address(prefix_count, b, s), score_head=scores.stride(1),
            non_finite_head=non_finite.stride(1), index_head=key_index.stride(1), rankings=rankings,
            end=starts[s] if mask.causal else n_keys, own_start=starts[s], own_stop=stops[s],
        )  # fmt: skip
        run(functions.s2o_order, argument)

    for_each(segment, itertools.product(range(batch), reversed(range(segments))), scores.device)
    return key_index, prefix_count
