"""Proves the mask of an attention for every length that the graph accepts, or says why it cannot.

A mask is proven when each of its terms is one of

    j <= i + c                causal, with offset c
    j >= i - c                sliding window; with c' > 0 above, a window around the query
    j // n == (i + c) // n    chunks of n keys, counted from the first; needs the causal term with the same c
    ids[b, i] == ids[b, j]    documents that are packed into one row; the integer tensor stays an operand
    look-up in [B, Nk]        key padding: constant along heads and queries; the tensor stays an operand

where i counts queries and j keys. All terms must hold at once. Every other mask is refused, or left to the operator,
which reads it in every run (`MaskReading`). A dense attention costs time; a wrong mask costs the result.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import fx

from s2o_compile.kernels.core.mask_band import ABSORBS, HIDES
from s2o_compile.passes.graph.mutations import Mutations
from s2o_compile.passes.graph.nodes import Size, known, value_of
from s2o_compile.passes.graph.rejected import Refused, Rejected, accepted, attempt
from s2o_compile.passes.masks import documents, views
from s2o_compile.passes.masks.additive import ABSORBING, AdditiveEvaluator, hides, rounded
from s2o_compile.passes.masks.classify import classify
from s2o_compile.passes.masks.index_tensor import IndexTensor
from s2o_compile.passes.masks.proof import MERGED, MaskPart, MaskProof, MaskReading
from s2o_compile.passes.masks.readable import is_readable
from s2o_compile.passes.masks.term import Term, Terms
from s2o_compile.passes.masks.terms import TermEvaluator


class MaskProver:
    """Proves the masks of one graph; layers that share a mask node share its proof.

    Args:
        graph: The captured graph.
        assume_causal: Whether the user promised that masks which enter the graph are causal.
        assume_block_masks: Whether the user promised that block masks which enter the graph are their mask_mods'.
        read: Whether the operator may read masks that are not proven.
        stored: The numbers of stored tensors that nobody will change; None where they may change.
    """

    def __init__(
        self, graph: fx.Graph, *, assume_causal: bool = False, assume_block_masks: bool = False, read: bool = False,
        stored: documents.Stored | None = None,
    ) -> None:  # fmt: skip
        self.mutations = Mutations(graph)
        self._terms = TermEvaluator(self.mutations)
        self._additive = AdditiveEvaluator(self._terms, self.mutations)
        self.indices = self._terms.indices
        self.assume_block_masks = assume_block_masks
        self._assume_causal = assume_causal
        self._read = read
        self._stored = stored
        self._proofs: dict[tuple[fx.Node, str, str], MaskProof | Rejected] = {}

    def prove(self, mask: fx.Node, query_len: Size, key_len: Size) -> MaskProof | Rejected:
        """Proves an ``attn_mask`` operand, or says why it cannot: `proof` for callers outside the passes."""
        return attempt(self.proof, mask, query_len, key_len)

    def proof(self, mask: fx.Node, query_len: Size, key_len: Size) -> MaskProof:
        """The proof of an ``attn_mask`` operand; raises `Refused`.

        The mask is bool (True: may be attended) or float (added to the scores), broadcastable to [B, Hq, Nq, Nk].
        """
        memo = mask, str(query_len), str(key_len)
        if memo not in self._proofs:
            proof = attempt(self._proven, mask, query_len, key_len)
            if isinstance(proof, Rejected):
                proof = self._unproven(mask, query_len, key_len, proof)
            self._proofs[memo] = proof
        return accepted(self._proofs[memo])

    def _unproven(self, mask: fx.Node, query_len: Size, key_len: Size, why: Rejected) -> MaskProof | Rejected:
        """A mask of which nothing is proven, as a promise or for the operator to read; else the reason."""
        if self._assume_causal and self._is_input(mask, query_len, key_len):
            return MaskProof(causal=True, promised=mask)
        readable = self._fits(mask, query_len, key_len) and self._may_read((MaskPart(mask),))
        return MaskProof(read=MaskReading((MaskPart(mask),), "zeros", why)) if readable else why

    def prove_parts(
        self, parts: Sequence[MaskPart], shape: Sequence[Size], dtype: torch.dtype, *, factor: float = 1.0,
        floored: bool = False, zeroed: bool = False,
    ) -> MaskProof:  # fmt: skip
        """Proves the conjunction of the masks that hand-written attention applies to its scores.

        Args:
            parts: The masks; none is a proof, too.
            shape: Of the scores, [B, Hq, Nq, Nk].
            dtype: Of the scores.
            factor: A positive number that multiplies masked scores.
            floored: Whether masked scores are raised to the dtype's lowest number, so that all hidden ones are it.
            zeroed: Whether the probabilities of hidden keys are set to zero behind the softmax.
        """
        query_len, key_len = shape[-2:]
        for part in parts:
            if value_of(part.node).dtype is torch.bool and part.hidden is None:
                raise Refused("the bool mask %s is added to the scores as numbers; fill by -inf instead", part.node)
        if floored and factor != 1:
            raise Refused("masked scores are clamped and multiplied by %s", factor)
        if len(parts) == 1 and factor == 1 and not floored and _as_it_is(parts[0]):
            proof = self.proof(parts[0].node, query_len, key_len)
            if proof.read is None or self._adds_alike(parts[0], dtype):
                return proof
            needed = "float32 for mask and query, or in the query's dtype no numbers but 0 and the lowest"
            raise Refused("%s (it is not read at run time, which needs %s)", proof.read.why, needed)
        try:
            return self._conjunction(parts, shape, dtype, factor, floored=floored, zeroed=zeroed)
        except Refused as error:
            fully_masked, fill = _fully_masked_if_read(parts, dtype, zeroed=zeroed), None
            if fully_masked is None and not zeroed and (fill := _common_fill(parts, dtype)) is not None:
                fully_masked = "mean"
            scaled = factor != 1 and any(part.hidden != -math.inf for part in parts)
            if scaled or floored or fully_masked is None:
                raise
            alike = all(
                self._fits(part.node, query_len, key_len)
                and self._adds_alike(part, dtype)
                # Layers share the joined mask, so its parts must not change.
                and attempt(self.mutations.settled, part.node)
                for part in parts
            )
            if not alike or not self._may_read(parts):
                raise
            return MaskProof(read=MaskReading(tuple(parts), fully_masked, error.why, fill))

    def _adds_alike(self, part: MaskPart, dtype: torch.dtype) -> bool:
        """Whether adding a mask to scores of a dtype gives the result of fused attention, whatever the mask holds.

        Fused attention adds in float32. In fewer bits, a score beside -1e4 is rounded, which fully masked rows show.
        """
        if part.hidden is not None:
            return True
        if value_of(part.node).dtype != dtype:
            return False
        if dtype is torch.float32:
            return True
        additive = attempt(self._additive.evaluate, part.node)
        return bool(additive) and additive.fully_masked is not None

    def _conjunction(
        self, parts: Sequence[MaskPart], shape: Sequence[Size], dtype: torch.dtype, factor: float, *, floored: bool,
        zeroed: bool,
    ) -> MaskProof:  # fmt: skip
        query_len, key_len = shape[-2:]
        terms: list[Term] = []
        conventions: list[str | None] = []
        for part in parts:
            try:
                part_terms, convention = self._part(part, dtype, factor, floored=floored)
            except Refused as error:
                raise Refused("the mask %s is not proven: %s", part.node, error.why) from None
            own = value_of(part.node).shape
            axes = tuple(range(4))[max(4 - len(own), 0) :] if part.axes is None else part.axes
            misfit = Refused("the mask %s of shape %s does not fit the scores' %s", part.node, own, tuple(shape))
            if len(own) > len(axes):
                raise misfit
            indices = []
            for dim, (size, axis) in enumerate(zip(own, axes, strict=True)):
                varies = not known(size == 1) and (
                    axis != MERGED or any(index.steps[dim] for term in part_terms for index in term.indices)
                )
                if varies and (axis is None or axis == MERGED or not known(size == shape[axis])):
                    raise misfit
                indices.append(IndexTensor.axis(shape, axis or 0) if varies else IndexTensor.constant(0, shape))
            terms += [term.at(indices, shape) for term in part_terms]
            conventions.append(convention)
        try:
            proof = self._classified(tuple(terms), shape, query_len, key_len)
        except Refused as error:
            masks = ", ".join(str(part.node) for part in parts)
            raise Refused("the masks %s are not proven: %s", masks, error.why) from None
        if zeroed or set(conventions) <= {"zeros"} or _every_row_sees_a_key(proof, query_len, key_len):
            return proof
        # Several numbers are no mean, unless the same floor lies under all of them, or all fill by the same.
        fills = {part.hidden for part in parts}
        filled = len(fills) == 1 and None not in fills and set(conventions) == {"mean"}
        if filled or conventions in (["mean"], ["lowest"] * len(conventions)):
            return dataclasses.replace(proof, fully_masked="mean")
        raise Refused("its masks hide scores by several finite numbers, which rows without any key show; use -inf")

    def check_no_bias(self, node: fx.Node) -> None:
        """Raises `Refused` if a tensor that is added to the scores is no mask, whatever its shape."""
        value = value_of(node)
        if isinstance(value, torch.Tensor) and value.dtype.is_floating_point:
            self._additive.evaluate(node)

    def _part(self, part: MaskPart, dtype: torch.dtype, factor: float, *, floored: bool) -> tuple[Terms, str | None]:
        """The terms of one mask, and the output that it gives fully masked rows."""
        if part.hidden is None:
            additive = self._additive.evaluate(part.node)
            hidden, fully_masked = additive.hidden, additive.fully_masked
            dtype = part.dtype or additive.dtype
        else:
            additive, hidden = None, {part.hidden}
            # A fill replaces the scores: one finite number everywhere in a row is a mean in every dtype.
            fully_masked = "zeros" if math.isinf(part.hidden) else "mean"
            dtype = part.dtype or dtype
        for number in hidden:
            least = number * min(factor, 1.0)  # a large factor scales the scores that are seen as well
            if not hides(least, dtype):
                raise Refused(
                    "it hides scores by %s, which large scores outweigh; expected -inf or torch.finfo(%s).min",
                    least,
                    dtype,
                )
        held = hidden if part.cast is None else rounded(hidden, part.cast)
        if -math.inf in held and -math.inf not in hidden:  # float32's lowest number is -inf in bfloat16
            if factor != 1:
                raise Refused("it hides scores by %s, which are scaled and cast to %s", max(hidden), part.cast)
            fully_masked = "zeros" if len(held) == 1 else None
        terms = self._terms.terms(part.node, negated=not part.negated) if additive is None else additive.terms
        if floored and all(number <= torch.finfo(torch.float32).min for number in hidden):
            fully_masked = "lowest"
        if fully_masked == "mean" and factor > 1:
            fully_masked = None  # it may overflow, then the mean is NaN
        return terms, fully_masked

    def _proven(self, mask: fx.Node, query_len: Size, key_len: Size) -> MaskProof:
        value = value_of(mask)
        if not isinstance(value, torch.Tensor) or not 1 <= value.ndim <= 4:
            raise Refused("the mask %s is not a tensor of rank 1 to 4", mask)
        if not known(value.shape[-1] == key_len):
            raise Refused("the mask %s has %s keys, but there are %s", mask, value.shape[-1], key_len)
        if value.ndim > 1 and not known(value.shape[-2] == query_len) and not known(value.shape[-2] == 1):
            raise Refused("the mask %s has %s queries, but there are %s", mask, value.shape[-2], query_len)
        if value.dtype is not torch.bool and not value.dtype.is_floating_point:
            raise Refused("the mask %s has dtype %s, expected bool or floating point", mask, value.dtype)
        try:
            if value.dtype is torch.bool:
                terms, fully_masked = self._terms.terms(mask), "zeros"
            else:
                additive = self._additive.evaluate(mask)
                terms, fully_masked = additive.terms, additive.fully_masked
            proof = self._classified(terms, value.shape, query_len, key_len)
        except Refused as error:
            raise Refused("the mask %s is not proven: %s", mask, error.why) from None
        if fully_masked == "zeros" or _every_row_sees_a_key(proof, query_len, key_len):
            return proof
        if fully_masked is None:
            raise Refused(
                "the mask %s adds finite numbers (%s) to hidden scores, which rows without any key show; use a bool "
                "mask, or -inf",
                mask,
                value.dtype,
            )
        return dataclasses.replace(proof, fully_masked=fully_masked)

    def _classified(self, terms: Terms, shape: Sequence[Size], query_len: Size, key_len: Size) -> MaskProof:
        return classify(documents.resolved(terms, shape, self.indices, self._stored), shape, query_len, key_len)

    def _fits(self, mask: fx.Node, query_len: Size, key_len: Size) -> bool:
        """Whether a mask broadcasts to [.., Nq, Nk] for every length."""
        value = value_of(mask)
        if not isinstance(value, torch.Tensor) or not 2 <= value.ndim <= 4:
            return False
        rows, columns = value.shape[-2:]
        return known(columns == key_len) and (known(rows == query_len) or known(rows == 1))

    def _may_read(self, parts: Sequence[MaskPart]) -> bool:
        """Whether masks may be left to the operator to read, and reading them promises anything."""
        return self._read and all(is_readable(part.node, self.indices) for part in parts)

    def _is_input(self, mask: fx.Node, query_len: Size, key_len: Size) -> bool:
        """Whether a mask enters the graph as a tensor over queries and keys, possibly seen through views and casts."""
        if not self._fits(mask, query_len, key_len) or not known(value_of(mask).shape[-2] == query_len):
            return False
        for seen in views.chain(mask, self.indices.evaluate):
            if self.indices.is_written(seen.node):
                return False
            if seen.node.op == "placeholder":
                # A padding mask spread over the queries is no causal mask, whatever was promised.
                return all(any(index.steps[dim] for index in seen.indices) for dim in (-2, -1))
        return False


def _as_it_is(part: MaskPart) -> bool:
    """Whether a mask is added to the scores as fused attention adds its own, in the dtype of both."""
    same = part.dtype in (None, value_of(part.node).dtype) and part.cast is None
    return same and part.hidden is None and part.axes is None


def _fully_masked_if_read(parts: Sequence[MaskPart], dtype: torch.dtype, *, zeroed: bool) -> str | None:
    """The output of fully masked rows if several masks, or fills, can be read as one mask; None if they cannot.

    Fills replace scores, and masks are added to them. Both are the same only if the number absorbs every score.
    """
    exact = _as_scores(parts, dtype)
    fills = [part.hidden for part in parts if part.hidden is not None]
    added = any(part.hidden is None for part in parts)
    low = all(math.isinf(fill) or (fill <= ABSORBS and dtype in ABSORBING) for fill in fills)
    if not exact or not low:
        return None
    if zeroed and (added or len(fills) > 1):
        return None
    return "mean" if fills and not zeroed and not added and not math.isinf(fills[0]) else "zeros"


def _common_fill(parts: Sequence[MaskPart], dtype: torch.dtype) -> float | None:
    """The number by which all parts fill scores, if it may hide them: the operator asks that in every run."""
    fills = {part.hidden for part in parts}
    number = fills.pop() if len(fills) == 1 and _as_scores(parts, dtype) else None
    return number if number is not None and -math.inf < number <= HIDES else None


def _as_scores(parts: Sequence[MaskPart], dtype: torch.dtype) -> bool:
    """Whether masks meet scores of the query's dtype, and along their last dimensions."""
    return all(part.axes is None and part.dtype in (None, dtype) and part.cast is None for part in parts)


def _every_row_sees_a_key(proof: MaskProof, query_len: Size, key_len: Size) -> bool:
    """Whether the first query's keys begin and the last one's have not ended, with no padding in between."""
    if proof.key_masks:
        return False
    if proof.documents is not None and not (proof.documents.of_itself and known(query_len <= key_len)):
        return False
    if not proof.causal:
        return True
    offset = key_len - query_len if proof.offset is None else proof.offset
    if proof.documents is not None:  # its own key
        return known(offset >= 0) and (proof.window is None or known(proof.window > offset))
    if proof.chunk is not None and not known(query_len + offset <= key_len):
        return False
    return known(offset >= 0) and (proof.window is None or known(query_len + offset - proof.window < key_len))
