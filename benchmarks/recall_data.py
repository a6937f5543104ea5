"""Sequences that ask a model for what it read long before: strings of symbols in text, each twice.

A row begins with a token of its own and holds text, the bytes of Python's standard library. Strings of symbols
overwrite some of it. A symbol stands in one string only, and a string stands in the row twice. So the tokens of its
second occurrence, without the first one, follow from one earlier place alone. They are the row's *answers*.

    associative recall   strings of two symbols, key and value
    copying              longer strings
"""

from __future__ import annotations

import argparse
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

PAIR = 2
COPIED = (4, 8, 16, 32)
"""Symbols of a string: of associative recall, and of copying."""

PAIRS = 0.75
"""Share of the batches of training that hold pairs; the others copy."""

FILLED = (1.0, 0.5, 0.25)
"""Shares of the strings that fit into a row of training."""

SKIPS = 4
SKIP_EVERY = max(COPIED)
"""Skips of positions in a row, and the positions at which they may be: between strings."""


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """Tokens: letters from 0 on, the token that begins a row, symbols."""

    letters: int = 256
    symbols: int = 1024

    @property
    def begin(self) -> int:
        """The token at position 0."""
        return self.letters

    @property
    def size(self) -> int:
        """Tokens, rounded up to a size that matrix products like."""
        return -(-(self.letters + 1 + self.symbols) // 64) * 64


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Token ids and what they ask for.

    Attributes:
        ids: int64 [B, N].
        positions: int64 [B, N], ascending; they skip some where a row should look longer than it is.
        answers: bool [B, N], the tokens whose next token is an answer.
        text: bool [B, N], the tokens whose next token is text.
    """

    ids: Tensor
    positions: Tensor
    answers: Tensor
    text: Tensor


class Source:
    """Makes batches on a device. The same seed makes the same ones on a device of the same type."""

    def __init__(self, vocabulary: Vocabulary, text: Tensor, *, seed: int) -> None:
        self._vocabulary, self._text, self._device = vocabulary, text, text.device
        self._generator = torch.Generator(text.device).manual_seed(seed)
        self._random = random.Random(seed)  # decides shapes, without a wait for the device

    def training(self, rows: int, length: int, *, longest: int) -> Batch:
        """Strings anywhere in a row. Half of the rows skip positions, up to ``longest``."""
        copied = [size for size in COPIED if size * 8 <= length] or [PAIR]
        string = PAIR if self._random.random() < PAIRS else self._random.choice(copied)
        most = min(self._vocabulary.symbols // string, (length // string - 1) // 2)
        count = max(1, int(most * self._random.choice(FILLED)))
        places = self._choose(rows, 1, length // string, 2 * count).view(rows, count, 2)
        ids = self._text_rows(rows, length)
        return self._plant(ids, string, places.amin(-1), places.amax(-1), self._positions(rows, length, longest))

    def far(self, rows: int, length: int, *, count: int, string: int = PAIR) -> Batch:
        """Strings in the first half of a row, and again, in another order, in its last quarter."""
        slots = length // string
        count = min(count, slots // 4, self._vocabulary.symbols // string)
        first = self._choose(rows, 1, slots // 2, count)
        second = self._choose(rows, slots - slots // 4, slots, count)
        ids = self._text_rows(rows, length)
        return self._plant(ids, string, first, second, self._positions(rows, length, length))

    def _choose(self, rows: int, low: int, high: int, count: int) -> Tensor:
        """Different numbers from ``low`` to ``high - 1`` in random order, [rows, count]."""
        return self._uniform(rows, high - low).argsort(-1)[:, :count] + low

    def _uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self._generator, device=self._device)

    def _text_rows(self, rows: int, length: int) -> Tensor:
        starts = (self._uniform(rows, 1) * (len(self._text) - length)).long()
        ids = self._text[starts + torch.arange(length, device=self._device)].long() % self._vocabulary.letters
        ids[:, 0] = self._vocabulary.begin
        return ids

    def _plant(self, ids: Tensor, string: int, first: Tensor, second: Tensor, positions: Tensor) -> Batch:
        """Write random strings into the slots ``first`` and ``second`` [rows, count]; a slot is as long as a string."""
        rows, count = first.shape
        symbols = self._choose(rows, 0, self._vocabulary.symbols, count * string) + self._vocabulary.begin + 1
        inside = torch.arange(string, device=self._device)
        for slots in (first, second):
            ids.scatter_(1, (slots[..., None] * string + inside).flatten(1), symbols)
        answers, text = (torch.zeros_like(ids, dtype=torch.bool) for _ in range(2))
        answers.scatter_(1, (second[..., None] * string + inside[:-1]).flatten(1), True)
        text[:, :-1] = ids[:, 1:] < self._vocabulary.letters
        return Batch(ids=ids, positions=positions, answers=answers, text=text)

    def _positions(self, rows: int, length: int, longest: int) -> Tensor:
        """Positions [rows, length] below ``longest``, which a few skips bring anywhere near it in half of the rows.

        So short rows train distances of long ones (PoSE, arXiv 2309.10400).
        """
        positions = torch.arange(length, device=self._device).expand(rows, length)
        if longest <= length:
            return positions
        share = self._uniform(rows, SKIPS)
        skipping = (self._uniform(rows, 1) < 0.5) * self._uniform(rows, 1) * (longest - length)
        skips = (share / share.sum(-1, keepdim=True) * skipping).long()
        places = (self._uniform(rows, SKIPS) * (length // SKIP_EVERY)).long() * SKIP_EVERY
        return positions + torch.zeros_like(positions).scatter_add(1, places, skips).cumsum(-1)


def library_text(device: str | torch.device) -> tuple[Tensor, Tensor]:
    """Bytes of the installed Python's standard library, uint8: to train on, and the last tenth to judge on."""
    files = sorted(Path(argparse.__file__).parent.glob("*.py"))
    text = torch.frombuffer(bytearray(b"\n".join(file.read_bytes() for file in files)), dtype=torch.uint8).to(device)
    cut = len(text) * 9 // 10
    return text[:cut], text[cut:]
