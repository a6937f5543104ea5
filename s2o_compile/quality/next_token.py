"""Two models' predictions of the next token, compared."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

PIECE_ROWS = 512
"""Rows of logits that are float32 at a time: those of a long prompt fill many GiB."""


@dataclass
class NextToken:
    """Sums over predicted tokens: losses and Kullback-Leibler divergences in nats, and how often the best agree."""

    tokens: int = 0
    loss_dense: float = 0.0
    loss_s2o: float = 0.0
    agreed: float = 0.0
    kl: float = 0.0

    def add(self, dense: Tensor, s2o: Tensor, ids: Tensor, counted: Tensor) -> None:
        """Compare logits.

        Args:
            dense: Logits [B, N, V].
            s2o: Logits [B, N, V].
            ids: int64 [B, N], the tokens themselves: row i predicts token i + 1.
            counted: bool [B, N], which tokens count as predicted; the first never does.
        """
        sums = torch.zeros(5, dtype=torch.float64, device=dense.device)
        places = (place.split(PIECE_ROWS) for place in counted[:, 1:].nonzero(as_tuple=True))
        for row, place in zip(*places, strict=True):
            target = ids[row, place + 1][:, None]
            theirs, ours = (logits[row, place].float().log_softmax(-1) for logits in (dense, s2o))
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
