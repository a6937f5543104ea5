"""The proof of a mask, as the rewriter needs it and as the user reads it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from s2o_compile.kernels.core.mask import describe
from s2o_compile.passes.graph.nodes import Size, known, simplified, value_of
from s2o_compile.passes.graph.rejected import Rejected

READ = "read at run time"
"""The mask column of attentions whose mask is not proven."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenTable:
    """A tensor of the graph that holds a number for every token of a row, for its queries or for its keys.

    Attributes:
        node: The tensor.
        batch_dim: Its dimension that runs along the batch, or None: the same numbers for every batch entry.
        dim: Its dimension that runs along the tokens.
        start: Position of the first token in that dimension.
        selected: For every other dimension the position read.
    """

    node: fx.Node
    batch_dim: int | None
    dim: int
    start: Size
    selected: tuple[tuple[int, int], ...]

    @property
    def place(self) -> tuple[object, ...]:
        """Equal for tables of the same numbers."""
        return self.node, self.batch_dim, self.dim, str(self.start), self.selected

    def steps(self, batch: Size, length: Size) -> Iterator[tuple[Callable[..., torch.Tensor], tuple[Size, ...]]]:
        """Functions, with their arguments behind the tensor, that make [B or 1, N] of it."""
        shape = value_of(self.node).shape
        if not (known(self.start == 0) and known(shape[self.dim] == length)):
            yield torch.narrow, (self.dim, self.start, length)
        if self.batch_dim is not None and not known(shape[self.batch_dim] == batch):
            yield torch.narrow, (self.batch_dim, 0, batch)  # it is read row by row, and may hold more of them
        # Highest dimension first, so that the lower ones keep their numbers.
        for dim, position in sorted(self.selected, reverse=True):
            yield torch.select, (dim, position)
        if self.batch_dim is None:
            yield torch.unsqueeze, (0,)
        elif self.batch_dim > self.dim:
            yield torch.transpose, (0, 1)


@dataclass(frozen=True, kw_only=True, eq=False)
class KeyMask(TokenTable):
    """A bool tensor of the graph that says which keys may be attended.

    Attributes:
        negated: Whether True means *not* to attend.
    """

    negated: bool

    @property
    def identity(self) -> tuple[object, ...]:
        """Equal for masks that read the same values."""
        return *self.place, self.negated


@dataclass(frozen=True, eq=False)
class DocumentBounds:
    """Where the documents of a row begin: integers that ascend from 0, ``cu_seqlens`` of varlen kernels."""

    node: fx.Node

    @property
    def place(self) -> tuple[object, ...]:
        """Equal for the same bounds."""
        return (self.node,)


@dataclass(frozen=True, eq=False)
class PackedDocuments:
    """Which document each query and each key belongs to; a query sees keys of its own.

    Attributes:
        query: Of the queries: a table of integers, or bounds.
        key: Of the keys.
        bottom_right: Whether the last query of a document is aligned with its last key, as varlen kernels do it.
    """

    query: TokenTable | DocumentBounds
    key: TokenTable | DocumentBounds
    bottom_right: bool = False

    @property
    def identity(self) -> tuple[object, ...]:
        """Equal for the same documents."""
        return self.query.place, self.key.place, self.bottom_right

    @property
    def of_itself(self) -> bool:
        """Whether queries and keys stand at the same positions of the same documents."""
        return self.query.place == self.key.place


MERGED = -1
"""The axis of a mask's dimension that the scores split or merge. The mask must not vary along it."""


@dataclass(frozen=True, eq=False)
class MaskPart:
    """One of several masks that must all let a key through.

    Attributes:
        node: A float tensor added to the scores, or with ``hidden`` the condition of a fill.
        hidden: The number that fills scores where the condition holds.
        negated: Whether the fill is where the condition does *not* hold.
        axes: Along which axis of the scores [B, Hq, Nq, Nk] each of its dimensions runs, None for a size of 1, or
            `MERGED`; None if the last ones are the last ones.
        dtype: Of the masked scores; None if it is that of the query.
        cast: A dtype of a smaller range that they are cast to before the softmax, or None.
    """

    node: fx.Node
    hidden: float | None = None
    negated: bool = False
    axes: tuple[int | None, ...] | None = None
    dtype: torch.dtype | None = None
    cast: torch.dtype | None = None


@dataclass(frozen=True, eq=False)
class BlockTables:
    """The part of a ``block_mask`` that decides the output of flex_attention; the rest serves gradients.

    Attributes:
        partial: int32 [B, H, Nq blocks] and [.., Nk blocks]: how many and which key blocks mask_mod is called for.
        full: The same for blocks that are visible as a whole, which ``partial`` leaves out; (None, None) for no such.
        sizes: Queries and keys of a block; integers, or nodes where they are symbolic.
        mask_mod: The get_attr node of the function.
    """

    partial: tuple[object, object]
    full: tuple[object, object]
    sizes: tuple[Any, Any]
    mask_mod: fx.Node


@dataclass(frozen=True, eq=False)
class MaskReading:
    """Unproven masks: the operator reads their values in every run.

    Attributes:
        parts: In the order in which the scores meet them.
        fully_masked: The output of fully masked rows, where a single bool mask leaves that open.
        why: Why nothing is proven.
        fill: The finite number by which all parts fill scores, if the operator has to ask whether it hides them.
    """

    parts: tuple[MaskPart, ...]
    fully_masked: str
    why: Rejected
    fill: float | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class MaskProof:
    """The proven mask: key j is visible to query i iff all of these terms hold.

    Attributes:
        causal: Whether ``j <= i + offset``.
        offset: The causal offset; None for bottom-right alignment, Nk - Nq.
        window: If given, also ``j > i + offset - window``; needs ``causal``.
        chunk: If given, also ``j // chunk == (i + offset) // chunk``; needs ``causal``.
        documents: If given, also: the query and the key belong to the same document.
        key_masks: Tensors that must all allow the key.
        fully_masked: The output of fully masked rows: "zeros", or "mean", the mean of all values, padding included.
        ahead: Keys after its own position (bottom-right: i + Nk - Nq) that a query sees; part of ``offset``, for text.
        promised: The mask operand, if nothing is proven of it and the user promised that it is causal.
        blocks: This mask as a bool tensor, broadcastable to [B, Hq, Nq, Nk], and the tables promised to be its own.
        read: The masks that the operator reads, if nothing is proven; then no other field is set.
    """

    causal: bool = False
    offset: Size | None = None
    window: Size | None = None
    chunk: int | None = None
    documents: PackedDocuments | None = None
    key_masks: tuple[KeyMask, ...] = ()
    fully_masked: str = "zeros"
    ahead: Size = 0
    promised: fx.Node | None = None
    blocks: tuple[fx.Node, BlockTables] | None = None
    read: MaskReading | None = None

    def __str__(self) -> str:
        if self.read is not None:
            return READ
        text = describe(
            causal=self.causal,
            offset=self.offset,
            window=None if self.window is None else simplified(self.window),
            attention_chunk=self.chunk,
            padded=bool(self.key_masks),
            ahead=self.ahead,
            packed=self.documents is not None,
        )
        return text + (" (promised)" if self.promised is not None or self.blocks is not None else "")
