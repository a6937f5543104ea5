"""S2O forward on a CPU in functions that can be traced: loops are operators, lengths may be symbolic.

    map over the segments of all key/value heads:  rank the segment's keys
    map over tiles, those of a group side by side:  pass 1, then a loop over the ranked keys, STEP at a time, until
                                                    every tile of the group has stopped (``core/stop_rule.py``)

``impl.torch.forward`` is the same with Python's loops; tiles stop behind the same chunk. Rows of all heads lie one
below the other and are read by number, so no head is copied for its segments.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from s2o_compile.kernels.core.call import AttentionCall
from s2o_compile.kernels.core.mask import AttentionMask
from s2o_compile.kernels.core.plan import TILE_LEN, default_chunk_len, in_segment_keys, n_segments, non_finite_keys
from s2o_compile.kernels.core.stop_rule import tail_share
from s2o_compile.kernels.impl.aot.cpu_ranking import Segment, rank_segment, row_normaliser
from s2o_compile.kernels.impl.aot.sizes import symbols
from s2o_compile.kernels.ranking import tail
from s2o_compile.kernels.ranking.basis import dim_stride, project, solve_basis
from s2o_compile.kernels.ranking.per_query import few_dims, scored_positions
from s2o_compile.kernels.support.torch_compat import map_loop, while_loop

STEP = 256
"""Keys of one product; the stop rule is tested every few of them, as ``plan.default_chunk_len`` says."""


def attend(call: AttentionCall, taus: Sequence[float] | Tensor, segment_len: int) -> tuple[Tensor, Tensor]:
    """Output float32 [B, Hq, Nq, Dv] and log-sum-exp float32 [B, Hq, Nq], by ranked keys and early stop.

    The call's mask has no window, and its scale is positive. ``taus`` are those of the query heads, float32 [Hq] if a
    tensor.
    """
    query, key, value = (x.float() for x in call.tensors)
    mask, scale, softcap = call.mask, call.scale, call.softcap
    batch, heads, n_queries, head_dim = query.shape
    kv_heads, n_keys = key.shape[1:3]
    group, tiles = heads // kv_heads, segment_len // TILE_LEN
    segments = (n_queries + segment_len - 1) // segment_len
    sampled = None if mask.key_mask is None else _samples(mask.key_mask, 1)
    basis = solve_basis(_samples(query), _samples(key), few_dims(head_dim), sampled)
    few_query, few_key = project(query, basis.query) * scale, project(key, basis.key)
    non_finite = non_finite_keys(key, value).flatten()
    tails = tail.tail_values(call.over(query, key, value), segment_len).flatten(0, 2)
    rest = _rest(query, key, mask)
    tau = taus if isinstance(taus, Tensor) else torch.cat([torch.full((1,), x, dtype=torch.float32) for x in taus])

    def segment_of(number: Tensor) -> tuple[Tensor, Segment]:
        head = (number // segments).clamp(max=batch * kv_heads - 1)
        first = number % segments * segment_len
        return head, Segment(first, *in_segment_keys(mask, first, n_queries, n_keys, segment_len))

    def query_rows(head: Tensor, slots: Tensor) -> Tensor:
        return (head * group + torch.arange(group))[:, None] * n_queries + slots.clamp(max=n_queries - 1)

    def allowed_keys(head: Tensor, keys: Tensor, rest: Sequence[Tensor]) -> Tensor | None:
        return None if mask.key_mask is None else rest[0].flatten()[head // kv_heads * n_keys + keys]

    def rank(number: Tensor, query: Tensor, key: Tensor, non_finite: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        head, segment = segment_of(number)
        keys = torch.arange(n_keys)
        rows = head * n_keys + keys
        slots = segment.first + scored_positions(call.query, segment_len, group).expand(group, -1)
        queries, allowed = query[query_rows(head, slots)], allowed_keys(head, keys, rest)
        normaliser = row_normaliser(queries, slots, key[rows], allowed, mask, segment, segment_len)
        normaliser = normaliser.masked_fill(slots >= n_queries, float("inf"))
        ranked, count = rank_segment(queries, normaliser, key[rows], non_finite[rows], allowed, mask.causal, segment)
        return (head * n_keys + ranked).to(torch.int32), count

    def tile(
        number: Tensor, query: Tensor, key: Tensor, value: Tensor, ranked_rows: Tensor, counts: Tensor, tails: Tensor,
        tau: Tensor, *rest: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        at = number // tiles
        head, segment = segment_of(at)
        slots = segment.first + number % tiles * TILE_LEN + torch.arange(TILE_LEN)
        rows = query[query_rows(head, slots)].flatten(0, 1)
        own = segment.start + torch.arange(segment_len)
        keys = own.clamp(max=(segment.stop - 1).clamp(min=0))  # hidden keys may be NaN, and zero times NaN is NaN
        seen = (own < segment.stop) & mask.visible(slots, own)
        allowed = allowed_keys(head, keys, rest)
        seen = seen if allowed is None else seen & allowed
        keys = head * n_keys + keys
        state = block(rows, key[keys], value[keys], seen, softcap)
        count = counts.index_select(0, at.view(1)).view(())
        limit = tau[head * group % heads + torch.arange(group)]
        # A head has a tail more than segments where n_segments counts one that is empty.
        seg_tail = head * n_segments(n_queries, segment_len) + at % segments
        mean = tails.index_select(0, seg_tail.view(1))[0]
        first = at * ranked_rows.shape[1]
        chunk_len = default_chunk_len(torch.full((), n_keys))
        return visit_ranked(rows, key, value, ranked_rows, first, count, chunk_len, limit, mean, state, softcap)

    flat = [x.reshape(-1, x.shape[3]) for x in (query * scale, few_query, key, few_key, value)]
    # One number more than there are: a map over one alone would be traced for several only.
    count = batch * kv_heads * segments + 1
    ranked_rows, counts = map_loop(rank, (torch.arange(count),), (flat[1], flat[3], non_finite, *rest))
    operands = (flat[0], flat[2], flat[4], ranked_rows, counts, tails, tau, *rest)
    output, lse = map_loop(tile, (torch.arange(count * tiles),), operands)
    rows = _tile_rows(query, group, segments * tiles)
    return output.flatten(0, 1)[rows], lse.flatten()[rows]


def attend_exact(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Exact attention in position order over the visible range of each tile; results as `attend`."""
    query, key, value = call.query.float() * call.scale, call.key.float(), call.value.float()
    mask, softcap = call.mask, call.softcap
    batch, heads, n_queries, _ = query.shape
    kv_heads, n_keys = key.shape[1:3]
    group, tiles = heads // kv_heads, (n_queries + TILE_LEN - 1) // TILE_LEN

    def tile(number: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        head = (number // tiles).clamp(max=batch * kv_heads - 1)
        slots = number % tiles * TILE_LEN + torch.arange(TILE_LEN)
        members = (head * group + torch.arange(group))[:, None]
        rows = query[members * n_queries + slots.clamp(max=n_queries - 1)].flatten(0, 1)
        first, last = slots[0], slots[-1].clamp(max=n_queries - 1)
        stop = (last + mask.offset + 1).clamp(0, n_keys) if mask.causal else torch.full((), n_keys)
        start = torch.zeros_like(stop)
        if mask.window is not None:
            start = torch.minimum((first + mask.offset - mask.window + 1).clamp(min=0), stop)

        def step(
            done: Tensor, output: Tensor, lse: Tensor, rows: Tensor, slots: Tensor, key: Tensor, value: Tensor,
            head: Tensor, stop: Tensor, *rest: Tensor,
        ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
            positions = done + torch.arange(STEP)
            keys = positions.clamp(max=(stop - 1).clamp(min=0))  # hidden keys may be NaN
            seen = (positions < stop) & mask.visible(slots, positions)
            if mask.key_mask is not None:
                seen = seen & rest[0].flatten()[head // kv_heads * n_keys + keys]
            keys = head * n_keys + keys
            brought = block(rows, key[keys], value[keys], seen, softcap)
            return done + STEP, *merge(output, lse, *brought)

        def more(done: Tensor, output: Tensor, lse: Tensor, *operands: Tensor) -> Tensor:
            return done < operands[5]

        nothing = rows.new_zeros(rows.shape[0], value.shape[1]), rows.new_full((rows.shape[0],), float("-inf"))
        _, *state = while_loop(more, step, (start, *nothing), (rows, slots, key, value, head, stop, *rest))
        return tuple(state)

    flat = [x.reshape(-1, x.shape[3]) for x in (query, key, value)]
    numbers = torch.arange(batch * kv_heads * tiles + 1)
    output, lse = map_loop(tile, (numbers,), (*flat, *_rest(query, key, mask)))
    rows = _tile_rows(query, group, tiles)
    return output.flatten(0, 1)[rows], lse.flatten()[rows]


def block(query: Tensor, key: Tensor, value: Tensor, seen: Tensor, softcap: float | None) -> tuple[Tensor, Tensor]:
    """``impl.torch.blocks.plain_block`` of query [M, D] and key [C, D] where ``seen`` [m or 1, C], m a divisor of M.

    A row may see nothing. The product adds the bias, as a tensor: the loop behind the product would compute it anew for
    every element, and one by one.
    """
    bias = torch.where(seen, 0.0, float("-inf"))
    bias = bias.expand(query.shape[0] // bias.shape[0], *bias.shape).flatten(0, 1) if bias.shape[0] > 1 else bias[0]
    if softcap is None:
        logits = torch.addmm(bias, query, key.transpose(0, 1))
    else:
        logits = (query @ key.transpose(0, 1) / softcap).tanh() * softcap + bias
    lse = logits.logsumexp(-1)
    finite = lse.masked_fill(lse == float("-inf"), 0.0)
    return (logits - finite[:, None]).exp() @ value, lse


def merge(output: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """``impl.torch.blocks.merge`` into new memory."""
    joint = torch.logaddexp(lse, other_lse)
    finite = joint.masked_fill(joint == float("-inf"), 0.0)
    return output * (lse - finite).exp()[:, None] + other * (other_lse - finite).exp()[:, None], joint


def visit_ranked(
    query: Tensor, key: Tensor, value: Tensor, ranked_rows: Tensor, first: Tensor, count: Tensor, chunk_len: Tensor,
    tau: Tensor, mean_value: Tensor, state: tuple[Tensor, Tensor], softcap: float | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Pass 2 of the tiles of a group, side by side; tiles that have stopped keep their results.

    Queries are float32 [G * TILE_LEN, D], tau float32 [G]. ``ranked_rows``, int32 [segments, L], are rows of key and
    value [R, ..] by rank. The segment's ranking begins at ``first`` and has ``count`` prefix keys; both and
    ``chunk_len``, a multiple of STEP, are int64 []. ``mean_value``, float32 [Dv], stands for the prefix keys that are
    left out. ``state`` is output [G * TILE_LEN, Dv] and log-sum-exp [G * TILE_LEN] of pass 1.
    """
    group = tau.shape[0]

    def more(visited: Tensor, output: Tensor, lse: Tensor, before: Tensor, going: Tensor, *operands: Tensor) -> Tensor:
        return (visited < operands[5]) & going.any()

    def step(
        visited: Tensor, output: Tensor, lse: Tensor, before: Tensor, going: Tensor, *operands: Tensor
    ) -> tuple[Tensor, ...]:
        query, key, value, ranked_rows, first, count, chunk_len, tau, mean_value = operands
        entries = visited + torch.arange(STEP)
        rows = ranked_rows.view(-1)[first + entries.clamp(max=count - 1)]
        brought = block(query, key[rows], value[rows], (entries < count)[None], softcap)
        merged, joint = merge(output, lse, *brought)
        visited = visited + STEP
        gain = (1 - (before - joint).exp()).nan_to_num(0.0).view(group, TILE_LEN)
        to_come = visited / chunk_len * (count / visited).log().clamp_min(0.0)
        tested = visited % chunk_len == 0
        uses_gain = visited > chunk_len
        unvisited = torch.where(uses_gain, gain.amax(-1), 1.0) * to_come
        stopped = tested & (count >= 2 * chunk_len) & (tau > 0) & (unvisited < tau)
        share = torch.where(stopped[:, None] & uses_gain, tail_share(gain, to_come), 0.0).view(-1)
        merged, joint = (merged + share[:, None] * mean_value) / (1 + share)[:, None], joint + share.log1p()
        live = going[:, None].expand(group, TILE_LEN).reshape(-1)
        output, lse = torch.where(live[:, None], merged, output), torch.where(live, joint, lse)
        return visited, output, lse, torch.where(tested, lse, before), going & ~stopped

    output, lse = state
    start = torch.zeros_like(count), output, lse, lse.clone(), tau >= 0
    operands = (query, key, value, ranked_rows, first, count, chunk_len, tau, mean_value)
    _, output, lse, _, _ = while_loop(more, step, start, operands)
    return output, lse


def _rest(query: Tensor, key: Tensor, mask: AttentionMask) -> list[Tensor]:
    """Other operands of loop bodies: the key mask, and every size that they compute with."""
    # Not flattened: Inductor frees an operand of a branch in every round of a loop that gets a view of its own shape.
    sizes = (*query.shape[:3], key.shape[2], mask.offset, *(() if mask.window is None else (mask.window,)))
    return [*(() if mask.key_mask is None else (mask.key_mask,)), *symbols(sizes)]


def _samples(x: Tensor, dim: int = 2) -> Tensor:
    """The rows that ``choose_basis`` takes, of ``dim``: several, so the last may come more than once."""
    stride, length = dim_stride(x.shape[dim]), torch.sym_max(x.shape[dim], TILE_LEN)
    rows = torch.arange((length + stride - 1) // stride) * stride
    return x.index_select(dim, rows.clamp(max=x.shape[dim] - 1))


def _tile_rows(query: Tensor, group: int, tiles: int) -> Tensor:
    """The index of each row in [B * Hkv * tiles, G, TILE_LEN], int64 [B, Hq, Nq]."""
    batch, heads, n_queries, _ = query.shape
    at, member = torch.arange(n_queries), torch.arange(heads)[:, None] % group
    head = torch.arange(batch)[:, None] * (heads // group) + torch.arange(heads) // group
    return ((head[..., None] * tiles + at // TILE_LEN) * group + member) * TILE_LEN + at % TILE_LEN
