"""The plan of an attention call: a ranking fills it, and pass 2 of an executor visits its keys.

Keys are never moved: the plan holds indices only.

Shapes: B batch, Hq query heads, Hkv key/value heads, Hr heads with a ranking of their own (Hkv where the heads of a
group share one, else Hq), Nq queries, Nk keys, P segments of ``segment_len`` queries, L keys of the longest ranking.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from s2o_compile.kernels.core.call import AttentionCall
from s2o_compile.kernels.core.mask import AttentionMask

ScoreKeys = Callable[[AttentionCall, slice], Tensor]
"""A slice of a call and its key/value heads -> its keys' scores [B, h_r, P, n_k]."""

TILE_LEN = 128
"""Queries of one tile. Tiles stop early as a whole, so every executor uses the same length."""

SCRATCH_SHARE = 5
SCRATCH_BYTES = 96 * 2**20
"""Scores and indices of all slices under way take at most 1/5 of the memory of key and value, or 96 MiB."""

BYTES_A_SCORE = 7
"""Bytes of a score in float16, an index of int32, and the counts of classes that order it."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Order of visits for every query tile.

    Attributes:
        segment_len: Queries per segment, a multiple of TILE_LEN.
        chunk_len: Keys between two tests of the stop rule, a multiple of 128.
        key_index: int32 [B, Hr, P, L], prefix keys of the segment, most important first.
        prefix_count: int32 [B, P], how many entries of ``key_index`` are real: the visible prefix keys.
        tail_value: float32 [B, Hkv, P, Dv], mean values that stand for keys left out (``ranking.tail``); None where no
            tile stops by itself, or until values are known.
    """

    segment_len: int
    chunk_len: int
    key_index: Tensor
    prefix_count: Tensor
    tail_value: Tensor | None = None

    @property
    def n_segments(self) -> int:
        """Number of segments P."""
        return self.key_index.shape[2]


def n_segments(n_queries: int, segment_len: int) -> int:
    """Segments that cover n_queries, the last one possibly short; two at least for a symbolic number.

    The second may be empty: a size that may be 1 would be traced for several only.
    """
    count = -(-n_queries // segment_len)
    return count if isinstance(count, int) else torch.sym_max(count, 2)


def n_tiles(n_queries: int) -> int:
    """Query tiles that cover n_queries, the last one possibly short."""
    return -(-n_queries // TILE_LEN)


def default_segment_len(length: int) -> int:
    """512 up to a length of 32K, 1024 beyond: small segments rank better until the index work bites.

    That work grows with the keys of a segment. So the length is that of the keys where there are fewer queries: chunks
    of a prefill cost what the whole prefill costs.
    """
    return 512 if length <= 32768 else 1024


def default_chunk_len(n_keys: int) -> int:
    """256 keys between stop tests up to 16K, 512 up to 64K, 1024 beyond: a test costs 2 to 5 % of a chunk of 256.

    ``n_keys`` may be a tensor, in programs whose lengths are not known yet.
    """
    return 256 + 256 * (n_keys > 16384) + 512 * (n_keys > 65536)


def in_segment_starts_stops(
    mask: AttentionMask, n_queries: int, n_keys: int, segment_len: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """int64 [P] starts and stops of all in-segment keys; made on the device, so nothing waits for a copy."""
    first = torch.arange(0, n_queries, segment_len, device=device)
    return in_segment_keys(mask, first, n_queries, n_keys, segment_len)


def in_segment_keys(
    mask: AttentionMask, first: Tensor, n_queries: int, n_keys: int, segment_len: int
) -> tuple[Tensor, Tensor]:
    """Starts and stops of the in-segment keys of the segments with these first queries, int64 of any shape."""
    offset = mask.seg_offset(n_queries, n_keys)
    starts = (first + offset).clamp(0, n_keys)
    stops = ((first + segment_len).clamp(max=n_queries) + offset).clamp(0, n_keys)
    return starts, torch.maximum(starts, stops)


def longest_prefix(mask: AttentionMask, n_queries: int, n_keys: int, segment_len: int) -> int:
    """Length of the longest ranking, from lengths alone: the host does not wait for the device."""
    last = (n_segments(n_queries, segment_len) - 1) * segment_len
    return mask.in_segment_range(last, n_queries - 1, n_queries, n_keys)[0] if mask.causal else n_keys


def non_finite_keys(key: Tensor, value: Tensor) -> Tensor:
    """Bool [B, Hkv, Nk]: keys that hold NaN or inf, or whose value does.

    They must be visited, or a row would come out finite where SDPA's would not. A sum in bfloat16 overflows where that
    in float32 does, in a third of its time on a CPU.
    """
    wide = torch.float32 if torch.float16 in (key.dtype, value.dtype) else None
    return ~torch.isfinite(key.sum(-1, dtype=wide) + value.sum(-1, dtype=wide))


def prefix_mask(mask: AttentionMask, n_queries: int, n_keys: int, segment_len: int, device: torch.device) -> Tensor:
    """Bool [B or 1, P, Nk]: which keys are prefix keys of which segment."""
    starts, stops = in_segment_starts_stops(mask, n_queries, n_keys, segment_len, device)
    position = torch.arange(n_keys, device=device)
    prefix = position < starts[:, None]
    if not mask.causal:
        prefix |= position >= stops[:, None]
    return prefix[None] if mask.key_mask is None else prefix[None] & mask.key_mask[:, None, :]


def order_keys(
    scores: Tensor, non_finite: Tensor, mask: AttentionMask, *, n_queries: int, segment_len: int
) -> tuple[Tensor, Tensor]:
    """Ranked key indices int32 [B, Hr, P, L] by importance, and prefix_count int32 [B, P], as a `Plan` has them.

    Scores are floating [B, Hr, P, Nk], larger for more important keys, on any monotone scale. They are overwritten.
    ``non_finite`` is bool [B, Hr, Nk], of `non_finite_keys`: such keys come first.
    """
    batch, _, segments, n_keys = scores.shape
    prefix = prefix_mask(mask, n_queries, n_keys, segment_len, scores.device)
    lowest = torch.finfo(scores.dtype).min
    scores = scores.nan_to_num_(nan=0.0, posinf=torch.finfo(scores.dtype).max, neginf=lowest)
    scores.masked_fill_(non_finite[:, :, None, :], float("inf"))
    scores.masked_fill_(~prefix[:, None], float("-inf"))
    longest = longest_prefix(mask, n_queries, n_keys, segment_len)
    key_index = descending_order(scores[..., :longest])
    return key_index, prefix.sum(-1, dtype=torch.int32).expand(batch, segments).contiguous()


ORDER_BITS, RADIX_FROM = 20, 1 << 15
"""The first bits of a score order it on a CPU. From 32768 numbers on, torch sorts one list of integers by radix."""


def descending_order(scores: Tensor) -> Tensor:
    """Positions int32 [.., L] of scores [.., L], the largest first.

    Stable: where scores are equal, as those of repeated keys, the order must not depend on how many keys follow. On a
    CPU float32 counts to 12 bits of its mantissa. Lists become one list of integers, the number of a list its highest
    bits, which a radix sort orders in a seventh of the time.
    """
    if scores.device.type != "cpu" or scores.dtype != torch.float32 or not scores.numel():
        return scores.sort(dim=-1, descending=True, stable=True).indices.to(torch.int32)
    bits = scores.contiguous().view(torch.int32)
    # Integers in the order of the numbers, then of their negatives: 0 is the largest score.
    falling = (1 << ORDER_BITS - 1) - 1 - ((bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> 32 - ORDER_BITS)
    lists, length = falling.view(-1, scores.shape[-1]), scores.shape[-1]
    order = torch.empty_like(lists)
    together = max(min(1 << 31 - ORDER_BITS, len(lists)), 1)
    for first in range(0, len(lists), together):
        part = lists[first : first + together]
        if part.numel() < RADIX_FROM:
            order[first : first + together] = part.sort(dim=-1, stable=True).indices
            continue
        number = torch.arange(len(part), dtype=torch.int32)[:, None]
        indices = (part + (number << ORDER_BITS)).view(-1).sort(stable=True).indices.view_as(part)
        order[first : first + together] = indices - number * length
    return order.view(scores.shape)
