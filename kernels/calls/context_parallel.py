"""One call of the operator on shards of a sequence: the mask's terms speak of positions in the whole sequence.

By ``all_gather`` each piece of this rank's queries attends to the whole keys, under a causal offset of its own. What a
plan needs of the whole call (segments, chunks, sampled queries and keys, mean values) is the whole sequence's, so tiles
are those of one device, bit for bit. It is not so where pieces begin inside of a segment, without a causal mask, under
``attention_chunk``, in packed sequences, and where heads go on to hold an error, which a rank measures on its own
queries: results are right there, by tiles of their own. By ``ulysses`` a rank makes the usual call over its heads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import NamedTuple

import torch
from torch import Tensor

from s2o_compile.kernels import dispatch
from s2o_compile.kernels.calls import gathered
from s2o_compile.kernels.calls.packed import run_packed
from s2o_compile.kernels.core.call import AttentionCall
from s2o_compile.kernels.core.documents import Documents
from s2o_compile.kernels.core.mask import AttentionMask
from s2o_compile.kernels.core.options import OperatorOptions
from s2o_compile.kernels.core.plan import default_segment_len
from s2o_compile.kernels.core.shards import sharded
from s2o_compile.kernels.exact.epilogue import finish
from s2o_compile.kernels.observe import observing
from s2o_compile.kernels.sequence.sharded import ShardedSequence
from s2o_compile.kernels.statistics import record
from s2o_compile.kernels.support.errors import ImplementationUnavailableError, InputError
from s2o_compile.kernels.support.torch_compat import version_of


class _Part(NamedTuple):
    """Results of some heads of this rank's queries; a path that computes every pair leaves some of them out."""

    output: Tensor
    lse: Tensor | None
    computed: Tensor | None
    error_sums: Tensor | None


def run(
    call: AttentionCall, options: OperatorOptions, sequence: ShardedSequence, documents: Documents | None = None
) -> tuple[Tensor, Tensor | None]:
    """Attention output [B, Hq, n, Dv] of this rank's queries and, if asked, its log-sum-exp float32 [B, Hq, n].

    The call holds this rank's shards, and its mask is that of a sequence of their length. With ``documents``, of the
    shard, it attends inside of the sequence's documents, and returns no log-sum-exp.

    Raises:
        InputError: The call is none of a shard of the sequence, or what it asks for is not possible on shards.
        RankError: Ranks make different calls, or one has ended.
    """
    what = "attention over a sharded sequence"
    with sequence.ranks.checking(what):
        whole_mask = _check(call, options, sequence)
        if documents is not None:
            sequence.check_documents(documents.query_ids, version_of(documents.query_ids))
            if not documents.of_itself and not torch.equal(documents.query_ids, documents.key_ids):
                raise InputError(
                    "key_documents",
                    expected="the documents of the queries",
                    got="others",
                    remedy="Attend to the keys of other documents outside of the block.",
                )
    sequence.agree(what, {**_facts(call, options), "packed": documents is not None})
    attend = _by_heads if sequence.method == "ulysses" else _by_gathering
    with sharded(None):
        ids = None if documents is None or sequence.documents is None else sequence.documents.to(call.query.device)
        return attend(call, options, sequence, whole_mask, ids)


def _check(call: AttentionCall, options: OperatorOptions, sequence: ShardedSequence) -> AttentionMask:
    """The mask over the whole sequence; raises InputError where the call cannot run on shards."""
    options.check_heads(call.query.shape[1])
    sequence.ranks.check_device(call.query, "query")
    mask, count = call.mask, sequence.count
    if (call.n_queries, call.n_keys) != (count, count) or (mask.causal and mask.offset != 0):
        offset = f", causal_offset {mask.offset}" if mask.causal else ""
        raise InputError(
            "context parallel",
            expected=f"queries and keys of this rank's {count} of {sequence.layout.length} tokens",
            got=f"{call.n_queries} queries, {call.n_keys} keys{offset}",
            remedy="Attend to other tensors, such as a filled cache, outside of the block.",
        )
    if observing():
        raise InputError(
            "context parallel",
            expected="nobody who looks at calls",
            got="evaluate, calibrate or a picture around it",
            remedy="Run them on one rank, with shorter inputs.",
        )
    sequence.check_padding(mask.key_mask, None if mask.key_mask is None else version_of(mask.key_mask))
    size, heads = sequence.ranks.size, call.key.shape[1]
    if sequence.method == "ulysses" and heads % size:
        raise InputError(
            "ulysses",
            expected=f"key/value heads that {size} ranks can share out evenly",
            got=heads,
            remedy='Choose method="all_gather".',
        )
    for name, x in (("padding", sequence.key_mask), ("documents", sequence.documents)):
        if x is not None and x.shape[0] not in (1, call.query.shape[0]):
            raise InputError(
                f"{name} of the sequence",
                expected=f"of {call.query.shape[0]} entries, as the batch, or of one",
                got=x.shape[0],
                remedy="Give one row for each entry of the batch.",
            )
    key_mask = None if sequence.key_mask is None else sequence.key_mask.to(call.query.device)
    length = sequence.layout.length
    window, chunk = (None if x is None or x >= length else x for x in (mask.window, mask.attention_chunk))
    mask = replace(mask, key_mask=key_mask, window=window, attention_chunk=chunk)  # longer ones hide nothing
    return mask.for_batch(call.query.shape[0])


def _facts(call: AttentionCall, options: OperatorOptions) -> dict[str, object]:
    query, _, value = call.tensors
    return {
        "batch": query.shape[0], "query heads": query.shape[1], "key/value heads": call.key.shape[1],
        "head dims": (query.shape[3], value.shape[3]), "dtype": query.dtype, "scale": call.scale,
        "softcap": call.softcap, "sinks": call.sinks is not None, "fully_masked": call.fully_masked,
        "return_lse": call.return_lse, "mask": replace(call.mask, key_mask=None).text(1, 1),
        "dense_heads": tuple(call.dense_heads), **{x.name: getattr(options, x.name) for x in fields(options)},
    }  # fmt: skip


def _by_heads(
    call: AttentionCall, options: OperatorOptions, sequence: ShardedSequence, mask: AttentionMask, ids: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    size, rank = sequence.ranks.size, sequence.ranks.rank
    share = call.key.shape[1] // size
    mine, mine_options, _ = gathered.of_heads(call, options, slice(rank * share, (rank + 1) * share))
    query, key, value = (sequence.to_heads(x) for x in call.tensors)
    documents = None if ids is None else Documents(ids, ids)
    output, lse = _run(mine.over(query, key, value, mask), mine_options, documents)
    return sequence.to_shards(output), None if lse is None else sequence.to_shards(lse)


def _run(call: AttentionCall, options: OperatorOptions, documents: Documents | None) -> tuple[Tensor, Tensor | None]:
    return dispatch.run(call, options) if documents is None else (run_packed(call, documents, options), None)


def _by_gathering(
    call: AttentionCall, options: OperatorOptions, sequence: ShardedSequence, mask: AttentionMask, ids: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    length, call = sequence.layout.length, call.but(mask=mask)
    path = _path(call, options, length) if ids is None else "calls"
    segment_len = _segment_len(call, options, sequence) if path == "s2o" else None
    if segment_len is None:
        output, lse, computed, errors = _by_pieces(call, options, sequence, path, ids)
    else:
        implementation = dispatch.choose_implementation(options.implementation, call.query)
        (output, lse, computed), errors = gathered.attend(call, options, sequence, implementation, segment_len)
        lse = lse if call.return_lse else None
    if path != "calls":
        rank = sequence.ranks.rank
        area = sum(
            replace(mask, offset=mask.offset + piece.start if mask.causal else 0)
            .area(call.query.shape[0], piece.stop - piece.start, length)
            for piece in sequence.layout.pieces[rank]
        )  # fmt: skip
        rows = sequence.layout.tile_rows(rank)
        record(call, path, computed, errors, area=area, tile_rows=rows, n_keys=length)  # pyright: ignore
    return output, lse


def _path(call: AttentionCall, options: OperatorOptions, length: int) -> str:
    """The path of the whole sequence, or "calls": of chunks or documents, each of which chooses its own."""
    if call.mask.attention_chunk is not None:
        return "calls"
    if call.scale <= 0 or dispatch.is_short(call.query, length, length, options.min_seq_len):
        return "dense"
    if call.mask.window is not None:
        return "window"
    return "dense" if len(call.dense_heads) == call.key.shape[1] else "s2o"


def _segment_len(call: AttentionCall, options: OperatorOptions, sequence: ShardedSequence) -> int | None:
    """The segments of the whole sequence; None where pieces cannot have the tiles of one device."""
    if dispatch.choose_implementation(options.implementation, call.query) == "flex":
        raise ImplementationUnavailableError(
            'implementation="flex": expected whole sequences, got shards: it plans whole calls. Use "auto".'
        )
    segment_len = options.segment_len or default_segment_len(sequence.layout.length)
    return segment_len if call.mask.causal and sequence.layout.starts_segments(segment_len) else None


def _by_pieces(
    call: AttentionCall, options: OperatorOptions, sequence: ShardedSequence, path: str, ids: Tensor | None
) -> _Part:
    """Attention of this rank's queries to all keys, some heads and one piece of the shard at a time."""
    parts: list[_Part] = []
    for heads, key, value, wait in sequence.gathered(call.key, call.value):
        part, part_options, members = gathered.of_heads(call, options, heads)
        wait()
        found = []
        for positions, rows in sequence.layout.runs(sequence.ranks.rank):
            mask = call.mask
            if mask.causal:
                mask = replace(mask, offset=mask.offset + positions.start)
            documents = None if ids is None else Documents(ids[:, positions], ids)
            piece = part.over(call.query[:, members, rows], key, value, mask)
            found.append(_attend_piece(piece, part_options, path, documents))
        parts.append(_joined(found, 2, lambda sums: torch.stack(sums).sum(0)))
    return _joined(parts, 1, lambda sums: torch.cat(sums, 2))


def _joined(parts: Sequence[_Part], dim: int, join_errors: Callable[[list[Tensor]], Tensor]) -> _Part:
    """Parts side by side: of heads (dim 1) or of queries (dim 2)."""
    output, lse, computed = (
        None if any(x is None for x in column) else torch.cat(column, dim)  # pyright: ignore[reportArgumentType]
        for column in list(zip(*parts, strict=True))[:3]
    )
    assert output is not None
    errors = [part.error_sums for part in parts if part.error_sums is not None]
    return _Part(output, lse, computed, join_errors(errors) if len(errors) == len(parts) else None)


def _attend_piece(call: AttentionCall, options: OperatorOptions, path: str, documents: Documents | None) -> _Part:
    if path == "calls":
        output, lse = _run(call, options, documents)
        return _Part(output, lse, None, None)
    result = dispatch.execute(call, path, options)
    errors = dispatch.measure(call, result, options) if path == "s2o" else None
    output, lse = finish(call, result.output, result.lse)
    return _Part(output, lse, None if path == "dense" else result.computed, errors)
