"""The memory layout of outputs is SDPA's own: legal code behind them (``.transpose(1, 2).view(...)``) relies on it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

_PROBE = torch.zeros(1, 2, 3, 4)
CPU_FOLLOWS_QUERY = scaled_dot_product_attention(_PROBE, _PROBE, _PROBE).stride() == _PROBE.stride()
"""Whether SDPA's CPU kernel lays its output out as the query. That differs between torch versions, so ask it."""


def empty_output(query: Tensor, value_dim: int, layout: str = "auto") -> Tensor:
    """Uninitialised output [B, H, N, Dv] for a query [B, H, N, D], laid out as SDPA lays out its own.

    SDPA's flash and cuDNN kernels follow the query. Its memory-efficient kernel, which takes float32, and some CPU
    versions always write [B, N, H, D]. Where Dv is not D plain matrix products serve the CPU, and write [B, H, N, Dv].
    A layout other than "auto" is the order of the attention that is replaced, "BHND" or "BNHD".
    """
    batch, heads, length, _ = query.shape
    if memory_order(query, value_dim, layout) == "BNHD":
        return query.new_empty(batch, length, heads, value_dim).transpose(1, 2)
    return query.new_empty(batch, heads, length, value_dim)


def memory_order(query: Tensor, value_dim: int, layout: str = "auto") -> str:
    """The order of ``empty_output``, "BHND" or "BNHD"; arguments as there."""
    if layout != "auto":
        return layout
    on_cpu = query.is_cpu
    if on_cpu and value_dim != query.shape[3]:
        return "BHND"
    follows = CPU_FOLLOWS_QUERY if on_cpu else query.dtype != torch.float32
    return "BHND" if follows and query.stride(1) >= query.stride(2) else "BNHD"


def as_sdpa(output: Tensor, query: Tensor, layout: str = "auto") -> Tensor:
    """The output itself if it lies as ``empty_output`` says, else a copy that does: the graph counts on it."""
    _, heads, length, value_dim = output.shape
    order = memory_order(query, value_dim, layout)
    inner = (value_dim, heads * value_dim) if order == "BNHD" else (length * value_dim, value_dim)
    if output.stride() == (heads * length * value_dim, *inner, 1):
        return output
    if order == "BNHD":
        return output.transpose(1, 2).clone(memory_format=torch.contiguous_format).transpose(1, 2)
    return output.clone(memory_format=torch.contiguous_format)
