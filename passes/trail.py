"""Follows scores from product to product: which tensors hold queries by keys, and where they weigh values.

    softmax(steps(q @ k^T)) @ v        steps(q @ k^T) @ v        q @ (k^T @ v)

A pass knows attention by its form, and says nothing of a form that it does not know. A `Trail` knows it by its parts:
the product of two tensors, neither of which is a parameter, meets a third one. `passes.unknown_forms` follows the nodes
of a graph, and the audit of ``s2o_compile.capture`` the tensors of a run.
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Generic, TypeVar

import torch

from s2o_compile.passes.graph.nodes import Size, known
from s2o_compile.passes.site import SiteRecord, size_text

T = TypeVar("T")

LEAST_LENGTH = 5
"""Products of smaller matrices without a softmax between them are rotations and cameras."""

_LINEAR = frozenset(
    ("mul", "div", "add", "sub", "neg", "where", "masked_fill", "tril", "triu", "cat", "pad", "getitem", "setitem",
     "sum", "dropout", "fill", "rsub", "copy", "truediv", "native_dropout", "true_divide", "itruediv", "isub")
)  # fmt: skip
"""Steps that weigh and hide scores, and choose none of the keys: attention with these alone is linear attention."""


@dataclass
class _Origin:
    """The product or the softmax that scores come from: with several values they are one attention."""

    counted: bool = False


@dataclass(frozen=True, eq=False)
class Scores:
    """Queries by keys, or what became of them.

    Attributes:
        shape: [..., Nq, Nk] of their product, or where a softmax met them.
        depth: The contracted size of their product; None where a softmax is of no product that is known.
        heads: Sizes of the dimensions beside the last two of ``shape``, wherever they were met.
        learned: Whether one side of the product is a parameter.
        softmax: The function that makes probabilities of them, such as ``exp``; empty where there is none.
        mixed: Whether heads were mixed by a product.
        steps: Functions that they went through, views left out.
    """

    shape: tuple[Size, ...]
    depth: Size | None
    heads: tuple[Size, ...] = ()
    learned: bool = False
    softmax: str = ""
    mixed: bool = False
    steps: tuple[str, ...] = ()
    origin: _Origin = field(default_factory=_Origin)

    @property
    def lengths(self) -> tuple[Size, ...]:
        """Of queries and keys."""
        return self.shape[-2:]

    @property
    def shapes(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """[..., Nq, D] and [..., Nk, D] as text, for the report; without D where no product is known."""
        *rows, keys = map(size_text, self.shape)
        depth = () if self.depth is None else (size_text(self.depth),)
        return (*rows, *depth), (*rows[:-1], keys, *depth)

    def record(self, name: str, output: torch.Tensor) -> SiteRecord:
        """The report line of an attention with these scores, which stays as it is."""
        query_shape, key_shape = self.shapes
        return SiteRecord(
            name=name,
            rewritten=False,
            reason=self._why_unknown,
            query_shape=query_shape,
            key_shape=key_shape,
            dtype=str(output.dtype).removeprefix("torch."),
            certain=self.mixed or bool(self.softmax),
        )

    @property
    def _why_unknown(self) -> str:
        steps = (self.softmax, *self.steps) if self.softmax not in ("", "softmax") else self.steps
        through = f" ({', '.join(steps)})" if steps else ""
        if self.mixed:
            return "its heads are mixed between its products (talking heads), and the sparse operator has none that mix"
        if self.softmax in ("exp", "log_softmax", "softmin"):
            return f"its softmax is written by {self.softmax}: if it is a plain one, write torch.softmax(scores, -1)"
        if self.softmax:
            return f"its form around the softmax is not known{through}: choose scaled_dot_product_attention"
        if set(self.steps) <= _LINEAR:
            return (
                "three tensors are multiplied with no softmax between them: if this is attention, it is linear "
                "attention, which can leave no key out"
            )
        return (
            f"three tensors are multiplied with no softmax over the keys between them{through}: if this is attention, "
            "the sparse operator does not compute it"
        )


class Trail(Generic[T]):
    """The tensors of one run, or the nodes of one graph, that hold scores; ``T`` stands for either.

    Args:
        table: Keeps the scores of each; it may forget those that nobody holds.
    """

    def __init__(self, table: MutableMapping[T, Scores]) -> None:
        self.table = table

    def product(
        self, left: T, right: T, output: T, sizes: Sequence[Size], depth: Size, learned: tuple[bool, bool]
    ) -> Scores | None:
        """The scores that a product multiplies with values, or None; what it makes is followed.

        Args:
            left: [..., M, K].
            right: [..., K, N].
            output: [..., M, N].
            sizes: Its shape.
            depth: K.
            learned: Whether left and right are parameters.
        """
        for side, other_learned in ((left, learned[1]), (right, learned[0])):
            scores = self.table.get(side)
            if scores is None:
                continue
            if any(known(depth == size) for size in scores.heads) and not _is_one(depth, scores.lengths):
                self.table[output] = replace(scores, mixed=True)
                return None
            if other_learned:
                return None
            weighs = _is_one(depth, scores.lengths) and not scores.learned and not known(depth < LEAST_LENGTH)
            if not scores.softmax and not weighs:
                continue
            if scores.origin.counted:
                return None
            scores.origin.counted = True
            return scores
        if not learned[1] and not known(depth == 1):  # an outer product makes positions times frequencies
            self.table[output] = Scores(tuple(sizes), depth, tuple(sizes[:-2]), learned=learned[0])
        return None

    def softmax(self, name: str, scores: T, output: T, sizes: Sequence[Size]) -> None:
        """A softmax over the last dimension, whose input has these sizes."""
        given = self.table.get(scores) or Scores((), None)
        heads = (*given.heads, *sizes[:-2])
        self.table[output] = replace(
            given, shape=tuple(sizes), heads=heads, softmax=given.softmax or name, origin=_Origin()
        )

    def step(
        self, name: str, inputs: Sequence[T], output: T, sizes: Sequence[Size], *, view: bool, keeps: bool
    ) -> None:
        """Any other function of tensors.

        Args:
            name: Of the function.
            inputs: Its tensors.
            output: Its value.
            sizes: The value's shape.
            view: Whether it changes no number.
            keeps: Whether the value certainly holds scores if an input does; else its sizes tell.
        """
        scores = next((self.table[x] for x in inputs if x in self.table), None)
        if scores is None:
            return
        holds = _holds(sizes, scores.lengths)
        if not keeps and not holds:
            return
        if holds:
            others = (size for size in sizes if not _is_one(size, (*scores.lengths, *scores.heads, 1)))
            scores = replace(scores, heads=(*scores.heads, *others))
        if not view and name not in scores.steps:
            scores = replace(scores, steps=(*scores.steps, name))
        self.table[output] = scores


def _is_one(size: Size, of: Sequence[Size]) -> bool:
    return any(known(size == other) for other in of)


def _holds(sizes: Sequence[Size], lengths: Sequence[Size]) -> bool:
    """Whether a shape has a dimension for each length."""
    left = list(sizes)
    for length in lengths:
        at = next((at for at, size in enumerate(left) if known(size == length)), None)
        if at is None:
            return False
        del left[at]
    return True
