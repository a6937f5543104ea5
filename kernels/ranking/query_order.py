"""Order of the queries inside a segment: neighbours in a tile should want the same keys.

"mean_query" sorts the queries of a segment by their dot product with the segment's mean query (the best guide
measured). A permuted tile spans its whole segment, so pass 1 costs more: natural order is the default.
"""

from __future__ import annotations

import torch
from torch import Tensor

from s2o_compile.kernels.ranking.mean_query import segment_means


def order_queries(query: Tensor, segment_len: int) -> Tensor:
    """Position of the query at every slot, int32 [B, Hq, Nq]; slots of a segment hold that segment's queries."""
    batch, heads, n_queries, head_dim = query.shape
    means = segment_means(query, segment_len)
    segments = means.shape[2]
    padded = torch.nn.functional.pad(query.float(), (0, 0, 0, segments * segment_len - n_queries))
    affinity = (padded.view(batch, heads, segments, segment_len, head_dim) * means[:, :, :, None]).sum(-1)
    first = torch.arange(0, segments * segment_len, segment_len, device=query.device)[:, None]
    slot = torch.arange(segment_len, device=query.device)
    absent = first + slot >= n_queries  # the last segment may be short: its empty slots sort behind
    affinity = affinity.nan_to_num(0.0).masked_fill(absent, float("-inf"))
    order = affinity.argsort(dim=-1, descending=True, stable=True) + first
    return order.flatten(2)[:, :, :n_queries].to(torch.int32).contiguous()
