"""Dense attention by SDPA, with the mask in the form its fastest backend takes."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from s2o_compile.kernels.core.mask import AttentionMask
from s2o_compile.kernels.exact.equal_dims import pad_to_equal


def needs_pairs(mask: AttentionMask, n_keys: int, scale: float) -> bool:
    """Whether SDPA must be given the mask pair by pair, [B or 1, 1, Nq, Nk]."""
    if mask.window is not None or mask.attention_chunk is not None or mask.key_mask is not None:
        return True
    return sdpa_causal(mask.causal, mask.offset, n_keys, scale) is None


def dense_attention(query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask, *, scale: float) -> Tensor:
    """Exact attention [B, Hq, Nq, Dv]; a query that sees no key gets zeros, as SDPA's boolean masks give."""
    n_queries, n_keys = query.shape[2], key.shape[2]
    if needs_pairs(mask, n_keys, scale):
        return sdpa(query, key, value, mask.visible_pairs(n_queries, n_keys, query.device), scale=scale)
    is_causal = sdpa_causal(mask.causal, mask.offset, n_keys, scale)
    return sdpa(query, key, value, is_causal=bool(is_causal), scale=scale)


def sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *,
    is_causal: bool = False,
    scale: float,
) -> Tensor:
    """SDPA's output [B, Hq, Nq, Dv] by its fused kernels, also for grouped heads and for two head dims."""
    value_dim = value.shape[3]
    # SDPA has no fused kernel for two head dims on a CPU, nor on CUDA with grouped heads: it would hold all logits.
    query, key, value = pad_to_equal(query, key, value)
    group = query.shape[1] // key.shape[1]
    if group > 1 and attn_mask is not None:  # nor with a mask for grouped heads; at these lengths the copy is small
        key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
        group = 1
    output = scaled_dot_product_attention(
        query, key, value, attn_mask, is_causal=is_causal, scale=scale, enable_gqa=group > 1
    )
    return output if output.shape[3] == value_dim else output[..., :value_dim]


def sdpa_causal(causal: bool, offset: int, n_keys: int, scale: float | None) -> bool | None:
    """SDPA's ``is_causal`` for a causal mask with this offset, or for none; None where SDPA needs the mask itself."""
    if not causal or offset >= n_keys - 1:  # the first query already sees every key
        return False
    if offset == 0 and (scale is None or scale > 0):  # is_causal hides by adding before it scales
        return True
    return None
