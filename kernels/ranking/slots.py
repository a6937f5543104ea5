"""Sums over slots of the largest products of a slot: what a ranking by every query spends its time on.

    score[j] = log sum over slots t of 2^( max over the queries i = t mod SLOTS of  rows_i . columns_j ),
    the last column of a row being its normaliser, so that a product is the logarithm of a probability

Products are binary logarithms: torch's ``exp`` takes up to a hundred times as long where its result is not normal.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

SLOTS = 64
"""Queries of a segment are summed by position modulo SLOTS; 16 slots do as well (SmolLM2, 16K)."""

KEY_STEP = 512
"""Keys of one product: the products of a segment stay in cache until they are reduced."""


def pack_rows(few: Tensor, normaliser: Tensor) -> Tensor:
    """Rows in whole slots, [.., n, R + 1], of queries float32 [.., n, R] and normalisers [.., n].

    A normaliser of +inf is that of a query that does not count.
    """
    few = torch.cat([few, normaliser[..., None]], dim=-1)
    missing = -few.shape[-2] % SLOTS
    if missing:
        few = pad(few, (0, 0, 0, missing))
        few[..., few.shape[-2] - missing :, -1] = float("inf")
    return few


def pack_keys(few: Tensor) -> Tensor:
    """Columns [.., R + 1, Nk] of keys [.., Nk, R]."""
    return pad(few, (0, 1), value=-1.0).transpose(-1, -2)


def memory_for(rows: Tensor) -> Tensor:
    """The memory that `score_slots` wants for rows [.., n, R]: fresh memory would cost as much as the products."""
    return rows.new_empty(rows.shape[-2] * KEY_STEP)


def score_slots(rows: Tensor, columns: Tensor, scores: Tensor, memory: Tensor) -> None:
    """Fill ``scores``, float32 [n], natural logarithms, from rows [m * SLOTS, R] and columns [R, n]."""
    n_rows, n_keys = len(rows), columns.shape[1]
    for first in range(0, n_keys, KEY_STEP):
        step = slice(first, min(first + KEY_STEP, n_keys))
        products = memory[: n_rows * (step.stop - first)].view(n_rows, -1)
        torch.mm(rows, columns[:, step], out=products)
        scores[step] = log2_sum(products.view(-1, SLOTS, step.stop - first).amax(0), 0)
    scores.mul_(math.log(2))


def log2_sum(logits: Tensor, dim: int) -> Tensor:
    """log2(sum(2^logits)) over a dimension that is not empty, whose memory is reused; -inf where all are."""
    largest = logits.amax(dim, keepdim=True)
    largest.masked_fill_(largest == float("-inf"), 0.0)
    return logits.sub_(largest).exp2_().sum(dim).log2_().add_(largest.squeeze(dim))
