"""Keeps the error of a call below a ceiling while it runs: measure, go on where it fails, measure again.

Sampled queries, attended exactly, say how far the output of each head is off. ``core/budget_rule.py`` says which heads
go on, and with what tau. All of it stays on the device: the host does not wait, a CUDA graph can hold it, and the same
call gives the same bits. Work is bounded: a tile that goes on visits only keys that it has not visited, so no head
costs more than all its keys. A call that runs in slices (``schedule``) holds its budget in each of them.

A GPU gets every round, needed or not. On a CPU the host looks, and ends with the round that finds the budget held.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from s2o_compile.kernels.core.budget_rule import LARGEST_TAU, lower_tau, tau_for
from s2o_compile.kernels.core.call import AttentionCall
from s2o_compile.kernels.core.plan import Plan
from s2o_compile.kernels.core.result import Result, empty_progress
from s2o_compile.kernels.exact.sampled import ExactRows, error_sums


class Rounds(NamedTuple):
    """How a budget is held.

    Attributes:
        samples: Sampled queries of each head.
        steps: Largest factor of tau in each round; the last one leaves no key out.
    """

    samples: int
    steps: tuple[float, ...]


ROUNDS = Rounds(256, (0.8, 0.6, 0.4, 0.15, 0.0))
"""Where the budget decides. A head that hardly reacts takes larger steps."""

ONE_OF, MOST = 16, 1024
"""Of long slices one of so many queries is sampled, and at most so many. Errors have long tails: in some layers 1 % of
the rows hold nine tenths of the squared error, and 256 queries saw less than half of it (64K tokens)."""

FEW_ROUNDS = Rounds(128, (0.5, 0.0))
"""Where the first tau nearly always holds: each round costs a GPU four launches, also where nothing goes on."""

CAUTIOUS = 0.25
"""Share of the tau that a budget stands for, up to which the first tau nearly always holds it."""


def rounds_for(tau: float | Tensor, error: float, n_queries: int) -> Rounds:
    """The rounds of a slice of so many queries that begins at this tau."""
    if not isinstance(tau, Tensor) and tau <= CAUTIOUS * tau_for(error):
        return FEW_ROUNDS
    return ROUNDS._replace(samples=min(max(n_queries // ONE_OF, ROUNDS.samples), MOST))


class Sampler(NamedTuple):
    """The steps of a measurement, in one executor's language.

    Attributes:
        attend_rows: As ``exact.sampled.attend_rows``.
        error_sums: As ``exact.sampled.error_sums``.
        first_tau: `first_tau` below, or the same on a GPU.
        lowering: Gives what measures, then lowers tau: `lowering` below, or the same on a GPU.
    """

    attend_rows: Callable[[AttentionCall, int], ExactRows]
    error_sums: Callable[[AttentionCall, ExactRows, Tensor, Tensor], Tensor]
    first_tau: Callable[[AttentionCall, float | Tensor], Tensor]
    lowering: Callable[[AttentionCall, ExactRows, Result, Tensor, Tensor, float], Callable[[float], None]]


def first_tau(call: AttentionCall, tau: float | Tensor) -> Tensor:
    """One tau, or float32 [Hq] or [B, Hq], as new float32 [B, Hq]; by torch."""
    shape = call.query.shape[:2]
    if isinstance(tau, Tensor):
        return tau.expand(shape).clone(memory_format=torch.contiguous_format)
    return torch.full(shape, tau, dtype=torch.float32, device=call.query.device)


def lowering(
    call: AttentionCall, exact: ExactRows, into: Result, tau: Tensor, limit: Tensor, error: float
) -> Callable[[float], None]:
    """What lowers tau and says where tiles stop by the error of ``into``, each time it is called; by torch.

    It takes the largest factor of tau in a round. The others are arguments of ``budget_rule.lower_tau``.
    """
    return lambda largest: lower_tau(error_sums(call, exact, into.output, into.lse), tau, limit, error, largest)


def attend_within(
    call: AttentionCall,
    plan: Plan,
    tau: float | Tensor,
    error: float,
    executor: Any,  # noqa: ANN401 (a module)
    sampler: Sampler,
    into: Result,
) -> None:
    """Attention over a plan, its sampled error within the budget.

    Args:
        call: Its mask has no window.
        plan: Ranked key indices of every segment.
        tau: Where to begin; one number, or float32 [Hq] from a calibration.
        error: The budget, a relative L2 error > 0.
        executor: The module ``forward`` of ``impl.torch``, ``impl.cpp`` or ``impl.triton``.
        sampler: What measures, in the executor's language.
        into: Where the results go.
    """
    rounds = rounds_for(tau, error, call.n_queries)
    exact = sampler.attend_rows(call, rounds.samples)
    tau = sampler.first_tau(call, tau if isinstance(tau, Tensor) else min(tau, LARGEST_TAU))
    limit, progress = torch.empty_like(tau), empty_progress(call.query)
    executor.attend(call, plan, tau, into, progress)
    lower = sampler.lowering(call, exact, into, tau, limit, error)
    go_on = executor.going_on(call, plan, limit, into, progress)
    for largest in rounds.steps:
        lower(largest)
        if limit.is_cpu and limit.isinf().all():  # the host of a GPU must not wait to look
            break
        go_on()
