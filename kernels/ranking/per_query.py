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

import torch
from torch import Tensor

from s2o_compile.kernels.core.call import AttentionCall
from s2o_compile.kernels.core.mask import AttentionMask
from s2o_compile.kernels.core.plan import TILE_LEN, ScoreKeys, in_segment_starts_stops
from s2o_compile.kernels.pages.sizes import Size, at_least
from s2o_compile.kernels.ranking.basis import Basis, FewKeys, choose_basis, project, solve_basis
from s2o_compile.kernels.support.parallel import for_each

KEY_STRIDE = 64
KEY_SAMPLES = 1024
"""The normaliser samples every 64th prefix key, or about 1024 of more than 64K."""

FIRST_KEYS = 4
"""Keys that count once in the normaliser: as samples they would stand for their neighbours."""

SLOTS = 64
"""Queries of a segment are summed by position modulo SLOTS; 16 slots do as well (SmolLM2, 16K)."""

ROWS = 2048
"""Queries of one ranking at most. On SmolLM2 at 64K half of 3072 cost 5 % more density at 5 % of error, a quarter 11 %.
The half that in-segment keys explain least cost 16 %."""

KEY_STEP = 512
"""Keys of one product: the products of a segment stay in cache until they are reduced."""


def few_dims(head_dim: int) -> int:
    """A quarter of the head, rounded up to a power of two up to 64, less one for the normaliser.

    On a CPU twice as many cost the time that they save (SmolLM2, 8K); a GPU's packed rows have room for more of them.
    """
    return (1 << min(max(4, (head_dim // 4 - 1).bit_length()), 6)) - 1


def scored_rows(segment_len: int, shared: int) -> int:
    """Queries of each head that rank the keys of a segment, in whole tiles; ``shared`` heads share the ranking."""
    return min(segment_len, max(ROWS // shared // TILE_LEN, 1) * TILE_LEN)


def scored_positions(segment_len: int, shared: int, device: torch.device) -> Tensor:
    """Positions of these queries in a segment, int64 [shared, rows]: neighbours by head; [1, rows] if they are all."""
    rows = scored_rows(segment_len, shared)
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
    """Estimated log-sum-exp of rows of one segment, [B, Hkv, G, n]; +inf for a row that sees none of these keys.

    Args:
        query: Scaled queries of the segment, float32 [B, Hkv, G, n, R].
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
    columns = key[:, :, keys].transpose(-1, -2)
    weight = torch.zeros(len(keys), dtype=key.dtype, device=device)
    weight[: len(outside)] = torch.where(outside >= FIRST_KEYS, math.log(stride), 0.0)
    visible = mask.visible(positions.flatten(), keys).unflatten(0, positions.shape)
    normaliser = query.new_empty(query.shape[:4])
    for b in range(len(query)):
        seen = visible if mask.key_mask is None else visible & mask.key_mask[b, keys]
        hidden = torch.where(seen, weight, float("-inf"))
        for first_row in range(0, query.shape[3], TILE_LEN):  # logits stay in cache, and few are -inf, which is slow
            rows, stop = slice(first_row, first_row + TILE_LEN), len(keys)
            if mask.causal:
                last = int(positions[:, rows].max())
                stop -= max(own[1] - max(last + 1 + mask.offset, own[0]), 0)
            for h, g in itertools.product(*map(range, query.shape[1:3])):
                outside_or_hidden = hidden[g % len(positions), rows, :stop]
                logits = torch.addmm(outside_or_hidden, query[b, h, g, rows], columns[b, h, :, :stop])
                normaliser[b, h, g, rows] = logits.logsumexp(-1)
    return normaliser.masked_fill_(normaliser == float("-inf"), float("inf"))


def basis_of_samples(samples: AttentionCall) -> Basis:
    """The basis of a call whose every few queries and keys these are (``basis.dim_stride``)."""
    head_dim = samples.query.shape[3]
    return solve_basis(samples.query, samples.key, min(few_dims(head_dim), head_dim))


def few_keys_of(call: AttentionCall, basis: Basis) -> Tensor:
    """The keys of a call, without pages, in few dimensions: float32 [B, Hkv, Nk, R]."""
    return project(call.key, basis.key)


def prepare(call: AttentionCall, segment_len: int, shared: int, made: FewKeys | None = None) -> ScoreKeys:
    """The function that scores slices of a call; the basis and the samples go by the whole call.

    Args:
        call: The whole call.
        segment_len: Queries that share one ranking.
        shared: Query heads that share one ranking.
        made: The basis and the keys in it, if they were made before.
    """
    head_dim, kept, few_keys = call.query.shape[3], call.kept, None if made is None else made.keys

    def chosen() -> Basis:
        return made.basis if made is not None else choose_basis(call.query, call.key, min(few_dims(head_dim), head_dim))

    basis = chosen() if kept is None else kept.once("basis", chosen)
    if kept is not None:
        first = kept.known("few keys", call.earlier_keys)
        few_keys = kept.extend("few keys", call.n_keys, first, project(call.key[:, :, first:], basis.key))
    stride = key_stride(call.n_keys)

    def score_keys(part: AttentionCall, heads: slice) -> Tensor:
        few = project(part.key, basis.key[:, heads]) if few_keys is None else few_keys[:, heads, : part.n_keys]
        return _score_keys(part, basis.query[:, heads], few, stride, segment_len, shared)

    return score_keys


def _score_keys(
    call: AttentionCall, factor: Tensor, few_key: Tensor, stride: int, segment_len: int, shared: int
) -> Tensor:
    """Importance of every key for every segment, float32 [B, Hr, P, Nk]; see the module docstring.

    ``factor`` is the basis of the queries, ``few_key`` float32 [B, Hkv, Nk, R] the keys in theirs.
    """
    (query, key, _), mask = call.tensors, call.mask
    batch, heads, n_queries, _ = query.shape
    kv_heads, n_keys = key.shape[1:3]
    few_query = (project(query, factor) * call.scale).view(batch, kv_heads, heads // kv_heads, n_queries, -1)
    key_columns = torch.nn.functional.pad(few_key, (0, 1), value=-1.0).transpose(-1, -2)
    starts, stops = in_segment_starts_stops(mask, n_queries, n_keys, segment_len, torch.device("cpu"))
    rankings = heads // kv_heads // shared  # of each key/value head
    shape = batch, kv_heads * rankings, len(starts), n_keys
    scores = torch.full(shape, float("-inf"), dtype=torch.float32, device=query.device)
    starts, stops = starts.tolist(), stops.tolist()
    members = torch.arange(heads // kv_heads, device=query.device)[:, None]
    spread = scored_positions(segment_len, shared, query.device)

    def segment(s: int) -> None:
        own, positions = (starts[s], stops[s]), s * segment_len + spread
        positions = positions[:, (positions < n_queries).any(0)]
        real = (positions < n_queries)[members[:, 0] % len(positions)]
        positions = positions.clamp(max=n_queries - 1)
        rows = few_query[:, :, members, positions[members[:, 0] % len(positions)]]
        normaliser = row_normaliser(rows, few_key, mask, positions=positions, own=own, stride=stride)
        normaliser.masked_fill_(~real, float("inf"))
        rows = torch.cat([rows, normaliser[..., None]], dim=-1)
        missing = -rows.shape[3] % SLOTS  # ignored queries
        rows = torch.nn.functional.pad(rows, (0, 0, 0, missing))
        rows[..., rows.shape[3] - missing :, -1] = float("inf")
        rows = rows.view(batch, kv_heads * rankings, -1, rows.shape[4])
        end = starts[s] if mask.causal else n_keys
        products = rows.new_empty(rows.shape[2] * KEY_STEP)  # reused: fresh memory would cost as much as the products
        for b in range(batch):
            for ranking_head in range(kv_heads * rankings):
                for j in range(0, end, KEY_STEP):
                    step = slice(j, min(j + KEY_STEP, end))
                    columns = key_columns[b, ranking_head // rankings, :, step]
                    out = products[: rows.shape[2] * columns.shape[1]].view(rows.shape[2], -1)
                    best = torch.mm(rows[b, ranking_head], columns, out=out).view(-1, SLOTS, columns.shape[1]).amax(0)
                    torch.logsumexp(best, 0, out=scores[b, ranking_head, s, step])

    for_each(segment, reversed(range(len(starts))), query.device)
    return scores
