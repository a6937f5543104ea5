"""Sparse attention of one rank's queries to the keys of all ranks, by the tiles of one device.

What is made of every key by itself is made on the rank that holds it, and gathered: the few numbers that score it, and
whether it is finite. So are the sums of values of every block. Every rank solves for the basis from the same samples.
Ranking needs no more, and begins while keys and values are on their way. All pieces of a rank share the streams of one
call: a slice runs beside the last tiles of the slice before, whatever piece it is of.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace

import torch
from torch import Tensor

from s2o_compile.kernels import dispatch, schedule
from s2o_compile.kernels.core.call import AttentionCall
from s2o_compile.kernels.core.options import OperatorOptions
from s2o_compile.kernels.core.result import Result, empty_result
from s2o_compile.kernels.exact.dense_heads import attend_dense, query_heads, runs
from s2o_compile.kernels.exact.epilogue import add_sinks, all_rows_see, fill_rows_with, fully_masked_rows, mean_of
from s2o_compile.kernels.planner import KeyShard, KnownKeys, Planner
from s2o_compile.kernels.ranking.basis import Basis, FewKeys, dim_stride
from s2o_compile.kernels.sequence.sharded import ShardedSequence
from s2o_compile.kernels.statistics import recording
from s2o_compile.kernels.streams import Turns, side_by_side


def of_heads(
    call: AttentionCall, options: OperatorOptions, heads: slice
) -> tuple[AttentionCall, OperatorOptions, slice]:
    """What a call and its options say of some key/value heads, with the whole tensors still; and their query heads."""
    members = query_heads(heads, call.group)
    marked = [head - heads.start for head in call.dense_heads if heads.start <= head < heads.stop]
    tau = options.tau[members] if isinstance(options.tau, tuple) else options.tau
    part = call.but(dense_heads=marked, sinks=None if call.sinks is None else call.sinks[members])
    return part, replace(options, tau=tau), members


def attend(
    call: AttentionCall, options: OperatorOptions, sequence: ShardedSequence, implementation: str, segment_len: int
) -> tuple[Result, Tensor | None]:
    """The results of this rank's queries and, if anybody records, the sums of their error, float32 [2, B, Hq].

    Args:
        call: This rank's shards, under the causal mask of the whole sequence.
        options: The call's.
        sequence: Whose pieces begin where segments do.
        implementation: "triton", "cpp" or "torch".
        segment_len: Queries of a segment.
    """
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in call.tensors)
    call = call.over(query, key, value)
    with call.on_device():
        return _Attending(call, options, sequence, implementation, segment_len).run()


class _Attending:
    """One call of `attend`; the arguments are its."""

    def __init__(
        self,
        call: AttentionCall,
        options: OperatorOptions,
        sequence: ShardedSequence,
        implementation: str,
        segment_len: int,
    ) -> None:
        self._call, self._options, self._sequence = call, options, sequence
        self._implementation, self._segment_len = implementation, segment_len
        self._pieces = sequence.layout.runs(sequence.ranks.rank)
        self._tau = options.tau_on(call.query.device)  # on the current stream, ahead of the others
        # A call of the whole sequence's sizes, whose numbers nobody looks at.
        query, key, value = (x[:, :, :1].expand(-1, -1, sequence.layout.length, -1) for x in call.tensors)
        self._sizes = call.over(query, key, value)
        self._result = empty_result(call.query, call.value.shape[3])
        self._errors: list[tuple[slice, Tensor]] = []
        self._turns_taken = 0

    def run(self) -> tuple[Result, Tensor | None]:
        call, length, means = self._call, self._sequence.layout.length, list[Tensor]()
        fills = call.fully_masked == "mean" and not all_rows_see(call.mask, length, length)
        known, scratch = self._know_keys(), schedule.scratch_bytes(self._sizes)
        with side_by_side(call.query.device, len(self._pieces)) as turns:
            for heads, key, value, wait in self._sequence.gathered(call.key, call.value):
                if fills:
                    with turns(self._turns_taken):
                        wait()
                        means.append(mean_of(value))
                self._attend_heads(heads, key, value, wait, known.of_heads(heads), scratch, turns)
                turns.join()  # before the memory of these keys takes others
        result = self._result
        if call.sinks is not None:
            result = Result(*add_sinks(result.output, result.lse, call.sinks), result.computed)
        if fills:
            output = fill_rows_with(result.output, torch.cat(means, 1), self._fully_masked(), call.sinks)
            result = result._replace(output=output)
        return result, self._error_sums()

    def _know_keys(self) -> KnownKeys:
        """What rankings need of all keys, from what every rank finds out about its own."""
        call, sequence, mask = self._call, self._sequence, self._call.mask
        made = KeyShard(self._options, self._implementation)
        basis_of_all = self._start_basis(made) if made.compares_few else None
        key_mask = None if mask.key_mask is None else sequence.shard(mask.key_mask, 1)
        shard = call.but(mask=replace(mask, key_mask=key_mask))
        sums, wait_for_sums = sequence.start_gather(made.value_sums(shard, self._segment_len), step=self._segment_len)
        own, basis = [made.non_finite(shard)], None
        if basis_of_all is not None:
            basis = basis_of_all()
            own.append(made.few_keys(shard, basis))
        (non_finite, *few), wait = sequence.start_gather(own)
        wait_for_sums()
        tail_value = made.tail_values(self._sizes, self._segment_len, tuple(sums))
        wait()
        return KnownKeys(None if basis is None else FewKeys(basis, *few), non_finite, tail_value)

    def _start_basis(self, made: KeyShard) -> Callable[[], Basis]:
        """The basis of the whole call, solved for on every rank from the same samples, once these have come."""
        call, sequence = self._call, self._sequence
        step, rank = dim_stride(sequence.layout.length), sequence.ranks.rank
        own = [sequence.layout.samples(x, rank, step) for x in (call.query, call.key)]
        (query, key), wait = sequence.start_gather(own, step=step)

        def solve() -> Basis:
            wait()
            key_mask = None if call.mask.key_mask is None else call.mask.key_mask[:, ::step].contiguous()
            return made.basis(call.over(query, key, call.value, replace(call.mask, key_mask=key_mask)))

        return solve

    def _attend_heads(
        self, heads: slice, key: Tensor, value: Tensor, wait: Callable[[], None], known: KnownKeys, scratch: int,
        turns: Turns,
    ) -> None:  # fmt: skip
        """Attention of some key/value heads' queries, the longest piece first: short tiles end beside each other."""
        part, options, members = of_heads(self._call, self._options, heads)
        whole = part.over(self._sizes.query[:, members], key, value)
        planner = Planner(whole, options, self._implementation, known)
        tau = self._tau[members] if isinstance(self._tau, Tensor) else self._tau
        for positions, rows in reversed(self._pieces):
            mask = replace(part.mask, offset=part.mask.offset + positions.start)
            piece = part.over(self._call.query[:, members, rows], key, value, mask)
            into = schedule.part_of(self._result, members, rows)
            if piece.dense_heads:
                with self._turn(turns):
                    wait()
                    attend_dense(piece, into, dispatch.EXACT[self._implementation])
                    for some in runs(piece.dense_heads, len(piece.dense_heads)):
                        every = slice(0, piece.n_queries)
                        found = schedule.part_of(into, query_heads(some, part.group), every)
                        marked = schedule.cut(piece, some, every)
                        sinks = None if piece.sinks is None else piece.sinks[query_heads(some, part.group)]
                        self._measure(marked.but(sinks=sinks), found, members.start, some)
            rankings = part.group // planner.shared
            cuts = schedule.slices(piece, self._segment_len, rankings, schedule.sparse_heads(piece), scratch)
            for some, queries in cuts:
                with self._turn(turns):
                    if known.few is None:
                        wait()  # such rankings look at whole keys
                    attended, found = schedule.attend_slice(
                        piece, some, queries, planner, tau, options.ceiling, self._implementation, into,
                        first_query=positions.start, before_attending=wait,
                    )  # fmt: skip
                    self._measure(attended, found, members.start, some)

    def _turn(self, turns: Turns) -> AbstractContextManager[object]:
        self._turns_taken += 1
        return turns(self._turns_taken)

    def _measure(self, part: AttentionCall, result: Result, first: int, heads: slice) -> None:
        """Keep the sums of the error of some heads, if anybody records; ``first`` is their part's first query head."""
        if recording():
            members = query_heads(heads, self._call.group)
            sums = schedule.measure_error(part, result, self._implementation)
            self._errors.append((slice(first + members.start, first + members.stop), sums))

    def _error_sums(self) -> Tensor | None:
        if not self._errors:
            return None
        batch, heads = self._call.query.shape[:2]
        total = torch.zeros(2, batch, heads, dtype=torch.float32, device=self._call.query.device)
        for members, sums in self._errors:
            total[:, :, members] += sums
        return total

    def _fully_masked(self) -> Tensor:
        """Bool [B or 1, 1, n, 1], True for this rank's queries that see no key."""
        mask, length, device = self._call.mask, self._sequence.layout.length, self._call.query.device
        rows = [
            fully_masked_rows(replace(mask, offset=mask.offset + at.start), at.stop - at.start, length, device)
            for at, _ in self._pieces
        ]
        return torch.cat(rows, 1)[:, None, :, None]
