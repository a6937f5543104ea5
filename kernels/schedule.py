"""Runs S2O in slices of heads and segments, so that scores and indices never exist for the whole call.

Scores and indices grow with segments times keys. For the whole call they would take as much memory as key and value. A
slice has as many heads, or segments of one head, as keep the card busy. Cuts change no bit of the result. Two slices
are under way at a time on a GPU: the last, longest tiles of one run beside the next slice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

from torch import Tensor

from s2o_compile.kernels import prepared
from s2o_compile.kernels.budget import Sampler, attend_within, first_tau, lowering
from s2o_compile.kernels.core.call import AttentionCall
from s2o_compile.kernels.core.options import OperatorOptions
from s2o_compile.kernels.core.plan import (
    BYTES_A_SCORE,
    SCRATCH_BYTES,
    SCRATCH_SHARE,
    TILE_LEN,
    Plan,
    n_segments,
    n_tiles,
)
from s2o_compile.kernels.core.result import Result, empty_result, empty_state
from s2o_compile.kernels.exact import sampled
from s2o_compile.kernels.exact.dense_heads import attend_dense, query_heads, runs
from s2o_compile.kernels.impl.torch import forward as torch_forward
from s2o_compile.kernels.planner import Planner
from s2o_compile.kernels.streams import STREAMS, side_by_side

SAMPLERS = {"torch": Sampler(sampled.attend_rows, sampled.error_sums, first_tau, lowering)}
"""What measures an error, by implementation."""

try:
    from s2o_compile.kernels.impl.triton import forward as triton_forward
    from s2o_compile.kernels.impl.triton import sampled as triton_sampled

    SAMPLERS["triton"] = Sampler(
        triton_sampled.attend_rows, triton_sampled.error_sums, triton_sampled.first_tau, triton_sampled.lowering
    )
except ImportError:  # no triton here: it is then never asked for
    triton_forward = None


def attend(
    call: AttentionCall,
    options: OperatorOptions,
    implementation: str,
    exact: Callable[[AttentionCall], Result],
    output: Tensor | None = None,
    planner: Planner | None = None,
    first_query: int = 0,
) -> Result:
    """Attention over plans by "triton" or "torch", except for heads marked dense, which run by ``exact``.

    The mask has no window. ``exact`` is the same implementation's executor over every visible key. ``output``, [B, Hq,
    Nq, Dv] with a unit last stride, is where the output goes; None for a new one. ``planner`` is that of a longer call
    over the same keys, whose queries from ``first_query`` on these are; None for this call's own.
    """
    result = empty_result(call.query, call.value.shape[3]) if output is None else empty_state(call.query, output)
    if call.dense_heads:
        attend_dense(call, result, exact)
    tau = options.tau_on(call.query.device)
    if planner is not None or implementation != "triton" or not prepared.attend(call, options, tau, result, _attend):
        planner = planner or Planner(call, options, implementation)
        _attend(call, options, implementation, tau, result, planner, first_query)
    return result


def _attend(
    call: AttentionCall, options: OperatorOptions, implementation: str, tau: float | Tensor, result: Result,
    planner: Planner, first_query: int = 0,
) -> None:  # fmt: skip
    """Attention of the heads that are not marked dense, slice by slice."""
    sparse = (head for head in range(call.key.shape[1]) if head not in call.dense_heads)
    parts = list(slices(call, planner.segment_len, call.group // planner.shared, sparse))
    # Tiles that never stop take as long as hundreds that do: the next slice fills the card beside them.
    with side_by_side(call.query.device, len(parts)) as turn:
        for number, (heads, rows) in enumerate(parts):
            with turn(number):
                part = cut(call, heads, rows)
                plan = planner.plan(part, heads, first_query + rows.start)
                members, tiles = query_heads(heads, call.group), slice(rows.start // TILE_LEN, n_tiles(rows.stop))
                into = Result(
                    result.output[:, members, rows], result.lse[:, members, rows], result.computed[:, members, tiles]
                )
                part = part if part.sinks is None else part.but(sinks=part.sinks[members])
                limit = tau[members] if isinstance(tau, Tensor) else tau
                attend_planned(part, plan, limit, options.error, implementation, into)
                del plan  # before the next is made


def attend_planned(
    call: AttentionCall, plan: Plan, tau: float | Tensor, error: float | None, implementation: str, into: Result
) -> None:
    """Attention over a plan by "torch" or "triton", within an error budget if there is one."""
    executor = triton_forward if implementation == "triton" else torch_forward
    assert executor is not None
    if error:
        attend_within(call, plan, tau, error, executor, SAMPLERS[implementation], into)
    else:
        executor.attend(call, plan, tau, into)


def measure_error(call: AttentionCall, result: Result, implementation: str) -> Tensor:
    """The sums of ``sampled.error_sums``, float32 [2, B, Hq], of a call's result before sinks are put in."""
    call, sampler = call.for_kernels(), SAMPLERS[implementation]
    with call.on_device():
        return sampler.error_sums(call, sampler.attend_rows(call, sampled.SAMPLED), result.output, result.lse)


def slices(call: AttentionCall, segment_len: int, rankings: int, heads: Iterable[int]) -> Iterator[tuple[slice, slice]]:
    """Key/value heads and queries of each slice, so that scores and indices stay small beside key and value.

    Queries are cut between segments, and only under a causal mask. Under other masks in-segment keys depend on the
    whole call's length, so one head's indices are the smallest slice. The heads ascend; each has ``rankings`` of its
    own.
    """
    (_, key, value), n_queries = call.tensors, call.n_queries
    rows = key.shape[0] * call.n_keys  # of each head
    scratch = rows * key.shape[1] * (key.shape[3] + value.shape[3]) * key.element_size() // SCRATCH_SHARE
    segments = n_segments(n_queries, segment_len)
    fits = max(scratch, SCRATCH_BYTES) // STREAMS // (rows * rankings * BYTES_A_SCORE)  # segments, of any head
    length = n_queries if not call.mask.causal else max(min(fits, segments), 1) * segment_len
    for part in runs(heads, max(fits // segments, 1)):
        for first in range(0, n_queries, length):
            yield part, slice(first, min(first + length, n_queries))


def cut(call: AttentionCall, heads: slice, rows: slice) -> AttentionCall:
    """One slice of a call: its heads and queries, and the keys that these see."""
    query = call.query[:, query_heads(heads, call.group), rows]
    if call.unread_rows is not None:
        call = call.but(unread_rows=call.unread_rows[:, rows])
    part, mask = call.over(query, call.key[:, heads], call.value[:, heads]), call.mask
    if not mask.causal:
        return part
    stop = min(max(rows.stop + mask.offset, 1), call.n_keys)
    key_mask = None if mask.key_mask is None else mask.key_mask[:, :stop]
    return part.first_keys(stop, replace(mask, offset=mask.offset + rows.start, key_mask=key_mask))
