"""``ranking_per_query`` on the GPU: every query against every earlier key in few dimensions, nothing of size N^2 kept.

    score[s, j] = max over rows r of segment s of  few_query[s, r] . few_key[j]

Rows are packed to PACKED numbers: the chosen dimensions, brought to the same size in queries and keys, and two columns
for the row normaliser (its value and what rounding left of it), -1 in the keys. So the last kernel's product is already
normalised and needs no exponential. Where the tensor cores multiply 8-bit floats rows are packed in them: twice the
rate, and a rank needs no more. few_query [B * Hkv, P, G * S, PACKED], few_key [B * Hkv, Nk, PACKED],
score fp16 [B * Hkv, P, Nk].
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from s2o_compile.kernels.mask import AttentionMask
from s2o_compile.kernels.plan import n_segments
from s2o_compile.kernels.ranking_per_query import choose_dims, few_dims, key_stride, second_moments
from s2o_compile.kernels.triton_tile import LN2, LOG2E

LARGEST = {torch.float8_e4m3fn: 448.0, torch.float16: 30000.0}
"""Clamp of packed numbers: the sum of two of them, a silent row's normaliser, still fits in a float16 score."""


@triton.jit
def pack_rows_kernel(
    x_ptr, dims_ptr, factor_ptr, packed_ptr, stride_b, stride_h, stride_n, length, heads, group, segment_len, segments,
    n_dims, last, largest, TILE: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Few dimensions of TILE rows [.., D], times their factors; ``last`` in the two columns of the normaliser."""
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    head = tl.program_id(1).to(tl.int64)
    b, h = head // heads, head % heads
    list_head = b * (heads // group) + h // group
    column = tl.arange(0, PACKED)
    chosen = column < n_dims
    dims = tl.load(dims_ptr + list_head * n_dims + column, mask=chosen, other=0)
    factor = tl.load(factor_ptr + list_head * n_dims + column, mask=chosen, other=0.0)
    source = x_ptr + b * stride_b + h * stride_h + row.to(tl.int64)[:, None] * stride_n + dims[None, :]
    x = tl.load(source, mask=(row < length)[:, None] & chosen[None, :], other=0.0).to(tl.float32)
    x = tl.where(tl.abs(x) < float("inf"), x, 0.0)  # one bad row must not spoil the whole order
    x = tl.minimum(tl.maximum(x * factor[None, :], -largest), largest)
    x = tl.where((column >= PACKED - 2)[None, :], last, x)
    target = (list_head * segments + row // segment_len) * group * segment_len
    target += (h % group) * segment_len + row % segment_len
    inside = row < segments * segment_len
    tl.store(
        packed_ptr + target[:, None] * PACKED + column[None, :], x.to(packed_ptr.dtype.element_ty), mask=inside[:, None]
    )


@triton.jit
def row_normaliser_kernel(
    few_query_ptr, few_key_ptr, key_mask_ptr, stride_mb, n_queries, n_keys, n_segments, rows, kv_heads, offset, largest,
    CAUSAL: tl.constexpr, HAS_KEY_MASK: tl.constexpr, SEGMENT: tl.constexpr, STRIDE: tl.constexpr, TILE: tl.constexpr,
    KEY_BLOCK: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp of TILE rows over every STRIDE-th key, written to the last two columns of the rows."""
    segment = tl.program_id(1)
    head = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    position = segment * SEGMENT + row % SEGMENT
    dims = tl.arange(0, PACKED)
    query_ptr = few_query_ptr + ((head * n_segments + segment) * rows + row)[:, None] * PACKED
    query = tl.load(query_ptr + dims[None, :])
    m = tl.full([TILE], -float("inf"), tl.float32)
    l = tl.zeros([TILE], tl.float32)
    end = n_keys
    if CAUSAL:
        last = tl.minimum(segment * SEGMENT + SEGMENT, n_queries) - 1 + offset
        end = tl.minimum(tl.maximum(last, -1) + 1, n_keys)
    for j in range(0, end, KEY_BLOCK * STRIDE):
        sample = j + tl.arange(0, KEY_BLOCK) * STRIDE
        present = sample < n_keys
        key = tl.load(
            few_key_ptr + (head * n_keys + sample)[None, :] * PACKED + dims[:, None], mask=present[None, :], other=0.0
        )
        logits = tl.dot(query, key) * LOG2E
        if HAS_KEY_MASK:
            kept = tl.load(key_mask_ptr + head // kv_heads * stride_mb + sample, mask=present, other=0)
            present = present & (kept != 0)
        seen = present[None, :]
        if CAUSAL:
            seen = seen & (sample[None, :] <= position[:, None] + offset)
        logits = tl.where(seen, logits, -float("inf"))
        m_new = tl.maximum(m, tl.max(logits, 1))
        finite = tl.where(m_new == -float("inf"), 0.0, m_new)
        l = l * tl.math.exp2(m - finite) + tl.sum(tl.math.exp2(logits - finite[:, None]), 1)
        m = m_new
    # A row that sees no sampled key, or lies beyond the last query, has no say.
    normaliser = (m + tl.math.log2(l * STRIDE)) * LN2
    silent = (l == 0.0) | (position >= n_queries)
    packed = few_query_ptr.dtype.element_ty
    whole = tl.where(silent, largest, tl.minimum(tl.maximum(normaliser, -largest), largest)).to(packed)
    rest = tl.where(silent, largest, tl.minimum(tl.maximum(normaliser - whole.to(tl.float32), -largest), largest))
    tl.store(query_ptr + (PACKED - 2), whole[:, None])
    tl.store(query_ptr + (PACKED - 1), rest.to(packed)[:, None])


@triton.jit
def largest_of_three(a, b, c, PTX: tl.constexpr):
    """Elementwise maximum of fp16 numbers; in PTX, for the compiler seldom sees the one instruction for two of each."""
    if PTX:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 t; max.f16x2 t, $1, $2; max.f16x2 $0, t, $3; }", "=r,r,r,r", [a, b, c], dtype=tl.float16,
            is_pure=True, pack=2,
        )  # fmt: skip
    return tl.maximum(tl.maximum(a, b), c)


@triton.jit
def score_keys_kernel(
    few_query_ptr, few_key_ptr, score_ptr, n_queries, n_keys, n_segments, rows, own_offset,
    CAUSAL: tl.constexpr, SEGMENT: tl.constexpr, KEY_BLOCK: tl.constexpr, ROW_BLOCK: tl.constexpr, STAGES: tl.constexpr,
    PACKED: tl.constexpr, PTX: tl.constexpr,
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
        for row in tl.range(0, rows, 2 * ROW_BLOCK, num_stages=STAGES):
            query = base + (row + tl.arange(0, ROW_BLOCK))[:, None] * PACKED + dims[None, :]
            one = tl.dot(tl.load(query), key, out_dtype=tl.float16)
            other = tl.dot(tl.load(query + ROW_BLOCK * PACKED), key, out_dtype=tl.float16)
            best = largest_of_three(one, other, best, PTX)
        tl.store(score_ptr + (head * n_segments + segment) * n_keys + keys, tl.max(best, 0), mask=inside)


def packed_dtype(device: torch.device) -> torch.dtype:
    """8-bit floats where the tensor cores multiply them (compute capability 8.9 and later), else float16."""
    fast = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)
    return torch.float8_e4m3fn if fast else torch.float16


def takes_ptx(device: torch.device) -> bool:
    """Whether ``max.f16x2`` exists: on NVIDIA's devices from compute capability 8.0 on."""
    return device.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(device) >= (8, 0)


def packed_width(head_dim: int) -> int:
    """Numbers of a packed row: a power of two that holds ``few_dims`` and the normaliser, 32 at least."""
    return max(32, triton.next_power_of_2(few_dims(head_dim) + 1))


def pack_rows(x: Tensor, dims: Tensor, factor: Tensor, *, segment_len: int, last: float, dtype: torch.dtype) -> Tensor:
    """[B, H, N, D] -> [B * Hkv, P, G * segment_len, PACKED], rows (head of group, slot); zeros beyond N.

    Args:
        x: Queries or keys.
        dims: int64 [B, Hkv, R], the dimensions to keep.
        factor: float32 [B, Hkv, R], what each is multiplied by.
        segment_len: Rows of one segment.
        last: Value of the two columns of the normaliser.
        dtype: Of the packed rows, a key of LARGEST.
    """
    batch, heads, length, head_dim = x.shape
    kv_heads, width = dims.shape[1], packed_width(head_dim)
    group, segments = heads // kv_heads, n_segments(length, segment_len)
    packed = torch.empty(batch * kv_heads, segments, group * segment_len, width, device=x.device, dtype=dtype)
    pack_rows_kernel[(triton.cdiv(segments * segment_len, 128), batch * heads)](
        x, dims, factor, packed, *x.stride()[:3], length, heads, group, segment_len, segments, dims.shape[2],
        last, LARGEST[dtype], TILE=128, PACKED=width, num_warps=4,
    )  # fmt: skip
    return packed


def score_keys(query: Tensor, key: Tensor, mask: AttentionMask, *, scale: float, segment_len: int) -> Tensor:
    """Importance of every key for every segment, fp16 [B, Hkv, P, Nk]; what is no prefix key is left undefined."""
    batch, kv_heads, n_keys, head_dim = key.shape
    n_queries, dtype = query.shape[2], packed_dtype(query.device)
    moments = second_moments(query, key)
    dims = choose_dims(moments, min(packed_width(head_dim) - 2, head_dim))
    query_size, key_size = (x.gather(-1, dims).sqrt_().clamp_min_(1e-6) for x in (moments.query, moments.key))
    balance = (key_size / query_size / scale).sqrt_()
    few_query = pack_rows(query, dims, balance * scale, segment_len=segment_len, last=0.0, dtype=dtype)
    few_key = pack_rows(key, dims, 1 / balance, segment_len=n_keys, last=-1.0, dtype=dtype)
    segments, rows, width = few_query.shape[1:]
    score = torch.empty(batch, kv_heads, segments, n_keys, device=key.device, dtype=torch.float16)
    row_normaliser_kernel[(rows // 128, segments, batch * kv_heads)](
        few_query, few_key, few_key if mask.key_mask is None else mask.key_mask,
        0 if mask.key_mask is None else mask.key_mask.stride(0),
        n_queries, n_keys, segments, rows, kv_heads, mask.offset, LARGEST[dtype],
        CAUSAL=mask.causal, HAS_KEY_MASK=mask.key_mask is not None, SEGMENT=segment_len,
        STRIDE=key_stride(n_keys), TILE=128, KEY_BLOCK=128, PACKED=width, num_warps=4,
    )  # fmt: skip
    score_keys_kernel[(triton.cdiv(n_keys, 128), batch * kv_heads)](
        few_query, few_key, score, n_queries, n_keys, segments, rows, mask.own_offset(n_queries, n_keys),
        CAUSAL=mask.causal, SEGMENT=segment_len, KEY_BLOCK=128, ROW_BLOCK=64, STAGES=3, PACKED=width,
        PTX=takes_ptx(query.device), num_warps=4,
    )  # fmt: skip
    return score
