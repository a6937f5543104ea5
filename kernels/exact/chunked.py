"""Chunked attention (Llama 4): a query sees the keys of its own chunk only, so chunks become calls of their own.

Chunk c holds the key positions [c * size, (c + 1) * size); query i stands at position i + offset. Whole chunks become
the batch of one call, as views where the batch is one. Chunks that the queries or the keys cover in part run alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from s2o_compile.kernels.core.call import AttentionCall

Attend = Callable[[AttentionCall], tuple[Tensor, Tensor | None]]


def chunk_runs(size: int, offset: int, n_queries: int, n_keys: int) -> Iterator[tuple[int, int]]:
    """Runs of chunks (first, number) that hold all queries: whole ones in one run, the others one by one."""
    first, last = offset // size, (offset + n_queries - 1) // size
    whole_first = max(-(-offset // size), 0)
    whole_last = min(offset + n_queries, n_keys) // size - 1
    for chunk in range(first, last + 1):
        if chunk == whole_first <= whole_last:
            yield chunk, whole_last - whole_first + 1
        elif not whole_first <= chunk <= whole_last:
            yield chunk, 1


def attend_chunks(call: AttentionCall, attend: Attend) -> tuple[Tensor, Tensor | None]:
    """Output [B, Hq, Nq, Dv] and log-sum-exp [B, Hq, Nq] under a causal mask with ``attention_chunk``.

    A key mask, if any, is [B, Nk]. ``attend`` is attention without chunks, with a log-sum-exp or None.
    """
    (query, key, value), mask = call.tensors, call.mask
    batch, n_queries, n_keys = query.shape[0], call.n_queries, call.n_keys
    size, key_mask = mask.attention_chunk, mask.key_mask
    assert size is not None
    outputs, masses = [], []
    for first, count in chunk_runs(size, mask.offset, n_queries, n_keys):
        start, stop = first * size, (first + count) * size
        rows = slice(max(start - mask.offset, 0), min(stop - mask.offset, n_queries))
        columns = slice(min(max(start, 0), n_keys), min(max(stop, 0), n_keys))
        if columns.start == columns.stop:
            outputs.append(query.new_zeros(*query.shape[:2], rows.stop - rows.start, value.shape[3]))
            masses.append(query.new_full(outputs[-1].shape[:3], -torch.inf, dtype=torch.float32))
            continue
        inside = replace(
            mask,
            attention_chunk=None,
            offset=rows.start + mask.offset - columns.start,
            key_mask=None if key_mask is None else fold(key_mask[:, None, columns], count)[:, 0],
        )
        parts = (fold(x[:, :, part], count) for x, part in ((query, rows), (key, columns), (value, columns)))
        output, mass = attend(call.over(*parts, inside))
        outputs.append(unfold(output, batch))
        masses.append(None if mass is None else unfold(mass, batch))
    return torch.cat(outputs, 2), None if any(mass is None for mass in masses) else torch.cat(masses, 2)


def fold(x: Tensor, count: int) -> Tensor:
    """[B, H, count * n, D] -> [B * count, H, n, D]."""
    return x.unflatten(2, (count, -1)).transpose(1, 2).flatten(0, 1)


def unfold(x: Tensor, batch: int) -> Tensor:
    """[B * count, H, n, ...] -> [B, H, count * n, ...]."""
    return x.unflatten(0, (batch, -1)).transpose(1, 2).flatten(2, 3)
