"""One attention call: its tensors, its mask, and everything else that changes its result.

A call is checked and completed once, by `AttentionCall.of`. After that every function takes the call itself: executors
take ``(call, plan, tau, into)``, exact attention takes ``(call)``, and parts of a call are calls, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, TypedDict, Unpack

import torch
from torch import Tensor

from s2o_compile.kernels.core.mask import UNKNOWN_MASK, AttentionMask
from s2o_compile.kernels.core.validation import check_arguments, check_tensors, check_whole
from s2o_compile.kernels.pages.prefill_cache import PrefillCache
from s2o_compile.kernels.pages.sizes import Sizes
from s2o_compile.kernels.pages.table import Pages


class MaskTerms(TypedDict, total=False):
    """The terms of a mask, as `AttentionMask.aligned` takes them."""

    causal: bool
    causal_offset: int | None
    window: int | None
    attention_chunk: int | None


def scale_of(query: Tensor, scale: float | None) -> float:
    """The softmax scale of a query [.., D]: ``D ** -0.5`` unless one is given."""
    return query.shape[-1] ** -0.5 if scale is None else scale


@dataclass(frozen=True, kw_only=True, eq=False)
class AttentionCall:
    """One call; its tensors are the caller's own and must not be written to.

    Legend: B batch, Hq query heads, Hkv key/value heads, Nq queries, Nk keys, D and Dv head dims.

    Attributes:
        query: [B, Hq, Nq, D].
        key: [B, Hkv, Nk, D].
        value: [B, Hkv, Nk, Dv].
        mask: Which keys a query sees.
        scale: Softmax scale.
        softcap: Bound of the logits, None for none.
        sinks: Floating [Hq], one more logit a head; None for none.
        fully_masked: The output of a query that sees no key, one of FULLY_MASKED.
        return_lse: Whether the caller wants the log-sum-exp.
        dense_heads: Key/value heads whose groups run densely beside the others, ascending.
        site: Module path of the attention, "" for eager calls.
        unread_rows: Bool [B, Nq], queries whose output nobody reads, so that its error does not count; None for none.
        pages: Where the keys of the one sequence of this call lie, if key and value are flat views of a cache, [1, Hkv,
            rows, D] and [1, Hkv, rows, Dv]; None if row j is key j.
        kept: What the ranking keeps between the chunks of a prefill, None for a call by itself.
        lengths: The sizes of the one sequence of this call, if only the device knows them; None if the tensors have
            them. Then lengths of tensors and pages are bounds, and the rows of all sequences lie behind their first.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: AttentionMask = UNKNOWN_MASK
    scale: float
    softcap: float | None = None
    sinks: Tensor | None = None
    fully_masked: str = "zeros"
    return_lse: bool = False
    dense_heads: Sequence[int] = ()
    site: str = ""
    unread_rows: Tensor | None = None
    pages: Pages | None = None
    kept: PrefillCache | None = None
    lengths: Sizes | None = None

    @classmethod
    def of(
        cls, query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None = None, sinks: Tensor | None = None, *,
        scale: float | None = None, softcap: float | None = None, fully_masked: str = "zeros",
        return_lse: bool = False, dense_heads: Sequence[int] = (), site: str = "", **terms: Unpack[MaskTerms],
    ) -> AttentionCall:  # fmt: skip
        """The call of these arguments, named as its fields and completed: a scale of None is ``D ** -0.5``.

        ``key_mask`` is bool [B, Nk] or [1, Nk], True where a key may be attended. ``dense_heads`` come in any order.

        Raises:
            InputError: Tensors or arguments that the operator cannot take, or tensors that are shards.
        """
        check_whole()
        check_tensors(query, key, value)
        check_arguments(
            query, key, key_mask, sinks, causal=terms.get("causal", False), window=terms.get("window"),
            attention_chunk=terms.get("attention_chunk"), softcap=softcap, fully_masked=fully_masked,
            dense_heads=dense_heads,
        )  # fmt: skip
        return cls(
            query=query, key=key, value=value, mask=AttentionMask.aligned(query, key, key_mask=key_mask, **terms),
            scale=scale_of(query, scale), softcap=softcap, sinks=sinks,
            fully_masked=fully_masked, return_lse=return_lse,
            dense_heads=sorted(set(dense_heads)) if dense_heads else (), site=site,
        )  # fmt: skip

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value."""
        return self.query, self.key, self.value

    @property
    def group(self) -> int:
        """Query heads that share a key/value head."""
        return self.query.shape[1] // self.key.shape[1]

    @property
    def n_queries(self) -> int:
        """Number of queries Nq."""
        return self.query.shape[2]

    @property
    def n_keys(self) -> int:
        """Number of keys Nk."""
        return self.key.shape[2] if self.pages is None else self.pages.length

    @property
    def sizes(self) -> Sizes:
        """The sizes as kernels take them."""
        if self.lengths is not None:
            return self.lengths
        n_queries, n_keys = self.n_queries, self.n_keys
        return Sizes(n_queries, n_keys, self.mask.offset, self.mask.seg_offset(n_queries, n_keys))

    @property
    def earlier_keys(self) -> int:
        """Keys before those of the queries themselves, if a sequence's last keys are theirs."""
        return max(self.n_keys - self.n_queries, 0)

    @property
    def wants_lse(self) -> bool:
        """Whether an executor must return the log-sum-exp: for the caller, or for sinks."""
        return self.return_lse or self.sinks is not None

    def but(self, **changes: Any) -> AttentionCall:  # noqa: ANN401 (any field)
        """A call with some fields changed.

        Every sparse call makes several. Copying the fields takes a third of the time of ``dataclasses.replace``. A
        subclass's own fields and cached results are left out: they belong to the call as it was.
        """
        if not FIELDS.issuperset(changes):
            raise TypeError(f"AttentionCall.but: expected fields of an AttentionCall, got {sorted(changes)}.")
        call = object.__new__(AttentionCall)
        fields = self.__dict__ if type(self) is AttentionCall else {name: self.__dict__[name] for name in FIELDS}
        call.__dict__.update(fields, **changes)
        return call

    def over(self, query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask | None = None) -> AttentionCall:
        """The same call over other tensors, and under another mask if one is given."""
        return self.but(query=query, key=key, value=value, mask=self.mask if mask is None else mask)

    def first_keys(self, stop: int, mask: AttentionMask) -> AttentionCall:
        """The same queries over the keys before ``stop``, under another mask."""
        if self.pages is not None:
            return self.but(pages=replace(self.pages, length=stop), mask=mask)
        return self.but(key=self.key[:, :, :stop], value=self.value[:, :, :stop], mask=mask)

    def out_of_pages(self) -> AttentionCall:
        """The call with keys and values copied out of their pages, for functions that read no pages."""
        if self.pages is None:
            return self
        rows = self.pages.rows()
        key, value = (x.index_select(2, rows) for x in (self.key, self.value))
        return self.but(key=key, value=value, pages=None)

    def over_seen_keys(self) -> AttentionCall:
        """The call without keys behind the last that a query sees: the end of a static cache must not rank others."""
        if not self.mask.causal or self.lengths is not None:
            return self
        stop = max(self.mask.visible_range(0, self.n_queries - 1, self.n_keys)[1], 1)
        return self if stop == self.n_keys else self.first_keys(stop, self.mask.first_keys(stop))

    def without_hidden_keys(self) -> AttentionCall:
        """The call with zeros where its key mask hides: of padding that holds NaN, a weight of nothing makes NaN."""
        if self.mask.key_mask is None:
            return self
        hidden = ~self.mask.key_mask[:, None, :, None]
        return self.but(key=self.key.masked_fill(hidden, 0.0), value=self.value.masked_fill(hidden, 0.0))

    def for_kernels(self) -> AttentionCall:
        """The call as our executors take it: unit last strides, and an offset beyond which nothing changes."""
        mask = self.mask.within(self.n_queries, self.n_keys)
        if mask is self.mask and all(x.stride(-1) == 1 for x in self.tensors):
            return self
        return self.over(*(x if x.stride(-1) == 1 else x.contiguous() for x in self.tensors), mask)

    def on_device(self) -> AbstractContextManager[object]:
        """A block in which launches go to the call's device: Triton launches on the current one."""
        return on_device(self.query)


def on_device(x: Tensor) -> AbstractContextManager[object]:
    """`AttentionCall.on_device` of a tensor."""
    elsewhere = x.is_cuda and x.get_device() != torch.cuda.current_device()
    return torch.cuda.device_of(x) if elsewhere else nullcontext()


FIELDS = frozenset(AttentionCall.__dataclass_fields__)
