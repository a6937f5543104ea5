"""Key/value heads marked dense, beside the sparse ones of the same call.

Some trained heads look at nearly everything: ranked, they would be walked to the end and cost more than dense
attention. A group of query heads shares one ranking, so a group is what is marked, by its key/value head.

All marked heads run in one call of SDPA, exactly. Heads that lie side by side are views, others are copied, which
N * D numbers cost little beside N * N products. Where SDPA cannot (a log-sum-exp is wanted, logits are capped) or would
need the mask pair by pair, the exact executor runs, in memory linear in N.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import ModuleType

import torch
from torch import Tensor

from s2o_compile.kernels.core.mask import AttentionMask
from s2o_compile.kernels.core.plan import TILE_LEN
from s2o_compile.kernels.core.result import Result
from s2o_compile.kernels.exact.sdpa import dense_attention, needs_pairs


def runs(heads: Iterable[int], longest: int) -> list[slice]:
    """Ascending heads as slices of at most ``longest`` that lie side by side."""
    found: list[slice] = []
    for head in heads:
        start = found[-1].start if found and found[-1].stop == head else None
        if start is not None and head - start < longest:
            found[-1] = slice(start, head + 1)
        else:
            found.append(slice(head, head + 1))
    return found


def query_heads(heads: slice, group: int) -> slice:
    """The query heads of some key/value heads."""
    return slice(heads.start * group, heads.stop * group)


def attend_dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: AttentionMask,
    into: Result,
    dense_heads: Sequence[int],
    *,
    scale: float,
    softcap: float | None,
    wants_lse: bool,
    exact: ModuleType,
) -> None:
    """Fill the marked heads of ``into``.

    Args:
        query: [B, Hq, Nq, D].
        key: [B, Hkv, Nk, D].
        value: [B, Hkv, Nk, Dv].
        mask: Without a window.
        into: Results of all heads.
        dense_heads: Key/value heads, ascending.
        scale: Softmax scale, positive.
        softcap: Bound of the logits, None for none.
        wants_lse: Whether the log-sum-exp is wanted; that of these heads may stay uninitialised otherwise.
        exact: `torch_exact` or `triton_exact`.
    """
    group = query.shape[1] // key.shape[1]
    places = runs(dense_heads, key.shape[1])
    rows = [query_heads(heads, group) for heads in places]
    taken = take(query, rows), take(key, places), take(value, places)
    if wants_lse or softcap is not None or needs_pairs(mask, key.shape[2], scale):
        exact = exact.attend_exact(*taken, mask, scale=scale, softcap=softcap)
    else:
        heads = taken[0].shape[:3]
        every = whole_tiles(mask, query.shape[2], key.shape[2], query.device).expand(*heads[:2], -1)
        lse = query.new_empty(heads, dtype=torch.float32)
        exact = Result(dense_attention(*taken, mask, scale=scale), lse, every)
    sizes = [heads.stop - heads.start for heads in rows]
    for whole, parts in zip(into, (x.split(sizes, 1) for x in exact), strict=True):
        for heads, part in zip(rows, parts, strict=True):
            whole[:, heads] = part


def whole_tiles(mask: AttentionMask, n_queries: int, n_keys: int, device: torch.device) -> Tensor:
    """int32 [tiles]: keys that each tile computes densely, up to the last that one of its queries sees."""
    _, stops = mask.row_ranges(n_queries, n_keys, device)
    last = torch.arange(TILE_LEN - 1, n_queries + TILE_LEN - 1, TILE_LEN, device=device).clamp(max=n_queries - 1)
    return stops[last].int()


def take(x: Tensor, places: Sequence[slice]) -> Tensor:
    """Some heads of [B, H, N, D]: a view if they lie side by side."""
    return x[:, places[0]] if len(places) == 1 else torch.cat([x[:, heads] for heads in places], dim=1)
