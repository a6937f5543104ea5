"""Proves what the mask of an attention is, for every length the graph accepts, or says why it cannot.

A mask is proven when each of its terms is one of

    j <= i + c            causal, with offset c
    j >= i - c            sliding window
    look-up in [B, Nk]    key padding: constant along heads and queries; the tensor stays an operand

where i counts queries and j keys. All terms must hold at once. Everything else is `Rejected`: an attention that stays
dense costs time, one rewritten under the wrong mask costs the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from s2o_compile.passes import views
from s2o_compile.passes.graph_values import Mutations, Size, function_name, known, simplified, value_of
from s2o_compile.passes.index_arithmetic import IndexEvaluator
from s2o_compile.passes.index_tensor import IndexTensor, broadcast_indices
from s2o_compile.passes.mask_terms import Comparison, LookUp, TermEvaluator, Terms
from s2o_compile.passes.site import Rejected

BATCH, HEAD, QUERY, KEY = range(4)
_AXES = ("batch entries", "heads", "queries", "keys")


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
        key_masks: Tensors that must all allow the key.
    """

    causal: bool = False
    offset: Size | None = None
    window: Size | None = None
    key_masks: tuple[KeyMask, ...] = ()

    def __str__(self) -> str:
        parts = ["causal" if self.causal else "bidirectional"]
        if self.causal and self.offset is not None:
            parts.append(f"offset {self.offset}")
        if self.window is not None:
            parts.append(f"window {self.window}")
        if self.key_masks:
            parts.append("key padding")
        return ", ".join(parts)


class MaskProver:
    """Proves the masks of one graph; layers that share a mask node share its proof.

    Args:
        graph: The captured graph.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.mutations = Mutations(graph)
        self._terms = TermEvaluator(self.mutations)
        self._proofs: dict[tuple[fx.Node, str, str], MaskProof | Rejected] = {}

    @property
    def indices(self) -> IndexEvaluator:
        """The evaluator of index tensors."""
        return self._terms.indices

    def top_left_causal(self, query_len: Size, key_len: Size) -> MaskProof:
        """The mask of SDPA's ``is_causal=True``: aligned to the top left, ``j <= i``."""
        return MaskProof(causal=True, offset=None if known(query_len == key_len) else 0)

    def prove(self, mask: fx.Node, query_len: Size, key_len: Size) -> MaskProof | Rejected:
        """Proves an ``attn_mask`` operand.

        Args:
            mask: bool node (True: may be attended) or float node (added to the scores), broadcastable to
                [B, Hq, Nq, Nk].
            query_len: Nq.
            key_len: Nk.
        """
        memo = mask, str(query_len), str(key_len)
        if memo not in self._proofs:
            self._proofs[memo] = self._prove(mask, query_len, key_len)
        return self._proofs[memo]

    def prove_parts(self, parts: Sequence[MaskPart], shape: Sequence[Size], dtype: torch.dtype) -> MaskProof | Rejected:
        """Proves the conjunction of the masks that hand-written attention applies to its scores.

        Args:
            parts: The masks; none is a proof, too.
            shape: Of the scores, [B, Hq, Nq, Nk].
            dtype: Of the scores.
        """
        query_len, key_len = shape[-2:]
        if len(parts) == 1 and parts[0].hidden is None:
            return self.prove(parts[0].node, query_len, key_len)
        terms: list[Comparison | LookUp] = []
        finite = False
        for part in parts:
            found = self._part(part, dtype)
            if isinstance(found, Rejected):
                return Rejected("the mask %s is not proven: %s", part.node, found)
            if value_of(part.node).ndim > len(shape):
                return Rejected("the mask %s has more dimensions than the scores", part.node)
            indices = broadcast_indices(value_of(part.node).shape, shape)
            terms += [term.at(indices, shape) for term in found[0]]
            finite |= found[1]
        proof = _classify(tuple(terms), shape, query_len, key_len)
        if isinstance(proof, Rejected):
            return Rejected("the masks %s are not proven: %s", ", ".join(str(part.node) for part in parts), proof)
        if finite and not _every_row_sees_a_key(proof, query_len, key_len):
            return Rejected("its masks hide scores by finite numbers, which shows in rows without any key")
        return proof

    def _part(self, part: MaskPart, dtype: torch.dtype) -> tuple[Terms, bool] | Rejected:
        """Terms of one mask, and whether it hides by a finite number."""
        if part.hidden is None:
            return self._additive(part.node)
        if not _hides(part.hidden, dtype):
            return Rejected("it hides scores by %s, expected -inf or torch.finfo(dtype).min", part.hidden)
        terms = self._terms.terms(part.node, negated=not part.negated)
        return terms if isinstance(terms, Rejected) else (terms, part.hidden != float("-inf"))

    def _prove(self, mask: fx.Node, query_len: Size, key_len: Size) -> MaskProof | Rejected:
        value = value_of(mask)
        if not isinstance(value, torch.Tensor) or not 1 <= value.ndim <= 4:
            return Rejected("the mask %s is not a tensor of rank 1 to 4", mask)
        if not known(value.shape[-1] == key_len):
            return Rejected("the mask %s has %s keys, but there are %s", mask, value.shape[-1], key_len)
        if value.ndim > 1 and not known(value.shape[-2] == query_len) and not known(value.shape[-2] == 1):
            return Rejected("the mask %s has %s queries, but there are %s", mask, value.shape[-2], query_len)
        finite = False
        if value.dtype is torch.bool:
            terms = self._terms.terms(mask)
        elif value.dtype.is_floating_point:
            additive = self._additive(mask)
            terms, finite = additive if not isinstance(additive, Rejected) else (additive, False)
        else:
            return Rejected("the mask %s has dtype %s, expected bool or floating point", mask, value.dtype)
        if isinstance(terms, Rejected):
            return Rejected("the mask %s is not proven: %s", mask, terms)
        proof = _classify(terms, value.shape, query_len, key_len)
        if isinstance(proof, Rejected):
            return Rejected("the mask %s is not proven: %s", mask, proof)
        # A row without any key is zero under -inf, but the mean of all values under a finite bias.
        if finite and not _every_row_sees_a_key(proof, query_len, key_len):
            return Rejected(
                "the mask %s adds a finite number to hidden scores, which shows in rows without any key", mask
            )
        return proof

    def _additive(self, node: fx.Node) -> tuple[Terms, bool] | Rejected:
        """Terms of a float mask that is 0 where a key is visible; whether its other value is finite."""
        writer = self.mutations.writer(node)
        if writer is not None:
            return Rejected("%s is changed in place by %s", node, writer)
        name, value = function_name(node), value_of(node)
        source = views.source(node, self.indices)
        if source is not None:
            if isinstance(source, Rejected):
                return source
            if not value_of(source.node).dtype.is_floating_point:
                return Rejected("%s adds numbers to the scores", node)
            inner = self._additive(source.node)
            if isinstance(inner, Rejected):
                return inner
            return tuple(term.at(source.indices, value.shape) for term in inner[0]), inner[1]
        fill = self.indices.fill
        condition, hidden, negated = None, None, False
        if fill(node) == 0:
            return (), False
        if name == "where" and len(node.args) == 3:
            chosen, otherwise = fill(node.args[1]), fill(node.args[2])
            if chosen == 0:
                condition, hidden = node.args[0], otherwise
            elif otherwise == 0:
                condition, hidden, negated = node.args[0], chosen, True
        elif name == "masked_fill" and len(node.args) == 3 and fill(node.args[0]) == 0:
            condition, hidden, negated = node.args[1], fill(node.args[2]), True
        elif name in ("triu", "tril") and node.args:
            hidden = fill(node.args[0])
            condition, negated = node, True
        if not isinstance(condition, fx.Node) or hidden is None or not _hides(hidden, value.dtype):
            return Rejected(
                "%s (%s) adds numbers to the scores; only 0 where a key is visible and -inf where it is not is a mask",
                node,
                name or node.op,
            )
        terms = self._terms.terms(condition, negated=negated)
        if isinstance(terms, Rejected):
            return terms
        indices = broadcast_indices(value_of(condition).shape, value.shape)
        return tuple(term.at(indices, value.shape) for term in terms), hidden != float("-inf")


def _hides(bias: float, dtype: torch.dtype) -> bool:
    return bias <= torch.finfo(dtype).min


def _every_row_sees_a_key(proof: MaskProof, query_len: Size, key_len: Size) -> bool:
    """Key 0 is always in sight: there is no window that leaves it, no padding, and the first query reaches it."""
    if proof.window is not None or proof.key_masks:
        return False
    return not proof.causal or known((key_len - query_len if proof.offset is None else proof.offset) >= 0)


def _classify(terms: Terms, shape: Sequence[Size], query_len: Size, key_len: Size) -> MaskProof | Rejected:
    """What a conjunction of terms over a mask's shape says about queries and keys."""
    lead = 4 - len(shape)
    singleton = [True] * lead + [known(size == 1) for size in shape]
    offsets: list[Size] = []  # j <= i + offset
    reaches: list[Size] = []  # j >= i - reach
    key_masks: list[KeyMask] = []
    for term in terms:
        if isinstance(term, LookUp):
            key_mask = _key_mask(term, shape, singleton, key_len)
            if isinstance(key_mask, Rejected):
                return key_mask
            key_masks.append(key_mask)
            continue
        steps = _steps(term.index, singleton)
        if steps == (0, 0, 1, -1):
            offsets.append(term.index.const)
        elif steps == (0, 0, -1, 1):
            reaches.append(term.index.const)
        else:
            return Rejected("%s is neither a causal bound nor a sliding window%s", term.node, _varies(steps))
    offset, reach = _least(offsets), _least(reaches)
    if isinstance(offset, Rejected):
        return offset
    if isinstance(reach, Rejected):
        return reach
    if reach is not None and offset is None:
        return Rejected("it hides keys before a sliding window but no keys after the query")
    if offset is None or reach is None:
        window = None
    else:
        window = simplified(offset + reach + 1)
        if not known(window >= 1):
            return Rejected("its sliding window of %s tokens may be empty", window)
    bottom_right = offset is not None and known(offset == key_len - query_len)
    return MaskProof(
        causal=offset is not None,
        offset=None if bottom_right or offset is None else simplified(offset),
        window=window,
        key_masks=tuple(key_masks),
    )


def _steps(index: IndexTensor, singleton: Sequence[bool]) -> tuple[int, ...]:
    """Steps along batch, head, query and key; 0 along dimensions of one element."""
    steps = (0,) * (4 - len(index.steps)) + index.steps
    return tuple(0 if single else step for step, single in zip(steps, singleton, strict=True))


def _varies(steps: Sequence[int]) -> str:
    axes = [axis for axis, step in zip(_AXES, steps, strict=True) if step]
    return f": it varies along {' and '.join(axes)}" if axes else ""


def _least(bounds: Sequence[Size]) -> Size | Rejected | None:
    """The tightest of several bounds that all hold."""
    if not bounds:
        return None
    for bound in bounds:
        if all(known(bound <= other) for other in bounds):
            return bound
    return Rejected("which of its bounds %s is the tightest depends on the lengths", ", ".join(map(str, bounds)))


def _key_mask(term: LookUp, shape: Sequence[Size], singleton: Sequence[bool], key_len: Size) -> KeyMask | Rejected:
    """A look-up as a key mask, provided that it varies along nothing but batch and keys."""
    batch_dim, key_dim, key_start = None, None, 0
    selected: list[tuple[int, int]] = []
    base = value_of(term.node).shape
    for dim, index in enumerate(term.indices):
        steps = _steps(index, singleton)
        if steps[QUERY] or steps[HEAD]:
            return Rejected("%s varies along %s, and %s", term.node, _AXES[QUERY if steps[QUERY] else HEAD], term.why)
        if steps == (1, 0, 0, 0) and batch_dim is None and known(index.const == 0) and known(base[dim] == shape[-4]):
            batch_dim = dim
        elif steps == (0, 0, 0, 1) and key_dim is None:
            key_dim, key_start = dim, simplified(index.const)
        elif not any(steps) and isinstance(simplified(index.const), int):
            selected.append((dim, int(index.const)))
        else:
            return Rejected("%s is read at positions that are no plain batch and key positions", term.node)
    if key_dim is None:
        return Rejected("%s does not vary along the keys, and %s", term.node, term.why)
    return KeyMask(
        node=term.node,
        batch_dim=batch_dim,
        key_dim=key_dim,
        key_start=key_start,
        selected=tuple(selected),
        negated=term.negated,
    )
