"""When the error of a call is within its budget, and how far tau falls where it is not (for ``kernels/budget.py``).

    distance[h]   sampled |out - exact|^2 of a head, over the mean of |exact|^2 of all heads, as a root over the budget
    held          if the root mean square of distance over the heads is at most MARGIN: then all heads are done
    tau[h]        else, of a head whose own distance is above it, times (AIM / distance) ** STEEPNESS, but at most the
                  round's largest step

The budget is that of the output as a whole, as the report shows it: a head with a small output may be more off.
"""

from __future__ import annotations

import torch
from torch import Tensor

MARGIN, AIM = 0.9, 0.85
"""Shares of the budget: where a sampled error is trusted to hold it, and what the next round aims for."""

STEEPNESS = 1.1
"""An error falls about like tau ** (1 / STEEPNESS) (SmolLM2, Gemma-3)."""

LEAST_STEP = 0.1


def lower_tau(sums: Tensor, tau: Tensor, limit: Tensor, error: float, largest: float) -> None:
    """Lower the tau of every head, in place, and say where its tiles stop: at infinity where the head is done.

    Args:
        sums: float32 [2, B, Hq] of ``exact.sampled.error_sums``.
        tau: float32 [B, Hq].
        limit: float32 [B, Hq], written.
        error: The budget, a relative L2 error > 0.
        largest: Largest factor of tau in this round.
    """
    off, size = sums
    distance = torch.where(off == 0, 0.0, off / size.mean(1, keepdim=True)).sqrt() / error
    # NaN is above every limit: what is not known to hold goes on.
    held = (distance <= MARGIN) | (distance.square().mean(1, keepdim=True).sqrt() <= MARGIN)
    tau *= (AIM / distance).pow(STEEPNESS).nan_to_num(0.0).clamp(LEAST_STEP).clamp(max=largest)
    limit.copy_(torch.where(held, torch.inf, tau))
