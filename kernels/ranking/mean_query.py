"""Ranks keys by the segment's mean query: the paper's ranking (S2O, arXiv 2602.22575, section 3).

    score[s, j] = max over the heads that share the ranking of  mean_{i in s}(q_i) . k_j * scale

It is cheap, at one query per segment. It misses keys that only a few queries look for, so retrieval suffers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from s2o_compile.kernels.core.call import AttentionCall


def segment_means(query: Tensor, group_len: int) -> Tensor:
    """Mean of every ``group_len`` neighbouring queries: [B, H, Nq, D] -> float32 [B, H, ceil(Nq / group_len), D]."""
    batch, heads, n_queries, head_dim = query.shape
    groups = -(-n_queries // group_len)
    missing = groups * group_len - n_queries
    padded = torch.nn.functional.pad(query, (0, 0, 0, missing)) if missing else query
    sums = padded.view(batch, heads, groups, group_len, head_dim).sum(3, dtype=torch.float32)
    first = torch.arange(0, n_queries, group_len, device=query.device)
    return sums / (n_queries - first).clamp(max=group_len)[:, None]


def score_keys(call: AttentionCall, segment_len: int, shared: int) -> Tensor:
    """Importance of every key for every segment, [B, Hr, P, Nk]; see the module docstring.

    Args:
        call: What is attended.
        segment_len: Queries that share one ranking.
        shared: Query heads that share one ranking.
    """
    key = call.key
    batch, kv_heads, n_keys, head_dim = key.shape
    means = segment_means(call.query, segment_len).to(key.dtype) * call.scale
    segments = means.shape[2]
    grouped = means.view(batch, kv_heads, -1, head_dim)
    logits = grouped @ key.transpose(-1, -2)
    return logits.view(batch, -1, shared, segments, n_keys).amax(2)
