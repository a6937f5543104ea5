"""A server's batch, divided on the host: requests whose prefill is long, and all others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from s2o_compile.kernels.core.plan import TILE_LEN
from s2o_compile.kernels.core.tuned import shortest_sparse


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The requests of one forward pass; their tokens lie one request after the other.

    Attributes:
        starts: The first query of each request, and the number of all.
        seq_lens: Keys of each request, those cached before included.
        sparse: Indices of the requests whose prefill is long, ascending.
    """

    starts: Sequence[int]
    seq_lens: Sequence[int]
    sparse: Sequence[int]

    @classmethod
    def divide(
        cls, starts: Sequence[int], seq_lens: Sequence[int], min_seq_len: int | str, device: torch.device,
        dtype: torch.dtype,
    ) -> Batch:  # fmt: skip
        """Divides requests by length, as the operator does: fewer than 128 queries, or short keys, are not sparse."""
        shortest = shortest_sparse(min_seq_len, device, dtype)
        lengths = zip(starts, starts[1:], seq_lens, strict=False)
        sparse = [at for at, (first, end, keys) in enumerate(lengths) if end - first >= TILE_LEN and keys >= shortest]
        return cls(starts=starts, seq_lens=seq_lens, sparse=sparse)

    @cached_property
    def others(self) -> list[int]:
        """Indices of the other requests that have queries, ascending."""
        sparse = set(self.sparse)
        return [at for at in range(len(self.seq_lens)) if at not in sparse and self.n_queries(at)]

    def n_queries(self, request: int) -> int:
        """Queries of a request."""
        return self.starts[request + 1] - self.starts[request]

    @cached_property
    def sparse_seq_lens(self) -> list[int]:
        """Keys of each sparse request."""
        return [self.seq_lens[at] for at in self.sparse]

    def starts_of(self, requests: Sequence[int]) -> list[int]:
        """Where each of some requests begins if their queries are packed, and the number of all."""
        starts = [0]
        for at in requests:
            starts.append(starts[-1] + self.n_queries(at))
        return starts

    def rows_of(self, requests: Sequence[int], device: torch.device) -> Tensor | slice:
        """The query rows of some requests: a slice where they lie together, int64 [rows] elsewhere."""
        if not requests:
            return slice(0, 0)
        if requests[-1] - requests[0] == len(requests) - 1:
            return slice(self.starts[requests[0]], self.starts[requests[-1] + 1])
        rows = [torch.arange(self.starts[at], self.starts[at + 1]) for at in requests]
        return torch.cat(rows).to(device, non_blocking=True)
