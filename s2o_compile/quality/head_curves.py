"""Error and density of every head of a site against tau, and which taus keep a budget at the least density."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from s2o_compile.kernels.observe import ObservedCall
from s2o_compile.quality.error_sums import ErrorSums

STEPS = 8
"""Taus tried between two measured ones. Error and density there are interpolated."""

FLOOR = 1e-4
"""Errors of a head below this are treated as equal."""

HEAD_SHARE = 2.0
"""No head may be off by more than this many budgets, however little it weighs in its layer."""

RATE = 0.8
"""Pairs that S2O computes in the time in which a dense kernel computes one (H100), its ranking of keys not counted."""

DENSE_FROM = 0.75
"""Mean density of a group from which it runs dense: beyond it nothing is left of RATE once keys are ranked."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Settings for a site.

    Attributes:
        tau: Of every query head.
        dense_heads: Key/value heads that run dense.
        error: Relative L2 error of the site's output on the calibration text.
        density: Computed over visible query-key pairs there; heads that run dense count 1.
        time: Of the site over that of dense attention, by RATE.
    """

    tau: tuple[float, ...]
    dense_heads: tuple[int, ...]
    error: float
    density: float
    time: float


class HeadCurves:
    """Errors and densities of a site's heads at several taus, ascending and positive: ``sums`` over its calls."""

    def __init__(self, taus: Sequence[float], kv_heads: int) -> None:
        self.taus, self.kv_heads, self.sums = tuple(taus), kv_heads, ErrorSums()

    def add(self, call: ObservedCall, exact: Tensor) -> None:
        """Run a call at every tau and compare with its exact output [B, Hq, Nq, Dv], sinks put into both."""
        self.sums.add(call, (call.run(tau=tau, dense_heads=()) for tau in self.taus), call.with_sinks(exact))

    def choose(self, budget: float) -> Choice:
        """The taus of the least density at which the site's error is ``budget``, a relative L2 error of all heads.

        Heads share the budget: one that saves much by a small error gets more of it than one that saves little, up to
        HEAD_SHARE. A group that stays nearly dense is marked dense, and the others share the budget that it leaves.
        """
        power = self.sums.power.cpu().clamp(min=torch.finfo(torch.float64).tiny)
        heads = len(power)
        taus, difference, density = self._refined(power)
        allowed = difference <= (HEAD_SHARE * budget) ** 2 * power
        density = density.masked_fill(~allowed, math.inf)
        exact = torch.zeros(1, heads, dtype=torch.float64)  # the last resort of every head: never to stop
        taus, difference = torch.cat([exact[:, :1], taus[:, None]])[:, 0], torch.cat([exact, difference])
        density = torch.cat([exact + 1.0, density])
        group = heads // self.kv_heads
        dense: set[int] = set()
        while True:
            kept = [head for head in range(heads) if head // group not in dense]
            place = _share(difference[:, kept], density[:, kept], budget**2 * power.sum().item())
            chosen = torch.zeros(heads, dtype=torch.int64)
            chosen[kept] = place
            cost = density.gather(0, chosen[None])[0]
            fuller = {g for g, mean in enumerate(cost.view(-1, group).mean(1).tolist()) if mean >= DENSE_FROM}
            if fuller <= dense:
                break
            dense |= fuller
        error = (difference.gather(0, chosen[None]).sum() / power.sum()).sqrt().item()
        return Choice(
            tau=tuple(float(f"{taus[at]:.4g}") for at in chosen.tolist()),
            dense_heads=tuple(sorted(dense)),
            error=error,
            density=cost.mean().item(),
            time=torch.where(cost < 1.0, cost / RATE, cost).mean().item(),
        )

    def _refined(self, power: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Taus, and difference and density [taus, Hq] there: monotonic, and interpolated between measured taus."""
        # A floor under differences near zero, from where interpolated logarithms would promise too little.
        floor = FLOOR**2 * power
        difference = torch.maximum(self.sums.difference.cpu().cummax(0).values, floor)
        density = self.sums.densities().cpu().cummin(0).values
        share = torch.arange(STEPS, dtype=torch.float64) / STEPS

        def fill(x: Tensor) -> Tensor:
            """[taus, ...] -> [(taus - 1) * STEPS + 1, ...]."""
            between = x[:-1, None] + (x[1:] - x[:-1])[:, None] * share.view(-1, *[1] * (x.dim() - 1))
            return torch.cat([between.flatten(0, 1), x[-1:]])

        taus = torch.tensor(self.taus, dtype=torch.float64).log()
        return fill(taus).exp(), fill(difference.log()).exp(), fill(density)


def _share(difference: Tensor, density: Tensor, budget: float) -> Tensor:
    """Row of each head: the least sum of density at which the differences sum to at most ``budget``.

    Where density is convex in the difference, the heads of that optimum all trade one for the other at the same price;
    it is found by bisection.
    """
    heads = torch.arange(difference.shape[1])
    low, high = -80.0, 80.0  # logarithm of the price of a difference, in densities a power
    for _ in range(60):
        middle = (low + high) / 2
        place = (density + difference * math.exp(middle)).argmin(0)
        if difference[place, heads].sum() > budget:
            low = middle
        else:
            high = middle
    return (density + difference * math.exp(high)).argmin(0)
