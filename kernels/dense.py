"""Dense attention by SDPA, with the mask in the form its fastest backend takes."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from s2o_compile.kernels.equal_dims import pad_to_equal
from s2o_compile.kernels.mask import AttentionMask


def needs_pairs(mask: AttentionMask, n_keys: int, scale: float) -> bool:
    """Whether SDPA must be given the mask pair by pair, [B or 1, 1, Nq, Nk]."""
    if mask.window is not None or mask.attention_chunk is not None or mask.key_mask is not None:
        return True
    # SDPA's is_causal starts both diagonals at 0, and hides by adding before it scales.
    return _hides(mask, n_keys) and (mask.offset != 0 or scale <= 0)


def _hides(mask: AttentionMask, n_keys: int) -> bool:
    """Whether the causal term hides anything: it does not if the first query already sees every key."""
    return mask.causal and mask.offset < n_keys - 1


def dense_attention(query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask, *, scale: float) -> Tensor:
    """Exact attention [B, Hq, Nq, Dv]; a query that sees no key gets zeros, as SDPA's boolean masks give."""
    value_dim = value.shape[3]
    # SDPA has no fused kernel for two head dims on a CPU, nor on CUDA with grouped heads: it would hold all logits.
    query, key, value = pad_to_equal(query, key, value)
    n_queries, n_keys = query.shape[2], key.shape[2]
    grouped = query.shape[1] != key.shape[1]
    if not needs_pairs(mask, n_keys, scale):
        causal = _hides(mask, n_keys)
        output = scaled_dot_product_attention(query, key, value, is_causal=causal, scale=scale, enable_gqa=grouped)
        return output if output.shape[3] == value_dim else output[..., :value_dim]
    visible = mask.visible_pairs(n_queries, n_keys, query.device)
    if grouped:  # with a mask, SDPA's fused backends want equal head counts; at these lengths the copy is small
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    return scaled_dot_product_attention(query, key, value, attn_mask=visible, scale=scale)[..., :value_dim]
