"""Errors and densities of one attention, summed over its calls, for `evaluate` and `calibrate`."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from s2o_compile.kernels.core.result import Result
from s2o_compile.kernels.exact.sampled import relative_error
from s2o_compile.kernels.observe import ObservedCall


class ErrorSums:
    """Sums over the calls of a site, for one or several results of each call. They stay on the device of the calls.

    Attributes:
        difference: float64 [results, Hq], squared norms of the differences to the exact output.
        power: float64 [Hq], squared norms of the exact output.
        computed: float64 [results, Hq], computed query-key pairs.
        area: Visible query-key pairs of a head.
    """

    def __init__(self) -> None:
        self.difference, self.power, self.computed = (torch.zeros((), dtype=torch.float64) for _ in range(3))
        self.area = 0.0

    def add(self, call: ObservedCall, results: Iterable[Result], exact: Tensor) -> tuple[Tensor, Tensor]:
        """Add one call by its results, always as many and in the same order, and its exact output with sinks.

        Returns:
            Of the first result, float64 [B, Hq, Nq]: squared norms of the differences, and of the exact output.
        """
        area = call.mask.area(len(exact), call.query.shape[2], call.key.shape[2]).sum().item()
        power, rows, differences, computed = squares(exact), None, [], []
        for result in results:
            own = squares(call.with_sinks(result.output, result.lse), exact)
            rows = own if rows is None else rows
            differences.append(own.sum((0, 2)))
            computed.append(call.densities(result).to(power.device) * area)
        assert rows is not None
        self.difference = torch.stack(differences) + self.difference.to(power.device)
        self.power = power.sum((0, 2)) + self.power.to(power.device)
        self.computed = torch.stack(computed) + self.computed.to(power.device)
        self.area += area
        return rows, power

    def errors(self) -> list[float]:
        """Relative L2 error of all heads together, for every result."""
        return relative_error(self.difference.sum(1), self.power.sum()).tolist()

    def head_errors(self) -> Tensor:
        """Relative L2 error of every head, float64 [results, Hq]."""
        return relative_error(self.difference, self.power)

    def densities(self) -> Tensor:
        """Computed over visible pairs, float64 [results, Hq]."""
        return self.computed / max(self.area, 1.0)


def squares(output: Tensor, exact: Tensor | None = None) -> Tensor:
    """Squared norms float64 [B, Hq, Nq] of an output [B, Hq, Nq, Dv], or of its difference to another.

    One head at a time, to save memory.
    """
    heads = [x.float() if exact is None else x.float() - exact[:, h].float() for h, x in enumerate(output.unbind(1))]
    return torch.stack([head.square().sum(-1).double() for head in heads], 1)
