"""Ranks keys by every query of the segment, in a few dimensions and with one exponential a slot.

    p[i, j]     = (q_i A) . (k_j B) * scale - normaliser_i
    score[s, j] = log sum over slots t of exp max over the queries i = t mod SLOTS of segment s, and the heads that
                  share the ranking, of p[i, j];  of long segments i are ROWS queries, spread evenly, by head others

A and B keep ``few_dims`` directions of the KV head (``basis.py``). ``normaliser_i`` estimates the log-sum-exp of the
query's row from its segment's in-segment keys, the first keys (trained models put much weight there) and a sample of
the others. So p is a log-probability. A mean query misses the key that one query retrieves;
this ranking finds it, and the sum over slots counts keys that many queries want. The normaliser is one more dimension.
Products are reduced as they are made, so nothing of size Nq x Nk is kept.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from s2o_compile.kernels.core.call import AttentionCall
from s2o_compile.kernels.core.mask import AttentionMask
from s2o_compile.kernels.core.plan import TILE_LEN, ScoreKeys, in_segment_starts_stops
from s2o_compile.kernels.pages.sizes import Size, at_least
from s2o_compile.kernels.ranking.basis import Basis, FewKeys, choose_basis, project, solve_basis
from s2o_compile.kernels.ranking.slots import log2_sum, memory_for, pack_keys, pack_rows, score_slots
from s2o_compile.kernels.support.parallel import for_each

KEY_STRIDE = 64
KEY_SAMPLES = 1024
"""The normaliser samples every 64th prefix key, or about 1024 of more than 64K."""

FIRST_KEYS = 4
"""Keys that count once in the normaliser: as samples they would stand for their neighbours."""

ROWS = 2048
"""Queries of one ranking at most. On SmolLM2 at 64K half of 3072 cost 5 % more density at 5 % of error, a quarter 11 %.
The half that in-segment keys explain least cost 16 %."""

NORMALISED = 32
"""Queries of each head whose normalisers are computed at a time."""

CPU_ROWS = 1024
"""The same on a CPU, where products cost as much as attention to the keys that they would save."""

HALF_ROWS_PER_DIM = 8
"""On a CPU queries in bfloat16 are no more than so many for each dimension of a head: attention in tiles is cheap, and
so is a key too many. Heads of 64: calls 5 to 15 % shorter (8K, 16K), errors 8 % larger (SmolLM2, in float32)."""


def few_dims(head_dim: int) -> int:
    """A quarter of the head, 31 at least of heads beyond 32, 63 at most; a power of two with the normaliser.

    Of heads of 64, 15 cost SmolLM2 0.011 nats a token at 8K, 31 and 62 cost 0.001 at 2 % less density. A GPU's packed
    rows have room for more of them.
    """
    least = 4 if head_dim <= 32 else 5
    return min((1 << min(max(least, (head_dim // 4 - 1).bit_length()), 6)) - 1, head_dim)


def scored_rows(query: Tensor, segment_len: int, shared: int, device: torch.device) -> int:
    """Queries of each head that rank the keys of a segment, in whole tiles; ``shared`` heads share the ranking.

    ``device`` computes; of the queries [.., D] only their dimensions and dtype are looked at.
    """
    most = CPU_ROWS if device.type == "cpu" else ROWS
    if device.type == "cpu" and query.dtype == torch.bfloat16:
        most = min(HALF_ROWS_PER_DIM * query.shape[-1], most)
    return min(segment_len, max(most // shared // TILE_LEN, 1) * TILE_LEN)


def scored_positions(query: Tensor, segment_len: int, shared: int) -> Tensor:
    """Positions of these queries in a segment, int64 [shared, rows]: neighbours by head; [1, rows] if they are all."""
    device = query.device
    rows = scored_rows(query, segment_len, shared, device)
    slot = torch.arange(rows, device=device)
    if rows == segment_len:
        return slot[None]
    shift = torch.arange(shared, device=device) * segment_len // shared
    return slot + (slot * (segment_len - rows) + shift[:, None]) // rows


def key_stride(n_keys: Size) -> Size:
    """Distance of the keys that the normaliser samples."""
    return at_least(KEY_STRIDE, n_keys // KEY_SAMPLES)


def row_normaliser(
    query: Tensor, key: Tensor, mask: AttentionMask, *, positions: Tensor, own: tuple[int, int], stride: int
) -> Tensor:
    """Estimated log-sum-exp of rows of one segment, [B, Hkv, G, n], binary; +inf for a row that sees none of the keys.

    Args:
        query: Queries of the segment, float32 [B, Hkv, G, n, R], scaled so that products are binary logarithms.
        key: Keys, float32 [B, Hkv, Nk, R].
        mask: The mask.
        positions: int64 [heads, n], ascending: where the queries stand; head g of a group has those of g modulo heads.
        own: In-segment keys [start, stop) of the segment.
        stride: Distance of the sampled prefix keys.
    """
    device, end = query.device, own[0] if mask.causal else key.shape[2]
    sampled = torch.arange(0, end, stride, device=device) + stride // 2
    first = torch.arange(min(FIRST_KEYS, end), device=device)
    outside = torch.cat([sampled[(sampled >= FIRST_KEYS) & (sampled < end)], first])
    outside = outside[(outside < own[0]) | (outside >= own[1])]
    keys = torch.cat([outside, torch.arange(*own, device=device)])
    if not len(keys):
        return query.new_full(query.shape[:4], float("inf"))
    columns = key[:, :, keys].transpose(-1, -2).contiguous()  # twice as fast in products
    weight = torch.zeros(len(keys), device=device, dtype=torch.float32)
    weight[: len(outside)] = torch.where(outside >= FIRST_KEYS, math.log2(stride), 0.0)
    normaliser = query.new_empty(query.shape[:4])
    members = torch.arange(query.shape[2], device=device) % len(positions)
    # Logits stay in cache, and few of them are hidden, because rows take only the keys that one of them sees.
    for first_row in range(0, query.shape[3], NORMALISED):
        rows, clear, stop = slice(first_row, first_row + NORMALISED), len(keys), len(keys)
        if mask.causal:
            place = positions[:, rows]
            ends = torch.stack([place.min(), place.max()]) + (1 + mask.offset)
            clear, stop = (len(outside) + (ends.clamp(*own) - own[0])).tolist()
            later = ~mask.visible(place.flatten(), keys[clear:stop]).unflatten(0, place.shape)[members]
        if not stop:
            normaliser[:, :, :, rows] = float("-inf")
            continue
        for b, h in itertools.product(range(query.shape[0]), range(query.shape[1])):
            bias = weight if mask.key_mask is None else torch.where(mask.key_mask[b, keys], weight, float("-inf"))
            logits = torch.addmm(bias[:stop], query[b, h, :, rows].flatten(0, 1), columns[b, h, :, :stop])
            if clear < stop:
                logits.unflatten(0, later.shape[:2])[..., clear:].masked_fill_(later, float("-inf"))
            normaliser[b, h, :, rows] = log2_sum(logits, 1).unflatten(0, (len(members), -1))
    return normaliser.masked_fill_(normaliser == float("-inf"), float("inf"))


def basis_of_samples(samples: AttentionCall) -> Basis:
    """The basis of a call whose every few queries and keys these are (``basis.dim_stride``)."""
    return solve_basis(samples.query, samples.key, few_dims(samples.query.shape[3]), samples.mask.key_mask)


def few_keys_of(call: AttentionCall, basis: Basis) -> Tensor:
    """The keys of a call, without pages, in few dimensions: float32 [B, Hkv, Nk, R]."""
    return project(call.key, basis.key)


def prepare(
    call: AttentionCall, segment_len: int, shared: int, made: FewKeys | None = None,
    score: Callable[[AttentionCall, Tensor, Tensor, int, int, int], Tensor] | None = None,
) -> ScoreKeys:  # fmt: skip
    """The function that scores slices of a call; the basis and the samples go by the whole call.

    Args:
        call: The whole call.
        segment_len: Queries that share one ranking.
        shared: Query heads that share one ranking.
        made: The basis and the keys in it, if they were made before.
        score: What scores a slice; `score_keys` if None.
    """
    score = score or score_keys
    kept, few_keys = call.kept, None if made is None else made.keys

    def chosen() -> Basis:
        if made is not None:
            return made.basis
        return choose_basis(call.query, call.key, few_dims(call.query.shape[3]), call.mask.key_mask)

    basis = chosen() if kept is None else kept.once("basis", chosen)
    if kept is not None:
        first = kept.known("few keys", call.earlier_keys)
        few_keys = kept.extend("few keys", call.n_keys, first, project(call.key[:, :, first:], basis.key))
    stride = key_stride(call.n_keys)

    def score_part(part: AttentionCall, heads: slice) -> Tensor:
        few = project(part.key, basis.key[:, heads]) if few_keys is None else few_keys[:, heads, : part.n_keys]
        return score(part, basis.query[:, heads], few, stride, segment_len, shared)

    return score_part


def score_keys(
    call: AttentionCall, factor: Tensor, few_key: Tensor, stride: int, segment_len: int, shared: int
) -> Tensor:
    """Importance of every key for every segment, float32 [B, Hr, P, Nk]; see the module docstring.

    ``factor`` is the basis of the queries, ``few_key`` [B, Hkv, Nk, R] the keys in theirs.
    """
    (query, key, _), mask = call.tensors, call.mask
    batch, heads, n_queries, _ = query.shape
    kv_heads, n_keys = key.shape[1:3]
    rankings = heads // kv_heads // shared  # of each key/value head
    query, factor = query.unflatten(1, (kv_heads, -1)), (factor * (call.scale / math.log(2)))[:, :, None]
    key_columns = pack_keys(few_key)
    starts, stops = in_segment_starts_stops(mask, n_queries, n_keys, segment_len, torch.device("cpu"))
    shape = batch, kv_heads * rankings, len(starts), n_keys
    scores = torch.full(shape, float("-inf"), dtype=torch.float32, device=query.device)
    starts, stops = starts.tolist(), stops.tolist()
    members = torch.arange(heads // kv_heads, device=query.device)[:, None]
    spread = scored_positions(query, segment_len, shared)

    def segment(s: int) -> None:
        own, positions = (starts[s], stops[s]), s * segment_len + spread
        end = own[0] if mask.causal else n_keys
        positions = positions[:, (positions < n_queries).any(0)]
        real = (positions < n_queries)[members[:, 0] % len(positions)]
        positions = positions.clamp(max=n_queries - 1)
        rows = query[:, :, members, positions[members[:, 0] % len(positions)]]
        rows = (rows.float() @ factor).nan_to_num_(0.0, 0.0, 0.0)
        normaliser = row_normaliser(rows, few_key, mask, positions=positions, own=own, stride=stride)
        normaliser.masked_fill_(~real, float("inf"))
        rows = pack_rows(rows, normaliser)  # [B, Hkv, G, whole slots, ..]
        rows = rows.flatten(2, 3).unflatten(2, (rankings, -1))
        memory = memory_for(rows)
        for b, h, ranking in itertools.product(*map(range, rows.shape[:3])):
            found = scores[b, h * rankings + ranking, s, :end]
            score_slots(rows[b, h, ranking], key_columns[b, h, :, :end], found, memory)

    for_each(segment, reversed(range(len(starts))), query.device)
    return scores
