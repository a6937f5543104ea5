"""Packed sequences: several documents side by side in one row, each of which attends to itself alone.

    documents:  query_ids[b, i] == key_ids[b, j]

Ids are data, and equal ids are one document wherever they stand. Varlen kernels name documents by their bounds instead
(``cu_seqlens``), which `ids_of` turns into ids.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from s2o_compile.kernels.core.mask import AttentionMask

ALL = slice(None)


def same_documents(ids: Tensor, others: Tensor, *, may_split: bool = False) -> bool:
    """Whether ids [B or 1, N] are equal where the others [B or 1, N] are, row by row. Waits for the device.

    If they ``may_split``, they may tell one document of the others apart in several.
    """
    rows = max(len(ids), len(others))
    for mine, theirs in zip(ids.expand(rows, -1), others.expand(rows, -1), strict=True):
        pairs = torch.stack([mine, theirs]).unique(dim=1).shape[1]
        if pairs != len(mine.unique()) or (not may_split and pairs != len(theirs.unique())):
            return False
    return True


Attended = tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class Documents:
    """The documents of one call.

    Attributes:
        query_ids: int64 [B or 1, Nq].
        key_ids: int64 [B or 1, Nk]; ``query_ids`` itself in self-attention.
        bottom_right: Whether a causal mask aligns the last query of each run of equal ids with the last key of its run,
            as varlen kernels do. Otherwise positions are those in the row.
    """

    query_ids: Tensor
    key_ids: Tensor
    bottom_right: bool = False

    @classmethod
    def of(cls, query_ids: Tensor, key_ids: Tensor | None, *, bottom_right: bool = False) -> Documents:
        """The documents of an operator's operands, of any integer dtype or bool."""
        query_ids = query_ids.long()
        if key_ids is None:
            return cls(query_ids, query_ids)
        return cls(query_ids, key_ids.long(), bottom_right)

    @property
    def of_itself(self) -> bool:
        """Whether queries and keys stand at the same positions of the same documents."""
        return self.key_ids is self.query_ids

    def visible(self, mask: AttentionMask, queries: slice = ALL, keys: slice = ALL) -> Tensor:
        """Bool [B or 1, 1, queries, keys]: the documents and all terms of a mask without chunks."""
        seen = self.query_ids[:, queries, None] == self.key_ids[:, None, keys]
        if mask.causal:
            i, j = self._positions[0][:, queries], self._positions[1][:, keys]
            distance = j[:, None, :] - i[:, :, None]
            seen = seen & (distance <= mask.offset)
            if mask.window is not None:
                seen = seen & (distance > mask.offset - mask.window)
        if mask.key_mask is not None:
            seen = seen & mask.key_mask[:, None, keys]
        return seen[:, None]

    @cached_property
    def _positions(self) -> tuple[Tensor, Tensor]:
        """Positions of queries and keys, [B or 1, Nq] and [B or 1, Nk], that a causal mask compares."""
        return tuple(self._counted(ids) for ids in (self.query_ids, self.key_ids))  # pyright: ignore[reportReturnType]

    def _counted(self, ids: Tensor) -> Tensor:
        positions = torch.arange(ids.shape[1], device=ids.device)[None]
        if not self.bottom_right:
            return positions
        last = torch.nn.functional.pad(ids[:, 1:] != ids[:, :-1], (0, 1), value=True)
        ends = positions.masked_fill(~last, ids.shape[1]).flip(1).cummin(1).values.flip(1)
        return positions - ends


def by_pairs(masked_attention: Callable[..., Attended]) -> Callable[..., Attended]:
    """A stand-in for ``s2o::packed_attention``: that for ``s2o::masked_attention`` under the mask of all pairs."""

    def packed_attention(
        query: Tensor, key: Tensor, value: Tensor, documents: Tensor, key_documents: Tensor | None = None,
        key_mask: Tensor | None = None, sinks: Tensor | None = None, *, causal: bool = False,
        causal_offset: int | None = None, window: int | None = None, bottom_right: bool = False,
        **given: Any,  # noqa: ANN401
    ) -> Attended:  # fmt: skip
        offset = 0 if bottom_right and causal_offset is None else causal_offset
        mask = AttentionMask.aligned(query, key, causal=causal, causal_offset=offset, window=window, key_mask=key_mask)
        pairs = Documents.of(documents, key_documents, bottom_right=bottom_right).visible(mask)
        return masked_attention(query, key, value, pairs, sinks, **given)

    return packed_attention


def ids_of(bounds: Tensor, length: int) -> Tensor:
    """Ids [1, length] of documents from their bounds: document d holds positions ``bounds[d]`` to ``bounds[d + 1]``.

    Bounds are integers that ascend from 0, [documents + 1]. Positions behind the last one are a document of their own.
    """
    return torch.bucketize(torch.arange(length, device=bounds.device), bounds[1:].long(), right=True)[None]
