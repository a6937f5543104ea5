"""Pages of a cache: where the keys of one sequence lie, if not one behind the other.

A server keeps keys and values in pages of ``page_len`` tokens, in any order. Kernels read a key by
``base + row * stride``. Between two slots of a page lies one stride, and between two pages a whole number of them. So a
flat view of the cache has a row for every slot, and key j of a sequence lies in the row

    row[j] = table[j // page_len] * page_rows + j % page_len

A ranking holds rows instead of positions: the inner loop gathers from pages as it gathers from anything else.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Pages:
    """The pages of one sequence.

    Attributes:
        table: int32 [pages], contiguous: the numbers of the sequence's pages, in order.
        length: Keys of the sequence.
        page_len: Tokens of a page.
        page_rows: Rows of the flat view from one page to the next.
        last: Number of the cache's last page. Numbers in the table that no page has stand for the nearest that exists.
    """

    table: Tensor
    length: int
    page_len: int
    page_rows: int
    last: int

    def rows(self) -> Tensor:
        """The row of every key, int64 [length]."""
        position = torch.arange(self.length, device=self.table.device)
        page = self.table.long().clamp(0, self.last)[position // self.page_len]
        return page * self.page_rows + position % self.page_len


def flat_view(cache: Tensor) -> tuple[Tensor, int] | None:
    """A flat view [1, H, rows, D] of a cache [pages, page_len, H, D], and the rows from one page to the next.

    None if the distance of two pages is no whole number of slots.
    """
    pages, page_len, heads, dim = cache.shape
    page_stride, slot_stride, head_stride, _ = cache.stride()
    slot_stride = page_stride if page_len == 1 else slot_stride  # that of a single slot means nothing
    if slot_stride < 1 or page_stride % slot_stride:
        return None
    page_rows = page_stride // slot_stride
    rows = (pages - 1) * page_rows + page_len
    strides = (0, head_stride, slot_stride, cache.stride(3))
    return cache.as_strided((1, heads, rows, dim), strides), page_rows


@dataclass(frozen=True, kw_only=True, eq=False)
class BlockTable:
    """The pages of several sequences.

    Attributes:
        table: int32 [S, most pages], unit last stride: the pages of each sequence in order; entries behind its last key
            mean nothing.
        page_len: Tokens of a page.
        page_rows: Rows of the flat view from one page to the next.
        last: Number of the cache's last page.
    """

    table: Tensor
    page_len: int
    page_rows: int
    last: int

    @property
    def capacity(self) -> int:
        """Keys of the longest sequence that the table has room for."""
        return self.table.shape[1] * self.page_len

    def pages(self, sequence: int, length: int) -> Pages:
        """The pages of one sequence of this many keys."""
        return Pages(
            table=self.table[sequence],
            length=length,
            page_len=self.page_len,
            page_rows=self.page_rows,
            last=self.last,
        )
