"""S2O forward in C++, for CPUs, one segment of the heads that share its ranking a call.

Products are those of float32, or of bfloat16 where the CPU multiplies it in tiles (AMX). ``forward.cpp`` beside it does
what ``impl.torch.forward`` does. Sums are made in another order, so a tile at the edge
of the stop rule may end a chunk elsewhere.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from s2o_compile.kernels.core.call import AttentionCall
from s2o_compile.kernels.core.plan import TILE_LEN, Plan
from s2o_compile.kernels.core.result import Progress, Result, empty_result
from s2o_compile.kernels.impl.cpp import library
from s2o_compile.kernels.impl.cpp.library import ALL, address, with_unit_stride
from s2o_compile.kernels.support.parallel import for_each

_Segment = library.structure(
    "query key value mean_value tau key_mask index output lse tail unvisited computed",
    "query_head query_row key_row value_row output_head output_row lse_head lse_row tail_head tail_row "
    "unvisited_head computed_head group rows dim value_dim count chunk_len own_start own_stop sees",
    "scale softcap",
    "resume",
)
"""``struct Segment`` of forward.cpp."""


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
    functions = library.load()
    assert functions is not None
    halves = call.query.dtype == torch.bfloat16 and functions.s2o_has_halves()
    attend_segment, dtype = (
        (functions.s2o_attend_halves, torch.bfloat16) if halves else (functions.s2o_attend, torch.float32)
    )
    query, key, value = (with_unit_stride(x.to(dtype)) for x in call.tensors)
    batch, heads, n_queries, dim = query.shape
    kv_heads, n_keys, value_dim = value.shape[1:]
    taus = torch.as_tensor(tau, dtype=torch.float32).expand(batch, heads).contiguous()
    mask, index, counts = call.mask, plan.key_index.contiguous(), plan.prefix_count.tolist()
    assert plan.tail_value is not None
    means = plan.tail_value.contiguous()
    key_mask = None if mask.key_mask is None else with_unit_stride(mask.key_mask)
    writes = into.output.dtype == dtype and into.output.stride(3) == 1
    output = into.output if writes else into.output.to(dtype).contiguous()
    tail, unvisited = (None, None) if progress is None else progress
    rankings = index.shape[1]
    group = heads // rankings
    steps = {
        "query_head": query.stride(1), "query_row": query.stride(2), "key_row": key.stride(2),
        "value_row": value.stride(2), "output_head": output.stride(1), "output_row": output.stride(2),
        "lse_head": into.lse.stride(1), "lse_row": into.lse.stride(2), "computed_head": into.computed.stride(1),
    }  # fmt: skip
    if tail is not None and unvisited is not None:
        steps |= {"tail_head": tail.stride(1), "tail_row": tail.stride(2), "unvisited_head": unvisited.stride(1)}
    steps |= {"group": group, "dim": dim, "value_dim": value_dim, "chunk_len": plan.chunk_len}

    def segment(place: tuple[int, int, int]) -> None:
        b, ranking, number = place
        first, head, kv = number * plan.segment_len, ranking * group, ranking * kv_heads // rankings
        end, tile = min(first + plan.segment_len, n_queries), first // TILE_LEN
        own_start, own_stop = mask.in_segment_range(first, end - 1, n_queries, n_keys)
        argument = _Segment(
            query=address(query, b, head, first), key=address(key, b, kv), value=address(value, b, kv),
            mean_value=address(means, b, kv, number), tau=address(taus, b, head), key_mask=address(key_mask, b),
            index=address(index, b, ranking, number), output=address(output, b, head, first),
            lse=address(into.lse, b, head, first), tail=address(tail, b, head, first),
            unvisited=address(unvisited, b, head, tile), computed=address(into.computed, b, head, tile),
            rows=end - first, count=counts[b][number], own_start=own_start, own_stop=own_stop,
            sees=first + mask.offset + 1 if mask.causal else ALL, scale=call.scale, softcap=call.softcap or 0.0,
            resume=resume, **steps,
        )  # fmt: skip
        attend_segment(ctypes.byref(argument))

    last_first = reversed(range(plan.n_segments))  # those with the most ranked keys first
    for_each(segment, itertools.product(range(batch), range(rankings), last_first), query.device)
    if not writes:
        into.output.copy_(output)
