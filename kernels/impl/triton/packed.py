"""Exact attention over packed sequences in one launch: short ones, windows, and lengths that only the device knows.

Sequence s has the queries ``query_start[s]`` and on, and keys behind ``key_start[s]`` or in pages of its own. A program
looks up whose tile it computes. There are as many programs as tiles at most, which lengths do not change: the host need
not know them. query [1, Hq, T, D], key and value [1, Hkv, rows, D]; results as ``exact.py``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from s2o_compile.kernels.core.call import AttentionCall
from s2o_compile.kernels.core.plan import TILE_LEN
from s2o_compile.kernels.core.result import Result
from s2o_compile.kernels.impl.triton.exact import attend_tile, with_positive_scale
from s2o_compile.kernels.impl.triton.tile import (
    LOG2E,
    can_fix,
    launch,
    launch_config,
    load_rows,
    logit_scales,
    needs_wide,
    paging,
    store_tile,
    value_parts,
)
from s2o_compile.kernels.pages.table import BlockTable


@triton.jit
def find_sequence(tile, tile_stop, n_sequences):
    """The first sequence whose tiles end behind this one; ``n_sequences`` if none does."""
    first = tile * 0
    behind = first + n_sequences
    while first < behind:
        middle = (first + behind) // 2
        is_before = tl.load(tile_stop + middle) <= tile
        first = tl.where(is_before, middle + 1, first)
        behind = tl.where(is_before, behind, middle)
    return first


@triton.jit
def packed_fwd_kernel(
    query_ptr, key_ptr, value_ptr, out_ptr, lse_ptr, sequences_ptr, sinks_ptr,
    stride_qh, stride_qn, stride_kh, stride_kn, stride_vh, stride_vn, stride_oh, stride_on, stride_lh, stride_table,
    stride_sink, n_sequences, group, window, qk_scale, inner, pages, page_rows, last_page,
    FIXED: tl.constexpr, CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SINKS: tl.constexpr, TILE: tl.constexpr,
    SOFTCAP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_VALUE: tl.constexpr, KEY_BLOCK: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
    WIDE: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """One query tile of one head of one sequence."""
    tile = tl.program_id(0) // group
    h = tl.program_id(1).to(tl.int64) * group + tl.program_id(0) % group
    tile_stop = sequences_ptr + 4 * n_sequences
    sequence = find_sequence(tile, tile_stop, n_sequences)
    if sequence >= n_sequences:
        return
    tile -= tl.load(tile_stop + sequence - 1, mask=sequence > 0, other=0)
    query_start = tl.load(sequences_ptr + sequence).to(tl.int64)
    n_queries = tl.load(sequences_ptr + n_sequences + sequence)
    key_start = tl.load(sequences_ptr + 2 * n_sequences + sequence).to(tl.int64)
    n_keys = tl.load(sequences_ptr + 3 * n_sequences + sequence)
    rows = tile * TILE + tl.arange(0, TILE)
    present = rows < n_queries
    rows = tl.minimum(rows, n_queries - 1)
    first, last = tile * TILE, tl.minimum(tile * TILE + TILE, n_queries) - 1
    query = query_ptr + h * stride_qh + query_start * stride_qn
    query = load_rows(query, rows, stride_qn, HEAD_DIM, BLOCK_DIM, WIDE)
    key = key_ptr + h // group * stride_kh + key_start * stride_kn
    value = value_ptr + h // group * stride_vh + key_start * stride_vn
    m, l, acc, _ = attend_tile(
        query, rows, first, last, key, value, key_ptr, stride_kn, stride_vn, n_keys, n_keys - n_queries, window,
        qk_scale, inner, pages + sequence * stride_table, page_rows, last_page, FIXED, CAUSAL, HAS_WINDOW, False, TILE,
        SOFTCAP, HEAD_DIM, BLOCK_DIM, VALUE_DIM, BLOCK_VALUE, KEY_BLOCK, STAGES, PRECISION, WIDE, PAGE,
    )  # fmt: skip
    if HAS_SINKS:  # one more logit, whose value is zero
        sink = tl.load(sinks_ptr + h * stride_sink).to(tl.float32) * LOG2E
        most = tl.maximum(m, sink)
        decay = tl.math.exp2(m - most)
        l = l * decay + tl.math.exp2(sink - most)
        acc = acc * decay[:, None]
        m = most
    out = out_ptr + h * stride_oh + query_start * stride_on
    lse = lse_ptr + h * stride_lh + query_start
    store_tile(out, lse, m, l, acc, rows, present, stride_on, VALUE_DIM, BLOCK_VALUE)


def attend_packed(
    call: AttentionCall, sequences: Tensor, tiles: int, blocks: BlockTable | None, output: Tensor, lse: Tensor
) -> None:
    """Fill the rows of some sequences, sinks included.

    Args:
        call: Tensors of all sequences, and terms of the mask; each sequence is bottom-right causal by itself.
        sequences: int32 [5, S], contiguous: first query, queries, first key, keys, and the tiles up to its last one. A
            sequence without queries is left out. Queries are taken for inside T, keys for inside their tensors.
        tiles: Tiles of all sequences at most.
        blocks: The pages of every sequence; None if keys lie one behind the other.
        output: [1, Hq, T, Dv], unit last stride.
        lse: float32 [1, Hq, T].
    """
    call = with_positive_scale(call)
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in call.tensors)
    mask, softcap = call.mask, call.softcap
    if not tiles:
        return
    computed = torch.empty(0, dtype=torch.int32, device=query.device)
    sinks = lse if call.sinks is None else call.sinks
    pages = paging(None if blocks is None else blocks.pages(0, 0), key)
    table = sequences if blocks is None else blocks.table
    for part, into in value_parts(value, Result(output, lse, computed)):
        launch(
            packed_fwd_kernel, (tiles * call.group, key.shape[1]),
            query, key, part, into.output, into.lse, sequences, sinks,
            *query.stride()[1:3], *key.stride()[1:3], *part.stride()[1:3], *into.output.stride()[1:3],
            into.lse.stride(1), table.stride(0), sinks.stride(-1), sequences.shape[1], call.group,
            0 if mask.window is None else mask.window, **logit_scales(call.scale, softcap), **pages,
            FIXED=can_fix(query.dtype, mask), CAUSAL=mask.causal, HAS_WINDOW=mask.window is not None,
            HAS_SINKS=call.sinks is not None, TILE=TILE_LEN, WIDE=needs_wide(query, key, part),
            **launch_config(query.shape[3], part.shape[3], query.dtype, query.device),
        )  # fmt: skip
