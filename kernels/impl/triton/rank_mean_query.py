"""``ranking.mean_query`` on the GPU: the scores of all segments in one pass over the keys.

    score[s, j] = max over the heads g that share the ranking of  mean_query[s, g] . key[j] * scale

mean_query [B * Hr, P, G, D], key [B, Hkv, Nk, D], score fp16 [B, Hr, P, Nk], G heads share a ranking.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from s2o_compile.kernels.core.call import AttentionCall
from s2o_compile.kernels.core.plan import n_segments
from s2o_compile.kernels.impl.triton.tile import key_rows, launch, load_rows, needs_wide, paging

ROWS = 64
"""Mean queries of one product, all heads of whole rankings."""

LARGEST = tl.constexpr(60000.0)
"""Clamp of scores: inside fp16, and NaN of one bad mean becomes a number."""


@triton.jit
def score_means_kernel(
    mean_ptr, key_ptr, score_ptr, stride_kb, stride_kh, stride_kn, n_keys, segments, group, heads, rankings, seg_offset,
    pages, page_rows, last_page, CAUSAL: tl.constexpr, SEGMENT: tl.constexpr, SEGMENTS: tl.constexpr,
    GROUP: tl.constexpr, KEY_BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """Scores of KEY_BLOCK keys for every segment that has them in its prefix, SEGMENTS of them at a time."""
    head = tl.program_id(1).to(tl.int64)
    keys = tl.program_id(0) * KEY_BLOCK + tl.arange(0, KEY_BLOCK)
    inside = keys < n_keys
    base = key_ptr + head // heads * stride_kb + head % heads // rankings * stride_kh
    rows = key_rows(tl.minimum(keys, n_keys - 1), pages, page_rows, last_page, PAGE)
    key = tl.trans(load_rows(base, rows, stride_kn, HEAD_DIM, BLOCK_DIM, WIDE))
    row = tl.arange(0, SEGMENTS * GROUP)
    member = tl.minimum(row % GROUP, group - 1)  # a group that is no power of two repeats its last head
    first = 0
    if CAUSAL:  # the first segment whose in-segment keys start behind the first key of this block
        first = tl.maximum(tl.program_id(0) * KEY_BLOCK - seg_offset, 0) // SEGMENT
    for start in range(first, segments, SEGMENTS):
        segment = tl.minimum(start + row // GROUP, segments - 1)
        mean = load_rows(mean_ptr, (head * segments + segment) * group + member, HEAD_DIM, HEAD_DIM, BLOCK_DIM, False)
        products = tl.dot(mean, key, input_precision=PRECISION)
        products = tl.where(products == products, products, 0.0)
        products = tl.minimum(tl.maximum(products, -LARGEST), LARGEST)
        best = tl.max(tl.reshape(products, [SEGMENTS, GROUP, KEY_BLOCK]), 1)
        target = start + tl.arange(0, SEGMENTS)
        pointers = score_ptr + (head * segments + target)[:, None] * n_keys + keys[None, :]
        tl.store(pointers, best.to(tl.float16), mask=(target < segments)[:, None] & inside[None, :])


@triton.jit
def segment_means_kernel(
    query_ptr, mean_ptr, stride_qb, stride_qh, stride_qn, n_queries, heads, group, scale, SEGMENT: tl.constexpr,
    ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Scaled mean query of one segment of one head."""
    segment, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    query = query_ptr + head // heads * stride_qb + head % heads * stride_qh
    first = segment * SEGMENT
    stop = tl.minimum(first + SEGMENT, n_queries)
    total = tl.zeros([BLOCK_DIM], tl.float32)
    for j in range(first, stop, ROWS):
        rows = j + tl.arange(0, ROWS)
        x = load_rows(query, tl.minimum(rows, stop - 1), stride_qn, HEAD_DIM, BLOCK_DIM, WIDE).to(tl.float32)
        total += tl.sum(tl.where((rows < stop)[:, None], x, 0.0), 0)
    dims = tl.arange(0, BLOCK_DIM)
    target = ((head // group) * tl.num_programs(0) + segment) * group + head % group
    mean = (total / (stop - first) * scale).to(mean_ptr.dtype.element_ty)
    tl.store(mean_ptr + target * HEAD_DIM + dims, mean, mask=dims < HEAD_DIM)


def score_keys(call: AttentionCall, segment_len: int, shared: int) -> Tensor:
    """Importance of every key for every segment, fp16 [B, Hr, P, Nk]; undefined for keys outside the prefix."""
    (query, key, _), mask = call.tensors, call.mask
    batch, kv_heads, _, head_dim = key.shape
    n_keys = call.n_keys
    heads, n_queries = query.shape[1:3]
    segments, ranking_heads = n_segments(n_queries, segment_len), heads // shared
    block_dim = max(16, triton.next_power_of_2(head_dim))
    means = key.new_empty(batch * ranking_heads, segments, shared, head_dim)
    launch(
        segment_means_kernel, (segments, batch * heads),
        query, means, *query.stride()[:3], n_queries, heads, shared, call.scale, SEGMENT=segment_len, ROWS=64,
        HEAD_DIM=head_dim, BLOCK_DIM=block_dim, WIDE=needs_wide(query), num_warps=4,
    )  # fmt: skip
    score = torch.empty(batch, ranking_heads, segments, n_keys, device=key.device, dtype=torch.float16)
    members = triton.next_power_of_2(shared)
    exact = key.dtype == torch.float32
    key_block = 32 if exact else 128
    launch(
        score_means_kernel, (triton.cdiv(n_keys, key_block), batch * ranking_heads),
        means, key, score, *key.stride()[:3], n_keys, segments, shared, ranking_heads, ranking_heads // kv_heads,
        mask.seg_offset(n_queries, n_keys), **paging(call.pages, key), CAUSAL=mask.causal, SEGMENT=segment_len,
        SEGMENTS=max(ROWS // members, 1), GROUP=members, KEY_BLOCK=key_block, HEAD_DIM=head_dim,
        BLOCK_DIM=block_dim, PRECISION="ieee" if exact else "tf32",
        WIDE=needs_wide(key), num_warps=4,
    )  # fmt: skip
    return score
