"""A sequence that ranks hold in shards, and what they exchange of it: keys and values, or heads for positions.

``all_gather``: every rank gets all keys and values, a few heads at a time, while it attends by the heads before.
``ulysses``: every rank gets all positions of its share of the heads. A ring is no way for ranked keys: a ranking needs
the whole prefix, and tau, a share of a row's mass, has no meaning for the keys of one rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from s2o_compile.kernels.core.documents import same_documents
from s2o_compile.kernels.core.shards import sharded
from s2o_compile.kernels.sequence.gather import Shard, start_gather
from s2o_compile.kernels.sequence.layout import Layout
from s2o_compile.kernels.sequence.ranks import Ranks
from s2o_compile.kernels.support.arguments import is_one_of, shown
from s2o_compile.kernels.support.errors import InputError

METHODS = ("all_gather", "ulysses")
PIECE_BYTES = 2**30
"""Keys and values that are gathered at a time take about as many bytes, but for a single head that takes more. Three
such pieces are held at most: one is attended to while the next two come."""

FIRST_BYTES = 128 * 2**20
"""The first piece takes so many bytes for each rank: attention waits for it, but with many ranks more for launches."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ShardedSequence:
    """One sequence, and the shards of it that the ranks of a group hold.

    Legend: N positions of the whole sequence, n of this rank's shard.

    Attributes:
        ranks: The group.
        layout: Which positions are whose.
        method: How ranks exchange what attention needs, one of METHODS.
        key_mask: bool [B or 1, N], True where a key may be attended; None for all.
        documents: int64 [B or 1, N], equal inside of a document; None for a sequence that is not packed.
        are_found: Whether documents are found by jumps of positions, and not named.
    """

    ranks: Ranks
    layout: Layout
    method: str = "all_gather"
    key_mask: Tensor | None = None
    documents: Tensor | None = None
    are_found: bool = False
    _agreed: set[str] = field(default_factory=set, init=False, repr=False)
    _compared: list[tuple[Tensor, int | None]] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        check_method(self.method)

    @property
    def count(self) -> int:
        """Positions n of this rank's shard."""
        return self.layout.counts[self.ranks.rank]

    def attending(self) -> AbstractContextManager[None]:
        """A block whose calls of the operator hold this rank's shard of the sequence."""
        return sharded(self)

    def positions(self, device: torch.device | None = None) -> Tensor:
        """Positions of this rank's shard in the sequence, int64 [n], ascending."""
        return self.layout.positions(self.ranks.rank, device)

    def shard(self, x: Tensor, dim: int) -> Tensor:
        """This rank's shard of a tensor that holds the whole sequence in a dimension: [.., N, ..] -> [.., n, ..]."""
        return self.layout.take(x, self.ranks.rank, dim)

    def gather(self, x: Tensor, dim: int) -> Tensor:
        """The whole sequence from everybody's shard, in its order: [.., n, ..] -> [.., N, ..]. Every rank calls it."""
        (whole,), wait = self.start_gather([x], dim % x.dim())
        wait()
        return whole

    def agree(self, what: str, facts: dict[str, object]) -> None:
        """Raise RankError on every rank unless all state these facts; facts that were agreed on cost nothing."""
        key = repr((what, sorted((name, str(fact)) for name, fact in facts.items())))
        if key not in self._agreed:
            self.ranks.agree(what, facts)
            self._agreed.add(key)

    def check_padding(self, key_mask: Tensor | None, version: int | None) -> None:
        """Raise InputError unless a call's key mask, bool [B or 1, n], is this shard of the sequence's. May wait.

        A mask that layers share is compared once, as long as nobody writes into it.
        """
        if key_mask is None or self._is_compared(key_mask, version):
            return
        expected = None if self.key_mask is None else self.shard(self.key_mask, 1)
        same = key_mask.all() if expected is None else (key_mask == expected).all()
        if not same:
            raise InputError(
                "key_mask",
                expected="this rank's shard of the padding of the sequence",
                got="another mask",
                remedy="Pass the padding of the whole sequence as attention_mask or key_mask of the context parallel "
                "block, and none, or its shard, inside.",
            )
        self._compared.append((key_mask, version))

    def check_documents(self, ids: Tensor, version: int | None) -> None:
        """Raise InputError unless a call's ids [B or 1, n] are those of the sequence's documents. May wait.

        They must be equal where these are. A model that finds documents by jumps of positions takes each piece of one
        for another one.
        """
        if self._is_compared(ids, version):
            return
        same = False
        if self.documents is not None:
            expected = self.shard(self.documents.to(ids.device), 1)
            inside = self.positions(ids.device).diff() == 1
            changes, others = ((x[:, 1:] != x[:, :-1]) & inside for x in (ids, expected))
            same = bool((changes == others).all()) and same_documents(ids, expected, may_split=self.are_found)
        if not same:
            raise InputError(
                "documents",
                expected="this rank's shard of the documents of the sequence",
                got="documents that nobody named" if self.documents is None else "other documents",
                remedy="Name those of the whole sequence: shard_sequence(..., documents=ids), or "
                'context_parallel(..., documents="name of the argument").',
            )
        self._compared.append((ids, version))

    def _is_compared(self, x: Tensor, version: int | None) -> bool:
        return any(other is x and at == version is not None for other, at in self._compared)

    def start_gather(
        self, shards: Sequence[Tensor], dim: int = 2, step: int = 1
    ) -> tuple[list[Tensor], Callable[[], None]]:
        """Begin to gather shards [.., n, ..] of every step-th position, as `gather.start_gather` does."""
        layout = self.layout if step == 1 else self.layout.every(step)
        return start_gather(self.ranks, [Shard(x, dim, layout) for x in shards])

    def gathered(
        self, key: Tensor, value: Tensor, heads_at_a_time: int | None = None
    ) -> Iterator[tuple[slice, Tensor, Tensor, Callable[[], None]]]:
        """Whole keys and values [B, h, N, D] of all heads, a few at a time, while the next ones are on their way.

        They are there once the function that comes with them has waited. When the next ones are asked for, the current
        stream must have waited for all that reads these.
        """
        parts = head_pieces(key, value, self.layout, heads_at_a_time)
        begun = [self.start_gather([key[:, part], value[:, part]]) for part in parts[:2]]
        for number, part in enumerate(parts):
            (whole_key, whole_value), wait = begun.pop(0)
            yield part, whole_key, whole_value, wait
            del whole_key, whole_value, wait
            if number + 2 < len(parts):
                begun.append(self.start_gather([x[:, parts[number + 2]] for x in (key, value)]))

    def to_heads(self, x: Tensor) -> Tensor:
        """All heads of a shard [B, H, n, D] -> this rank's share of the heads of the sequence [B, H / W, N, D]."""
        layout, size = self.layout, self.ranks.size
        shares = x.chunk(size, 1)
        sizes = [count * shares[0][:, :, 0].numel() for count in layout.counts]
        parts = self.ranks.all_to_all([share.reshape(-1) for share in shares], sizes)
        whole = x.new_empty(*shares[0].shape[:2], layout.length, *x.shape[3:])
        for rank, (part, count) in enumerate(zip(parts, layout.counts, strict=True)):
            layout.put(part.view(*whole.shape[:2], count, *x.shape[3:]), rank, whole, 2)
        return whole

    def to_shards(self, x: Tensor) -> Tensor:
        """The inverse of `to_heads`: [B, h, N, ...] -> [B, h * W, n, ...]."""
        layout, size = self.layout, self.ranks.size
        sends = [layout.take(x, rank, 2).reshape(-1) for rank in range(size)]
        shape = (*x.shape[:2], self.count, *x.shape[3:])
        each = x[:, :, 0].numel() * self.count
        return torch.cat([part.view(shape) for part in self.ranks.all_to_all(sends, [each] * size)], 1)


def head_pieces(key: Tensor, value: Tensor, layout: Layout, heads_at_a_time: int | None = None) -> list[slice]:
    """The key/value heads [B, H, n, D] of a sequence that are gathered at a time."""
    heads = key.shape[1]
    one = key.shape[0] * layout.length * (key.shape[3] + value.shape[3]) * key.element_size()
    sizes = (min(FIRST_BYTES * layout.ranks, PIECE_BYTES), PIECE_BYTES)
    first, step = (heads_at_a_time or max(size // one, 1) for size in sizes)
    return [slice(0, min(first, heads)), *(slice(at, min(at + step, heads)) for at in range(first, heads, step))]


def check_method(method: object) -> None:
    """Raise InputError unless this is one of METHODS."""
    if is_one_of(method, METHODS):
        return
    ring = is_one_of(method, ("ring",))
    raise InputError(
        "method",
        expected=f"one of {', '.join(map(repr, METHODS))}",
        got=shown(method),
        remedy="A ranking needs the whole prefix, and tau has no meaning for the keys of one rank: a ring cannot have "
        "either. Gather keys and values."
        if ring
        else "Choose one of these names.",
    )
