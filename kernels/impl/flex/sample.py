"""Ranks keys by functions of a score that are not analysed: sampled queries attend densely, weights only.

Half of the sampled queries of a segment rank its keys, by the sum of their weights. The other half estimates the mass
left behind each block of the ranking (``ranking.unvisited``). One half for both would find the keys that it ranked
itself first. Keys that no sampled query sees come last.
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
"""Sampled queries of a segment and head that rank, and as many that estimate. By 8 of each tau 0.5 errs 5.6 % instead
of 4.1 % (SmolLM2, 8K, three layers), and one error takes 1.3 times the density, as for segments twice as long."""

LOGIT_BYTES = 2**30
"""Bytes of sampled queries' logits that exist at once."""


def over_all(function: Function, leading: int, captured: int) -> Function:
    """A function of one score, for all scores [B, H, rows, keys] and index vectors [B], [H], [rows], [keys]."""
    for axis in (3, 2, 1, 0):
        positions = tuple(0 if place == axis else None for place in range(4))
        function = torch.vmap(function, in_dims=(*(0,) * leading, *positions, *(None,) * captured))
    return function


def sample(
    query: Tensor, key: Tensor, value: Tensor, grid: BlockGrid, mods: tuple[Function, Function],
    buffers: tuple[tuple[Any, ...], tuple[Any, ...]], scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Rank keys by the weights that sampled queries give them through the functions of a call.

    Query [B, Hq, Nq, D], key [B, Hkv, Nk, D], value [B, Hkv, Nk, Dv]. ``mods`` are its score_mod and its mask_mod,
    ``buffers`` the tensors that each of these captured.

    Returns:
        Ranked keys int32 [B, Hkv, P, Nk] and the mass left unvisited, as of ``rank_samples``; int64 [B, Hkv, P], how
        many keys of each ranking are real.
    """
    (score_mod, mask_mod), (score_buffers, mask_buffers) = mods, buffers
    segments, device = n_segments(grid.n_queries, grid.segment_len), query.device
    # A GPU waits for memory here. Products have no more digits anyway, and the range covers every logit of any weight.
    dtype = torch.float32 if query.is_cpu or query.dtype == torch.float32 else torch.float16
    largest = torch.finfo(dtype).max
    non_finite = non_finite_keys(key, value)
    key = key.transpose(-1, -2)
    positions = sample_segments(grid.n_queries, grid.segment_len, 2 * HALF, device).flatten()
    batches, heads, keys = (torch.arange(size, device=device) for size in (grid.batch, grid.heads, grid.n_keys))
    candidate = candidates(grid, keys)
    step = max(LOGIT_BYTES // (dtype.itemsize * grid.batch * grid.heads * 2 * HALF * grid.n_keys), 1)
    parts = []
    for first in range(0, segments, step):
        rows = positions[first * 2 * HALF : (first + step) * 2 * HALF]
        at = batches, heads, rows, keys
        logits = query[:, :, rows].unflatten(1, (grid.kv_heads, grid.group)).flatten(2, 3) @ key
        logits = logits.view(grid.batch, grid.heads, len(rows), grid.n_keys).float() * scale
        with indexing_by_tensors():
            logits = over_all(score_mod, 1, len(score_buffers))(logits, *at, *score_buffers)
            visible = over_all(mask_mod, 0, len(mask_buffers))(*at, *mask_buffers)
        whole, part = (flags[:, :, rows // TILE_LEN][..., keys // BLOCK_LEN] for flags in (grid.full, grid.partial))
        logits = logits.clamp(-largest, largest).masked_fill(~(whole | (part & visible)), float("-inf")).to(dtype)
        parts.append(_rank_samples(logits, candidate[:, :, first : first + step], non_finite))
    ranked_keys, unvisited = zip(*parts, strict=True)
    return torch.cat(ranked_keys, 2), torch.cat(unvisited, 2), candidate.sum(-1)


def rank_samples(logits: Tensor, candidate: Tensor, non_finite: Tensor) -> tuple[Tensor, Tensor]:
    """Rank keys by one half of the sampled queries, and estimate the unvisited mass by the other.

    Args:
        logits: [B, Hq, p * 2 * HALF, Nk], of the sampled queries of p segments, -inf for keys that they do not see.
        candidate: Bool [B, Hkv, p, Nk], keys that are ranked.
        non_finite: Bool [B, Hkv, Nk], of ``plan.non_finite_keys``; these rank first where they are visible.

    Returns:
        Ranked keys int32 [B, Hkv, p, Nk], candidates first, and float32 [B, Hq, p, 1 + blocks], as
        ``ranking.unvisited.estimate_unvisited``.
    """
    by_kernels = triton_sample is not None and lives_on_gpu(logits)
    rank = triton_sample.rank_samples if by_kernels else _rank_by_torch  # pyright: ignore[reportOptionalMemberAccess]
    ranked_keys, mass = rank(logits, candidate, non_finite)
    behind = mass.flip(-1).cumsum(-1).flip(-1).amax(3)
    return ranked_keys, torch.nn.functional.pad(behind, (0, 1))


def _rank_by_torch(logits: Tensor, candidate: Tensor, non_finite: Tensor) -> tuple[Tensor, Tensor]:
    """Ranked keys int32 [B, Hkv, p, Nk], and their blocks' mass by estimating query, [B, Hq, p, HALF, blocks]."""
    (kv_heads, segments, n_keys), heads = candidate.shape[1:], logits.shape[1]
    hidden = logits == float("-inf")
    weight = logits.float().softmax(-1).nan_to_num_(nan=float("inf"))
    weight = weight.masked_fill_(non_finite.repeat_interleave(heads // kv_heads, 1)[:, :, None], float("inf"))
    weight = weight.masked_fill_(hidden, 0.0).unflatten(2, (segments, HALF, 2))
    ranking, estimating = (half.unflatten(1, (kv_heads, -1)) for half in weight.unbind(4))
    score = ranking.sum((2, 4)).masked_fill_(~candidate, -1.0)
    order = score.argsort(dim=-1, descending=True, stable=True)
    mass = estimating.masked_fill(~candidate[:, :, None, :, None], 0.0)
    mass = mass.gather(-1, order[:, :, None, :, None].expand(mass.shape))
    mass = torch.nn.functional.pad(mass, (0, -n_keys % BLOCK_LEN)).unflatten(-1, (-1, BLOCK_LEN)).sum(-1)
    return order.to(torch.int32), mass.flatten(1, 2)


def candidates(grid: BlockGrid, keys: Tensor) -> Tensor:
    """Keys that a segment may rank, bool [B, Hkv, P, Nk]: in a block that one of its tiles sees, and not in-segment."""
    segments = n_segments(grid.n_queries, grid.segment_len)
    visible = grid.partial | grid.full
    missing = segments * grid.segment_len // TILE_LEN - visible.shape[2]
    visible = torch.nn.functional.pad(visible, (0, 0, 0, missing)).unflatten(2, (segments, -1)).any(3)
    visible = visible.unflatten(1, (grid.kv_heads, grid.group)).any(2)[..., keys // BLOCK_LEN]
    start, stop = (bound[:, None] for bound in seg_blocks(grid, keys.device))
    return visible & ~((keys >= start * BLOCK_LEN) & (keys < stop * BLOCK_LEN))


def seg_blocks(grid: BlockGrid, device: torch.device) -> tuple[Tensor, Tensor]:
    """First block of the in-segment keys and the block behind their last, int64 [P]; none in cross attention."""
    start, stop = in_segment_starts_stops(AttentionMask(), grid.n_queries, grid.n_keys, grid.segment_len, device)
    return start // BLOCK_LEN, -(-stop // BLOCK_LEN)


_library = torch.library.Library("s2o", "FRAGMENT")
_rank_samples = define_operator(_library, rank_samples)
