"""Rank keys by several sub-means: softmax over the prefix for the mean of every 32 neighbouring queries, averaged.

score[s, j] = sum over sub-means r of segment s, heads h that share the list, of  softmax_j(m_{h,r} . k_j * scale)

Between the mean query (cheap) and every query (best) in cost and quality.
"""

from __future__ import annotations

import torch
from torch import Tensor

from s2o_compile.kernels.core.mask import AttentionMask
from s2o_compile.kernels.core.plan import prefix_mask
from s2o_compile.kernels.ranking.mean_query import segment_means

SUB_LEN = 32


def score_keys(
    query: Tensor, key: Tensor, mask: AttentionMask, *, scale: float, segment_len: int, shared: int
) -> Tensor:
    """Importance of every key for every segment, float32 [B, Hl, P, Nk]; see the module docstring."""
    batch, kv_heads, n_keys, head_dim = key.shape
    group = query.shape[1] // kv_heads
    n_queries = query.shape[2]
    segments = -(-n_queries // segment_len)
    per_segment = segment_len // SUB_LEN
    means = segment_means(query, SUB_LEN).to(key.dtype) * scale
    means = torch.nn.functional.pad(means, (0, 0, 0, segments * per_segment - means.shape[2]))
    means = means.view(batch, kv_heads, group, segments, per_segment, head_dim)
    prefix = prefix_mask(mask, n_queries, n_keys, segment_len, query.device)
    scores = torch.empty(batch, kv_heads * group // shared, segments, n_keys, device=query.device, dtype=torch.float32)
    for s in range(segments):  # one segment at a time: [B, Hkv, G * R, Nk] is the largest thing held
        logits = means[:, :, :, s].flatten(2, 3) @ key.transpose(-1, -2)
        logits = logits.float().masked_fill(~prefix[:, None, s, None, :], float("-inf"))
        weights = logits.softmax(-1).nan_to_num(0.0)
        scores[:, :, s] = weights.view(batch, -1, shared * per_segment, n_keys).sum(2)
    return scores
