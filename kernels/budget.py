"""Keeps a call within an error budget while it runs: measure, go on where it fails, measure again.

    distance[h]   sampled |out - exact|^2 of a head, over the mean of |exact|^2 of all heads (``exact.sampled``)
    held          if the mean of distance over the heads is at most (MARGIN * budget)^2: then all heads are done
    tau[h]        else, of a head whose own distance is above it, times (AIM * budget / its root) ** STEEPNESS, but at
                  most STEPS[round]; 0 in the last round, which leaves no key out

The budget is that of the output as a whole, as the report shows it: a head with a small output may be more off.
All of it stays on the device: the host does not wait, a CUDA graph can hold it, and the same call gives the same bits.
Work is bounded: a tile that goes on visits only keys that it has not visited, so no head costs more than all its keys.
A call that runs in slices (``schedule``) holds its budget in each of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from s2o_compile.kernels.core.call import AttentionCall
from s2o_compile.kernels.core.plan import Plan
from s2o_compile.kernels.core.result import Result
from s2o_compile.kernels.exact.sampled import ExactRows, error_sums, relative_error, sample_rows

STEPS = (0.8, 0.6, 0.4, 0.15, 0.0)
"""Largest factor of tau in each round: a head that hardly reacts takes larger steps, the last one to all its keys."""

LEAST_STEP = 0.1

SAMPLES = 256
"""Sampled queries of each head. Errors have long tails: by 64 queries, one at 64K tokens seemed half as large."""

BEGIN, LARGEST_TAU = 1.5, 3.0
"""The first tau: over the one that the budget stands for, and none that could not change much."""

MARGIN, AIM = 0.9, 0.85
"""Shares of the budget: where a sampled error is trusted to hold it, and what the next round aims for."""

STEEPNESS = 1.1
"""An error falls about like tau ** (1 / STEEPNESS) (SmolLM2, Gemma-3)."""


def attend_within(
    call: AttentionCall,
    plan: Plan,
    tau: float | Tensor,
    error: float,
    executor: Any,  # noqa: ANN401 (a module)
    attend_rows: Callable[[AttentionCall, Tensor], ExactRows],
    into: Result,
) -> None:
    """Attention over a plan, its sampled error within the budget.

    Args:
        call: Its mask has no window.
        plan: Ranked key indices of every segment.
        tau: Where to begin; one number, or float32 [Hq] from a calibration.
        error: The budget, a relative L2 error > 0.
        executor: ``impl.torch.forward`` or ``impl.triton.forward``.
        attend_rows: ``exact.sampled.attend_rows``, or the same on the GPU.
        into: Where the results go.
    """
    by_head = isinstance(tau, Tensor)
    exact = attend_rows(call, sample_rows(call.n_queries, call.query.device, SAMPLES))
    tau = torch.zeros_like(exact.lse[:, :, 0]) + tau  # [B, Hq]
    tau = tau if by_head else (tau * BEGIN).clamp(max=LARGEST_TAU)
    progress = executor.begin_progress(call)
    executor.attend(call, plan, tau, into, progress)
    for largest in STEPS:
        off, size = error_sums(call, exact, into.output, into.lse)
        distance = relative_error(off, size.mean(1, keepdim=True)) / error
        # NaN is above every limit: what is not known to hold goes on.
        held = (distance <= MARGIN) | (distance.square().mean(1, keepdim=True).sqrt() <= MARGIN)
        step = (AIM / distance).pow(STEEPNESS).nan_to_num(0.0).clamp(LEAST_STEP).clamp(max=largest)
        tau = tau * step
        executor.attend(call, plan, torch.where(held, torch.inf, tau), into, progress, resume=True)
