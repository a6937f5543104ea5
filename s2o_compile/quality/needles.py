"""Needles: random strings of tokens that test whether a model still finds far tokens.

Each needle stands in the first half of a sequence and again, in another order, in the second half. Only the first
occurrence predicts the repeat, so the loss on the repeats shows whether attention still reaches it. This is the hard
case of sparse attention: a few queries need a few far keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from s2o_compile.errors import EvaluationError

NEEDLES = 24
NEEDLE_LEN = 40
LEAST_RECALL = 0.1
"""Nats that a repeat must be easier than the first occurrence for a model to recall needles at all."""


@dataclass(frozen=True, kw_only=True)
class Haystack:
    """Tokens with needles in them.

    Attributes:
        ids: int64 [B, N].
        first: bool [B, N], the tokens of first occurrences.
        repeated: bool [B, N], the tokens of repeats. A needle's own first token is in neither: nothing predicts it.
    """

    ids: Tensor
    first: Tensor
    repeated: Tensor


@dataclass(frozen=True, kw_only=True)
class NeedleRecall:
    """Mean loss on needles, without their first tokens.

    Attributes:
        count: Needles of a sequence.
        length: Tokens of a needle.
        loss_dense: Loss on the repeats, dense.
        loss_s2o: Loss on the repeats, S2O.
        loss_first: Loss on the first occurrences, dense. A model that does not find the needles again loses as much.
    """

    count: int
    length: int
    loss_dense: float
    loss_s2o: float
    loss_first: float

    @property
    def kept(self) -> float | None:
        """Share of dense attention's recall that S2O keeps, from 0 to 1; None if the dense model recalls nothing."""
        recalled = self.loss_first - self.loss_dense
        if not recalled > LEAST_RECALL:
            return None
        return min(max((self.loss_first - self.loss_s2o) / recalled, 0.0), 1.0)


def hide_needles(ids: Tensor, *, seed: int, needles: int = NEEDLES, needle_len: int = NEEDLE_LEN) -> Haystack:
    """Overwrite some tokens of int64 [B, N] by needles, each twice. Every row gets its own.

    Their tokens are drawn from all ids up to the largest in the batch, so the model knows them. The same seed gives the
    same needles at the same places.

    Raises:
        EvaluationError: The batch is too short for them.
    """
    batch, length = ids.shape
    half = length // 2
    cell = half // needles  # each needle lies somewhere in a cell of its own
    if cell < needle_len:
        raise EvaluationError(
            f"needles: expected at least {2 * needles * needle_len} tokens, which hold {needles} needles of "
            f"{needle_len} twice, got {length}. Give longer batches, or needles=False (--no-needles)."
        )
    generator, vocabulary = torch.Generator().manual_seed(seed), int(ids.max()) + 1
    into, first, repeated = ids.cpu().clone(), *(torch.zeros(batch, length, dtype=torch.bool) for _ in range(2))
    for row in range(batch):
        tokens = torch.randint(vocabulary, (needles, needle_len), generator=generator)
        again = torch.randperm(needles, generator=generator)
        for begin, order, marks in ((0, torch.arange(needles), first), (half, again, repeated)):
            starts = torch.randint(cell - needle_len + 1, (needles,), generator=generator)
            starts += begin + cell * torch.arange(needles)
            places = starts[:, None] + torch.arange(needle_len)
            into[row, places] = tokens[order]
            marks[row, places[:, 1:]] = True
    return Haystack(ids=into.to(ids.device), first=first.to(ids.device), repeated=repeated.to(ids.device))
