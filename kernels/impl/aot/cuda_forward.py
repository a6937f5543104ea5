"""The Triton kernels of the operator in functions that can be traced: launches are recorded, lengths are symbolic.

The launchers are those of the operator. The longest length decides the lengths of segments and chunks, and how many
key/value heads are ranked at a time. The host does not wait for the device, and nothing is tuned.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from s2o_compile.kernels.core.call import AttentionCall
from s2o_compile.kernels.core.plan import (
    BYTES_A_SCORE,
    SCRATCH_BYTES,
    SCRATCH_SHARE,
    Plan,
    default_chunk_len,
    n_segments,
)
from s2o_compile.kernels.core.result import empty_result
from s2o_compile.kernels.exact.dense_heads import query_heads, runs
from s2o_compile.kernels.impl.aot.sizes import longest
from s2o_compile.kernels.impl.triton import forward as triton_forward
from s2o_compile.kernels.impl.triton import order as triton_order
from s2o_compile.kernels.impl.triton import rank_per_query as triton_ranking
from s2o_compile.kernels.impl.triton import tail as triton_tail
from s2o_compile.kernels.impl.triton.exact import launch_exact
from s2o_compile.kernels.impl.triton.tile import tracing, value_parts
from s2o_compile.kernels.support.torch_compat import dispatch_functionalize

LAYOUT = "BHND"
"""Layout of results: a symbolic query has no known one."""


def attend(call: AttentionCall, taus: Sequence[float], segment_len: int) -> tuple[Tensor, Tensor]:
    """Attention by ranked keys and early stop; arguments and results as ``cpu_forward.attend``."""
    return _recorded(lambda call: _attend(call, taus, segment_len), call)


def _attend(call: AttentionCall, taus: Sequence[float], segment_len: int) -> tuple[Tensor, Tensor]:
    query, key, value = call.tensors
    tau = taus[0]
    if len(set(taus)) > 1:
        tau = torch.cat([torch.full((1,), tau, dtype=torch.float32, device=query.device) for tau in taus])
    results = []
    score_keys = triton_ranking.prepare(call, segment_len, call.group)
    tail_value = triton_tail.tail_values(call, segment_len)
    non_finite = triton_order.find_non_finite(key, value)
    for heads in runs(range(key.shape[1]), _heads_at_once(key, value, call.n_queries, segment_len)):
        members = query_heads(heads, call.group)
        part = call.over(query[:, members], key[:, heads], value[:, heads])
        key_index, prefix_count = triton_order.order_keys(
            score_keys(part, heads), non_finite[:, heads], call.mask, n_queries=call.n_queries, segment_len=segment_len
        )
        plan = Plan(
            segment_len=segment_len,
            chunk_len=default_chunk_len(longest(call.n_keys)),
            key_index=key_index,
            prefix_count=prefix_count,
            tail_value=tail_value[:, heads],
        )
        limit = tau[members] if isinstance(tau, Tensor) else tau
        results.append(triton_forward.attend(part, plan, limit, empty_result(part.query, value.shape[3], LAYOUT)))
    return torch.cat([part.output for part in results], 1), torch.cat([part.lse for part in results], 1)


def attend_exact(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Exact attention in position order; results as ``cpu_forward.attend``."""

    def run(call: AttentionCall) -> tuple[Tensor, Tensor]:
        result = empty_result(call.query, call.value.shape[3], LAYOUT)
        for part, into in value_parts(call.value, result):
            launch_exact(call, part, into)
        return result.output, result.lse

    return _recorded(run, call)


def _recorded(run: Callable[[AttentionCall], tuple[Tensor, Tensor]], call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Trace launches as functions of the tensors they read: one that writes to memory looks dead when traced again."""

    def functional(query: Tensor, key: Tensor, value: Tensor, *key_mask: Tensor) -> tuple[Tensor, Tensor]:
        return run(call.over(query, key, value, replace(call.mask, key_mask=key_mask[0] if key_mask else None)))

    recording = tracing.set(True)
    try:
        key_mask = () if call.mask.key_mask is None else (call.mask.key_mask,)
        return dispatch_functionalize(functional)(*call.tensors, *key_mask)
    finally:
        tracing.reset(recording)


def _heads_at_once(key: Tensor, value: Tensor, n_queries: int, segment_len: int) -> int:
    """Key/value heads that are ranked at a time, so that scores and indices stay small beside key and value."""
    batch, kv_heads, n_keys = (longest(size) for size in key.shape[:3])
    scratch = batch * kv_heads * n_keys * (key.shape[3] + value.shape[3]) * key.element_size() // SCRATCH_SHARE
    ranking_bytes = batch * n_segments(longest(n_queries), segment_len) * n_keys * BYTES_A_SCORE
    return max(max(scratch, SCRATCH_BYTES) // ranking_bytes, 1)
