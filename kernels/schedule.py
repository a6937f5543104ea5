"""Runs S2O in slices of heads and segments, so that scores and indices never exist for the whole call.

Scores and indices grow with segments times keys. For the whole call they would take as much memory as key and value. A
slice has as many heads, or segments of one head, as keep the card busy. Cuts change no bit of the result at a tau; each
slice holds an error by itself. Two slices are under way at a time on a GPU: the last, longest tiles of one run beside
the next slice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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
from s2o_compile.kernels.impl.cpp import exact as cpp_exact
from s2o_compile.kernels.impl.cpp import forward as cpp_forward
from s2o_compile.kernels.impl.torch import forward as torch_forward
from s2o_compile.kernels.planner import Planner
from s2o_compile.kernels.streams import STREAMS, side_by_side

SAMPLERS = {
    "torch": Sampler(sampled.attend_rows, sampled.error_sums, first_tau, lowering),
    "cpp": Sampler(cpp_exact.attend_rows, sampled.error_sums, first_tau, lowering),
}
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
    lse: Tensor | None = None,
) -> Result:
    """Attention over plans by "triton", "cpp" or "torch", except for heads marked dense, which run by ``exact``.

    The mask has no window. ``exact`` is the same implementation's executor over every visible key. ``output``, [B, Hq,
    Nq, Dv] with a unit last stride, is where the output goes, and ``lse``, [B, Hq, Nq], where the log-sum-exp goes.
    """
    result = empty_result(call.query, call.value.shape[3]) if output is None else empty_state(call.query, output)
    result = result if lse is None else result._replace(lse=lse)
    if call.dense_heads:
        attend_dense(call, result, exact)
    tau = options.tau_on(call.query.device)
    if implementation != "triton" or not prepared.attend(call, options, tau, result, _attend):
        _attend(call, options, implementation, tau, result, Planner(call, options, implementation))
    return result


def _attend(
    call: AttentionCall, options: OperatorOptions, implementation: str, tau: float | Tensor, result: Result,
    planner: Planner,
) -> None:  # fmt: skip
    """Attention of the heads that are not marked dense, slice by slice."""
    parts = list(slices(call, planner.segment_len, call.group // planner.shared, sparse_heads(call)))
    # Tiles that never stop take as long as hundreds that do: the next slice fills the card beside them.
    with side_by_side(call.query.device, len(parts)) as turn:
        for number, (heads, rows) in enumerate(parts):
            with turn(number):
                attend_slice(call, heads, rows, planner, tau, options.ceiling, implementation, result)


def attend_slice(
    call: AttentionCall, heads: slice, rows: slice, planner: Planner, tau: float | Tensor, error: float | None,
    implementation: str, result: Result, *, first_query: int = 0, before_attending: Callable[[], None] | None = None,
) -> tuple[AttentionCall, Result]:  # fmt: skip
    """Plan some heads and queries of a call, and attend into their part of its ``result``; return both parts.

    ``tau`` is of all heads. The call's queries are those from ``first_query`` on of the planner's. What is done
    ``before_attending`` may be a wait for the keys and values, if the planner knows the keys.
    """
    part, members = cut(call, heads, rows), query_heads(heads, call.group)
    plan = planner.plan(part, heads, first_query + rows.start)
    part = part if part.sinks is None else part.but(sinks=part.sinks[members])
    into = part_of(result, members, rows)
    if before_attending is not None:
        before_attending()
    attend_planned(part, plan, tau[members] if isinstance(tau, Tensor) else tau, error, implementation, into)
    return part, into


def part_of(result: Result, members: slice, rows: slice) -> Result:
    """The results of some query heads and queries, which begin where a tile does."""
    tiles = slice(rows.start // TILE_LEN, n_tiles(rows.stop))
    return Result(result.output[:, members, rows], result.lse[:, members, rows], result.computed[:, members, tiles])


def sparse_heads(call: AttentionCall) -> list[int]:
    """The key/value heads that are not marked dense."""
    return [head for head in range(call.key.shape[1]) if head not in call.dense_heads]


def attend_planned(
    call: AttentionCall, plan: Plan, tau: float | Tensor, error: float | None, implementation: str, into: Result
) -> None:
    """Attention over a plan by "triton", "cpp" or "torch", below an error if there is one to hold."""
    executor = {"triton": triton_forward, "cpp": cpp_forward, "torch": torch_forward}[implementation]
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


def slices(
    call: AttentionCall, segment_len: int, rankings: int, heads: Sequence[int], scratch: int | None = None
) -> Iterator[tuple[slice, slice]]:
    """Key/value heads and queries of each slice, so that scores and indices stay small beside key and value.

    Queries are cut between segments, and only under a causal mask. Under other masks in-segment keys depend on the
    whole call's length, so one head's indices are the smallest slice. The heads ascend; each has ``rankings`` of its
    own. ``scratch`` is what all slices under way may take, in bytes; None for that of this call (`scratch_bytes`).
    """
    n_queries, segments = call.n_queries, n_segments(call.n_queries, segment_len)
    seen = min(n_queries + call.mask.offset, call.n_keys) if call.mask.causal else call.n_keys
    row_bytes = max(call.key.shape[0] * seen, 1) * rankings * BYTES_A_SCORE  # of a segment of a head
    fits = (scratch_bytes(call) if scratch is None else scratch) // STREAMS // row_bytes  # segments, of any head
    length = n_queries if not call.mask.causal else evenly(segments, fits) * segment_len
    for part in runs(heads, evenly(len(heads), fits // segments)):
        for first in range(0, n_queries, length):
            yield part, slice(first, min(first + length, n_queries))


def scratch_bytes(call: AttentionCall) -> int:
    """Bytes that the scores and indices of all slices under way take at most."""
    _, key, value = call.tensors
    held = key.shape[0] * call.n_keys * key.shape[1] * (key.shape[3] + value.shape[3]) * key.element_size()
    return max(held // SCRATCH_SHARE, SCRATCH_BYTES)


def evenly(count: int, most: int) -> int:
    """The length of equal parts of ``count`` things, as few parts as have ``most`` at most, or one, each."""
    return -(-count // -(-count // max(most, 1))) if count else 1


def cut(call: AttentionCall, heads: slice, rows: slice) -> AttentionCall:
    """One slice of a call: its heads and queries, and the keys that these see."""
    query = call.query[:, query_heads(heads, call.group), rows]
    if call.unread_rows is not None:
        call = call.but(unread_rows=call.unread_rows[:, rows])
    part, mask = call.over(query, call.key[:, heads], call.value[:, heads]), call.mask
    if call.lengths is not None and query.shape[2] < call.n_queries:
        part = part.but(lengths=call.lengths.cut(rows.start, query.shape[2]))
    if not mask.causal:
        return part
    stop = min(max(rows.stop + mask.offset, 1), call.n_keys)
    return part.first_keys(stop, replace(mask.first_keys(stop), offset=mask.offset + rows.start))
