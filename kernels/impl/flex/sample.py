"""Keys ranked by functions of a score that nobody has looked into: sampled queries attend densely, weights only.

Half of the sampled queries of a segment rank its keys, by the sum of their weights. The other half says how much of the
mass is left behind each block of the list (``unvisited.py``); were it one half, it would find its in-segment keys
first. What no sampled query sees stands at the end.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from s2o_compile.kernels.core.mask import AttentionMask
from s2o_compile.kernels.core.plan import TILE_LEN, in_segment_starts_stops, n_segments, non_finite_keys
from s2o_compile.kernels.impl.flex.layout import BlockGrid, Function, lives_on_gpu
from s2o_compile.kernels.ranking.unvisited import BLOCK_LEN, sample_segments
from s2o_compile.kernels.support.define_op import define_operator
from s2o_compile.kernels.support.torch_compat import indexing_by_tensors

try:
    from s2o_compile.kernels.impl.flex import triton_sample
except ImportError:  # no triton here, and no CUDA device
    triton_sample = None

HALF = 16
"""Sampled queries of a segment and head that rank, and as many that judge. By 8 of each tau 0.5 errs 5.6 % instead of
4.1 % (SmolLM2, 8K, three layers), and one error takes 1.3 times the density, as for segments of twice the length."""

HELD = 2**30
"""Bytes of sampled queries' logits that are held at once."""


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
    grid: BlockGrid,
    score_mod: Function,
    mask_mod: Function,
    scale: float,
    score_buffers: tuple[Any, ...],
    mask_buffers: tuple[Any, ...],
) -> tuple[Tensor, Tensor, Tensor]:
    """Rank keys by what sampled queries see through the functions of a call.

    Returns:
        Lists int32 [B, Hkv, P, Nk] and what is left of the mass, as ``rank_samples`` has them; int64 [B, Hkv, P], how
        many entries of each list are real.
    """
    segments, device = n_segments(grid.n_queries, grid.segment_len), query.device
    # A GPU waits for memory here, and products have no more digits anyway; the range is enough for what has any weight.
    held = torch.float32 if query.is_cpu or query.dtype == torch.float32 else torch.float16
    largest = torch.finfo(held).max
    non_finite = non_finite_keys(key, value)
    key = key.transpose(-1, -2)
    positions = sample_segments(grid.n_queries, grid.segment_len, 2 * HALF, device).flatten()
    batches, heads, keys = (torch.arange(size, device=device) for size in (grid.batch, grid.heads, grid.n_keys))
    candidate = candidates(grid, keys)
    together = max(HELD // (held.itemsize * grid.batch * grid.heads * 2 * HALF * grid.n_keys), 1)
    parts = []
    for first in range(0, segments, together):
        rows = positions[first * 2 * HALF : (first + together) * 2 * HALF]
        at = batches, heads, rows, keys
        logits = query[:, :, rows].unflatten(1, (grid.kv_heads, grid.group)).flatten(2, 3) @ key
        logits = logits.view(grid.batch, grid.heads, len(rows), grid.n_keys).float() * scale
        with indexing_by_tensors():
            logits = over_all(score_mod, 1, len(score_buffers))(logits, *at, *score_buffers)
            visible = over_all(mask_mod, 0, len(mask_buffers))(*at, *mask_buffers)
        whole, part = (flags[:, :, rows // TILE_LEN][..., keys // BLOCK_LEN] for flags in (grid.full, grid.partial))
        logits = logits.clamp(-largest, largest).masked_fill(~(whole | (part & visible)), float("-inf")).to(held)
        parts.append(_rank_samples(logits, candidate[:, :, first : first + together], non_finite))
    lists, unvisited = zip(*parts, strict=True)
    return torch.cat(lists, 2), torch.cat(unvisited, 2), candidate.sum(-1)


def rank_samples(logits: Tensor, candidate: Tensor, non_finite: Tensor) -> tuple[Tensor, Tensor]:
    """Rank keys by what some of the sampled queries see, and estimate by the others what is left unvisited.

    Args:
        logits: [B, Hq, p * 2 * HALF, Nk], of the sampled queries of p segments, -inf for what they do not see.
        candidate: Bool [B, Hkv, p, Nk], keys that the lists hold.
        non_finite: Bool [B, Hkv, Nk], of ``plan.non_finite_keys``; these rank first where they are seen.

    Returns:
        Lists int32 [B, Hkv, p, Nk], most important first, candidates before all others; float32 [B, Hq, p, 1 + blocks],
        as ``unvisited.estimate_unvisited``.
    """
    by_kernels = triton_sample is not None and lives_on_gpu(logits)
    rank = triton_sample.rank_samples if by_kernels else _rank_by_torch  # pyright: ignore[reportOptionalMemberAccess]
    lists, mass = rank(logits, candidate, non_finite)
    behind = mass.flip(-1).cumsum(-1).flip(-1).amax(3)
    return lists, torch.nn.functional.pad(behind, (0, 1))


def _rank_by_torch(logits: Tensor, candidate: Tensor, non_finite: Tensor) -> tuple[Tensor, Tensor]:
    """Lists int32 [B, Hkv, p, Nk], and each judge's mass of their blocks, float32 [B, Hq, p, HALF, blocks]."""
    (kv_heads, segments, n_keys), heads = candidate.shape[1:], logits.shape[1]
    hidden = logits == float("-inf")
    weight = logits.float().softmax(-1).nan_to_num_(nan=float("inf"))
    weight = weight.masked_fill_(non_finite.repeat_interleave(heads // kv_heads, 1)[:, :, None], float("inf"))
    weight = weight.masked_fill_(hidden, 0.0).unflatten(2, (segments, HALF, 2))
    ranking, judging = (half.unflatten(1, (kv_heads, -1)) for half in weight.unbind(4))
    score = ranking.sum((2, 4)).masked_fill_(~candidate, -1.0)
    order = score.argsort(dim=-1, descending=True, stable=True)
    mass = judging.masked_fill(~candidate[:, :, None, :, None], 0.0)
    mass = mass.gather(-1, order[:, :, None, :, None].expand(mass.shape))
    mass = torch.nn.functional.pad(mass, (0, -n_keys % BLOCK_LEN)).unflatten(-1, (-1, BLOCK_LEN)).sum(-1)
    return order.to(torch.int32), mass.flatten(1, 2)


def candidates(grid: BlockGrid, keys: Tensor) -> Tensor:
    """Keys that a list of the segment may hold, bool [B, Hkv, P, Nk]: listed for some query of it, and not its own."""
    segments = n_segments(grid.n_queries, grid.segment_len)
    listed = grid.partial | grid.full
    missing = segments * grid.segment_len // TILE_LEN - listed.shape[2]
    listed = torch.nn.functional.pad(listed, (0, 0, 0, missing)).unflatten(2, (segments, -1)).any(3)
    listed = listed.unflatten(1, (grid.kv_heads, grid.group)).any(2)[..., keys // BLOCK_LEN]
    start, stop = (bound[:, None] for bound in seg_blocks(grid, keys.device))
    return listed & ~((keys >= start * BLOCK_LEN) & (keys < stop * BLOCK_LEN))


def seg_blocks(grid: BlockGrid, device: torch.device) -> tuple[Tensor, Tensor]:
    """First and last block, int64 [P], of keys that stand where a segment's queries do; cross attention has none."""
    start, stop = in_segment_starts_stops(AttentionMask(), grid.n_queries, grid.n_keys, grid.segment_len, device)
    return start // BLOCK_LEN, -(-stop // BLOCK_LEN)


_library = torch.library.Library("s2o", "FRAGMENT")
_rank_samples = define_operator(_library, rank_samples)
torch.library.register_fake("s2o::rank_samples", rank_samples, lib=_library)
