"""When the error of a call is within its budget, and how far tau falls where it is not (for ``kernels/budget.py``).

    distance[h]   sampled |out - exact|^2 of a head, over the mean of |exact|^2 of all heads, as a root over the budget
    held          if the root mean square of distance over the heads is at most MARGIN: then all heads are done
    tau[h]        else, of a head whose own distance is above it, times (AIM / distance) ** STEEPNESS, but at most the
                  round's largest step

The budget is that of the output as a whole, as the report shows it: a head with a small output may be more off.
`tau_for` says where to begin in a model that was not calibrated.
"""

from __future__ import annotations

import itertools
import math
from functools import lru_cache

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


MEASURED = ((0.0052, 0.02), (0.0086, 0.05), (0.0147, 0.12), (0.0236, 0.25), (0.0374, 0.5), (0.0595, 1.0), (0.0881, 2.0))
"""Error of an attention, mean over layers, and tau: SmolLM2-135M at 64K tokens, where errors are larger than at 16K
(H100, bfloat16). The worst layer is off by two to four times the mean. The ranking kept 30 of 64 dimensions then, and
less than half of them it still keeps of larger heads; with the 62 of now, errors are 12 to 18 % lower."""


BEGIN, LARGEST_TAU = 1.5, 3.0
"""Where a call with nothing but a budget begins: over the tau that the budget stands for, and at most where a larger
tau would hardly change anything."""


@lru_cache(maxsize=1024)
def first_tau(error: float) -> float:
    """Where a call begins that is given nothing but a budget; 0 for 0."""
    return min(BEGIN * tau_for(error), LARGEST_TAU)


def tau_for(error: float) -> float:
    """Tau at which an attention's output is off by this relative L2 error, mean over layers; 0 for 0."""
    if error == 0.0:
        return 0.0
    points = [(math.log(at), math.log(tau)) for at, tau in MEASURED]
    x = math.log(error)
    between = (pair for pair in itertools.pairwise(points) if x <= pair[1][0])
    (x0, y0), (x1, y1) = next(between, (points[-2], points[-1]))
    return math.exp(y0 + (y1 - y0) * (x - x0) / (x1 - x0))
