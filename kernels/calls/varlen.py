"""Attention over packed sequences: each is a call of its own, over views of the packed tensors or over pages.

Sequences that are long enough are ranked and stop by themselves. All others, and those under a window, run exactly in
one launch where the executor has one for packed sequences.

Lengths on a GPU stay there: the host does not wait, and a CUDA graph can record the call. The device then says which
sequences are sparse, and puts them into slots. There are as many as sequences can be long enough. The host launches
the work of every slot by bounds, and kernels read the lengths.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from s2o_compile.kernels.calls.lengths import (
    Sequences,
    Slots,
    check_longest,
    check_numbers_of_pages,
    check_pages,
    lengths_of,
    read_starts,
    sequences_on_device,
)
from s2o_compile.kernels.core.call import AttentionCall
from s2o_compile.kernels.core.options import OperatorOptions
from s2o_compile.kernels.core.plan import TILE_LEN, n_tiles
from s2o_compile.kernels.core.tuned import shortest_sparse
from s2o_compile.kernels.dispatch import (
    attend_packed,
    choose_implementation,
    execute,
    is_short,
    reads_pages,
    run,
    settle,
)
from s2o_compile.kernels.exact.epilogue import add_sinks
from s2o_compile.kernels.exact.formula import attend_differentiably
from s2o_compile.kernels.observe import observing
from s2o_compile.kernels.pages.table import BlockTable
from s2o_compile.kernels.statistics import count, record, recording
from s2o_compile.kernels.streams import side_by_side
from s2o_compile.kernels.support.errors import InputError


@dataclass(frozen=True, kw_only=True, eq=False)
class Packed:
    """Packed sequences.

    Attributes:
        call: The tensors of all sequences, [1, H, tokens, D], and everything that they share. Its mask says whether
            sequences are causal, and their window. Its key and value are flat views if there are ``blocks``.
        query_starts: int [S + 1], cumulative numbers of queries.
        keys: int [S + 1], cumulative numbers of keys; with ``blocks`` the number of keys of each sequence, [S].
        blocks: The pages of the sequences, if keys lie in pages.
        host_table: The table of pages as the caller gave it, if the host can see it; None if not.
        longest_query: Queries of a sequence at most, if the caller knows.
        longest_key: Keys of a sequence at most, if the caller knows.
    """

    call: AttentionCall
    query_starts: Tensor
    keys: Tensor
    blocks: BlockTable | None = None
    host_table: Tensor | None = None
    longest_query: int | None = None
    longest_key: int | None = None

    @property
    def on_host(self) -> bool:
        """Whether the host knows the lengths without waiting."""
        return self.query_starts.is_cpu and self.keys.is_cpu

    @property
    def key_room(self) -> int:
        """Keys of all sequences, or of a sequence in pages at most."""
        return self.call.key.shape[2] if self.blocks is None else self.blocks.capacity

    def read(self) -> Sequences:
        """Where the sequences begin, checked; waits for the device if lengths are there."""
        name = "cu_seqlens_q"
        query_start = read_starts(name, self.query_starts, self.call.n_queries)
        n_queries = lengths_of(query_start)
        check_longest("max_seqlen_q", self.longest_query, n_queries)
        if self.blocks is None:
            key_start = read_starts("cu_seqlens_k", self.keys, self.key_room)
            n_keys = lengths_of(key_start)
            check_longest("max_seqlen_k", self.longest_key, n_keys)
            return Sequences(query_start[:-1], n_queries, key_start[:-1], n_keys)
        n_keys = self.keys.tolist()
        check_longest("max_seqlen_k", self.longest_key, n_keys)
        check_pages(self.blocks, n_keys, n_queries, causal=self.call.mask.causal)
        if self.host_table is not None:
            check_numbers_of_pages(self.host_table, n_keys, self.blocks.page_len, self.blocks.last + 1)
        return Sequences(query_start[:-1], n_queries, [0] * len(n_keys), n_keys)

    def sequence(self, sequences: Sequences, at: int) -> AttentionCall:
        """One sequence as a call of its own, bottom-right causal."""
        first, count, first_key, n_keys = (field[at] for field in sequences)
        call, mask = self.call, self.call.mask
        query = call.query[:, :, first : first + count]
        mask = replace(mask, offset=n_keys - count if mask.causal else 0)
        if self.blocks is not None:
            return call.but(query=query, mask=mask, pages=self.blocks.pages(at, n_keys))
        keys = slice(first_key, first_key + n_keys)
        return call.over(query, call.key[:, :, keys], call.value[:, :, keys], mask)


def run_packed(packed: Packed, options: OperatorOptions, output: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Output [T, Hq, Dv] and log-sum-exp float32 [Hq, T], unset unless the call wants it.

    ``output``, if given, is where the output goes; its last stride is 1.
    """
    call = packed.call
    options.check_heads(call.query.shape[1])
    _, heads, tokens, _ = call.query.shape
    if output is None:
        output = call.query.new_empty(tokens, heads, call.value.shape[3])
    lse = output.new_empty(heads, tokens, dtype=torch.float32)
    # As the operator does: a product of float32 must not become one of bfloat16 on the way.
    with call.on_device(), torch.autocast(call.query.device.type, enabled=False):
        unread = _unread(packed, options)
        if unread is not None:
            if call.kept is not None:
                call.kept.begin(0)  # nobody knows where the chunk begins
            _attend_unread(packed, unread, options, output, lse)
        else:
            _check_readable(packed)
            sequences = packed.read()
            if call.kept is not None:  # of one sequence
                call.kept.begin(max(sequences.n_keys[0] - sequences.n_queries[0], 0))
            _attend_read(packed, sequences, options, output, lse)
    return output, lse


class _Bounds(NamedTuple):
    """What the host knows of lengths that it does not read.

    Attributes:
        longest: Queries and keys of a sparse sequence at most.
        shortest: Keys of a sparse sequence at least.
        slots: Sparse sequences at most; 0 if all run exactly.
    """

    longest: tuple[int, int]
    shortest: int
    slots: int


def _unread(packed: Packed, options: OperatorOptions) -> _Bounds | None:
    """The bounds of a call whose lengths stay on the device; None if the host reads them."""
    call, count = packed.call, len(packed.query_starts) - 1
    if packed.on_host or recording() or choose_implementation(options.implementation, call.query) != "triton":
        return None
    queries, keys = call.n_queries, packed.key_room
    most_queries = queries if packed.longest_query is None else min(packed.longest_query, queries)
    most_keys = keys if packed.longest_key is None else min(packed.longest_key, keys)
    shortest = shortest_sparse(options.min_seq_len, call.query.device, call.query.dtype)
    window = call.mask.window
    slots = min(count, queries // TILE_LEN, count if packed.blocks is not None else keys // max(shortest, 1))
    slides = window is not None and window < most_keys
    if slides or call.scale <= 0 or most_queries < TILE_LEN or most_keys < shortest:
        slots = 0
    if slots and (observing() or call.dense_heads or call.kept is not None or options.ranking != "per_query"):
        return None
    return _Bounds((most_queries, most_keys), shortest, slots)


def _check_readable(packed: Packed) -> None:
    """Raise InputError if lengths must be read while a CUDA graph is captured, which cannot wait for them."""
    if not packed.on_host and packed.call.query.is_cuda and torch.cuda.is_current_stream_capturing():
        raise InputError(
            "lengths",
            expected="lengths that stay on the device while a CUDA graph is captured",
            got="a call that reads them: a recording, an observer, dense heads, a PrefillCache, a ranking other than "
            '"per_query" or an implementation other than "triton"',
            remedy="Leave these out of the graph, or give lengths on the host.",
        )


def _attend_unread(packed: Packed, bounds: _Bounds, options: OperatorOptions, output: Tensor, lse: Tensor) -> None:
    """All sequences by lengths that the host does not know. Queries of no sequence get zeros."""
    call, blocks = packed.call, packed.blocks
    output.zero_()
    lse.fill_(-torch.inf)
    device, count_of = call.query.device, len(packed.query_starts) - 1
    assert attend_packed is not None
    starts, keys = (x.to(device, non_blocking=True) for x in (packed.query_starts, packed.keys))
    sequences = sequences_on_device(starts, keys, call.n_queries, packed.key_room, cumulative=blocks is None)
    if bounds.slots:
        sequences, slots = sequences.divide(bounds.slots, bounds.longest, bounds.shortest)
        _attend_slots(packed, bounds, slots, options, output, lse)
        if call.sinks is not None:  # of exact sequences they are put in below
            lse.copy_(add_sinks(output.transpose(0, 1), lse, call.sinks)[1])
    attend_packed(call, sequences.table(), n_tiles(call.n_queries) + count_of, blocks, *_as_call(output, lse))
    count("s2o" if bounds.slots else "dense" if call.mask.window is None else "window")


def _attend_slots(
    packed: Packed, bounds: _Bounds, slots: Slots, options: OperatorOptions, output: Tensor, lse: Tensor
) -> None:
    """The sequences in slots, sparse and without sinks. Slots without a sequence do nothing."""
    (queries, n_keys), blocks = bounds.longest, packed.blocks
    # Whole rows before they are cut: a copy of some would end with them. The offset hides no key from the host.
    call, causal = packed.call.for_kernels(), packed.call.mask.causal
    call = call.over(
        call.query[:, :, :queries], call.key, call.value, replace(call.mask, window=None, offset=n_keys * causal)
    )
    if blocks is None:
        call = call.over(call.query, call.key[:, :, :n_keys], call.value[:, :, :n_keys])
    else:
        blocks = replace(blocks, table=blocks.table[slots.number])
    into = _as_call(output, lse, slice(queries))
    with side_by_side(call.query.device, bounds.slots) as turn:
        for slot in range(bounds.slots):
            with turn(slot):
                part = call.but(lengths=slots.lengths(slot, causal=causal))
                part = part if blocks is None else part.but(pages=blocks.pages(slot, n_keys))
                execute(part, "s2o", options, *into)


def _as_call(output: Tensor, lse: Tensor, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
    """Some rows of the results as those of one call, [1, Hq, n, Dv] and [1, Hq, n]."""
    return output[rows].transpose(0, 1)[None], lse[None, :, rows]


def _attend_read(packed: Packed, sequences: Sequences, options: OperatorOptions, output: Tensor, lse: Tensor) -> None:
    """Sequences one by one, two under way at a time on a GPU, except those that run exactly in one launch."""
    call = packed.call
    by_triton = choose_implementation(options.implementation, call.query) == "triton"
    if (
        packed.blocks is None and len(sequences.n_keys) == 1
    ):  # one sequence is a call, and SDPA is fastest at short ones
        by_triton = False
    apart: list[tuple[AttentionCall, slice]] = []
    together: list[int] = []
    unseen = by_triton and not recording() and not observing()
    for at, rows in _real_sequences(packed, sequences, output, lse):
        # A batch may hold hundreds of short sequences: without a witness no call is made of them.
        if unseen and is_short(call.query, sequences.n_queries[at], sequences.n_keys[at], options.min_seq_len):
            together.append(at)
            count("dense")
            continue
        part = packed.sequence(sequences, at)
        settled, path = settle(part, options)
        if by_triton and path != "s2o" and (packed.blocks is None or reads_pages(part, options)):
            together.append(at)
            record(settled, path)
        else:
            apart.append((part, rows))
    if together and attend_packed is not None:
        table, tiles = sequences.table(together, call.query.device)
        blocks = packed.blocks
        if blocks is not None and len(together) < len(sequences.n_keys):
            blocks = replace(blocks, table=blocks.table[together])
        attend_packed(call, table, tiles, blocks, *_as_call(output, lse))
    with side_by_side(call.query.device, len(apart)) as turn:
        for number, (part, rows) in enumerate(apart):
            into, masses = _as_call(output, lse, rows)
            with turn(number):
                found, mass = run(part.for_kernels(), options, into)
                if found.data_ptr() != into.data_ptr():
                    into.copy_(found)
                if mass is not None:
                    masses.copy_(mass)


def _real_sequences(packed: Packed, sequences: Sequences, output: Tensor, lse: Tensor) -> Iterator[tuple[int, slice]]:
    """Sequences with queries and keys, and their rows of the results. Queries without keys get zeros."""
    for at, (first, n_queries) in enumerate(zip(sequences.query_start, sequences.n_queries, strict=True)):
        rows = slice(first, first + n_queries)
        if n_queries and sequences.n_keys[at]:
            yield at, rows
        elif n_queries:
            output[rows] = 0
            sinks = packed.call.sinks
            lse[:, rows] = -torch.inf if sinks is None else sinks.float()[:, None]


def attend_packed_differentiably(packed: Packed) -> Tensor:
    """Exact attention [T, Hq, Dv] over packed sequences that derivatives pass."""
    call, sequences = packed.call, packed.read()
    outputs = []
    for at, n_queries in enumerate(sequences.n_queries):
        part = packed.sequence(sequences, at).out_of_pages()
        if n_queries and sequences.n_keys[at]:
            outputs.append(attend_differentiably(part)[0].transpose(0, 1))
        elif n_queries:
            outputs.append(call.query.new_zeros(n_queries, call.query.shape[1], call.value.shape[3]))
    if not outputs:
        return call.query.new_zeros(0, call.query.shape[1], call.value.shape[3])
    return torch.cat(outputs)
