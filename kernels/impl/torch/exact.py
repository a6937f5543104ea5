"""Exact attention in position order in plain torch: only the visible range of each tile is computed.

It serves sliding windows, where the work is linear in the length. On the dense path it does what SDPA cannot: return a
log-sum-exp, which sinks need, and cap logits. A tile is many small operations, so each runs on one thread.
"""

from __future__ import annotations

import itertools

import torch

from s2o_compile.kernels.core.call import AttentionCall
from s2o_compile.kernels.core.plan import TILE_LEN
from s2o_compile.kernels.core.result import Result, empty_result
from s2o_compile.kernels.impl.torch.blocks import block_attention, merge
from s2o_compile.kernels.support.parallel import for_each

KEY_STEP = 4096
"""Keys of one block: bounds the memory of the explicit mask."""


def attend_exact(call: AttentionCall) -> Result:
    """Exact attention over every visible key."""
    (query, key, value), mask, softcap = call.without_hidden_keys().tensors, call.mask, call.softcap
    batch, heads, n_queries, _ = query.shape
    kv_heads, n_keys, value_dim = value.shape[1:]
    key, value = key.contiguous(), value.contiguous()
    result = output, lse, computed = empty_result(query, value_dim)

    def tile(place: tuple[int, int, int]) -> None:
        first, b, kv = place
        last = min(first + TILE_LEN, n_queries) - 1
        start, stop = mask.visible_range(first, last, n_keys)
        rows = torch.arange(first, last + 1, device=query.device)
        group = slice(kv * heads // kv_heads, (kv + 1) * heads // kv_heads)
        tile_query = query[b, group, first : last + 1].float().flatten(0, 1)
        out = torch.zeros(len(tile_query), value_dim, device=query.device, dtype=torch.float32)
        mass = torch.full(tile_query.shape[:1], -torch.inf, device=query.device, dtype=torch.float32)
        for begin in range(start, stop, KEY_STEP):
            positions = torch.arange(begin, min(begin + KEY_STEP, stop), device=query.device)
            hidden = ~mask.visible(rows, positions)
            if mask.key_mask is not None:
                hidden |= ~mask.key_mask[b, positions]
            block = slice(begin, begin + len(positions))
            hidden = hidden.repeat(tile_query.shape[0] // len(rows), 1)
            keys, values = key[b, kv, block].float(), value[b, kv, block].float()
            part = block_attention(tile_query, keys, values, hidden, scale=call.scale, softcap=softcap)
            out, mass, _ = merge(out, mass, *part)
        computed[b, group, first // TILE_LEN] = stop - start
        output[b, group, first : last + 1] = out.view(-1, len(rows), value_dim).to(output.dtype)
        lse[b, group, first : last + 1] = mass.view(-1, len(rows))

    last_first = reversed(range(0, n_queries, TILE_LEN))  # the longest rows first
    for_each(tile, itertools.product(last_first, range(batch), range(kv_heads)), query.device)
    return result
