"""The records of an attention: `AttentionSite` goes from frontend to rewriter, `SiteRecord` into the user's report."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from s2o_compile.passes.graph.nodes import Size
from s2o_compile.passes.graph.operand import Operand, Step
from s2o_compile.passes.masks.proof import MaskProof

SHARED = "s2o_shared"
"""In the metadata of a captured graph: the class of its module, if other modules of that class may run it, too."""

ELSEWHERE = "s2o_elsewhere"
"""In the metadata of a captured graph: the names of the model's modules that other graphs may hold."""


OWN_FUNCTIONS = "its own mask_mod and score_mod"
"""The mask, as text, of a call of flex_attention that keeps its functions. Its graph runs without the operator."""

VARYING = -1
"""The length of a dimension along which the entries of a nested tensor differ."""


@dataclass(frozen=True, kw_only=True, eq=False)
class AttentionSite:
    """One attention of the graph, ready to be rewritten.

    Attributes:
        node: The node that computes it; its value is [B, Hq, Nq, Dv], after ``restore``.
        query: [B, Hq, Nq, D].
        key: [B, Hkv, Nk, D], before any ``repeat_kv``.
        value: [B, Hkv, Nk, Dv], before any ``repeat_kv``.
        mask: The proven mask.
        scale: Factor of the scores: a number, an fx node (under ``dynamic=True``), or None for ``D ** -0.5``.
        softcap: Cap of ``softcap * tanh(score / softcap)``; None for no cap.
        sinks: fx node [Hq], one more logit a head whose value is zero; None for none.
        restore: View steps from [B, Hq, Nq, Dv] to the value of ``node``.
        interior: Nodes that serve this attention alone, first to last; erased with it.
        dense_heads: Key/value heads that the user wants dense.
        head_tau: Tau of each query head, empty for that of the options.
        name: Of the site, such as ``model.layers.0.self_attn``; the frontends leave it to the pipeline.
    """

    node: fx.Node
    query: Operand
    key: Operand
    value: Operand
    mask: MaskProof
    scale: float | fx.Node | None
    softcap: float | None = None
    sinks: fx.Node | None = None
    restore: tuple[Step, ...] = ()
    interior: tuple[fx.Node, ...] = ()
    dense_heads: tuple[int, ...] = ()
    head_tau: tuple[float, ...] = ()
    name: str = ""


@dataclass(frozen=True, kw_only=True)
class SiteRecord:
    """The report's line about one attention.

    Attributes:
        name: Module path of the attention.
        rewritten: Whether it now runs the sparse operator.
        reason: Why it stayed dense; empty when rewritten.
        mask: The proven mask, such as ``causal, window 4096``, or ``read at run time``; empty when left dense.
        unproven: Why the mask is read at run time; empty where it is not.
        query_shape: [B, Hq, Nq, D], each size printed; symbolic sizes as such (``s50``).
        key_shape: [B, Hkv, Nk, D] as the operator sees it.
        dtype: Of the query, such as ``bfloat16``.
        dense_heads: Key/value heads that run dense because the user marked them.
        unheld_error: The error ceiling that it was given and that nothing holds, because FlexAttention measures nothing
            while it runs: it goes by its tau. None where there is none, or it is held.
        certain: Whether this is an attention for sure: other code multiplies three tensors without a softmax, too.
    """

    name: str
    rewritten: bool
    reason: str = ""
    mask: str = ""
    unproven: str = ""
    query_shape: tuple[str, ...] = ()
    key_shape: tuple[str, ...] = ()
    dtype: str = ""
    dense_heads: tuple[int, ...] = ()
    unheld_error: float | None = None
    certain: bool = True


def shape_text(value: object) -> tuple[str, ...]:
    """Sizes of a (fake) tensor as text; empty if it is none. A nested tensor's length that varies is "?"."""
    return tuple(map(size_text, sizes_of(value))) if isinstance(value, torch.Tensor) else ()


def size_text(size: Size) -> str:
    """A size of `sizes_of` as text."""
    return "?" if isinstance(size, int) and size == VARYING else str(size)


def sizes_of(x: torch.Tensor) -> tuple[Size, ...]:
    """The shape of a tensor; a nested one has none, and gives `VARYING` where its entries differ."""
    return tuple(_size(x, dim) for dim in range(x.dim())) if x.is_nested and x.layout is torch.strided else (*x.shape,)


def _size(nested: torch.Tensor, dim: int) -> Size:
    try:
        return nested.size(dim)
    except RuntimeError:
        return VARYING


def record(name: str, query: object, key: object, *, reason: str = "", **details: Any) -> SiteRecord:  # noqa: ANN401
    """The report line of one attention; ``query`` and ``key`` are its (fake) tensors or None."""
    return SiteRecord(
        name=name,
        rewritten=not reason,
        reason=reason,
        query_shape=shape_text(query),
        key_shape=shape_text(key),
        dtype=str(query.dtype).removeprefix("torch.") if isinstance(query, torch.Tensor) else "",
        **details,
    )


_ATTENTION = re.compile(r"attn|attention|attend|sdpa")
_NOT_OF_USERS = frozenset({"aten", "prims", "s2o", "higher_order"})


def is_named_attention(namespace: str, name: str) -> bool:
    """Whether an operator of a user's own, whose code no graph shows, is an attention by its name."""
    return namespace not in _NOT_OF_USERS and bool(_ATTENTION.search(name.lower()))
