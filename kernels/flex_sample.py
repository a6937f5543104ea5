"""Keys ranked by functions of a score that nobody has looked into: sampled queries attend densely, weights only.

Half of the sampled queries of a segment rank its keys, by the sum of their weights. The other half says how much of the
mass is left behind each block of the list (``unvisited.py``); were it one half, it would find its own keys first. What
no sampled query sees stands at the end.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

from s2o_compile.kernels.mask import AttentionMask
from s2o_compile.kernels.opaque import define_operator
from s2o_compile.kernels.plan import TILE_LEN, n_segments, own_starts_stops, poisoned_keys
from s2o_compile.kernels.unvisited import BLOCK_LEN, SAMPLES, sample_segments

HELD = 2**28
"""Logits of sampled queries that are held at once."""

Function = Callable[..., Tensor]


class Site(NamedTuple):
    """What the functions of one call look at: lengths, and which blocks its block mask lists."""

    batch: int
    heads: int
    kv_heads: int
    n_queries: int
    n_keys: int
    segment_len: int
    partial: Tensor
    """Bool [B, Hq, T, key blocks], blocks for which the mask_mod is called."""
    full: Tensor
    """The same for blocks that are visible as a whole."""

    @property
    def group(self) -> int:
        """Query heads of one key/value head."""
        return self.heads // self.kv_heads


def over_all(function: Function, leading: int, captured: int) -> Function:
    """A function of one score, for all scores [B, H, rows, keys] and index vectors [B], [H], [rows], [keys]."""
    for axis in (3, 2, 1, 0):
        positions = tuple(0 if place == axis else None for place in range(4))
        function = torch.vmap(function, in_dims=(*(0,) * leading, *positions, *(None,) * captured))
    return function


def sample(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    site: Site,
    score_mod: Function,
    mask_mod: Function,
    scale: float,
    score_buffers: tuple[Any, ...],
    mask_buffers: tuple[Any, ...],
) -> tuple[Tensor, Tensor]:
    """What sampled queries see: scores of all keys and what is left of the mass, as ``rank_samples`` has them."""
    segments, device = n_segments(site.n_queries, site.segment_len), query.device
    poisoned = poisoned_keys(key, value)
    key = key.repeat_interleave(site.group, 1).transpose(-1, -2)
    sampled = sample_segments(site.n_queries, site.segment_len, 2 * SAMPLES, device).flatten()
    places = *(torch.arange(size, device=device) for size in (site.batch, site.heads)), sampled
    keys = torch.arange(site.n_keys, device=device)
    together = max(HELD // (site.batch * site.heads * 2 * SAMPLES * site.n_keys), 1)
    parts = []
    for first in range(0, segments, together):
        rows = places[2][first * 2 * SAMPLES : (first + together) * 2 * SAMPLES]
        at = *places[:2], rows, keys
        logits = (query[:, :, rows] @ key).float() * scale
        with TransformGetItemToIndex():
            logits = over_all(score_mod, 1, len(score_buffers))(logits, *at, *score_buffers)
            visible = over_all(mask_mod, 0, len(mask_buffers))(*at, *mask_buffers)
        parts.append(_rank_samples(logits, visible, poisoned, site.partial, site.full, first, *site[2:6]))
    scores, unvisited = zip(*parts, strict=True)
    return torch.cat(scores, 2), torch.cat(unvisited, 2)


def rank_samples(
    logits: Tensor,
    visible: Tensor,
    poisoned: Tensor,
    partial: Tensor,
    full: Tensor,
    first: int,
    kv_heads: int,
    n_queries: int,
    n_keys: int,
    segment_len: int,
) -> tuple[Tensor, Tensor]:
    """Rank keys by what some of the sampled queries see, and estimate by the others what is left unvisited.

    Args:
        logits: [B, Hq, p * 2 * SAMPLES, Nk], of the sampled queries of p segments; modified, not masked.
        visible: Bool, the same shape, what the mask_mod says.
        poisoned: Bool [B, Hkv, Nk], of ``plan.poisoned_keys``; these rank first.
        partial: Bool [B, Hq, T, key blocks], as in `Site`.
        full: The same.
        first: The first of the p segments.
        kv_heads: Key/value heads.
        n_queries: Number of queries.
        n_keys: Number of keys.
        segment_len: Queries of one list.

    Returns:
        Scores float32 [B, Hkv, p, Nk], 0 for a key that no sampled query sees, -1 for the segment's own keys and those
        that none of its queries may see; float32 [B, Hq, p, 1 + blocks], as ``unvisited.estimate_unvisited``.
    """
    site = Site(len(logits), logits.shape[1], kv_heads, n_queries, n_keys, segment_len, partial, full)
    segments = logits.shape[2] // (2 * SAMPLES)
    rows = sample_segments(n_queries, segment_len, 2 * SAMPLES, logits.device)[first : first + segments].flatten()
    keys = torch.arange(n_keys, device=logits.device)
    candidate = candidates(site, keys)[:, :, first : first + segments]
    whole, part = (flags[:, :, rows // TILE_LEN][..., keys // BLOCK_LEN] for flags in (full, partial))
    hidden = ~(whole | (part & visible))
    weight = logits.masked_fill(hidden, float("-inf")).softmax(-1)
    weight = weight.masked_fill_(hidden.all(-1, keepdim=True), 0.0)
    weight = weight.masked_fill_(poisoned.repeat_interleave(site.group, 1)[:, :, None] & ~hidden, float("inf"))
    weight = weight.unflatten(2, (segments, SAMPLES, 2))
    ranking, judging = (half.unflatten(1, (kv_heads, site.group)) for half in weight.unbind(4))
    score = ranking.nan_to_num(nan=float("inf")).sum((2, 4)).masked_fill_(~candidate, -1.0)
    order = score.argsort(dim=-1, descending=True, stable=True)[:, :, None, :, None]
    mass = judging.masked_fill(~candidate[:, :, None, :, None], 0.0)
    mass = mass.gather(-1, order.expand(mass.shape))
    mass = torch.nn.functional.pad(mass, (0, -n_keys % BLOCK_LEN)).unflatten(-1, (-1, BLOCK_LEN)).sum(-1)
    behind = mass.flip(-1).cumsum(-1).flip(-1).amax(4).nan_to_num(nan=float("inf"))
    return score, torch.nn.functional.pad(behind, (0, 1)).flatten(1, 2)


def candidates(site: Site, keys: Tensor) -> Tensor:
    """Keys that a list of the segment may hold, bool [B, Hkv, P, Nk]: listed for some query of it, and not its own."""
    segments = n_segments(site.n_queries, site.segment_len)
    listed = site.partial | site.full
    missing = segments * site.segment_len // TILE_LEN - listed.shape[2]
    listed = torch.nn.functional.pad(listed, (0, 0, 0, missing)).unflatten(2, (segments, -1)).any(3)
    listed = listed.unflatten(1, (site.kv_heads, site.group)).any(2)[..., keys // BLOCK_LEN]
    start, stop = (bound[:, None] for bound in own_blocks(site, keys.device))
    return listed & ~((keys >= start * BLOCK_LEN) & (keys < stop * BLOCK_LEN))


def own_blocks(site: Site, device: torch.device) -> tuple[Tensor, Tensor]:
    """First and last block, int64 [P], of keys that stand where a segment's queries do; cross attention has none."""
    start, stop = own_starts_stops(AttentionMask(), site.n_queries, site.n_keys, site.segment_len, device)
    return start // BLOCK_LEN, -(-stop // BLOCK_LEN)


_library = torch.library.Library("s2o", "FRAGMENT")
_rank_samples = define_operator(_library, rank_samples)
torch.library.register_fake("s2o::rank_samples", rank_samples, lib=_library)
