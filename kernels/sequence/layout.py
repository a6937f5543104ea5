"""Which positions of a sequence a rank holds: pieces in a zigzag over the ranks, cut where segments begin.

Under a causal mask the work of a position grows with it. Pieces 0, 1, .., W-1, W-1, .., 1, 0 give each of W ranks a
short and a long one ("head-tail"). Early stop makes the work depend on the data, too: several turns even that out,
because neighbouring segments cost about the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from s2o_compile.kernels.core.plan import TILE_LEN
from s2o_compile.kernels.support.errors import InputError

SWEEPS = {1: "+-", 2: "+-+-", 4: "++-+-+--"}
"""Directions in which the ranks are dealt one piece each, by turns of the zigzag; a turn gives a rank two pieces.

As many go up as down, and pairs under a causal mask are even. Of all such orders of four turns this one came out first
on SmolLM2 for 8 ranks (8K in 64 segments, worst layer): 1.085 times the mean on prose and 1.086 on code. Alternating
gives 1.135 and 1.104, two turns 1.115 and 1.103, one turn 1.155 and 1.216."""

MANY_RANKS = 8
"""Ranks from which four turns are dealt instead of two. With 4 ranks two give 1.08 and 1.07, with 2 ranks 1.03 and 1.05
(the same); more pieces cost launches."""


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
    def zigzag(cls, length: int, ranks: int, *, units: tuple[int, ...], turns: int | None = None) -> Layout:
        """Pieces of whole units, as even as these allow.

        Args:
            length: Positions of the whole sequence.
            ranks: Number of ranks W.
            units: Lengths that every piece but the last is a multiple of: the first that gives every rank two pieces.
            turns: Turns of the zigzag at most; None for four, or two where there are few ranks.

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
        most = turns or (4 if ranks >= MANY_RANKS else 2)
        most = min(most, -(-length // fitting[0]) // (2 * ranks))
        candidates = [
            cls.turns(length, ranks, fitting[0], turns) for turns in sorted(SWEEPS, reverse=True) if turns <= most
        ]
        return min(candidates, key=lambda layout: round(layout.causal_imbalance, 2))  # of equals the most turns

    @classmethod
    def turns(cls, length: int, ranks: int, unit: int, turns: int) -> Layout:
        """Pieces of whole units in 1, 2 or 4 turns of the zigzag; there are two or more a rank and turn."""
        parts, count = -(-length // unit), 2 * ranks * turns
        ends = [min(parts * number // count * unit, length) for number in range(count + 1)]
        pieces: list[list[slice]] = [[] for _ in range(ranks)]
        for number in range(count):
            sweep, at = divmod(number, ranks)
            rank = at if SWEEPS[turns][sweep] == "+" else ranks - 1 - at
            pieces[rank].append(slice(ends[number], ends[number + 1]))
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

    def every(self, step: int) -> Layout:
        """The layout of every step-th position alone: of samples, or of blocks that pieces hold whole."""
        pieces = (tuple(slice(-(-p.start // step), -(-p.stop // step)) for p in mine) for mine in self.pieces)
        return Layout(length=-(-self.length // step), pieces=tuple(pieces))

    @cached_property
    def in_order(self) -> list[tuple[int, slice]]:
        """Every piece in the order of positions: its rank and its place in that rank's shard."""
        placed = [(whole.start, rank, mine) for rank in range(self.ranks) for whole, mine in self.runs(rank)]
        return [(rank, mine) for _, rank, mine in sorted(placed, key=lambda piece: piece[0]) if mine.start < mine.stop]

    def samples(self, x: Tensor, rank: int, step: int) -> Tensor:
        """Every step-th position of a sequence in a rank's shard [B, H, n, D], as ``every(step)`` lays them out."""
        found = (x[:, :, mine.start + -whole.start % step : mine.stop : step] for whole, mine in self.runs(rank))
        return torch.cat(list(found), 2)

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
