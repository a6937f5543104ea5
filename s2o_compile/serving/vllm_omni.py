"""S2O as a kernel of vllm-omni's backend SPARSE_ATTN: ``extra={"backend": "s2o", "params": {"tau": 0.25}}``.

vllm-omni serves diffusion models. It finds this function by the entry point group ``vllm_omni.sparse_attn``.
"""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

from torch import Tensor

from s2o_compile.config import S2OConfig
from s2o_compile.errors import InputError
from s2o_compile.functional import attention
from s2o_compile.kernels.support.arguments import as_integer, shown
from s2o_compile.serving.options import config_from_environment

FIELDS = ("tau", "error", "min_seq_len", "segment_len", "ranking", "ranking_per", "implementation")
"""Params that are fields of `S2OConfig`. What a model publishes beside them, such as its geometry, changes nothing."""


def attn_fn(
    query: Tensor, key: Tensor, value: Tensor, params: dict[str, Any], is_causal: bool, softmax_scale: float
) -> Tensor:
    """Attention of diffusion models, sparse from ``min_seq_len`` on.

    Args:
        query: [B, Nq, Hq, D].
        key: [B, Nk, Hkv, D].
        value: [B, Nk, Hkv, D].
        params: Fields of `S2OConfig`, which win over the environment, and the server's own: ``attn_mask`` is
            padding [B, Nk] (nonzero for a key to attend), or a mask that SDPA takes. ``valid_kv_length`` is the number
            of keys before padding. ``cu_seqlens_q`` is of one document, if ``max_seqlen_q`` is as long as that.
        is_causal: Whether a query sees the keys up to its own position, counted from the first.
        softmax_scale: Of the logits.

    Returns:
        [B, Nq, Hq, D].

    Raises:
        OptionError: A param that its field cannot take.
        InputError: Tensors that do not fit, a ``valid_kv_length`` that is no number of keys, ``full_attn_spans``,
            packed sequences (``cu_seqlens_q``), or ``is_causal`` beside another mask than padding.
    """
    remedy = "Choose another backend for this model."
    if params.get("full_attn_spans") is not None:
        expected = "a mask, which attn_mask can hold"
        raise InputError("full_attn_spans", expected=expected, got="spans of full attention", remedy=remedy)
    attn_mask, n_valid = params.get("attn_mask"), params.get("valid_kv_length")
    if params.get("cu_seqlens_q") is not None and (n_valid is None or n_valid != params.get("max_seqlen_q")):
        expected = "one document, max_seqlen_q as long as valid_kv_length"
        raise InputError("cu_seqlens_q", expected=expected, got="packed sequences", remedy=remedy)
    if n_valid is not None:
        n_keys = as_integer(n_valid, least=1, most=key.shape[1])
        if n_keys is None:
            expected = f"a number of keys, 1 to {key.shape[1]}"
            raise InputError(
                "valid_kv_length", expected=expected, got=shown(n_valid), remedy="Pass None without padding."
            )
        if attn_mask is not None and attn_mask.shape[-1] == key.shape[1]:
            attn_mask = attn_mask[..., :n_keys]
        key, value = key[:, :n_keys], value[:, :n_keys]
    given = tuple((name, params[name]) for name in FIELDS if params.get(name) is not None)
    heads_first = [x.transpose(1, 2) for x in (query, key, value)]
    mask = _mask(attn_mask, key, is_causal)
    output = attention(*heads_first, **mask, scale=softmax_scale, config=_config_of(given))
    assert isinstance(output, Tensor)
    return output.transpose(1, 2)


attn_fn.capabilities = {"supports_attention_mask": True}  # pyright: ignore[reportFunctionMemberAccess]


def _mask(attn_mask: Tensor | None, key: Tensor, is_causal: bool) -> dict[str, Any]:
    """The mask as arguments of `attention`."""
    causal = {"causal": is_causal, "causal_offset": 0 if is_causal else None}
    if attn_mask is None:
        return causal
    if attn_mask.shape == key.shape[:2]:  # padding, of any dtype: the server adds it to sequences that it cuts
        return {**causal, "key_mask": attn_mask.bool()}
    if is_causal:
        raise InputError(
            "attn_mask",
            expected=f"padding {tuple(key.shape[:2])} beside is_causal",
            got=f"a mask {tuple(attn_mask.shape)}",
            remedy="Write the causal mask into it, as SDPA wants it, too.",
        )
    return {"attn_mask": attn_mask}


def _config_of(given: tuple[tuple[str, Any], ...]) -> S2OConfig:
    """The configuration of these fields; a list of a JSON file is a tuple."""
    given = tuple((name, tuple(value) if isinstance(value, list) else value) for name, value in given)
    try:
        hash(given)
    except TypeError:  # no field takes such a value: its error is not kept
        return _config.__wrapped__(given)
    return _config(given)


@cache
def _config(given: tuple[tuple[str, Any], ...]) -> S2OConfig:
    config, fields = config_from_environment(), dict(given)
    if {"tau", "error"} & fields.keys():  # either one takes the place of whatever the environment says
        fields = {"tau": None, "error": None, "site_tau": {}, **fields}
    return dataclasses.replace(config, **fields)
