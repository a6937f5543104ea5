"""The output's memory layout: SDPA's own, because legal code behind it (``.transpose(1, 2).view(...)``) relies on it."""

from __future__ import annotations

import torch
from torch import Tensor


def empty_output(query: Tensor) -> Tensor:
    """Uninitialised output for a query [B, H, N, D], laid out as SDPA lays out its own.

    SDPA's CPU kernel always writes [B, N, H, D] and returns the transposed view; its CUDA kernels follow the query.
    """
    batch, heads, length, dim = query.shape
    if query.device.type == "cpu" or query.stride(1) < query.stride(2):
        return query.new_empty(batch, length, heads, dim).transpose(1, 2)
    return query.new_empty(batch, heads, length, dim)


def as_sdpa(output: Tensor, query: Tensor) -> Tensor:
    """The output itself if it is laid out as ``empty_output(query)``, else a copy that is: the graph counts on it."""
    expected = empty_output(query)
    return output if output.stride() == expected.stride() else expected.copy_(output)
