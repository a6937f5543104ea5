"""``sample.rank_samples`` on the GPU: logits of sampled queries read once for their sums, and once in halves.

    log_total[i] = log2 of  sum over keys j of  2^(logit[i, j] * log2(e))
    score[j]     = sum over ranking rows i of  2^(logit[i, j] * log2(e) - log_total[i])
    mass[i, c]   = the same weights of an estimating row i, summed over keys j of block c of the ranking

Logits of the half that estimates are gathered key by key: all rows of a head and segment fit in the L2 cache, where
programs of neighbouring blocks find them.

Logits [B, Hq, p * 2 * HALF, Nk], -inf for what is hidden; even rows rank, odd rows estimate.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from s2o_compile.kernels.impl.triton.tile import LOG2E, NOTHING_SEEN
from s2o_compile.kernels.ranking.unvisited import BLOCK_LEN

ROW_KEYS = 2048
"""Keys of a row that are summed together."""

SCORE_KEYS = 512
"""Keys that one program ranks."""


@triton.jit
def row_totals_kernel(logit_ptr, total_ptr, n_keys, BLOCK: tl.constexpr):
    """Base-2 log-sum-exp of one row; NaN if it holds NaN."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    most = tl.full([BLOCK], NOTHING_SEEN, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, n_keys, BLOCK):
        keys = start + lane
        logit = tl.load(logit_ptr + row * n_keys + keys, mask=keys < n_keys, other=-float("inf")).to(tl.float32) * LOG2E
        more = tl.maximum(most, logit)
        total = total * tl.math.exp2(most - more) + tl.math.exp2(logit - more)
        most = more
    highest = tl.max(most, 0)
    total = tl.sum(total * tl.math.exp2(most - highest), 0)
    tl.store(total_ptr + row, highest + tl.math.log2(total))


@triton.jit
def load_weights(logit_ptr, total_ptr, row, keys, present, non_finite, n_keys):
    """Weights of rows for keys, [rows, keys]: 0 for hidden keys, inf for visible keys that hold NaN or inf."""
    pointers = logit_ptr + row[:, None] * n_keys + keys[None, :]
    logit = tl.load(pointers, mask=present[None, :], other=-float("inf")).to(tl.float32)
    weight = tl.math.exp2(logit * LOG2E - tl.load(total_ptr + row)[:, None])
    weight = tl.where((weight == weight) & (non_finite == 0)[None, :], weight, float("inf"))
    return tl.where(logit == -float("inf"), 0.0, weight)


@triton.jit
def score_keys_kernel(
    logit_ptr, total_ptr, candidate_ptr, non_finite_ptr, score_ptr, n_keys, segments, group,
    HALF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Weight of some keys in the ranking rows of a group, -1 for keys that are not ranked."""
    segment, head = tl.program_id(1), tl.program_id(2).to(tl.int64)  # of [B * Hkv]
    keys = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    present = keys < n_keys
    non_finite = tl.load(non_finite_ptr + head * n_keys + keys, mask=present, other=0)
    score = tl.zeros([BLOCK], tl.float32)
    for g in range(0, group):
        row = ((head * group + g) * segments + segment) * (2 * HALF) + 2 * tl.arange(0, HALF)
        score += tl.sum(load_weights(logit_ptr, total_ptr, row, keys, present, non_finite, n_keys), 0)
    at = (head * segments + segment) * n_keys + keys
    score = tl.where(tl.load(candidate_ptr + at, mask=present, other=0) != 0, score, -1.0)
    tl.store(score_ptr + at, score.to(score_ptr.dtype.element_ty), mask=present)


@triton.jit
def block_masses_kernel(
    logit_ptr, total_ptr, candidate_ptr, non_finite_ptr, order_ptr, ranked_ptr, mass_ptr, n_keys, segments, group,
    HALF: tl.constexpr, BLOCK_LEN: tl.constexpr,
):  # fmt: skip
    """Mass of one block of a ranking in each estimating row of one head; the ranking as 32-bit numbers."""
    block, segment, head = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)  # of [B * Hq]
    entry = block * BLOCK_LEN + tl.arange(0, BLOCK_LEN)
    ranked = (head // group * segments + segment) * n_keys
    keys = tl.load(order_ptr + ranked + entry, mask=entry < n_keys, other=0)
    if head % group == 0:
        tl.store(ranked_ptr + ranked + entry, keys.to(tl.int32), mask=entry < n_keys)
    is_candidate = (entry < n_keys) & (tl.load(candidate_ptr + ranked + keys) != 0)
    non_finite = tl.load(non_finite_ptr + head // group * n_keys + keys)
    estimator = tl.arange(0, HALF)
    row = (head * segments + segment) * (2 * HALF) + 2 * estimator + 1
    mass = tl.sum(load_weights(logit_ptr, total_ptr, row, keys, is_candidate, non_finite, n_keys), 1)
    target = mass_ptr + ((head * segments + segment) * HALF + estimator) * tl.num_programs(0) + block
    tl.store(target, mass)


def rank_samples(logits: Tensor, candidate: Tensor, non_finite: Tensor) -> tuple[Tensor, Tensor]:
    """Lists int32 [B, Hkv, p, Nk] and each estimating query's mass of their blocks, float32 [B, Hq, p, HALF, blocks].

    Scores are sorted as bfloat16: those that differ by less than a hundredth may stand in any order. Arguments as
    ``sample.rank_samples``.
    """
    batch, heads, rows, n_keys = logits.shape
    kv_heads, segments = candidate.shape[1:3]
    half, blocks = rows // (2 * segments), triton.cdiv(n_keys, BLOCK_LEN)
    logits, candidate, non_finite = logits.contiguous(), candidate.contiguous(), non_finite.contiguous()
    totals = torch.empty(batch, heads, rows, dtype=torch.float32, device=logits.device)
    scores = torch.empty(candidate.shape, dtype=torch.bfloat16, device=logits.device)
    mass = totals.new_empty(batch, heads, segments, half, blocks)
    sizes = n_keys, segments, heads // kv_heads
    row_totals_kernel[(batch * heads * rows,)](logits, totals, n_keys, BLOCK=ROW_KEYS, num_warps=4)
    score_keys_kernel[(triton.cdiv(n_keys, SCORE_KEYS), segments, batch * kv_heads)](
        logits, totals, candidate, non_finite, scores, *sizes, HALF=half, BLOCK=SCORE_KEYS, num_warps=4
    )
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    ranked = torch.empty(candidate.shape, dtype=torch.int32, device=logits.device)
    block_masses_kernel[(blocks, segments, batch * heads)](
        logits, totals, candidate, non_finite, order, ranked, mass, *sizes, HALF=half, BLOCK_LEN=BLOCK_LEN, num_warps=2
    )
    return ranked, mass
