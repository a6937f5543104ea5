"""Exact attention of a few sampled queries, and from it the error of an output: what sparse attention costs, measured.

    error[b, h] = sqrt( sum over sampled i of |out_i - exact_i|^2  /  sum over sampled i of |exact_i|^2 )

Of 64 queries the error of a call lies within 0.85 to 1.25 of the true one (5 to 95 %, SmolLM2, 16K tokens). They are
drawn by number and without a period, so the same call gives the same bits. A query that nobody drew is not seen: the
stop rule, which watches every row, is what guards it. On a GPU ``impl.triton.sampled`` does the same in three launches.

Shapes: B batch, Hq query heads, Nq queries, Dv head dim of the value, R sampled queries.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from s2o_compile.kernels.core.call import AttentionCall

SAMPLED = 64
"""Queries that are sampled in each head: 0.1 % of dense attention at 128K tokens."""

ROW_BLOCK = 16
"""Sampled queries that attend together: under a causal mask the first blocks see few keys."""

TURN, TURNS = 40503, 65536
"""A turn by the golden ratio has no period. In whole numbers the GPU draws the same queries. The first draw is half a
turn: the first row of all, whose output is often the largest, must not stand for its whole part."""


class ExactRows(NamedTuple):
    """Exact attention of sampled queries.

    Attributes:
        rows: int64 [R], their positions, ascending.
        output: float32 [B, Hq, R, Dv], zeros for a query that sees no key.
        lse: float32 [B, Hq, R], the log-sum-exp of their logits, -inf for such a query.
    """

    rows: Tensor
    output: Tensor
    lse: Tensor


def sample_rows(n_queries: int, device: torch.device, count: int = SAMPLED) -> Tensor:
    """Positions of sampled queries, int64 [min(count, Nq)], ascending: one in each of as many equal parts."""
    count = min(count, n_queries)
    part = torch.arange(count, device=device)
    first, behind = part * n_queries // count, (part + 1) * n_queries // count
    return first + (part * TURN + TURNS // 2) % TURNS * (behind - first) // TURNS


def attend_rows(call: AttentionCall, count: int = SAMPLED) -> ExactRows:
    """Exact attention of sampled queries, in float32. Holds Hq / Hkv * ROW_BLOCK * Nk numbers."""
    rows = sample_rows(call.n_queries, call.query.device, count)
    (query, key, value), mask, group = call.tensors, call.mask, call.group
    output = query.new_empty(*query.shape[:2], len(rows), value.shape[3], dtype=torch.float32)
    lse = output.new_empty(output.shape[:3])
    may_hide = mask.key_mask is not None or mask.window is not None or (mask.causal and mask.offset < 0)
    for part, stop in _row_blocks(call, count):
        visible = mask.visible(rows[part], torch.arange(stop, device=rows.device))
        for b, h in itertools.product(range(key.shape[0]), range(key.shape[1])):
            heads = slice(h * group, (h + 1) * group)
            seen = visible if mask.key_mask is None else visible & mask.key_mask[b, :stop]
            logits = query[b, heads, rows[part]].float() * call.scale @ key[b, h, :stop].float().mT
            if call.softcap is not None:
                logits = call.softcap * torch.tanh(logits / call.softcap)
            logits.masked_fill_(~seen, -torch.inf)
            highest = logits.amax(-1, keepdim=True)
            highest.masked_fill_(highest == -torch.inf, 0.0)
            weight = logits.sub_(highest).exp_()
            total = weight.sum(-1, keepdim=True)
            values = value[b, h, :stop].float()
            if may_hide:  # the value of a key that nobody sees must not turn 0 into NaN
                values = values.masked_fill(~seen.any(0)[:, None], 0.0)
            output[b, heads, part] = weight @ values / total.masked_fill(total == 0.0, 1.0)
            lse[b, heads, part] = (highest + total.log())[..., 0]
    return ExactRows(rows, output, lse)


def _row_blocks(call: AttentionCall, count: int) -> Iterator[tuple[slice, int]]:
    """Blocks of sampled queries, and how many keys the last one of each may see; without a wait for the device."""
    numbers = sample_rows(call.n_queries, torch.device("cpu"), count).tolist()
    for first in range(0, len(numbers), ROW_BLOCK):
        part = slice(first, min(first + ROW_BLOCK, len(numbers)))
        sees = numbers[part.stop - 1] + call.mask.offset + 1 if call.mask.causal else call.n_keys
        yield part, min(max(sees, 1), call.n_keys)


def padding_rows(call: AttentionCall, rows: Tensor) -> Tensor | None:
    """Bool [B, R]: queries at the positions of hidden keys, whose outputs nobody reads; None where there are none.

    Queries have positions among the keys under a causal mask, and where there are as many of them as keys. A mask that
    was read can name more of them (``unread_rows``).
    """
    mask, n_keys = call.mask, call.n_keys
    unread = None if call.unread_rows is None else call.unread_rows[:, rows]
    if mask.key_mask is None or not (mask.causal or call.n_queries == n_keys):
        return unread
    position = rows + mask.offset
    inside = (position >= 0) & (position < n_keys)
    padding = inside & ~mask.key_mask[:, position.clamp(0, n_keys - 1)]
    return padding if unread is None else padding | unread


def error_sums(call: AttentionCall, exact: ExactRows, output: Tensor, lse: Tensor) -> Tensor:
    """Squared distance to exact attention and its squared size, summed over the samples: float32 [2, B, Hq].

    Padding does not count. A sink takes a share of the mass, which is another one where keys are left out.

    Args:
        call: What was attended; its sinks are those of the output's heads.
        exact: Exact attention of sampled queries.
        output: [B, Hq, Nq, Dv], without sinks.
        lse: float32 [B, Hq, Nq], the log-sum-exp that belongs to it; read only beside sinks.
    """
    expected, actual = exact.output, output[:, :, exact.rows].float()
    padding = padding_rows(call, exact.rows)
    if padding is not None:
        expected, actual = (x.masked_fill(padding[:, None, :, None], 0.0) for x in (expected, actual))
    if call.sinks is not None:
        sink = call.sinks.float()[:, None]
        # NaN: a row that sees no key beside a sink of -inf, all zeros.
        expected = expected * torch.sigmoid(exact.lse - sink).nan_to_num(1.0)[..., None]
        actual = actual * torch.sigmoid(lse[:, :, exact.rows] - sink).nan_to_num(1.0)[..., None]
    return torch.stack([(actual - expected).square().sum((2, 3)), expected.square().sum((2, 3))])


def relative_error(difference: Tensor, power: Tensor) -> Tensor:
    """Relative L2 errors from squares; zero where both are, as in rows that see no key."""
    return torch.where(difference == 0, 0.0, difference / power).sqrt()
