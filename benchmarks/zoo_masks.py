"""What the mask of an attention is by the values it had when it ran: the judge of what the pass should have rewritten.

The pass proves masks by structure; here they are looked at, which suits a judge. A call counts as *expressible* if its
mask hides what a causal, sliding, padded, bidirectional or cross mask hides, and it has more than one query. Doubt
counts as expressible: a mask that is causal by accident, or an operator whose mask is not read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from s2o_compile.capture.audit import FLEX, SDPA, Counter, Ran
from s2o_compile.kernels.support.torch_compat import tree_leaves
from s2o_compile.passes.site import SiteRecord

UNREAD, DECODE, NUMBERS, OTHER = "not read", "one query", "numbers added to the scores", "another mask"
NO_SCORES = "no product of queries and keys"
BOTH, CAUSAL, WINDOW, PADDING = "bidirectional", "causal", "sliding", ", padded"
HIDING = -1e3
"""A number added to a score, or the distance of a score to its row's largest, from which it hides a key."""

EXEMPT = (
    "one query token",
    "its probabilities are read by",
    "its attention weights are read",
    "more than the output of flex_attention is read",
)
"""Beginnings of the reasons that are no matter of masks: decode, and probabilities that somebody reads."""


def expressible(call: Ran, record: SiteRecord | None) -> bool:
    """Whether the pass should have rewritten this call; ``record`` is what it made of it, None for not found."""
    if record is not None and record.rewritten and not record.unproven:
        return True  # proven, so it is such a mask; `contradicts` compares
    exempt = record is not None and record.reason.startswith(EXEMPT)
    return not exempt and call.mask not in (DECODE, NUMBERS, OTHER, NO_SCORES)


def contradicts(call: Ran, record: SiteRecord | None) -> bool:
    """Whether a call was rewritten whose mask, by value, is none that the operator has: never."""
    # Chunks are no mask of the judge's, and one that the operator has.
    return (
        record is not None
        and record.rewritten
        and not record.unproven  # SDPA runs under such masks
        and "chunk" not in record.mask
        and call.mask in (NUMBERS, OTHER, NO_SCORES)
    )


class MaskCounter(Counter):
    """The audit, with what each mask hides; scores that numbers were added to are marked on their way."""

    def __init__(self, path: Callable[[], str]) -> None:
        super().__init__(path)
        self._numbers: Any = WeakIdKeyDictionary()  # scores -> whether numbers were added to them
        self._width: Any = WeakIdKeyDictionary()  # scores -> keys of their product: sinks are one column more
        self._masks: Any = WeakIdKeyDictionary()  # probabilities and scores -> their mask

    def __torch_dispatch__(
        self,
        func: Any,  # noqa: ANN401 (an operator of any kind)
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 (what the operator returns)
        name = func.overloadpacket.__name__ if hasattr(func, "overloadpacket") else ""
        adds = self._adds_numbers(name, args, kwargs or {})
        output = super().__torch_dispatch__(func, types, args, kwargs)
        if adds and isinstance(output, Tensor):
            self._numbers[output] = True
        return output

    def _adds_numbers(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        if name == "baddbmm":
            return kwargs.get("beta", 1) != 0 and not _only_hides(args[0])
        if name not in ("add", "add_", "sub", "sub_", "rsub"):
            return False
        tensors = [x for x in args[:2] if isinstance(x, Tensor)]
        if len(tensors) < 2 or not any(x in self._trail.table for x in tensors):
            return False
        return not any(_only_hides(x) for x in tensors)

    def _product(self, name: str, args: Sequence[Any], output: Tensor) -> None:
        ran = len(self.ran)
        super()._product(name, args, output)
        if output in self._trail.table:
            self._width[output] = output.shape[-1]
        if len(self.ran) > ran:
            mask = next((self._masks[x] for x in args if isinstance(x, Tensor) and x in self._masks), OTHER)
            self.ran[-1] = replace(self.ran[-1], mask=mask)

    def _step(self, name: str, args: Sequence[Any], output: object) -> None:
        inputs = [x for x in tree_leaves(args) if isinstance(x, Tensor)]
        super()._step(name, args, output)
        for table in (self._numbers, self._width, self._masks):
            known = next((table[x] for x in inputs if x in table), None)
            for x in tree_leaves(output) if known is not None else ():
                if isinstance(x, Tensor) and x in self._trail.table:
                    table[x] = known

    def _softmax(self, name: str, scores: object, dim: int, weights: Tensor) -> None:
        super()._softmax(name, scores, dim, weights)
        if isinstance(scores, Tensor) and weights in self._trail.table:
            keys = self._width.get(scores, scores.shape[-1])
            mask = NUMBERS if scores in self._numbers else _of_scores(scores[..., :keys])
            without = self._trail.table[weights].depth is None
            self._masks[weights] = DECODE if scores.shape[-2] == 1 else NO_SCORES if without else mask

    def _count(self, func: Any, kind: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:  # noqa: ANN401
        super()._count(func, kind, args, kwargs)
        mask = UNREAD
        if kind == FLEX:
            mask = _of_flex(args)
        elif kind == SDPA:
            names = [argument.name for argument in func._schema.arguments]
            mask = _of_sdpa({**dict(zip(names, args, strict=False)), **kwargs})
        self.ran[-1] = replace(self.ran[-1], mask=mask)


def _only_hides(added: object) -> bool:
    """Whether a tensor added to scores is 0 or hides, or is the same for all keys, which no softmax sees."""
    if not isinstance(added, Tensor) or added.ndim == 0 or added.shape[-1] == 1:
        return True
    return bool(((added == 0) | (added <= HIDING)).all())


def _of_sdpa(call: Mapping[str, Any]) -> str:
    query_len, key_len = call["query"].shape[-2], call["key"].shape[-2]
    if query_len == 1:
        return DECODE
    visible = torch.ones(query_len, key_len, dtype=torch.bool)
    if call.get("is_causal"):
        visible = visible.tril()
    added = call.get("attn_mask", call.get("attn_bias"))
    if added is None:
        return of_visible(visible)
    if added.dtype is not torch.bool and not _only_hides(added.expand(*added.shape[:-1], key_len)):
        return NUMBERS
    return of_visible(visible.to(added.device) & (added if added.dtype is torch.bool else added > HIDING))


def _of_flex(args: Sequence[Any]) -> str:
    """Of flex_attention's functions over all positions at once; its block tables are not looked at."""
    query, key, _, score_mod, block_mask = args[:5]
    sizes = (*query.shape[:3], key.shape[-2])
    if sizes[2] == 1:
        return DECODE
    score_captures, mask_captures = (*args[7:], (), ())[:2]
    positions = [torch.arange(n).view([-1 if at == dim else 1 for at in range(4)]) for dim, n in enumerate(sizes)]
    try:
        scores = score_mod(torch.zeros(sizes), *positions, *score_captures)
        visible = block_mask[-1](*positions, *mask_captures)
    except Exception:  # a function that wants its positions one by one
        return UNREAD
    if not _only_hides(scores.expand(sizes)):
        return NUMBERS
    return of_visible(visible.expand(sizes) & (scores > HIDING))


def _of_scores(scores: Tensor) -> str:
    return of_visible(scores > scores.amax(dim=-1, keepdim=True) + HIDING)


def of_visible(visible: Tensor) -> str:
    """The kind of a mask, bool [..., Nq, Nk]; heads and batch entries may differ in their padding."""
    kinds, before = set(), None
    for one in visible.reshape(-1, *visible.shape[-2:]):
        if before is None or not torch.equal(one, before):
            # Rows without any key see all under finite numbers: a mask that makes no sense with them is read without.
            kinds.add(_of_rows(one, one.any(-1)) or _of_rows(one, one.any(-1) & ~one.all(-1)) or OTHER)
        before = one
    if OTHER in kinds:
        return OTHER
    kind = next(kind for kind in (WINDOW, CAUSAL, BOTH) if any(found.startswith(kind) for found in kinds))
    return kind + (PADDING if any(found.endswith(PADDING) for found in kinds) else "")


def _of_rows(visible: Tensor, rows: Tensor) -> str:
    """The kind of one mask [Nq, Nk] in some of its rows; empty for any other than a band of the keys in use."""
    if not rows.any():
        return BOTH
    keys = visible[rows].any(0)
    distance = torch.arange(visible.shape[1]) - torch.arange(visible.shape[0])[:, None]
    first, last = distance[visible & rows[:, None]].aminmax()
    judged = rows[:, None] & keys
    early, late = distance < first, distance > last
    if (visible != ~(early | late))[judged].any():
        return ""
    kind = WINDOW if early[judged].any() else CAUSAL if late[judged].any() else BOTH
    return kind + ("" if keys.all() else PADDING)
