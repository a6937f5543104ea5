"""The sizes of a call as kernels take them: numbers of the host, or tensors where the device alone knows them.

A host that does not know the lengths of a sequence knows bounds. Tensors, grids and memory go by these. Kernels read
the numbers (``impl/triton/tile.py``), and programs behind the last query or key end at once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

Size = int | Tensor


class Sizes(NamedTuple):
    """Sizes of a call, each an int or int32 of the device, on a boundary of 16 bytes, as kernels are compiled for.

    Attributes:
        n_queries: Number of queries; on the device [2], with the row where the first of them lies.
        n_keys: Number of keys; on the device [2], with the row of the first.
        offset: Causal offset.
        seg_offset: Offset from a query's position to its own key.
    """

    n_queries: Size
    n_keys: Size
    offset: Size
    seg_offset: Size

    def cut(self, first: int, count: int) -> Sizes:
        """Those on the device of ``count`` queries from one on, of a causal call; the host cuts the query's rows."""
        n_queries, n_keys, offset, _ = self
        assert isinstance(n_queries, Tensor)
        left = (n_queries[0] - first).clamp(0, count)
        return Sizes(torch.stack([left, n_queries[1]]), n_keys, offset + first, offset + first)


def number(size: Size) -> Size:
    """A number of queries or keys without the row of the first."""
    return size[0] if isinstance(size, Tensor) else size


def at_least(least: int, size: Size) -> Size:
    """The larger of two sizes, one of which may be symbolic or on the device."""
    return size.clamp(min=least) if isinstance(size, Tensor) else torch.sym_max(least, size)
