"""Dense attention by SDPA, with the mask in the form its fastest backend takes."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from s2o_compile.kernels.core.call import AttentionCall
from s2o_compile.kernels.core.mask import AttentionMask


def needs_pairs(mask: AttentionMask, n_keys: int, scale: float) -> bool:
    """Whether SDPA must be given the mask pair by pair, [B or 1, 1, Nq, Nk]."""
    if mask.window is not None or mask.attention_chunk is not None or mask.key_mask is not None:
        return True
    return sdpa_causal(mask.causal, mask.offset, n_keys, scale) is None


def attend_by_sdpa(call: AttentionCall) -> Tensor:
    """Exact attention [B, Hq, Nq, Dv] of a call without softcap and sinks; fully masked rows get zeros."""
    mask = call.mask
    if needs_pairs(mask, call.n_keys, call.scale):
        pairs = mask.visible_pairs(call.n_queries, call.n_keys, call.query.device)
        return sdpa(*call.tensors, pairs, scale=call.scale)
    is_causal = sdpa_causal(mask.causal, mask.offset, call.n_keys, call.scale)
    return sdpa(*call.tensors, is_causal=bool(is_causal), scale=call.scale)


def sdpa(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *, is_causal: bool = False, scale: float
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


def pad_to_equal(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key [..., D] and value [..., Dv] with zero columns up to the larger of the two; themselves if equal.

    Zero columns change no product q . k, and those of the value are zero columns of the output, to be cut off again.
    """
    missing = query.shape[-1] - value.shape[-1]
    if missing > 0:
        value = pad(value, (0, missing))
    elif missing < 0:
        query, key = pad(query, (0, -missing)), pad(key, (0, -missing))
    return query, key, value
