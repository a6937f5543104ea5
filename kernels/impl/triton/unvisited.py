"""``ranking.unvisited.estimate_unvisited`` on the GPU: ranked keys are read once, and nothing of their number is kept.

    mass[i, c] = log2 of  sum over keys j of block c of  2^(q_i . k_j * scale * log2(e))
    behind[n]  = max over sampled queries i of  sum over blocks c >= n of  2^(mass[i, c] - log2 of all mass of i)

Blocks do not depend on each other. So one launch computes them side by side, in-segment keys before ranked ones, and a
second one adds them up. A row's whole mass is known only then, hence the logarithms.

Query [B, Hq, Nq, D], key [B, Hkv, Nk, D], any strides with unit last stride; mass float32 [B * Hq, P, SAMPLES,
in-segment blocks + ranked blocks]. A program takes the sampled queries of all heads that share a ranking as one tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from s2o_compile.kernels.core.call import AttentionCall
from s2o_compile.kernels.core.plan import Plan
from s2o_compile.kernels.impl.triton.order import find_non_finite
from s2o_compile.kernels.impl.triton.tile import (
    NOTHING_SEEN,
    cap_products,
    key_mask_of,
    launch,
    load_rows,
    logit_scales,
    needs_wide,
    seg_bounds,
)
from s2o_compile.kernels.ranking.unvisited import BLOCK_LEN, SAMPLES, sample_segments

ROWS = 64
"""Rows of one tile at most: a warpgroup multiplies that many."""

TILE_BYTES = 32 * 1024
"""Bytes of a tile at most: one of queries and STAGES of keys fit in any GPU's shared memory."""

STAGES = 2

PROGRAM_BLOCKS = 8
"""Blocks of one program: enough to load queries for, few enough that short rankings fill the card."""


@triton.jit
def block_masses_kernel(
    query_ptr, key_ptr, key_index_ptr, prefix_count_ptr, sampled_ptr, non_finite_ptr, key_mask_ptr, mass_ptr, bad_ptr,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_mb, n_queries, n_keys, segments,
    ranking_len, columns, rankings, shared, group, offset, seg_offset, qk_scale, inner, CAUSAL: tl.constexpr,
    HAS_KEY_MASK: tl.constexpr, SOFTCAP: tl.constexpr, SEGMENT: tl.constexpr, SAMPLES: tl.constexpr,
    HEADS: tl.constexpr, OWN_BLOCKS: tl.constexpr, PROGRAM_BLOCKS: tl.constexpr, KEY_BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Mass of some blocks of one ranking for the sampled queries of HEADS heads, and which hold non-finite keys."""
    segment = tl.program_id(1) % segments
    ranking_row = tl.program_id(2).to(tl.int64)  # of [B * Hr]
    b, heads = ranking_row // rankings, rankings * shared
    count = tl.load(prefix_count_ptr + b * segments + segment)
    first_block = tl.program_id(0) * PROGRAM_BLOCKS
    stop_block = tl.minimum(first_block + PROGRAM_BLOCKS, OWN_BLOCKS + tl.cdiv(count, KEY_BLOCK))

    row = tl.arange(0, HEADS * SAMPLES)
    member = tl.program_id(1) // segments * HEADS + row // SAMPLES  # of the heads that share the ranking
    h = ranking_row % rankings * shared + tl.minimum(member, shared - 1)
    position = tl.load(sampled_ptr + segment * SAMPLES + row % SAMPLES)
    kv = ranking_row % rankings * shared // group
    key = key_ptr + b * stride_kb + kv * stride_kh
    non_finite = non_finite_ptr + (b * (heads // group) + kv) * n_keys
    dims = tl.arange(0, BLOCK_DIM)
    wide = position.to(tl.int64)
    pointers = query_ptr + (b * stride_qb + h * stride_qh + wide * stride_qn)[:, None] + dims[None, :]
    query = tl.load(pointers, mask=dims[None, :] < HEAD_DIM, other=0.0)
    seg_start, seg_stop = seg_bounds(segment, n_queries, n_keys, seg_offset, SEGMENT)
    last_seen = position + offset
    key_index = key_index_ptr + (ranking_row * segments + segment) * ranking_len
    target = mass_ptr + (((b * heads + h) * segments + segment) * SAMPLES + row % SAMPLES) * columns
    for block in tl.range(first_block, stop_block, num_stages=STAGES):
        lane = tl.arange(0, KEY_BLOCK)
        own, entries = block < OWN_BLOCKS, (block - OWN_BLOCKS) * KEY_BLOCK + lane
        is_ranked = (entries >= 0) & (entries < count)
        keys = tl.load(key_index + entries, mask=is_ranked, other=0)
        keys = tl.where(own, seg_start + block * KEY_BLOCK + lane, keys)
        present = tl.where(own, keys < seg_stop, is_ranked)
        keys = tl.minimum(keys, n_keys - 1)
        if HAS_KEY_MASK:
            present = present & (tl.load(key_mask_ptr + b * stride_mb + keys) != 0)
        k = load_rows(key, keys, stride_kn, HEAD_DIM, BLOCK_DIM, WIDE)
        products = cap_products(tl.dot(query, tl.trans(k), input_precision=PRECISION), inner, SOFTCAP)
        seen = present[None, :]
        if CAUSAL:
            seen = seen & (keys[None, :] <= last_seen[:, None])
        logits = tl.where(seen, products * qk_scale, -float("inf"))
        most = tl.maximum(tl.max(logits, 1), NOTHING_SEEN)
        mass = most + tl.math.log2(tl.sum(tl.math.exp2(logits - most[:, None]), 1))
        tl.store(target + block, mass, mask=member < shared)
        bad = tl.max((is_ranked & (tl.load(non_finite + keys) != 0)).to(tl.int32), 0)
        tl.store(bad_ptr + (ranking_row * segments + segment) * columns + block, bad)


@triton.jit
def mass_behind_kernel(
    mass_ptr, bad_ptr, prefix_count_ptr, unvisited_ptr, segments, columns, width, heads, rankings, shared,
    SAMPLES: tl.constexpr, OWN_BLOCKS: tl.constexpr, KEY_BLOCK: tl.constexpr, BLOCK_LEN: tl.constexpr,
    STEP: tl.constexpr,
):  # fmt: skip
    """Mass that the worst sampled query of one segment of one head leaves behind every BLOCK_LEN ranked keys."""
    segment, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    count = tl.load(prefix_count_ptr + head // heads * segments + segment)
    stop = OWN_BLOCKS + tl.cdiv(count, KEY_BLOCK)
    rows = mass_ptr + ((head * segments + segment) * SAMPLES + tl.arange(0, SAMPLES))[:, None] * columns
    bad_ptr += (head // shared * segments + segment) * columns
    unvisited_ptr += (head * segments + segment) * width
    most = tl.full([SAMPLES], NOTHING_SEEN, tl.float32)
    total = tl.zeros([SAMPLES], tl.float32)
    for start in range(0, stop, STEP):
        column = start + tl.arange(0, STEP)
        mass = tl.load(rows + column[None, :], mask=column[None, :] < stop, other=-float("inf"))
        more = tl.maximum(most, tl.max(mass, 1))
        total = total * tl.math.exp2(most - more) + tl.sum(tl.math.exp2(mass - more[:, None]), 1)
        most = more
    behind = tl.zeros([SAMPLES], tl.float32)
    steps = tl.cdiv(OWN_BLOCKS + (width - 1) * (BLOCK_LEN // KEY_BLOCK) + 1, STEP)
    for step in range(0, steps):
        column = (steps - 1 - step) * STEP + tl.arange(0, STEP)
        is_ranked = (column >= OWN_BLOCKS) & (column < stop)
        mass = tl.load(rows + column[None, :], mask=is_ranked[None, :], other=-float("inf"))
        share = tl.math.exp2(mass - most[:, None]) / total[:, None]
        bad = tl.load(bad_ptr + column, mask=is_ranked, other=0) != 0
        share = tl.where((share == share) & (bad == 0)[None, :], share, float("inf"))
        share = tl.where(is_ranked[None, :], share, 0.0)  # a row of NaN has no number there either
        left = tl.cumsum(share, 1, reverse=True) + behind[:, None]
        entry = (column - OWN_BLOCKS) * KEY_BLOCK
        kept = (entry >= 0) & (entry % BLOCK_LEN == 0) & (entry // BLOCK_LEN < width)
        tl.store(unvisited_ptr + entry // BLOCK_LEN, tl.max(left, 0), mask=kept)
        behind += tl.sum(share, 1)


def estimate_unvisited(call: AttentionCall, plan: Plan) -> Tensor:
    """Share of a row's mass behind the first n blocks of its ranking, float32 [B, Hq, P, 1 + blocks]."""
    (query, key, value), mask, softcap = call.tensors, call.mask, call.softcap
    batch, heads, n_queries, head_dim = query.shape
    kv_heads, n_keys = key.shape[1:3]
    rankings, segments, longest = plan.key_index.shape[1:]
    shared = heads // rankings
    block_dim = max(16, triton.next_power_of_2(head_dim))
    block_rows = TILE_BYTES // (block_dim * query.element_size())
    key_block = max(16, min(block_rows, BLOCK_LEN))
    tile_heads = max(1, min(triton.next_power_of_2(shared), min(block_rows, ROWS) // SAMPLES))
    seg_blocks = triton.cdiv(plan.segment_len, key_block)
    columns = seg_blocks + triton.cdiv(longest, key_block)
    width = 1 + triton.cdiv(longest, BLOCK_LEN)
    rows = sample_segments(n_queries, plan.segment_len, SAMPLES, query.device).to(torch.int32)
    mass = torch.empty(batch * heads, segments, SAMPLES, columns, dtype=torch.float32, device=query.device)
    bad = torch.empty(batch * rankings, segments, columns, dtype=torch.int32, device=query.device)
    unvisited = torch.empty(batch, heads, segments, width, dtype=torch.float32, device=query.device)
    sizes = {"SAMPLES": SAMPLES, "OWN_BLOCKS": seg_blocks, "KEY_BLOCK": key_block}
    key_mask, stride_mb = key_mask_of(mask.key_mask, rows)
    grid = triton.cdiv(columns, PROGRAM_BLOCKS), segments * triton.cdiv(shared, tile_heads), batch * rankings
    launch(
        block_masses_kernel, grid,
        query, key, plan.key_index, plan.prefix_count, rows, find_non_finite(key, value), key_mask, mass, bad,
        *query.stride()[:3], *key.stride()[:3], stride_mb, n_queries, n_keys, segments, longest, columns, rankings,
        shared, heads // kv_heads, mask.offset, mask.seg_offset(n_queries, n_keys), **logit_scales(call.scale, softcap),
        CAUSAL=mask.causal, HAS_KEY_MASK=mask.key_mask is not None, SEGMENT=plan.segment_len, HEADS=tile_heads,
        PROGRAM_BLOCKS=PROGRAM_BLOCKS, HEAD_DIM=head_dim, BLOCK_DIM=block_dim, STAGES=STAGES, WIDE=needs_wide(key),
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32", num_warps=4, **sizes,
    )  # fmt: skip
    launch(
        mass_behind_kernel, (segments, batch * heads),
        mass, bad, plan.prefix_count, unvisited, segments, columns, width, heads, rankings, shared, BLOCK_LEN=BLOCK_LEN,
        STEP=256, num_warps=4, **sizes,
    )  # fmt: skip
    return unvisited
