"""Planted strings: does a model still find what it read long ago?

Random strings of tokens stand in the first half of a text and once more, in another order, in the second. Nothing but
their first occurrence foretells a repeat, so the loss on the repeats says whether attention still reaches it. It is the
hard case of sparse attention: a few queries want a few far keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from s2o_compile.errors import EvaluationError

STRINGS = 24
STRING_LEN = 40


@dataclass(frozen=True, kw_only=True)
class Planted:
    """Tokens with planted strings.

    Attributes:
        ids: int64 [B, N].
        first: bool [B, N], the tokens of first occurrences.
        repeated: bool [B, N], the tokens of repeats. A string's own first token is in neither: nothing foretells it.
    """

    ids: Tensor
    first: Tensor
    repeated: Tensor


@dataclass(frozen=True, kw_only=True)
class PlantedRecall:
    """Mean loss on planted strings, their first tokens apart.

    Attributes:
        strings: Strings of a text.
        string_len: Tokens of a string.
        loss_dense: On the repeats, dense.
        loss_s2o: On the repeats, S2O.
        loss_first: Where the strings stand first, dense: what a model loses that does not find them again.
    """

    strings: int
    string_len: int
    loss_dense: float
    loss_s2o: float
    loss_first: float


def plant(ids: Tensor, *, seed: int, strings: int = STRINGS, string_len: int = STRING_LEN) -> Planted:
    """Overwrite some tokens by random strings, each twice; every row gets its own.

    Their tokens are drawn from all ids up to the largest in the text, so the model knows them.

    Args:
        ids: int64 [B, N].
        seed: The same seed gives the same strings at the same places.
        strings: Strings of a row.
        string_len: Tokens of a string.

    Raises:
        EvaluationError: The text is too short for them.
    """
    batch, length = ids.shape
    half = length // 2
    cell = half // strings  # a string lies somewhere in a cell of its own
    if cell < string_len:
        raise EvaluationError(
            f"planted: expected at least {2 * strings * string_len} tokens, which hold {strings} strings of "
            f"{string_len} twice, got {length}. Give longer batches, or planted=False (--no-planted)."
        )
    generator, vocabulary = torch.Generator().manual_seed(seed), int(ids.max()) + 1
    into, first, repeated = ids.cpu().clone(), *(torch.zeros(batch, length, dtype=torch.bool) for _ in range(2))
    for row in range(batch):
        texts = torch.randint(vocabulary, (strings, string_len), generator=generator)
        again = torch.randperm(strings, generator=generator)
        for begin, order, marks in ((0, torch.arange(strings), first), (half, again, repeated)):
            starts = torch.randint(cell - string_len + 1, (strings,), generator=generator)
            starts += begin + cell * torch.arange(strings)
            places = starts[:, None] + torch.arange(string_len)
            into[row, places] = texts[order]
            marks[row, places[:, 1:]] = True
    return Planted(ids=into.to(ids.device), first=first.to(ids.device), repeated=repeated.to(ids.device))
