"""Key/value heads marked dense, beside the sparse ones of the same call.

Some trained heads look at nearly everything: ranked, they would be walked to the end and cost more than dense
attention. A group of query heads shares one ranking, so a group is what is marked, by its key/value head.

All marked heads run in one call of SDPA, exactly. Heads that lie side by side are views, others are copied, which
N * D numbers cost little beside N * N products. Where SDPA cannot (a log-sum-exp is wanted, logits are capped) or would
need the mask pair by pair, the exact executor runs, in memory linear in N.
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


def attend_dense(call: AttentionCall, into: Result, exact: Callable[[AttentionCall], Result]) -> None:
    """Fill the marked heads of ``into``, the results of all heads; ``exact`` attends to every visible key.

    The call's mask has no window, and its scale is positive. If no log-sum-exp is wanted, that of the marked heads may
    stay uninitialised.
    """
    places = runs(call.dense_heads, call.key.shape[1])
    if call.pages is None:
        _attend_places(call, places, into, exact)
        return
    for place in places:  # heads of pages are views, and cannot be joined by a copy
        _attend_places(call, [place], into, exact)


def _attend_places(
    call: AttentionCall, places: Sequence[slice], into: Result, exact: Callable[[AttentionCall], Result]
) -> None:
    query, key, value = call.tensors
    rows = [query_heads(heads, call.group) for heads in places]
    marked = call.over(take(query, rows), take(key, places), take(value, places))
    if (
        call.pages is not None
        or call.wants_lse
        or call.softcap is not None
        or needs_pairs(call.mask, call.n_keys, call.scale)
    ):
        found = exact(marked)
    else:
        heads = marked.query.shape[:3]
        every = whole_tiles(call).expand(*heads[:2], -1)
        found = Result(attend_by_sdpa(marked), query.new_empty(heads, dtype=torch.float32), every)
    sizes = [heads.stop - heads.start for heads in rows]
    for whole, parts in zip(into, (x.split(sizes, 1) for x in found), strict=True):
        for heads, part in zip(rows, parts, strict=True):
            whole[:, heads] = part


def whole_tiles(call: AttentionCall) -> Tensor:
    """int32 [tiles]: keys that each tile computes densely, up to the last that one of its queries sees."""
    n_queries, device = call.n_queries, call.query.device
    _, stops = call.mask.row_ranges(n_queries, call.n_keys, device)
    last = torch.arange(TILE_LEN - 1, n_queries + TILE_LEN - 1, TILE_LEN, device=device).clamp(max=n_queries - 1)
    return stops[last].int()


def take(x: Tensor, places: Sequence[slice]) -> Tensor:
    """Some heads of [B, H, N, D]: a view if they lie side by side."""
    return x[:, places[0]] if len(places) == 1 else torch.cat([x[:, heads] for heads in places], dim=1)
