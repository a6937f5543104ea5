"""S2O forward on a CPU in functions that can be traced: loops are operators, lengths may be symbolic.

    map over segments of all key/value heads
        rank the segment's keys
        map over its query positions, TILE_LEN at a time, the tiles of a group side by side
            pass 1 over the own keys, then a loop over chunks of the list until every tile of the group has stopped

``torch_forward.py`` is the same method with Python's loops; a tile stops there behind the same chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._higher_order_ops.map import map_impl
from torch._higher_order_ops.while_loop import while_loop_op

from s2o_compile.kernels.definition import FIRST_TEST
from s2o_compile.kernels.mask import AttentionMask
from s2o_compile.kernels.plan import TILE_LEN, default_chunk_len, own_keys, poisoned_keys
from s2o_compile.kernels.portable_ranking import Segment, rank_segment
from s2o_compile.kernels.ranking_per_query import choose_dims, dim_stride, few_dims, sample_moments, take_dims

STEP = 256
"""Keys of one product; the stop rule is tested every few of them, as ``plan.default_chunk_len`` says."""


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: AttentionMask,
    *,
    scale: float,
    tau: Tensor,
    softcap: float | None,
    segment_len: int,
) -> tuple[Tensor, Tensor]:
    """Attention by ranked keys and early stop.

    Args:
        query: float32 [B, Hq, Nq, D].
        key: float32 [B, Hkv, Nk, D].
        value: float32 [B, Hkv, Nk, Dv].
        mask: The mask, without a window.
        scale: Softmax scale, positive.
        tau: float32 [Hq].
        softcap: Bound of the logits, None for none.
        segment_len: Queries that share one ranking.

    Returns:
        Output float32 [B, Hq, Nq, Dv] and log-sum-exp float32 [B, Hq, Nq].
    """
    batch, heads, n_queries, head_dim = query.shape
    kv_heads, n_keys, value_dim = value.shape[1:]
    group, tiles = heads // kv_heads, segment_len // TILE_LEN
    dims = choose_dims(sample_moments(_samples(query), _samples(key)), min(few_dims(head_dim), head_dim))
    few_query, few_key = take_dims(query, dims) * scale, take_dims(key, dims)
    segments = (n_queries + segment_len - 1) // segment_len
    poisoned = poisoned_keys(key, value).flatten()
    # Rows of all heads one below the other: a row is read by its number, and no head is copied for its segments.
    query, few_query, key, few_key, value = (
        x.reshape(-1, x.shape[3]) for x in (query * scale, few_query, key, few_key, value)
    )
    def segment(
        number: Tensor, query: Tensor, key: Tensor, poisoned: Tensor, *rest: Tensor | int
    ) -> tuple[Tensor, Tensor]:
        head = (number // segments).clamp(max=batch * kv_heads - 1)
        place = place_of(number)
        query_rows = rows_of(head, place.first + torch.arange(segment_len))
        key_rows = head * n_keys + torch.arange(n_keys)
        allowed = rest[0][head // kv_heads * n_keys + torch.arange(n_keys)] if padded else None
        keys, count = rank_segment(query[query_rows], key[key_rows], poisoned[key_rows], allowed, mask, place, n_queries)
        return (head * n_keys + keys).to(torch.int32), count

    def tile(
        number: Tensor, query: Tensor, key: Tensor, value: Tensor, lists: Tensor, counts: Tensor, tau: Tensor,
        *rest: Tensor | int,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        at, within = number // tiles, number % tiles
        head = (at // segments).clamp(max=batch * kv_heads - 1)
        place = place_of(at)
        slots = place.first + within * TILE_LEN + torch.arange(TILE_LEN)
        tile_query = query[rows_of(head, slots)].flatten(0, 1)
        own = place.start + torch.arange(segment_len)
        seen = (own < place.stop) & mask.visible(slots, own)
        own = own.clamp(max=n_keys - 1)
        if padded:
            seen = seen & rest[0][head // kv_heads * n_keys + own]
        own = head * n_keys + own
        out, lse = block(tile_query, key[own], value[own], ~seen.repeat(group, 1), softcap)
        chunk = default_chunk_len(torch.full((), n_keys))
        limit = tau[head * group % heads + torch.arange(group)]
        return walk(tile_query, key, value, lists, at, counts.index_select(0, at.view(1)).view(()), chunk, limit, out, lse, softcap)

    def place_of(number: Tensor) -> Segment:
        first = number % segments * segment_len
        return Segment(first, *own_keys(mask, first, n_queries, n_keys, segment_len))

    def rows_of(head: Tensor, slots: Tensor) -> Tensor:
        return (head * group + torch.arange(group))[:, None] * n_queries + slots.clamp(max=n_queries - 1)

    padded = mask.key_mask is not None
    symbols = {str(size): size for size in (batch, n_queries, n_keys) if isinstance(size, torch.SymInt)}.values()
    key_mask = (mask.key_mask.flatten(),) if mask.key_mask is not None else ()
    # One number more than there are: what may be a single one is else traced for several only.
    numbers = torch.arange(batch * kv_heads * segments + 1)
    lists, counts = map_impl(segment, (numbers,), (few_query, few_key, poisoned, *key_mask, *symbols))
    numbers = torch.arange((batch * kv_heads * segments + 1) * tiles)
    output, lse = map_impl(tile, (numbers,), (query, key, value, lists, counts, tau, *key_mask, *symbols))
    # [tiles of all key/value heads, group, TILE_LEN]: where a query's row is found there
    at = torch.arange(n_queries)
    head = torch.arange(batch)[:, None] * kv_heads + torch.arange(heads) // group
    rows = (head[..., None] * segments + at // segment_len) * tiles + at % segment_len // TILE_LEN
    rows = (rows * group + torch.arange(heads)[:, None] % group) * TILE_LEN + at % TILE_LEN
    return output.flatten(0, 1)[rows], lse.flatten()[rows]


def _samples(x: Tensor) -> Tensor:
    """What ``second_moments`` takes of [B, H, N, D]; it is several rows, for the sparse path runs from a tile on."""
    stride = dim_stride(x.shape[2])
    return x.index_select(2, torch.arange((torch.sym_max(x.shape[2], TILE_LEN) + stride - 1) // stride) * stride)


def block(query: Tensor, key: Tensor, value: Tensor, hidden: Tensor, softcap: float | None) -> tuple[Tensor, Tensor]:
    """Attention of query [M, D] to key [C, D] where not ``hidden`` [M or 1, C]: output [M, Dv] and lse [M]."""
    logits = query @ key.transpose(0, 1)
    if softcap is not None:
        logits = (logits / softcap).tanh() * softcap
    logits = logits.masked_fill(hidden, float("-inf"))
    lse = logits.logsumexp(-1)
    finite = lse.masked_fill(lse == float("-inf"), 0.0)
    return (logits - finite[:, None]).exp() @ value, lse


def walk(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lists: Tensor,
    at: Tensor,
    count: Tensor,
    chunk_len: Tensor,
    tau: Tensor,
    output: Tensor,
    lse: Tensor,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """Pass 2 of the tiles of a group, side by side: those that have stopped keep what they have.

    Args:
        query: float32 [G * TILE_LEN, D].
        key: float32 [R, D].
        value: float32 [R, Dv].
        lists: int32 [segments, L], rows of both by rank.
        at: int64 [], which list to walk.
        count: int64 [], how many of these are prefix keys.
        chunk_len: int64 [], a multiple of STEP.
        tau: float32 [G].
        output: float32 [G * TILE_LEN, Dv] of pass 1.
        lse: float32 [G * TILE_LEN] of pass 1.
        softcap: Bound of the logits, None for none.
    """
    group = tau.shape[0]

    def more(visited: Tensor, output: Tensor, lse: Tensor, before: Tensor, going: Tensor, *given: Tensor) -> Tensor:
        count = given[5]
        return (visited < count) & going.any()

    def step(visited: Tensor, output: Tensor, lse: Tensor, before: Tensor, going: Tensor, *given: Tensor) -> tuple:
        query, key, value, lists, at, count, chunk_len, tau = given
        entries = visited + torch.arange(STEP)
        chosen = lists.view(-1)[at * lists.shape[1] + entries.clamp(max=lists.shape[1] - 1)]
        brought, own = block(query, key[chosen], value[chosen], (entries >= count)[None], softcap)
        joint = torch.logaddexp(lse, own)
        finite = joint.masked_fill(joint == float("-inf"), 0.0)
        merged = output * (lse - finite).exp()[:, None] + brought * (own - finite).exp()[:, None]
        visited = visited + STEP
        gain = (1 - (before - joint).exp()).nan_to_num(0.0).view(group, TILE_LEN).amax(-1)
        to_come = visited / chunk_len * (count / visited).log().clamp_min(0.0)
        tested = visited % chunk_len == 0
        stopped = tested & (visited >= FIRST_TEST * chunk_len) & (tau > 0) & (gain * to_come < tau)
        live = going[:, None].expand(group, TILE_LEN).reshape(-1)
        output, lse = torch.where(live[:, None], merged, output), torch.where(live, joint, lse)
        return visited, output, lse, torch.where(tested, lse, before), going & ~stopped

    start = torch.zeros_like(count), output, lse, lse.clone(), tau >= 0
    _, output, lse, _, _ = while_loop_op(more, step, start, (query, key, value, lists, at, count, chunk_len, tau))
    return output, lse
