"""Estimates, before anything is attended, the mass left unvisited after each block of a ranking.

    unvisited[s, n] = max over sampled queries i of segment s of  sum of softmax_i over ranked keys from n BLOCK_LEN on

The stop rule watches the mass of a tile that visits keys; FlexAttention must know the number of visits before it
starts. So some queries of every segment attend densely, weights only, and the worst of them decides. Of the estimates
tried on SmolLM2 at 8K this one foretold errors best. At one density the scores of ``ranking.per_query``, read as
probabilities, left a fifth more error. Between heads errors at one limit spread less than under the stop rule.
"""

from __future__ import annotations

import torch
from torch import Tensor

from s2o_compile.kernels.core.call import AttentionCall
from s2o_compile.kernels.core.plan import Plan, non_finite_keys

BLOCK_LEN = 128
"""Ranked keys that are visited or left out as one: FlexAttention's block of keys."""

SAMPLES = 16
"""Queries of a segment that are sampled, the last of them among these."""

GOLDEN_RATIO = 0.6180339887498949

STOP_RULE_TO_SAMPLE_RATIO = 7.0
"""The stop rule's estimate of the worst row over this one's, where both leave the same error (SmolLM2, 8K, tau 0.1 to
1): the rule extrapolates by Zipf's law, and sees every row."""


def sampled(length: int | Tensor, count: int, device: torch.device) -> Tensor:
    """Positions of sampled queries in a segment, int64 [count]: all over it, the segment's last query at the end.

    Lengths [P, 1] of several segments give [P, count]. Distances have no period: rows of an image, or a mask of every
    16th key, have samples in all columns.
    """
    turns = torch.arange(count - 1, -1, -1, device=device, dtype=torch.float32) * GOLDEN_RATIO % 1.0
    return length - 1 - (turns * length).long()


def sample_segments(n_queries: int, segment_len: int, count: int, device: torch.device) -> Tensor:
    """Positions of the sampled queries of every segment, int64 [P, count]."""
    first = torch.arange(0, n_queries, segment_len, device=device)[:, None]
    return first + sampled((n_queries - first).clamp(max=segment_len), count, device)


def estimate_unvisited(call: AttentionCall, plan: Plan) -> Tensor:
    """Share of a row's mass behind the first n blocks of its ranking, float32 [B, Hq, P, 1 + blocks], falling in n.

    Args:
        call: Its mask has no window.
        plan: Its ranked key indices.

    A row that holds NaN leaves infinite mass. So does a key that is not visited and whose value is not finite.
    """
    (query, key, value), mask, softcap = call.tensors, call.mask, call.softcap
    batch, heads, n_queries, _ = query.shape
    kv_heads, n_keys = key.shape[1:3]
    longest = plan.key_index.shape[3]
    blocks = -(-longest // BLOCK_LEN)
    unvisited = query.new_zeros(batch, heads, plan.n_segments, blocks + 1, dtype=torch.float32)
    columns = key.transpose(-1, -2)
    positions = torch.arange(n_keys, device=query.device)
    non_finite = non_finite_keys(key, value)[:, :, None].expand(-1, -1, heads // kv_heads, -1)
    sampled_rows = sample_segments(n_queries, plan.segment_len, SAMPLES, query.device)
    for s in range(plan.n_segments):
        first, stop = s * plan.segment_len, min((s + 1) * plan.segment_len, n_queries)
        seg_start, seg_stop = mask.in_segment_range(first, stop - 1, n_queries, n_keys)
        n_ranked, end = (seg_start, seg_stop) if mask.causal else (longest, n_keys)
        if n_ranked == 0:
            continue
        rows = sampled_rows[s]
        logits = query[:, :, rows].unflatten(1, (kv_heads, -1)).flatten(2, 3) @ columns[..., :end]
        logits = logits.float() * call.scale
        if softcap is not None:
            logits = softcap * (logits / softcap).tanh()
        hidden = ~mask.visible(rows, positions[:end])
        if mask.key_mask is not None:
            hidden = hidden | ~mask.key_mask[:, None, :end]
        logits = logits.unflatten(2, (-1, len(rows))).masked_fill_(
            hidden.view(-1, 1, 1, *hidden.shape[-2:]), float("-inf")
        )
        seen = ~hidden.all(-1).view(-1, 1, 1, len(rows), 1)
        weight = torch.where(seen, logits.softmax(-1), 0.0)
        ranked = plan.key_index[:, :, s, :n_ranked].long().clamp(0, end - 1).unflatten(1, (kv_heads, -1))
        ranked = ranked.repeat_interleave(heads // plan.key_index.shape[1], 2)  # one for each head of the group
        real = torch.arange(n_ranked, device=query.device) < plan.prefix_count[:, s, None]
        shape = (*weight.shape[:-1], n_ranked)
        mass = weight.gather(-1, ranked[:, :, :, None].expand(shape))
        mass = mass.masked_fill_(non_finite.gather(-1, ranked.expand(*shape[:3], -1))[:, :, :, None], float("inf"))
        mass = mass.masked_fill_(~real[:, None, None, None], 0.0)
        mass = torch.nn.functional.pad(mass, (0, -n_ranked % BLOCK_LEN)).unflatten(-1, (-1, BLOCK_LEN)).sum(-1)
        left = mass.flip(-1).cumsum(-1).flip(-1).amax(3).nan_to_num_(nan=float("inf"), posinf=float("inf"))
        unvisited[:, :, s, : left.shape[-1]] = left.flatten(1, 2)
    return unvisited


def blocks_to_visit(unvisited: Tensor, tau: float | Tensor) -> Tensor:
    """Blocks of each ranking that are visited for a tau, int32 [B, Hq, P]; 1 + blocks for all of them.

    Args:
        unvisited: Of ``estimate_unvisited``.
        tau: One number, or float32 [Hq]; 0 visits everything.
    """
    limit = (tau[:, None, None] if isinstance(tau, Tensor) else tau) / STOP_RULE_TO_SAMPLE_RATIO
    return (unvisited >= limit).sum(-1, dtype=torch.int32)
