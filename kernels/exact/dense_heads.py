"""Key/value heads marked dense, beside the sparse ones of the same call.

Some trained heads look at nearly everything: a sparse one would visit all ranked keys and cost more than dense
attention. A group of query heads shares one ranking, so whole groups are marked, by their key/value head.

All marked heads run in one call of SDPA, exactly. Heads that lie side by side are views. Others are copied, which costs
little: N * D numbers beside N * N products. SDPA returns no log-sum-exp, caps no logits, and may need the mask pair by
pair: there the exact executor runs, in memory linear in N.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from s2o_compile.kernels.core.call import AttentionCall
from s2o_compile.kernels.core.plan import TILE_LEN
from s2o_compile.kernels.core.result import Result
from s2o_compile.kernels.exact.sdpa import attend_by_sdpa, needs_pairs


def runs(heads: Iterable[int], longest: int) -> list[slice]:
    """Ascending heads as slices of at most ``longest`` that lie side by side."""
    slices: list[slice] = []
    for head in heads:
        if slices and slices[-1].stop == head and head - slices[-1].start < longest:
            slices[-1] = slice(slices[-1].start, head + 1)
        else:
            slices.append(slice(head, head + 1))
    return slices


def query_heads(heads: slice, group: int) -> slice:
    """The query heads of a run of key/value heads."""
    return slice(heads.start * group, heads.stop * group)


def attend_dense(call: AttentionCall, into: Result, exact: Callable[[AttentionCall], Result]) -> None:
    """Fill the marked heads of ``into``.

    Args:
        call: Its mask has no window, its scale is positive.
        into: Results of all heads. If no log-sum-exp is wanted, that of the marked heads may stay uninitialised.
        exact: The implementation's executor over every visible key.
    """
    query, key, value = call.tensors
    kv_heads = runs(call.dense_heads, key.shape[1])
    members = [query_heads(heads, call.group) for heads in kv_heads]
    marked = call.over(take(query, members), take(key, kv_heads), take(value, kv_heads))
    if call.wants_lse or call.softcap is not None or needs_pairs(call.mask, call.n_keys, call.scale):
        result = exact(marked)
    else:
        rows = marked.query.shape[:3]
        computed = whole_tiles(call).expand(*rows[:2], -1)
        result = Result(attend_by_sdpa(marked), query.new_empty(rows, dtype=torch.float32), computed)
    sizes = [heads.stop - heads.start for heads in members]
    for whole, parts in zip(into, (x.split(sizes, 1) for x in result), strict=True):
        for heads, part in zip(members, parts, strict=True):
            whole[:, heads] = part


def whole_tiles(call: AttentionCall) -> Tensor:
    """int32 [tiles]: keys that each tile computes densely, up to the last that one of its queries sees."""
    n_queries, device = call.n_queries, call.query.device
    _, stops = call.mask.row_ranges(n_queries, call.n_keys, device)
    last = torch.arange(TILE_LEN - 1, n_queries + TILE_LEN - 1, TILE_LEN, device=device).clamp(max=n_queries - 1)
    return stops[last].int()


def take(x: Tensor, runs: Sequence[slice]) -> Tensor:
    """Runs of heads of [B, H, N, D]: a view if there is one run."""
    return x[:, runs[0]] if len(runs) == 1 else torch.cat([x[:, heads] for heads in runs], dim=1)
