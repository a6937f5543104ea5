"""Dense attention of a block of queries to a block of keys, with the log-sum-exp by which partial results merge.

lse = log(exp(lse_1) + exp(lse_2)),   out = out_1 exp(lse_1 - lse) + out_2 exp(lse_2 - lse)
"""

from __future__ import annotations

import torch
from torch import Tensor

from s2o_compile.kernels.exact.sdpa import pad_to_equal

_fused_cpu = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
"""SDPA's CPU kernel, the only one that returns the log-sum-exp. Plain torch serves without it, and capped logits."""


def block_attention(
    query: Tensor, key: Tensor, value: Tensor, hidden: Tensor | None = None, *, scale: float,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention of every query to every key that is not hidden.

    Args:
        query: float32 [M, D].
        key: float32 [C, D].
        value: float32 [C, Dv].
        hidden: bool [M, C] or [C], True where the key may not be attended.
        scale: Factor of the logits.
        softcap: Bound of the logits, None for none.

    Returns:
        output float32 [M, Dv] (zeros where all is hidden) and lse float32 [M] (-inf there).
    """
    if hidden is not None:
        hidden = hidden.expand(len(query), len(key))
    if _can_fuse(query, softcap):
        output, lse = _fused_block(query, key, value, hidden, scale)
    else:
        output, lse = plain_block(query, key, value, hidden, scale=scale, softcap=softcap)
    if hidden is not None:
        fully_masked = hidden.all(-1)
        output, lse = output.masked_fill(fully_masked[:, None], 0.0), lse.masked_fill(fully_masked, float("-inf"))
    return output, lse


def causal_block(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """The same under the mask j <= i of G heads that share keys: query [G, M, D] -> output [G, M, Dv], lse [G, M]."""
    group, rows, _ = query.shape
    if _can_fuse(query, softcap):
        assert _fused_cpu is not None
        query, key, padded = pad_to_equal(query, key, value)
        shared = (x.expand(group, 1, *x.shape) for x in (key, padded))
        output, lse = _fused_cpu(query[:, None], *shared, 0.0, True, scale=scale)
        return output[:, 0, :, : value.shape[1]], lse.reshape(group, rows)
    positions = torch.arange(max(rows, len(key)), device=query.device)
    hidden = (positions[None, : len(key)] > positions[:rows, None]).repeat(group, 1)
    output, lse = plain_block(query.flatten(0, 1), key, value, hidden, scale=scale, softcap=softcap)
    return output.view(group, rows, -1), lse.view(group, rows)


def _can_fuse(query: Tensor, softcap: float | None) -> bool:
    return query.device.type == "cpu" and _fused_cpu is not None and softcap is None


def _fused_block(
    query: Tensor, key: Tensor, value: Tensor, hidden: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """One call of SDPA's CPU kernel."""
    bias = None
    if hidden is not None:
        bias = query.new_zeros(hidden.shape).masked_fill_(hidden, float("-inf"))[None, None]
    assert _fused_cpu is not None
    tensors = (x[None, None] for x in pad_to_equal(query, key, value))
    output, lse = _fused_cpu(*tensors, 0.0, False, attn_mask=bias, scale=scale)
    return output[0, 0, :, : value.shape[1]], lse.reshape(-1)


def plain_block(
    query: Tensor, key: Tensor, value: Tensor, hidden: Tensor | None, *, scale: float, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """The same in plain products and a softmax."""
    logits = query * scale @ key.T
    if softcap is not None:
        logits.div_(softcap).tanh_().mul_(softcap)
    if hidden is not None:
        logits.masked_fill_(hidden, float("-inf"))
    return logits.softmax(-1) @ value, logits.logsumexp(-1)


def merge(output: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Join two partial results over disjoint keys; a part that saw nothing (-inf) leaves the other as it is.

    Returns the joint output and lse, and the other part's share of the mass. The first output, float32, is overwritten:
    at these sizes a fresh allocation costs more than the arithmetic.
    """
    above = torch.where(other_lse == float("-inf"), other_lse, other_lse - lse)
    kept, share = torch.sigmoid(-above), torch.sigmoid(above)
    output.mul_(kept[:, None]).add_(other.mul_(share[:, None]))
    return output, torch.logaddexp(lse, other_lse), share
