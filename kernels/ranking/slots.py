"""Sums over slots of the largest products of a slot: what a ranking by every query spends its time on.

    score[j] = log sum over slots t of 2^( max over the queries i = t mod SLOTS of  rows_i . columns_j ),
    the last columns of a row being its normaliser, so that a product is the logarithm of a probability

Products are binary logarithms: torch's ``exp`` takes up to a hundred times as long where its result is not normal.
Products are float32, or bfloat16 where a CPU multiplies it in tiles (AMX). There they are shifted by SHIFT, because
positive numbers of bfloat16 have the order of their bits, and a maximum of int16 takes a fifth of the time. A key that
no query gives 2^-SHIFT of its mass counts as if one did.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from s2o_compile.kernels.support.torch_compat import has_amx

SLOTS = 64
"""Queries of a segment are summed by position modulo SLOTS; 16 slots do as well (SmolLM2, 16K)."""

KEY_STEP = 512
"""Keys of one product: the products of a segment stay in cache until they are reduced."""

SHIFT = 24.0

TILE_DIMS = 62
"""Directions of a product in bfloat16: with two columns for the normaliser they fill a step of 64."""

LARGEST = 1e30
"""The normaliser of queries that do not count, in bfloat16."""


def products_dtype(device: torch.device) -> torch.dtype:
    """The dtype of the products on a device."""
    return torch.bfloat16 if device.type == "cpu" and has_amx() else torch.float32


def pack_rows(few: Tensor, normaliser: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows in whole slots, [.., n, R + 1 or 2], of queries float32 [.., n, R] and normalisers [.., n].

    A normaliser of +inf is that of a query that does not count.
    """
    if dtype == torch.bfloat16:
        normaliser = (normaliser - SHIFT).nan_to_num_(LARGEST, LARGEST, -LARGEST)[..., None]
        rounded = normaliser.to(dtype)
        few = torch.cat([few.to(dtype), rounded, (normaliser - rounded.float()).to(dtype)], dim=-1)
        ignored = LARGEST
    else:
        few, ignored = torch.cat([few, normaliser[..., None]], dim=-1), float("inf")
    missing = -few.shape[-2] % SLOTS
    if missing:
        few = pad(few, (0, 0, 0, missing))
        few[..., few.shape[-2] - missing :, normaliser_column(dtype)] = ignored
    return few


def pack_keys(few: Tensor, dtype: torch.dtype) -> Tensor:
    """Columns [.., R + 1 or 2, Nk] of keys [.., Nk, R]."""
    return pad(few.to(dtype), (0, -normaliser_column(dtype)), value=-1.0).transpose(-1, -2)


def normaliser_column(dtype: torch.dtype) -> int:
    """Where the normaliser of a row begins, from its end: it has a second column, the rounding error of the first."""
    return -2 if dtype == torch.bfloat16 else -1


def memory_for(rows: Tensor) -> Tensor:
    """The memory that `score_slots` wants for rows [.., n, R]: fresh memory would cost as much as the products."""
    return rows.new_empty(rows.shape[-2] * KEY_STEP)


def score_slots(rows: Tensor, columns: Tensor, scores: Tensor, memory: Tensor) -> None:
    """Fill ``scores``, float32 [n], natural logarithms, from rows [m * SLOTS, R] and columns [R, n]."""
    n_rows, n_keys = len(rows), columns.shape[1]
    halves = rows.dtype == torch.bfloat16
    for first in range(0, n_keys, KEY_STEP):
        step = slice(first, min(first + KEY_STEP, n_keys))
        products = memory[: n_rows * (step.stop - first)].view(n_rows, -1)
        torch.mm(rows, columns[:, step], out=products)
        if halves:
            products = products.view(torch.int16)
        largest = products.view(-1, SLOTS, step.stop - first).amax(0)
        if halves:
            largest = largest.view(rows.dtype).float().clamp_(min=0.0)
        torch.sub(log2_sum(largest, 0), SHIFT if halves else 0.0, out=scores[step])
    scores.mul_(math.log(2))


def log2_sum(logits: Tensor, dim: int) -> Tensor:
    """log2(sum(2^logits)) over a dimension that is not empty, whose memory is reused; -inf where all are."""
    largest = logits.amax(dim, keepdim=True)
    largest.masked_fill_(largest == float("-inf"), 0.0)
    return logits.sub_(largest).exp2_().sum(dim).log2_().add_(largest.squeeze(dim))
