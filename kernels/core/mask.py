"""The mask of an attention call, and how a segment of queries divides the keys.

Key j is visible to query i iff all of these hold:

    causal:    j <= i + offset                     (bottom-right: offset = Nk - Nq; SDPA's is_causal: offset = 0)
    window:    j >  i + offset - window
    chunk:     j // attention_chunk == (i + offset) // attention_chunk
    key_mask:  key_mask[b, j]                      (False: padding)

For one segment of queries the visible keys fall into two parts (S2O, arXiv 2602.22575, section 3):

    in-segment keys      the positions of the segment itself: pass 1 attends to them in position order, under the mask
    prefix keys   visible to *every* query of the segment: pass 2 visits them ranked by importance

Without a causal mask the "prefix" is every key outside the segment. Cross attention has no in-segment keys.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from s2o_compile.kernels.support.errors import InputError
from s2o_compile.kernels.support.torch_compat import statically_known_true

FARTHEST = 2**61
"""Tokens of a causal offset at most. Positions are int64: even beside a window twice as long none wraps around."""

FULLY_MASKED = ("zeros", "mean")
"""The output of a query that sees no key: zeros, or the mean of all values of its head."""


@dataclass(frozen=True, kw_only=True)
class AttentionMask:
    """The mask of one attention call.

    Attributes:
        causal: Whether key j must satisfy ``j <= i + offset``.
        offset: Causal offset in tokens; ignored unless ``causal``.
        window: Sliding window in tokens, the query's own position included; needs ``causal``.
        attention_chunk: Length in tokens of the chunks, counted from key 0, whose keys alone a query sees; needs
            ``causal``.
        key_mask: bool [B, Nk], True where the key may be attended, or None.
    """

    causal: bool = False
    offset: int = 0
    window: int | None = None
    attention_chunk: int | None = None
    key_mask: Tensor | None = None

    @classmethod
    def aligned(
        cls, query: Tensor, key: Tensor, *, causal: bool = False, causal_offset: int | None = None,
        window: int | None = None, attention_chunk: int | None = None, key_mask: Tensor | None = None,
    ) -> AttentionMask:  # fmt: skip
        """The mask of a call on [.., Nq, D] and [.., Nk, D]; no offset aligns the last query with the last key.

        Raises:
            InputError: The offset lies so far away that positions would wrap around in a window or in chunks.
        """
        offset = key.shape[-2] - query.shape[-2] if causal_offset is None else causal_offset
        offset = offset if causal else 0
        if type(offset) is int and not -FARTHEST <= offset <= FARTHEST:
            if window is attention_chunk is None:  # all keys are seen, or none
                offset = FARTHEST if offset > 0 else -FARTHEST
                return cls(causal=causal, offset=offset, key_mask=key_mask)
            raise InputError(
                "causal_offset",
                expected="an integer from -2**61 to 2**61 beside a window or chunks",
                got=offset,
                remedy="Drop the window and the chunks, or give a smaller offset: positions are int64.",
            )
        # Longer ones hide the same keys: none lies that far from a query.
        if type(window) is int:
            window = min(window, 2 * FARTHEST)
        if type(attention_chunk) is int:
            attention_chunk = min(attention_chunk, 2 * FARTHEST)
        return cls(causal=causal, offset=offset, window=window, attention_chunk=attention_chunk, key_mask=key_mask)

    def for_batch(self, batch: int) -> AttentionMask:
        """The mask with a key mask of its own for each batch entry, contiguous, as kernels read it."""
        key_mask = self.key_mask
        if key_mask is None or (key_mask.shape[0] == batch and key_mask.is_contiguous()):
            return self
        return replace(self, key_mask=key_mask.expand(batch, -1).contiguous())

    def within(self, n_queries: int, n_keys: int) -> AttentionMask:
        """The mask with an offset beyond which nothing changes: kernels count in 32 bits."""
        if not self.causal or self.window is not None or -n_queries <= self.offset <= n_keys:
            return self
        return replace(self, offset=min(max(self.offset, -n_queries), n_keys))

    def first_keys(self, stop: int) -> AttentionMask:
        """The mask of the keys before ``stop``."""
        return self if self.key_mask is None else replace(self, key_mask=self.key_mask[:, :stop])

    def text(self, n_queries: int, n_keys: int) -> str:
        """The mask in words, such as ``causal, window 4096, key padding``."""
        shift = n_keys - n_queries
        return describe(
            causal=self.causal,
            offset=None if self.offset == shift else self.offset,
            window=self.window,
            attention_chunk=self.attention_chunk,
            padded=self.key_mask is not None,
            ahead=max(self.offset - shift, 0) if self.causal else 0,
        )

    def visible(self, query_positions: Tensor, key_positions: Tensor) -> Tensor:
        """Bool [queries, keys] of the terms on positions; the key mask is a column and applied apart."""
        i, j = query_positions[:, None] + self.offset, key_positions[None, :]
        seen = torch.ones(i.shape[0], j.shape[1], dtype=torch.bool, device=query_positions.device)
        if self.causal:
            seen = seen & (j <= i)
        if self.window is not None:
            seen = seen & (j > i - self.window)
        if self.attention_chunk is not None:
            seen = seen & (j // self.attention_chunk == i // self.attention_chunk)
        return seen

    def seg_offset(self, n_queries: int, n_keys: int) -> int:
        """Offset from a query's position to its own key; ``-n_queries`` (no in-segment keys) in cross attention."""
        if self.causal:
            return self.offset
        return 0 if same_length(n_queries, n_keys) else -n_queries

    def in_segment_range(self, first_query: int, last_query: int, n_queries: int, n_keys: int) -> tuple[int, int]:
        """In-segment keys [start, stop) of the queries first_query..last_query."""
        offset = self.seg_offset(n_queries, n_keys)
        start = min(max(first_query + offset, 0), n_keys)
        return start, min(max(last_query + 1 + offset, start), n_keys)

    def visible_pairs(self, n_queries: int, n_keys: int, device: torch.device) -> Tensor:
        """Bool [B or 1, 1, Nq, Nk] of all terms."""
        padding = None if self.key_mask is None else self.key_mask[:, None, None, :]
        # Else the first query already sees every key. Symbolic lengths are not asked: the answer is that of one length.
        causal = self.causal and (self.offset < n_keys - 1) is not False
        if padding is not None and not causal and self.window is self.attention_chunk is None:
            return padding.expand(-1, -1, n_queries, -1)
        if self.attention_chunk is None:
            seen = torch.ones(n_queries, n_keys, dtype=torch.bool, device=device)
            seen = seen.tril(self.offset) if causal else seen
            seen = seen if self.window is None else seen.triu(self.offset - self.window + 1)
        else:
            seen = self.visible(*(torch.arange(length, device=device) for length in (n_queries, n_keys)))
        return seen[None, None] if padding is None else seen & padding

    def visible_range(self, first: int, last: int, n_keys: int) -> tuple[int, int]:
        """Keys [start, stop) that some query of first..last may see, padding aside."""
        start, stop = 0, n_keys
        if self.causal:
            stop = min(max(last + self.offset + 1, 0), n_keys)
            if self.window is not None:
                start = min(max(first + self.offset - self.window + 1, 0), stop)
            if self.attention_chunk is not None:
                start = min(max(start, (first + self.offset) // self.attention_chunk * self.attention_chunk), stop)
        return start, stop

    def row_ranges(self, n_queries: int, n_keys: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """``visible_range`` of every query alone: int64 [Nq] starts and stops, computed on the device."""
        end = torch.arange(1, n_queries + 1, device=device) + self.offset
        stop = end.clamp(0, n_keys) if self.causal else torch.full_like(end, n_keys)
        start = torch.zeros_like(end)
        if self.window is not None:
            start = torch.maximum(start, end - self.window)
        if self.attention_chunk is not None:
            start = torch.maximum(start, (end - 1) // self.attention_chunk * self.attention_chunk)
        return start.clamp(max=n_keys), stop

    def area(self, batch: int, n_queries: int, n_keys: int) -> Tensor:
        """Number of visible query-key pairs per head, float64 [B]: what density is measured against.

        Padding is not subtracted: dense kernels compute those pairs too.
        """
        start, stop = self.row_ranges(n_queries, n_keys, torch.device("cpu"))
        return (stop - start).sum().double().expand(batch)


UNKNOWN_MASK = AttentionMask()
"""Stands for the mask of a call that runs under a mask tensor: reports know no words for it."""


def same_length(left: int | torch.SymInt, right: int | torch.SymInt) -> bool:
    """Whether two lengths are equal; if they are symbolic, whether they always are, which adds no guard."""
    if isinstance(left, int) and isinstance(right, int):
        return left == right
    return statically_known_true(left == right)


def upper_bound(size: int | torch.SymInt) -> float:
    """The largest value that a size can take; infinite for a symbolic one without a bound."""
    if isinstance(size, int):
        return size
    upper = size.node.shape_env.bound_sympy(size.node.expr).upper
    return int(upper) if upper.is_Integer else float("inf")


def describe(
    *, causal: bool, offset: object | None, window: int | torch.SymInt | None, attention_chunk: int | None,
    padded: bool, ahead: object, packed: bool = False,
) -> str:  # fmt: skip
    """A mask in words; arguments as in `AttentionMask`.

    ``offset`` is None if the last query is aligned with the last key. ``ahead`` is how many keys behind its own
    position a query sees, if that is a number. ``packed`` says that documents lie side by side.
    """
    if window is not None and isinstance(ahead, int) and ahead > 0:
        behind = window - 1 - ahead
        first = f"+{-behind}" if isinstance(behind, int) and behind < 0 else f"-{behind}"
        parts = [f"sliding window {first}..+{ahead}"]
    else:
        parts = ["causal" if causal else "bidirectional"]
        if causal and offset is not None:
            parts.append(f"offset {offset}")
        if window is not None:
            parts.append(f"window {window}")
    if packed:
        parts[0] = f"packed {parts[0]}"
    if attention_chunk is not None:
        parts.append(f"chunk {attention_chunk}")
    if padded:
        parts.append("key padding")
    return ", ".join(parts)
