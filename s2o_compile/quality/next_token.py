"""Two models' predictions of the next token, compared."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from s2o_compile.quality import logits as piece
from s2o_compile.quality.logits import Logits


@dataclass
class NextToken:
    """Sums over predicted tokens: losses and Kullback-Leibler divergences in nats, and how often the best agree."""

    tokens: int = 0
    loss_dense: float = 0.0
    loss_s2o: float = 0.0
    agreed: float = 0.0
    kl: float = 0.0

    def add(self, dense: Logits, s2o: Logits, ids: Tensor, counted: Tensor) -> None:
        """Compare logits, those of a few tokens at a time.

        Args:
            dense: Of B x N tokens.
            s2o: Of the same tokens.
            ids: int64 [B, N], the tokens themselves: row i predicts token i + 1.
            counted: bool [B, N], which tokens count as predicted; the first never does.
        """
        sums = torch.zeros(5, dtype=torch.float64, device=ids.device)
        length = max(1, piece.PIECE_BYTES // (4 * dense.vocabulary))
        predicting = ((row, of_row.nonzero()[:, 0]) for row, of_row in enumerate(counted[:, 1:]))
        for row, place in ((row, part) for row, places in predicting for part in places.split(length)):
            target = ids[row, place + 1][:, None]
            theirs, ours = (logits.at(row, place).float().log_softmax(-1) for logits in (dense, s2o))
            apart = torch.where(theirs == -torch.inf, 0.0, theirs - ours)  # ruled out by the model in both
            figures = (
                torch.ones_like(target),
                -theirs.gather(1, target),
                -ours.gather(1, target),
                theirs.argmax(-1) == ours.argmax(-1),
                theirs.exp() * apart,
            )
            sums += torch.stack([figure.sum(dtype=torch.float64) for figure in figures])
        tokens, *others = sums.tolist()
        self.tokens += int(tokens)
        for name, value in zip(("loss_dense", "loss_s2o", "agreed", "kl"), others, strict=True):
            setattr(self, name, getattr(self, name) + value)

    def mean(self, name: str) -> float:
        """One of the sums over the number of tokens."""
        return getattr(self, name) / max(self.tokens, 1)
