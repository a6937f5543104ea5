"""Attention over packed sequences: every document is a call of its own, over views of the row.

Ids are data, so their runs are found when the call runs: on CUDA the host waits for the device.
Neighbouring documents of one length become the batch of one call. Short ones share a dense call under their mask.
Documents in several pieces are brought together first, where a mask without positions allows it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from s2o_compile.kernels.core.call import AttentionCall
from s2o_compile.kernels.core.documents import Documents
from s2o_compile.kernels.core.mask import AttentionMask
from s2o_compile.kernels.core.options import OperatorOptions
from s2o_compile.kernels.dispatch import choose_path, is_short, run
from s2o_compile.kernels.exact.chunked import fold, unfold
from s2o_compile.kernels.exact.epilogue import fill_rows, fully_masked_rows
from s2o_compile.kernels.exact.formula import attend_under
from s2o_compile.kernels.statistics import record

TOGETHER = 512
"""Queries, and keys, of neighbouring short documents that share one dense call: a call more costs more than pairs."""

ELEMENTS = 1 << 24
"""Query-key pairs of a mask that are held at once."""


@dataclass(frozen=True)
class _Document:
    """Queries [first, last) of a row that see keys [start, stop) of it, the mask aside."""

    first: int
    last: int
    start: int
    stop: int

    @property
    def lengths(self) -> tuple[int, int]:
        """Queries and keys."""
        return self.last - self.first, self.stop - self.start


_Output = tuple[Tensor, Tensor]
"""Output [B, Hq, Nq, Dv], and bool [B, Nq], True for a query that sees no key."""


def run_packed(call: AttentionCall, documents: Documents, options: OperatorOptions) -> Tensor:
    """Attention output [B, Hq, Nq, Dv] of a call whose mask has no chunks, inside each document alone."""
    options.check_heads(call.query.shape[1])
    call = call.but(mask=call.mask.for_batch(call.query.shape[0]))
    path = choose_path(call, options.min_seq_len)
    # A CUDA graph cannot wait for the ids.
    if path == "dense" or (call.query.is_cuda and torch.cuda.is_current_stream_capturing()):
        record(call, "dense" if path == "dense" else "masked")
        return _under_mask(call, documents)
    rows = _rows(documents)
    if rows is None:
        mask = call.mask
        unordered = not mask.causal or (documents.of_itself and mask.offset == 0 and mask.window is None)
        if not unordered:  # the mask asks for positions that bringing together would change
            record(call, "masked")
            return _under_mask(call, documents)
        output, fully_masked = _brought_together(call, documents, options)
    else:
        output, fully_masked = _attend(call, documents, rows, options)
    if call.fully_masked == "mean":  # of all values of the row, those of other documents included
        output = fill_rows(output, call.value, fully_masked[:, None, :, None], call.sinks)
    return output


def _rows(documents: Documents) -> list[list[_Document]] | None:
    """The documents of every row, one list for all rows that are alike; None if the keys of one lie apart."""
    queries = _runs(documents.query_ids)
    keys = queries if documents.of_itself else _runs(documents.key_ids)
    rows = max(len(queries), len(keys))
    every = zip(*(x * rows if len(x) == 1 else x for x in (queries, keys)), strict=True)
    found = [row for row in (_documents(*runs) for runs in every) if row is not None]
    return found if len(found) == rows else None


_Runs = list[tuple[int, int, int]]
"""Runs (id, start, stop) of equal ids."""


def _documents(query_runs: _Runs, key_runs: _Runs) -> list[_Document] | None:
    keys = {name: (start, stop) for name, start, stop in key_runs}
    if len(keys) < len(key_runs):
        return None
    return [_Document(first, last, *keys.get(name, (0, 0))) for name, first, last in query_runs]


def _runs(ids: Tensor) -> list[_Runs]:
    """The runs of every row of ids [B, N], one list for all rows that are alike; only here the host waits.

    They are found where the ids lie: as many as a long prompt has would take the host longer than the attention.
    """
    begins = torch.ones_like(ids, dtype=torch.bool)
    begins[:, 1:] = ids[:, 1:] != ids[:, :-1]
    at, starts = begins.nonzero(as_tuple=True)
    found: list[list[tuple[int, int]]] = [[] for _ in range(ids.shape[0])]
    for row, start, name in torch.stack([at, starts, ids[at, starts]], 1).tolist():
        found[row].append((name, start))
    rows = [[(name, a, b) for (name, a), (_, b) in pairwise([*row, (0, ids.shape[1])])] for row in found]
    return rows[:1] if all(row == rows[0] for row in rows) else rows


def _attend(
    call: AttentionCall, documents: Documents, rows: Sequence[Sequence[_Document]], options: OperatorOptions
) -> _Output:
    """Attention of the documents of every row; one list of documents is that of all rows."""
    batch, heads, n_queries, _ = call.query.shape
    output = call.query.new_empty(batch, heads, n_queries, call.value.shape[3])
    fully_masked = torch.zeros(batch, n_queries, dtype=torch.bool, device=output.device)
    for at, row in enumerate(rows):
        entries = slice(None) if len(rows) == 1 else slice(at, at + 1)
        inside = _entries(call, entries)
        ids = documents if len(rows) == 1 else _of_entries(documents, entries)
        for piece in _pieces(row, inside, documents, options):
            queries = slice(piece[0].first, piece[-1].last)
            output[entries, :, queries], fully_masked[entries, queries] = _piece(inside, ids, piece, options)
    return output, fully_masked


def _entries(call: AttentionCall, entries: slice) -> AttentionCall:
    """The call of some batch entries."""
    mask = call.mask
    if mask.key_mask is not None:
        mask = replace(mask, key_mask=mask.key_mask[entries])
    return call.over(*(x[entries] for x in call.tensors), mask)


def _of_entries(documents: Documents, entries: slice) -> Documents:
    ids = [ids if ids.shape[0] == 1 else ids[entries] for ids in (documents.query_ids, documents.key_ids)]
    return replace(documents, query_ids=ids[0], key_ids=ids[0] if documents.of_itself else ids[1])


def _pieces(
    row: Sequence[_Document], call: AttentionCall, documents: Documents, options: OperatorOptions
) -> list[list[_Document]]:
    """Neighbouring documents that run in one call: of one length as its batch, short ones under a mask."""
    alike: list[list[_Document]] = []
    for document in row:
        last = alike[-1][-1] if alike else None
        if last is not None and _are_batched([last, document], call, documents):
            alike[-1].append(document)
        else:
            alike.append([document])
    pieces: list[list[_Document]] = []
    for piece in alike:
        together = [*pieces[-1], *piece] if pieces else []
        sizes = [sum(lengths) for lengths in zip(*(document.lengths for document in together), strict=True)]
        short = all(is_short(call.query, *document.lengths, options.min_seq_len) for document in together)
        if together and short and max(sizes) <= TOGETHER and _are_neighbours(together):
            pieces[-1] = together
        else:
            pieces.append(piece)
    return pieces


def _are_neighbours(piece: Sequence[_Document]) -> bool:
    """Whether the keys of documents lie side by side, as their queries do."""
    return all(a.stop == b.start for a, b in pairwise(piece)) and all(document.lengths[1] for document in piece)


def _are_batched(piece: Sequence[_Document], call: AttentionCall, documents: Documents) -> bool:
    """Whether documents can be the batch of one call, without a copy and under one mask."""
    (n_queries, n_keys), *others = (document.lengths for document in piece)
    one_offset = n_queries == n_keys or documents.bottom_right or not call.mask.causal
    alike = all(lengths == (n_queries, n_keys) for lengths in others)
    return call.query.shape[0] == 1 and one_offset and alike and _are_neighbours(piece)


def _piece(call: AttentionCall, documents: Documents, piece: Sequence[_Document], options: OperatorOptions) -> _Output:
    """Attention of neighbouring documents, over their own queries and keys."""
    first, count = piece[0], len(piece)
    queries, keys = slice(first.first, piece[-1].last), slice(first.start, piece[-1].stop)
    query, key, value = call.query[:, :, queries], call.key[:, :, keys], call.value[:, :, keys]
    if not key.shape[2]:
        fully_masked = torch.ones(query.shape[0], query.shape[2], dtype=torch.bool, device=query.device)
        return query.new_zeros(*query.shape[:3], value.shape[3]), fully_masked
    mask = _local(call.mask, documents, first, keys)
    if count > 1 and not _are_batched(piece, call, documents):
        part = call.over(query, key, value, mask)
        pairs = documents.visible(call.mask, queries, keys)
        record(part, "dense")
        return attend_under(part.but(fully_masked="zeros"), pairs), ~pairs.any(-1)[:, 0]
    if count > 1:
        query, key, value = (fold(x, count) for x in (query, key, value))
        if mask.key_mask is not None:
            mask = replace(mask, key_mask=mask.key_mask.unflatten(1, (count, -1)).flatten(0, 1))
    part = call.over(query, key, value, mask).but(fully_masked="zeros")
    output, _ = run(part, options)
    fully_masked = fully_masked_rows(mask, part.n_queries, part.n_keys, query.device).expand(query.shape[0], -1)
    if count > 1:
        output, fully_masked = unfold(output, 1), fully_masked.reshape(1, -1)
    return output, fully_masked


def _local(mask: AttentionMask, documents: Documents, document: _Document, keys: slice) -> AttentionMask:
    """The mask in positions of a document's own queries and keys."""
    n_queries, n_keys = document.lengths
    shift = n_keys - n_queries if documents.bottom_right else document.first - document.start
    key_mask = None if mask.key_mask is None else mask.key_mask[:, keys]
    return replace(mask, offset=mask.offset + shift if mask.causal else 0, key_mask=key_mask)


def _brought_together(call: AttentionCall, documents: Documents, options: OperatorOptions) -> _Output:
    """Attention over queries and keys in the order of their documents, which keeps the order inside of each."""
    query_order = documents.query_ids.argsort(dim=1, stable=True)
    key_order = query_order if documents.of_itself else documents.key_ids.argsort(dim=1, stable=True)
    mask, batch = call.mask, call.query.shape[0]
    if mask.key_mask is not None:
        mask = replace(mask, key_mask=mask.key_mask.gather(1, key_order.expand(batch, -1)))
    inside = call.over(_taken(call.query, query_order), *(_taken(x, key_order) for x in call.tensors[1:]), mask)
    query_ids = documents.query_ids.gather(1, query_order)
    key_ids = query_ids if documents.of_itself else documents.key_ids.gather(1, key_order)
    ordered = replace(documents, query_ids=query_ids, key_ids=key_ids)
    rows = _rows(ordered)
    assert rows is not None
    output, fully_masked = _attend(inside, ordered, rows, options)
    back = query_order.argsort(dim=1)
    return _taken(output, back), fully_masked.gather(1, back.expand(batch, -1))


def _taken(x: Tensor, order: Tensor) -> Tensor:
    """The rows of [B, H, N, D] in an order [B or 1, N]."""
    if order.shape[0] == 1:
        return x.index_select(2, order[0])
    return x.gather(2, order[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


def _under_mask(call: AttentionCall, documents: Documents) -> Tensor:
    """Exact attention under the mask of all pairs, so many rows at a time that it stays small."""
    step = max(ELEMENTS // (documents.query_ids.shape[0] * call.n_keys), 1)
    outputs = []
    for first in range(0, call.n_queries, step):
        queries = slice(first, min(first + step, call.n_queries))
        part = call.over(call.query[:, :, queries], call.key, call.value)
        outputs.append(attend_under(part, documents.visible(call.mask, queries)))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 2)
