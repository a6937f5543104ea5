"""What is proven of a mask, as the rewriter needs it and as the user reads it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from s2o_compile.passes.graph_values import Size, simplified


@dataclass(frozen=True, kw_only=True, eq=False)
class KeyMask:
    """A bool tensor of the graph that says which keys may be attended.

    Attributes:
        node: The tensor.
        batch_dim: Its dimension that runs along the batch, or None: the same keys for every batch entry.
        key_dim: Its dimension that runs along the keys.
        key_start: Position of key 0 in that dimension.
        selected: For every other dimension the position read.
        negated: Whether True means *not* to attend.
    """

    node: fx.Node
    batch_dim: int | None
    key_dim: int
    key_start: Size
    selected: tuple[tuple[int, int], ...]
    negated: bool


@dataclass(frozen=True, eq=False)
class MaskPart:
    """One of several masks that must all let a key through.

    Attributes:
        node: A float tensor added to the scores, or with ``hidden`` the condition of a fill.
        hidden: What scores are filled with where the condition holds.
        negated: Whether the fill is where the condition does *not* hold.
    """

    node: fx.Node
    hidden: float | None = None
    negated: bool = False


@dataclass(frozen=True, kw_only=True, eq=False)
class MaskProof:
    """The proven mask: key j is visible to query i iff every term given here holds.

    Attributes:
        causal: Whether ``j <= i + offset``.
        offset: The causal offset; None for bottom-right alignment, Nk - Nq.
        window: If given, also ``j > i + offset - window``; needs ``causal``.
        chunk: If given, also ``j // chunk == (i + offset) // chunk``; needs ``causal``.
        key_masks: Tensors that must all allow the key.
        blind: What a query gives that sees no key: "zeros", or "mean", the mean of all values, padding included.
        ahead: Keys after its own position (bottom-right: i + Nk - Nq) that a query sees; part of ``offset``, for text.
        promised: The mask operand, if nothing is proven of it and the user promised that it is causal.
    """

    causal: bool = False
    offset: Size | None = None
    window: Size | None = None
    chunk: int | None = None
    key_masks: tuple[KeyMask, ...] = ()
    blind: str = "zeros"
    ahead: Size = 0
    promised: fx.Node | None = None

    def __str__(self) -> str:
        if self.window is not None and isinstance(self.ahead, int) and self.ahead > 0:
            behind = simplified(self.window - 1 - self.ahead)
            first = f"+{-behind}" if isinstance(behind, int) and behind < 0 else f"-{behind}"
            parts = [f"sliding window {first}..+{self.ahead}"]
        else:
            parts = ["causal" if self.causal else "bidirectional"]
            if self.causal and self.offset is not None:
                parts.append(f"offset {self.offset}")
            if self.window is not None:
                parts.append(f"window {self.window}")
        if self.chunk is not None:
            parts.append(f"chunk {self.chunk}")
        if self.key_masks:
            parts.append("key padding")
        return ", ".join(parts) + (" (promised)" if self.promised is not None else "")
