"""S2O forward in C++, for CPUs, one segment of the heads that share its ranking a call.

``forward.cpp`` beside it does what ``impl.torch.forward`` does. Sums are made in another order, so a tile at the edge
of the stop rule may end a chunk elsewhere.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from s2o_compile.kernels.core.call import AttentionCall
from s2o_compile.kernels.core.plan import TILE_LEN, Plan
from s2o_compile.kernels.core.result import Progress, Result, empty_result
from s2o_compile.kernels.impl.cpp.segments import Segments, products_dtype, writable
from s2o_compile.kernels.support.cpp_library import ALL, address
from s2o_compile.kernels.support.parallel import for_each


def attend(
    call: AttentionCall, plan: Plan, tau: float | Tensor, into: Result | None = None, progress: Progress | None = None
) -> Result:
    """Attention of a call without a window over its plan; arguments as of ``impl.torch.forward.attend``."""
    result = empty_result(call.query, call.value.shape[3]) if into is None else into
    _run(call, plan, tau, result, progress, resume=False)
    return result


def going_on(call: AttentionCall, plan: Plan, tau: Tensor, into: Result, progress: Progress) -> Callable[[], None]:
    """What lets tiles go on each time it is called; arguments as of ``impl.torch.forward.going_on``."""

    def go_on() -> None:
        if not (progress.unvisited < tau[..., None]).all():
            _run(call, plan, tau, into, progress, resume=True)

    return go_on


def _run(
    call: AttentionCall, plan: Plan, tau: float | Tensor, into: Result, progress: Progress | None, *, resume: bool
) -> None:
    """Every segment, one a thread."""
    batch, heads, n_queries, _ = call.query.shape
    taus = torch.as_tensor(tau, dtype=torch.float32, device=call.query.device).expand(batch, heads).contiguous()
    mask, index, counts = call.mask, plan.key_index.contiguous(), plan.prefix_count.tolist()
    assert plan.tail_value is not None
    means, rankings = plan.tail_value.contiguous(), index.shape[1]
    group, kv_heads = heads // rankings, call.key.shape[1]
    output = writable(into.output, products_dtype(call))
    segments = Segments(call, None, output, into.lse, into.computed)
    alike = {"chunk_len": plan.chunk_len, "resume": resume}
    tail, unvisited = (None, None) if progress is None else progress
    if tail is not None and unvisited is not None:
        alike |= {"tail_head": tail.stride(1), "tail_row": tail.stride(2), "unvisited_head": unvisited.stride(1)}

    def segment(place: tuple[int, int, int]) -> None:
        b, ranking, number = place
        first, head, kv = number * plan.segment_len, ranking * group, ranking * kv_heads // rankings
        end, tile = min(first + plan.segment_len, n_queries), first // TILE_LEN
        own_start, own_stop = mask.in_segment_range(first, end - 1, n_queries, call.n_keys)
        segments.attend(
            b, slice(head, head + group), kv, slice(first, end), tile,
            mean_value=address(means, b, kv, number), tau=address(taus, b, head), count=counts[b][number],
            index=address(index, b, ranking, number), tail=address(tail, b, head, first),
            unvisited=address(unvisited, b, head, tile), own_start=own_start, own_stop=own_stop,
            sees=first + mask.offset + 1 if mask.causal else ALL, **alike,
        )  # fmt: skip

    last_first = reversed(range(plan.n_segments))  # those with the most ranked keys first
    for_each(segment, itertools.product(range(batch), range(rankings), last_first), call.query.device)
    if output is not into.output:
        into.output.copy_(output)
