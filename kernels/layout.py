"""The output's memory layout: SDPA's own, because legal code behind it (``.transpose(1, 2).view(...)``) relies on it."""

from __future__ import annotations

import torch
from torch import Tensor


def _cpu_follows_query() -> bool:
    """Whether SDPA's CPU kernel lays its output out as the query; it has changed between torch versions, so ask it."""
    probe = torch.zeros(1, 2, 3, 4)
    return torch.nn.functional.scaled_dot_product_attention(probe, probe, probe).stride() == probe.stride()


CPU_FOLLOWS_QUERY = _cpu_follows_query()


def empty_output(query: Tensor) -> Tensor:
    """Uninitialised output for a query [B, H, N, D], laid out as SDPA lays out its own.

    SDPA follows the query, [B, H, N, D] or [B, N, H, D] in memory; some CPU versions always write the latter.
    """
    batch, heads, length, dim = query.shape
    follows = query.device.type != "cpu" or CPU_FOLLOWS_QUERY
    if not follows or query.stride(1) < query.stride(2):
        return query.new_empty(batch, length, heads, dim).transpose(1, 2)
    return query.new_empty(batch, heads, length, dim)


def as_sdpa(output: Tensor, query: Tensor) -> Tensor:
    """The output itself if it is laid out as ``empty_output(query)``, else a copy that is: the graph counts on it."""
    expected = empty_output(query)
    return output if output.stride() == expected.stride() else expected.copy_(output)
