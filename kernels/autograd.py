"""Attention that gradients flow through: SDPA, or plain torch where SDPA has no such argument; sparse by FlexAttention.

The sparse forward's gradient is exact: that of attention over the keys that were visited. Which these are was decided
by numbers that no gradient goes through.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from s2o_compile.kernels.core import head_tau
from s2o_compile.kernels.core.layout import as_sdpa, memory_order
from s2o_compile.kernels.core.mask import AttentionMask
from s2o_compile.kernels.core.options import OperatorOptions
from s2o_compile.kernels.dispatch import choose_path
from s2o_compile.kernels.exact.blind_rows import fill_blind_rows, fill_rows
from s2o_compile.kernels.exact.chunked import attend_chunks
from s2o_compile.kernels.exact.sdpa import dense_attention
from s2o_compile.kernels.impl.flex import forward as flex_forward
from s2o_compile.kernels.support.errors import InputError


def attend_differentiably(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: AttentionMask,
    *,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    blind: str,
) -> Tensor:
    """Exact attention [B, Hq, Nq, Dv]; arguments as ``operator.run``."""

    def attend(query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask) -> tuple[Tensor, None]:
        if softcap is None and sinks is None:
            return dense_attention(query, key, value, mask, scale=scale), None
        visible = mask.visible_pairs(query.shape[2], key.shape[2], query.device)
        return plain_attention(query, key, value, visible, scale=scale, softcap=softcap, sinks=sinks), None

    chunked = mask.attention_chunk is not None
    output, _ = attend_chunks(query, key, value, mask, attend) if chunked else attend(query, key, value, mask)
    if blind == "mean":
        output = fill_blind_rows(output, value, mask, sinks)
    return as_sdpa(output, query)


def attend_sparsely(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: AttentionMask,
    *,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    blind: str,
    options: OperatorOptions,
    dense_heads: Sequence[int] = (),
) -> Tensor:
    """Attention [B, Hq, Nq, Dv] by FlexAttention, dense where it is short; arguments as ``operator.run``."""
    if sinks is not None:
        raise InputError(
            "sinks",
            expected='none where training="sparse" and gradients are wanted',
            got=tuple(sinks.shape),
            remedy='Train such an attention with training="dense".',
        )
    head_tau.check(options.tau, query.shape[1])
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    if mask.key_mask is not None:
        mask = replace(mask, key_mask=mask.key_mask.expand(query.shape[0], -1).contiguous())

    def attend(query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask) -> tuple[Tensor, None]:
        path = choose_path(query, key, mask, scale=scale, min_seq_len=options.min_seq_len)
        if path == "dense":
            return attend_differentiably(
                query, key, value, mask, scale=scale, softcap=softcap, sinks=None, blind="zeros"
            ), None  # fmt: skip
        if path == "window":
            exact = flex_forward.attend_planned(
                query, key, value, mask, None, None, scale=scale, softcap=softcap, wants_lse=False
            )
            return exact.output, None
        with torch.cuda.device_of(query):  # Triton launches on the current device
            sparse = flex_forward.attend(
                query, key, value, mask, scale=scale, softcap=softcap, options=options, dense_heads=dense_heads
            )
        return sparse.output, None

    chunked = mask.attention_chunk is not None
    output, _ = attend_chunks(query, key, value, mask, attend) if chunked else attend(query, key, value, mask)
    return as_sdpa(fill_blind_rows(output, value, mask) if blind == "mean" else output, query)


def attend_plainly(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: AttentionMask | Tensor,
    *,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    blind: str,
    layout: str = "auto",
) -> Tensor:
    """Exact attention [B, Hq, Nq, Dv] by the formula alone, for graphs that leave torch.

    SDPA gives rows that see no key zeros here, and something else in other formats. Nothing is written in place.

    Args:
        query: [B, Hq, Nq, D].
        key: [B, Hkv, Nk, D].
        value: [B, Hkv, Nk, Dv].
        mask: Which keys a query sees, or a bool or additive mask of rank 2 to 4.
        scale: Softmax scale.
        softcap: Bound of the logits, None for none.
        sinks: Floating [Hq], one more logit a head.
        blind: What a query gets that sees no key under a mask that is not additive.
        layout: How the output lies in memory (``layout.py``).
    """
    if isinstance(mask, AttentionMask):
        mask = mask.visible_pairs(query.shape[2], key.shape[2], query.device)
    output = plain_attention(query, key, value, mask, scale=scale, softcap=softcap, sinks=sinks)
    if blind == "mean" and mask.dtype is torch.bool:
        output = fill_rows(output, value, ~mask.any(-1, keepdim=True), sinks)
    if memory_order(query, value.shape[3], layout) == "BHND":
        return output.contiguous()
    return output.transpose(1, 2).contiguous().transpose(1, 2)


def plain_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    *,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """The formula itself under a bool or additive mask, logits and softmax in float32; all Nq x Nk logits are held.

    A number of the mask is added to the logit in float32, and nothing stands in its place: a key under -inf weighs
    nothing, keys under ``finfo.min`` share a row that has no other. A row without any logit above -inf gets zeros.
    """
    n_keys = key.shape[2]
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    logits = (query @ key.transpose(-1, -2)).float() * scale
    if softcap is not None:
        logits = softcap * (logits / softcap).tanh()
    hidden = ~mask if mask.dtype is torch.bool else mask == -torch.inf
    if mask.dtype is not torch.bool:
        logits = logits + mask
    logits = logits.masked_fill(hidden, -torch.inf)  # also where the key is NaN
    if sinks is not None:
        logits = torch.cat([logits, sinks.float()[:, None, None].expand(*logits.shape[:3], 1)], dim=-1)
    # Softmax of -inf alone is NaN, forth and back: such rows go through it as zeros, and come out as zeros.
    empty = logits.detach().amax(-1, keepdim=True) == -torch.inf
    weights = logits.masked_fill(empty, 0.0).softmax(-1)[..., :n_keys].masked_fill(empty, 0.0)
    return weights.to(value.dtype) @ value
