"""``exact.sampled.attend_rows`` on the GPU: a few queries of every head against all keys, which programs share out.

So few rows would leave most of the card idle. Each program takes SPLIT_LEN keys for a block of rows, and torch merges
the parts by their log-sum-exp. Rows ascend, so the first blocks skip the last keys. query [B, Hq, Nq, D], key
[B, Hkv, Nk, D], value [B, Hkv, Nk, Dv], rows [R].
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from s2o_compile.kernels.core.call import AttentionCall
from s2o_compile.kernels.core.plan import TILE_LEN
from s2o_compile.kernels.exact.sampled import ExactRows
from s2o_compile.kernels.impl.triton.exact import attend_range
from s2o_compile.kernels.impl.triton.tile import (
    LN2,
    NOTHING_SEEN,
    WIDEST_VALUE,
    key_mask_of,
    launch_config,
    load_rows,
    logit_scales,
    needs_wide,
)

SPLIT_LEN = 4096
"""Keys of one program."""


@triton.jit
def sampled_fwd_kernel(
    query_ptr, key_ptr, value_ptr, rows_ptr, part_ptr, lse_ptr, key_mask_ptr,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn, stride_mb,
    n_rows, n_keys, heads, group, offset, qk_scale, inner,
    CAUSAL: tl.constexpr, HAS_KEY_MASK: tl.constexpr, SPLIT: tl.constexpr, TILE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_VALUE: tl.constexpr, KEY_BLOCK: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """A block of one head's rows over one split of the keys: output and natural log-sum-exp [.., splits, slots]."""
    split, row_head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h = row_head // heads, row_head % heads
    slot = tl.program_id(2) * TILE + tl.arange(0, TILE)
    rows = tl.load(rows_ptr + tl.minimum(slot, n_rows - 1)).to(tl.int32)
    start, stop = split * SPLIT, tl.minimum(split * SPLIT + SPLIT, n_keys)
    if CAUSAL:
        stop = tl.minimum(stop, tl.maximum(tl.max(rows, 0) + offset + 1, start))
    query = load_rows(query_ptr + b * stride_qb + h * stride_qh, rows, stride_qn, HEAD_DIM, BLOCK_DIM, WIDE)
    key = key_ptr + b * stride_kb + h // group * stride_kh
    value = value_ptr + b * stride_vb + h // group * stride_vh
    m = tl.full([TILE], NOTHING_SEEN, tl.float32)
    l = tl.zeros([TILE], tl.float32)
    acc = tl.zeros([TILE, BLOCK_VALUE], tl.float32)
    m, l, acc = attend_range(
        m, l, acc, query, rows, key, value, key_mask_ptr + b * stride_mb, start, stop, stride_kn, stride_vn, n_keys,
        offset, 0, qk_scale, inner, True, False, CAUSAL, False, HAS_KEY_MASK, HAS_SOFTCAP, HEAD_DIM, BLOCK_DIM,
        VALUE_DIM, BLOCK_VALUE, KEY_BLOCK, STAGES, PRECISION, WIDE,
    )  # fmt: skip
    part = (row_head * tl.num_programs(0) + split) * (tl.num_programs(2) * TILE) + slot
    dims = tl.arange(0, BLOCK_VALUE)
    result = acc / tl.where(l == 0.0, 1.0, l)[:, None]
    tl.store(part_ptr + part[:, None] * VALUE_DIM + dims[None, :], result, mask=(dims < VALUE_DIM)[None, :])
    tl.store(lse_ptr + part, (m + tl.math.log2(l)) * LN2)


def attend_rows(call: AttentionCall, rows: Tensor) -> ExactRows:
    """Exact attention of sampled queries; arguments and results as ``exact.sampled.attend_rows``."""
    (query, key, _), mask = call.tensors, call.mask
    batch, heads = query.shape[:2]
    n_keys, n_rows = key.shape[2], len(rows)
    tile, splits = min(max(16, triton.next_power_of_2(n_rows)), TILE_LEN), triton.cdiv(n_keys, SPLIT_LEN)
    blocks = triton.cdiv(n_rows, tile)
    lse = torch.empty(batch, heads, splits, blocks * tile, dtype=torch.float32, device=query.device)
    key_mask, stride_mb = key_mask_of(mask.key_mask, rows)
    outputs = []
    for value in call.value.split(WIDEST_VALUE, 3):
        part = lse.new_empty(*lse.shape, value.shape[3])
        config = launch_config(query.shape[3], value.shape[3], query.dtype, query.device)
        sampled_fwd_kernel[splits, batch * heads, blocks](
            query, key, value, rows, part, lse, key_mask,
            *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], stride_mb,
            n_rows, n_keys, heads, call.group, mask.offset, *logit_scales(call.scale, call.softcap),
            CAUSAL=mask.causal, HAS_KEY_MASK=mask.key_mask is not None, SPLIT=SPLIT_LEN, TILE=tile,
            HAS_SOFTCAP=call.softcap is not None, WIDE=needs_wide(query, key, value), **config,
        )  # fmt: skip
        outputs.append(part)
    whole = lse.logsumexp(2)
    share = (lse - torch.where(whole == -torch.inf, 0.0, whole)[:, :, None]).exp()
    output = torch.cat([(share[..., None] * part).sum(2) for part in outputs], -1)
    return ExactRows(rows, output[:, :, :n_rows], whole[:, :, :n_rows])
