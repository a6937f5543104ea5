"""Attention sinks: one more logit for each query head, which takes its share of the mass and brings nothing (gpt-oss).

    out_i  <-  out_i exp(lse_i) / (exp(lse_i) + exp(sink)),    lse_i  <-  log(exp(lse_i) + exp(sink))

So they need no kernel, only the log-sum-exp. The stop rule does not know them: it stops later than it might.
"""

from __future__ import annotations

import torch
from torch import Tensor


def add_sinks(output: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """Let sinks take part.

    Args:
        output: [..., Hq, Nq, Dv], overwritten.
        lse: float32 [..., Hq, Nq].
        sinks: Floating, [Hq] or with leading dimensions that broadcast.

    Returns:
        The output and its log-sum-exp; a row that sees no key has zeros and the sink.
    """
    return output.mul_(sink_share(lse, sinks)[..., None]), torch.logaddexp(lse, sinks.float()[..., None])


def sink_share(lse: Tensor, sinks: Tensor) -> Tensor:
    """What is left of every row's output, float32 [..., Hq, Nq]; arguments as `add_sinks`."""
    kept = torch.sigmoid(lse - sinks.float()[..., None])
    return kept.masked_fill(lse == float("-inf"), 0.0)  # also where the sink is -inf itself, which is no sink at all
