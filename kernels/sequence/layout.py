"""Which positions of a sequence a rank holds: pieces in a zigzag over the ranks, cut where segments begin.

Under a causal mask the work of a position grows with it. Pieces 0, 1, .., W-1, W-1, .., 1, 0 give each of W ranks a
short and a long one ("head-tail"). Early stop makes the work depend on the data, too: several rounds of the zigzag even
that out, because neighbouring segments cost about the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from s2o_compile.kernels.core.plan import TILE_LEN
from s2o_compile.kernels.support.errors import InputError

ROUNDS = 2
"""Turns of the zigzag at most, where the sequence is long enough. On SmolLM2 (8K in 64 segments) two give ranks pairs
of 1.01 (2 ranks) to 1.06 (8) times the mean in the mean layer; one gives 1.02 to 1.07, and more give nothing."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The shards of a sequence.

    Attributes:
        length: Positions of the whole sequence.
        pieces: By rank, its runs of positions, ascending; none is empty.
    """

    length: int
    pieces: tuple[tuple[slice, ...], ...]

    @classmethod
    def zigzag(cls, length: int, ranks: int, *, units: tuple[int, ...], rounds: int = ROUNDS) -> Layout:
        """Pieces of whole units, as even as these allow.

        Args:
            length: Positions of the whole sequence.
            ranks: Number of ranks W.
            units: Lengths that every piece but the last is a multiple of: the first that gives every rank two pieces.
            rounds: Turns of the zigzag at most; each gives a rank two pieces.

        Raises:
            InputError: The sequence is too short to be shared out.
        """
        fitting = [unit for unit in units if -(-length // unit) >= 2 * ranks]
        if not fitting:
            raise InputError(
                "length of the sequence",
                expected=f"at least {2 * ranks * units[-1] - units[-1] + 1} tokens for {ranks} ranks",
                got=length,
                remedy="Attend on one rank, outside of the block.",
            )
        parts = -(-length // fitting[0])
        most = max(min(rounds, parts // (2 * ranks)), 1)
        candidates = [cls.turns(length, ranks, fitting[0], turns) for turns in range(most, 0, -1)]
        return min(candidates, key=lambda layout: round(layout.causal_imbalance, 2))  # of equals the most turns

    @classmethod
    def turns(cls, length: int, ranks: int, unit: int, turns: int) -> Layout:
        """Pieces of whole units in so many turns of the zigzag; the sequence has at least two units a rank and turn."""
        parts, count = -(-length // unit), 2 * ranks * turns
        ends = [min(parts * number // count * unit, length) for number in range(count + 1)]
        pieces: list[list[slice]] = [[] for _ in range(ranks)]
        for number in range(count):
            turn = number % (2 * ranks)
            pieces[min(turn, 2 * ranks - 1 - turn)].append(slice(ends[number], ends[number + 1]))
        return cls(length=length, pieces=tuple(map(tuple, pieces)))

    @property
    def ranks(self) -> int:
        """Number of ranks W."""
        return len(self.pieces)

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """Positions of each rank."""
        return tuple(sum(piece.stop - piece.start for piece in mine) for mine in self.pieces)

    @property
    def causal_imbalance(self) -> float:
        """Pairs that the ranks see under a causal mask, the most of one over their mean."""
        pairs = [sum(piece.stop**2 - piece.start**2 for piece in mine) for mine in self.pieces]
        return max(pairs) * self.ranks / sum(pairs)

    def starts_segments(self, segment_len: int) -> bool:
        """Whether every piece begins where a segment of the whole sequence does."""
        return all(piece.start % segment_len == 0 for mine in self.pieces for piece in mine)

    def runs(self, rank: int) -> list[tuple[slice, slice]]:
        """Each piece of a rank as positions of the sequence and as positions in the rank's shard."""
        found, first = [], 0
        for piece in self.pieces[rank]:
            stop = first + piece.stop - piece.start
            found.append((piece, slice(first, stop)))
            first = stop
        return found

    def positions(self, rank: int, device: torch.device | None = None) -> Tensor:
        """Positions of a rank's shard in the sequence, int64 [n]."""
        return torch.cat([torch.arange(piece.start, piece.stop, device=device) for piece in self.pieces[rank]])

    def tile_rows(self, rank: int) -> list[int]:
        """Queries of each tile of a rank, whose tiles begin where its pieces do."""
        lengths = (piece.stop - piece.start for piece in self.pieces[rank])
        return [min(TILE_LEN, length - first) for length in lengths for first in range(0, length, TILE_LEN)]

    def take(self, x: Tensor, rank: int, dim: int) -> Tensor:
        """A rank's shard of a tensor that holds the whole sequence in a dimension."""
        return torch.cat([x.narrow(dim, piece.start, piece.stop - piece.start) for piece in self.pieces[rank]], dim)

    def put(self, shard: Tensor, rank: int, into: Tensor, dim: int) -> None:
        """Write a rank's shard into a tensor of the whole sequence."""
        for whole, mine in self.runs(rank):
            length = whole.stop - whole.start
            into.narrow(dim, whole.start, length).copy_(shard.narrow(dim, mine.start, length))
