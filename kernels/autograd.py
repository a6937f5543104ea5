"""Attention that gradients flow through: SDPA, or plain torch where SDPA has no such argument."""

from __future__ import annotations

import torch
from torch import Tensor

from s2o_compile.kernels.core.layout import as_sdpa, memory_order
from s2o_compile.kernels.core.mask import AttentionMask
from s2o_compile.kernels.exact.chunked import attend_chunks
from s2o_compile.kernels.exact.fully_masked_rows import fill_fully_masked_rows, fill_rows
from s2o_compile.kernels.exact.sdpa import dense_attention


def attend_differentiably(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: AttentionMask,
    *,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    fully_masked: str,
) -> Tensor:
    """Exact attention [B, Hq, Nq, Dv]; arguments as ``operator.run``."""

    def attend(query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask) -> tuple[Tensor, None]:
        if softcap is None and sinks is None:
            return dense_attention(query, key, value, mask, scale=scale), None
        visible = mask.visible_pairs(query.shape[2], key.shape[2], query.device)
        return plain_attention(query, key, value, visible, scale=scale, softcap=softcap, sinks=sinks), None

    chunked = mask.attention_chunk is not None
    output, _ = attend_chunks(query, key, value, mask, attend) if chunked else attend(query, key, value, mask)
    if fully_masked == "mean":
        output = fill_fully_masked_rows(output, value, mask, sinks)
    return as_sdpa(output, query)


def attend_plainly(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: AttentionMask | Tensor,
    *,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    fully_masked: str,
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
        fully_masked: What a query gets that sees no key under a mask that is not additive.
        layout: How the output lies in memory (``layout.py``).
    """
    if isinstance(mask, AttentionMask):
        mask = mask.visible_pairs(query.shape[2], key.shape[2], query.device)
    output = plain_attention(query, key, value, mask, scale=scale, softcap=softcap, sinks=sinks)
    if fully_masked == "mean" and mask.dtype is torch.bool:
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
