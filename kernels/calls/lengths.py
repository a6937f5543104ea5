"""The lengths of packed sequences: read where the host may wait for them, or left on the device.

Cumulative lengths ``cu[0] = 0 <= cu[1] <= ...`` say that sequence s holds the tokens ``cu[s]`` to ``cu[s + 1]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from s2o_compile.kernels.core.plan import TILE_LEN
from s2o_compile.kernels.pages.sizes import Sizes
from s2o_compile.kernels.pages.table import BlockTable
from s2o_compile.kernels.support.arguments import as_integer, check_device, shown
from s2o_compile.kernels.support.errors import InputError

INTEGERS = (torch.int32, torch.int64)


class Sequences(NamedTuple):
    """Where each of S sequences begins, and its lengths: all that the host knows.

    Attributes:
        query_start: Its first query among those of all sequences.
        n_queries: Its number of queries.
        key_start: Its first key; 0 for keys in pages.
        n_keys: Its number of keys.
    """

    query_start: list[int]
    n_queries: list[int]
    key_start: list[int]
    n_keys: list[int]

    def table(self, chosen: Sequence[int], device: torch.device) -> tuple[Tensor, int]:
        """int32 [5, S] of some of them, as the kernels of packed sequences take it, and the number of tiles."""
        lists = [[field[at] for at in chosen] for field in self]
        stop, stops = 0, []
        for n_queries in lists[1]:
            stop += -(-n_queries // TILE_LEN)
            stops.append(stop)
        return torch.tensor([*lists, stops], dtype=torch.int32).to(device), stop


def as_integers(name: str, values: object, query: Tensor, dims: int = 1) -> Tensor:
    """Integers of a caller as a tensor, on its device; of a list or another sequence on the CPU.

    Raises:
        InputError: They are no int32 or int64 numbers of this many dimensions, or neither on the CPU nor on the
            query's device.
    """
    if not isinstance(values, Tensor):
        try:
            values = torch.tensor(values, device="cpu")
        except (TypeError, ValueError, RuntimeError):
            values = None
        if values is not None and not values.numel():
            values = values.to(torch.int64)
    if values is None or values.dtype not in INTEGERS or values.dim() != dims:
        got = "no numbers" if values is None else f"{values.dtype} of shape {tuple(values.shape)}"
        raise InputError(
            name, expected=f"int32 or int64 of {dims} dimension{'s' * (dims > 1)}", got=got,
            remedy="Give a tensor of integers, or for lengths a list.",
        )  # fmt: skip
    check_device(name, values, query, host_too=True)
    return values


def check_starts(name: str, starts: Tensor) -> None:
    """Raise InputError unless cumulative lengths have a first entry."""
    if not len(starts):
        raise InputError(
            name, expected="cumulative lengths [S + 1] that begin with 0", got="none",
            remedy="Give [0] for no sequence.",
        )  # fmt: skip


def check_counts(**counts: int) -> None:
    """Raise InputError unless all arguments are made for one number of sequences."""
    if len(set(counts.values())) > 1:
        got = ", ".join(f"{count} in {name}" for name, count in counts.items())
        raise InputError(
            "sequences", expected="one number of them", got=got, remedy="Give each sequence in all of them."
        )


def read_starts(name: str, starts: Tensor, total: int) -> list[int]:
    """Cumulative lengths as numbers; waits for the device if they are there.

    Raises:
        InputError: They do not begin with 0, do not ascend, or do not end with the number of tokens.
    """
    numbers = starts.tolist()
    if numbers[0] != 0 or numbers[-1] != total or any(a > b for a, b in pairwise(numbers)):
        raise InputError(
            name,
            expected=f"0, then ascending numbers, and {total} at the end, which is the number of tokens",
            got=shown(numbers),
            remedy="Give cumulative lengths [S + 1]; cut off tokens of no sequence.",
        )
    return numbers


def lengths_of(starts: list[int]) -> list[int]:
    """The lengths of cumulative lengths."""
    return [stop - start for start, stop in pairwise(starts)]


def as_longest(name: str, longest: object) -> int | None:
    """The most tokens of a sequence as Python's integer, None if the caller does not know.

    Raises:
        InputError: It is no integer, or below 0.
    """
    if longest is None or isinstance(longest, torch.SymInt):
        return longest
    number = as_integer(longest, least=0)
    if number is None:
        remedy = "Leave it None, or read it out of a tensor with .item()."
        raise InputError(name, expected="a number of tokens, or None", got=shown(longest), remedy=remedy)
    return number


def check_longest(name: str, longest: int | None, lengths: list[int]) -> None:
    """Raise InputError if a sequence is longer than the caller says."""
    if longest is not None and lengths and max(lengths) > longest:
        raise InputError(
            name, expected=f"at least {max(lengths)}, the longest sequence", got=longest, remedy="Leave it None."
        )


def check_pages(blocks: BlockTable, lengths: list[int], n_queries: list[int], *, causal: bool) -> None:
    """Raise InputError if a sequence has no room in its pages, or fewer keys than queries."""
    for at, (length, count) in enumerate(zip(lengths, n_queries, strict=True)):
        if not 0 <= length <= blocks.capacity:
            raise InputError(
                "seq_lens",
                expected=f"0 to {blocks.capacity} keys, {blocks.table.shape[1]} pages of {blocks.page_len}",
                got=f"{length} of sequence {at}",
                remedy="Give the number of keys of each sequence, and a block_table with all of its pages.",
            )
        if causal and count and length < count:
            raise InputError(
                "seq_lens",
                expected=f"at least the {count} queries of sequence {at}, whose keys are in the cache",
                got=length,
                remedy="Write the keys of a chunk before its attention; seq_lens counts them, too.",
            )


def check_numbers_of_pages(table: Tensor, lengths: list[int], page_len: int, pages: int) -> None:
    """Raise InputError if a page that a sequence uses does not exist, or is used twice; the table is the host's."""
    for at, length in enumerate(lengths):
        used = table[at, : -(-length // page_len)]
        if len(used) and not 0 <= int(used.min()) <= int(used.max()) < pages:
            raise InputError(
                "block_table", expected=f"pages from 0 to {pages - 1}", got=f"{shown(used.tolist())} of sequence {at}",
                remedy="Give the pages of this cache; entries behind the last key may be any.",
            )  # fmt: skip
        if len(used.unique()) < len(used):
            raise InputError(
                "block_table", expected="each page once in a sequence", got=f"{shown(used.tolist())} of sequence {at}",
                remedy="Give every page of a sequence its own place; different sequences may share pages.",
            )  # fmt: skip


class UnreadSequences(NamedTuple):
    """`Sequences` of lengths that only the device knows: int32 [S] each, and nothing lies outside of the tensors."""

    query_start: Tensor
    n_queries: Tensor
    key_start: Tensor
    n_keys: Tensor

    def table(self) -> Tensor:
        """int32 [5, S] as of `Sequences.table`."""
        tiles = ((self.n_queries + TILE_LEN - 1) // TILE_LEN).cumsum(0, dtype=torch.int32)
        return torch.stack([*self, tiles])

    def divide(self, slots: int, longest: tuple[int, int], shortest: int) -> tuple[UnreadSequences, Slots]:
        """Those that run exactly, without queries of the others, and the others.

        Args:
            slots: Sequences that may be sparse, at most. More of them run exactly.
            longest: Queries and keys of a sequence at most. A longer one runs exactly.
            shortest: Keys of a sparse sequence at least.
        """
        _, n_queries, _, n_keys = self
        sparse = (n_queries >= TILE_LEN) & (n_queries <= longest[0]) & (n_keys >= shortest) & (n_keys <= longest[1])
        sparse &= sparse.cumsum(0) <= slots
        count = len(n_queries)
        numbers = torch.arange(count, device=sparse.device)
        number = numbers.masked_fill(~sparse, count).sort().values[:slots]
        present = number < count
        number = number.clamp(max=count - 1)
        query_start, n_queries, key_start, n_keys = ((x[number] * present).to(torch.int32) for x in self)
        exact = self._replace(n_queries=self.n_queries.masked_fill(sparse, 0))
        return exact, Slots(number, *_boxes((n_queries, query_start), (n_keys, key_start), (n_keys - n_queries,)))


class Slots(NamedTuple):
    """Places for the sequences of a call that are sparse; some may be empty.

    Attributes:
        number: int64 [slots], the number of each sequence.
        n_queries: int32 [slots, 4]: its number of queries, and its first one among those of all sequences.
        n_keys: int32 [slots, 4]: its number of keys, and its first one; 0 for keys in pages.
        offset: int32 [slots, 4]: its causal offset.
    """

    number: Tensor
    n_queries: Tensor
    n_keys: Tensor
    offset: Tensor

    def lengths(self, slot: int, *, causal: bool) -> Sizes:
        """The sizes of one sequence, bottom-right causal or not causal at all."""
        n_queries, n_keys, offset = self.n_queries[slot, :2], self.n_keys[slot, :2], self.offset[slot, 0]
        seg_offset = offset if causal else (-n_queries[0]).masked_fill(n_queries[0] == n_keys[0], 0)
        return Sizes(n_queries, n_keys, offset, seg_offset)


def _boxes(*columns: tuple[Tensor, ...]) -> list[Tensor]:
    """int32 [S, 4] with these columns [S]: every row lies on a boundary of 16 bytes."""
    return [torch.stack([*some, *[torch.zeros_like(some[0])] * (4 - len(some))], 1) for some in columns]


def sequences_on_device(
    starts: Tensor, keys: Tensor, n_queries: int, n_keys: int, *, cumulative: bool
) -> UnreadSequences:
    """Where sequences begin, and their lengths, without a wait of the host.

    Args:
        starts: int [S + 1], cumulative numbers of queries.
        keys: Cumulative numbers of keys [S + 1], or numbers of keys [S] in pages.
        n_queries: All queries. What lies outside of them is left out.
        n_keys: All keys, or the most that a sequence may have in pages. What lies outside of them is left out.
        cumulative: Whether ``keys`` is cumulative.
    """
    starts = starts.clamp(0, n_queries)
    counts = starts.diff().clamp(min=0)
    keys = keys.clamp(0, n_keys)
    if cumulative:
        key_start, key_counts = keys[:-1], keys.diff().clamp(min=0)
    else:
        key_start, key_counts = torch.zeros_like(keys), keys
    rows = starts[:-1], counts, key_start, key_counts
    return UnreadSequences(*(row.to(torch.int32) for row in rows))
