"""``ranking_per_query`` on the GPU: every query against every earlier key in few dimensions, nothing of size N^2 kept.

    score[s, j] = max over rows r of segment s of  few_query[s, r] . few_key[j]

Two kernels over packed fp16 rows of PACKED = few_dims + 1 numbers. The last one carries the row normaliser: the first
kernel fills it into the queries, the keys hold -1 there, so the second kernel's product is already normalised and
needs no exponential. few_query [B * Hkv, P, G * S, PACKED], few_key [B * Hkv, Nk, PACKED], score fp16 [B * Hkv, P, Nk].
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from s2o_compile.kernels.mask import AttentionMask
from s2o_compile.kernels.plan import n_segments
from s2o_compile.kernels.ranking_per_query import KEY_STRIDE, choose_dims, few_dims, take_dims
from s2o_compile.kernels.triton_tile import LN2, LOG2E

LARGEST = tl.constexpr(30000.0)
"""Clamp of packed values: far from any real logit and inside fp16."""


@triton.jit
def row_normaliser_kernel(
    few_query_ptr, sampled_key_ptr, sampled_mask_ptr, n_queries, n_samples, n_segments, rows, kv_heads, offset,
    CAUSAL: tl.constexpr, HAS_KEY_MASK: tl.constexpr, SEGMENT: tl.constexpr, STRIDE: tl.constexpr, TILE: tl.constexpr,
    KEY_BLOCK: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp of TILE rows over the sampled keys, written to the last column of the rows."""
    segment = tl.program_id(1)
    head = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    position = segment * SEGMENT + row % SEGMENT
    dims = tl.arange(0, PACKED)
    query_ptr = few_query_ptr + ((head * n_segments + segment) * rows + row)[:, None] * PACKED
    query = tl.load(query_ptr + dims[None, :])
    m = tl.full([TILE], -float("inf"), tl.float32)
    l = tl.zeros([TILE], tl.float32)
    end = n_samples
    if CAUSAL:
        last = tl.minimum(segment * SEGMENT + SEGMENT, n_queries) - 1 + offset
        end = tl.minimum(tl.maximum(last, -1) // STRIDE + 1, n_samples)
    for j in range(0, end, KEY_BLOCK):
        sample = j + tl.arange(0, KEY_BLOCK)
        present = sample < n_samples
        key = tl.load(
            sampled_key_ptr + (head * n_samples + sample)[None, :] * PACKED + dims[:, None],
            mask=present[None, :],
            other=0.0,
        )
        logits = tl.dot(query, key) * LOG2E
        if HAS_KEY_MASK:
            present = present & (
                tl.load(sampled_mask_ptr + head // kv_heads * n_samples + sample, mask=present, other=0) != 0
            )
        seen = present[None, :]
        if CAUSAL:
            seen = seen & ((sample * STRIDE)[None, :] <= position[:, None] + offset)
        logits = tl.where(seen, logits, -float("inf"))
        m_new = tl.maximum(m, tl.max(logits, 1))
        finite = tl.where(m_new == -float("inf"), 0.0, m_new)
        l = l * tl.math.exp2(m - finite) + tl.sum(tl.math.exp2(logits - finite[:, None]), 1)
        m = m_new
    # A row that sees no sampled key, or lies beyond the last query, has no say.
    normaliser = (m + tl.math.log2(l * STRIDE)) * LN2
    silent = (l == 0.0) | (position >= n_queries)
    normaliser = tl.where(silent, LARGEST, tl.minimum(tl.maximum(normaliser, -LARGEST), LARGEST))
    tl.store(query_ptr + (PACKED - 1), normaliser.to(tl.float16)[:, None])


@triton.jit
def score_keys_kernel(
    few_query_ptr, few_key_ptr, score_ptr, n_queries, n_keys, n_segments, rows, own_offset,
    CAUSAL: tl.constexpr, SEGMENT: tl.constexpr, KEY_BLOCK: tl.constexpr, ROW_BLOCK: tl.constexpr, STAGES: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """Scores of KEY_BLOCK keys for every segment that has them in its prefix: one program keeps its keys on chip."""
    head = tl.program_id(1).to(tl.int64)
    keys = tl.program_id(0) * KEY_BLOCK + tl.arange(0, KEY_BLOCK)
    inside = keys < n_keys
    dims = tl.arange(0, PACKED)
    key = tl.load(
        few_key_ptr + (head * n_keys + keys)[None, :] * PACKED + dims[:, None], mask=inside[None, :], other=0.0
    )
    first = 0
    if CAUSAL:  # the first segment whose own keys start behind the first key of this block
        first = tl.maximum(tl.program_id(0) * KEY_BLOCK - own_offset, 0) // SEGMENT
    for segment in range(first, n_segments):
        base = few_query_ptr + (head * n_segments + segment) * rows * PACKED
        best = tl.full([ROW_BLOCK, KEY_BLOCK], -60000.0, tl.float16)
        for row in tl.range(0, rows, ROW_BLOCK, num_stages=STAGES):
            query = tl.load(base + (row + tl.arange(0, ROW_BLOCK))[:, None] * PACKED + dims[None, :])
            best = tl.maximum(best, tl.dot(query, key, out_dtype=tl.float16))
        tl.store(score_ptr + (head * n_segments + segment) * n_keys + keys, tl.max(best, 0), mask=inside)


def pack_queries(query: Tensor, dims: Tensor, scale: float, segment_len: int) -> Tensor:
    """[B, Hq, Nq, D] -> fp16 [B * Hkv, P, G * segment_len, PACKED], last column zero, rows (head of group, slot)."""
    batch, heads, n_queries, _ = query.shape
    kv_heads, segments = dims.shape[1], n_segments(n_queries, segment_len)
    group = heads // kv_heads
    few = (take_dims(query, dims).float() * scale).clamp_(-LARGEST.value, LARGEST.value).to(torch.float16)
    width = few_dims(query.shape[3]) + 1  # a power of two, also where the head itself is smaller
    packed = query.new_zeros(batch * kv_heads, segments, group, segment_len, width, dtype=torch.float16)
    few = torch.nn.functional.pad(few, (0, 0, 0, segments * segment_len - n_queries))
    few = few.view(batch * kv_heads, group, segments, segment_len, -1).transpose(1, 2)
    packed[..., : dims.shape[2]] = few
    return packed.flatten(2, 3)


def score_keys(query: Tensor, key: Tensor, mask: AttentionMask, *, scale: float, segment_len: int) -> Tensor:
    """Importance of every key for every segment, fp16 [B, Hkv, P, Nk]; what is no prefix key is left undefined."""
    batch, kv_heads, n_keys, _ = key.shape
    n_queries = query.shape[2]
    dims = choose_dims(query, key)
    few_query = pack_queries(query, dims, scale, segment_len)
    few_key = take_dims(key, dims).float().clamp_(-LARGEST.value, LARGEST.value).to(torch.float16)
    few_key = torch.nn.functional.pad(few_key, (0, few_query.shape[-1] - dims.shape[2]))
    few_key[..., -1] = -1.0
    sampled_key = few_key[:, :, ::KEY_STRIDE].contiguous()
    sampled_mask = few_key if mask.key_mask is None else mask.key_mask[:, ::KEY_STRIDE].contiguous()
    segments, rows = few_query.shape[1:3]
    score = torch.empty(batch, kv_heads, segments, n_keys, device=key.device, dtype=torch.float16)
    row_normaliser_kernel[(rows // 128, segments, batch * kv_heads)](
        few_query, sampled_key, sampled_mask, n_queries, sampled_key.shape[2], segments, rows, kv_heads, mask.offset,
        CAUSAL=mask.causal, HAS_KEY_MASK=mask.key_mask is not None, SEGMENT=segment_len, STRIDE=KEY_STRIDE, TILE=128,
        KEY_BLOCK=128, PACKED=few_query.shape[-1], num_warps=4,
    )  # fmt: skip
    score_keys_kernel[(triton.cdiv(n_keys, 256), batch * kv_heads)](
        few_query, few_key, score, n_queries, n_keys, segments, rows, mask.own_offset(n_queries, n_keys),
        CAUSAL=mask.causal, SEGMENT=segment_len, KEY_BLOCK=256, ROW_BLOCK=64, STAGES=3,
        PACKED=few_query.shape[-1], num_warps=4,
    )  # fmt: skip
    return score
