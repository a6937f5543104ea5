"""The frontend for ``torch.nn.functional.scaled_dot_product_attention``, in every form that graphs hold."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from s2o_compile.kernels.support.torch_compat import scaled_dot_product_attention
from s2o_compile.passes.frontends import repeat_kv
from s2o_compile.passes.frontends.checks import check_sequence, check_tensors
from s2o_compile.passes.frontends.head_layout import broadcast, to_heads
from s2o_compile.passes.graph.nodes import Size, known, value_of
from s2o_compile.passes.graph.operand import Operand, Step
from s2o_compile.passes.graph.rejected import Refused, Rejected, attempt
from s2o_compile.passes.masks.proof import MaskProof
from s2o_compile.passes.masks.prover import MaskProver
from s2o_compile.passes.site import AttentionSite

_ATEN = torch.ops.aten.scaled_dot_product_attention
_TARGETS = frozenset((scaled_dot_product_attention, _ATEN, _ATEN.default))
_POSITIONAL = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
_DEFAULTS = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None, "enable_gqa": False}


def is_attention(node: fx.Node) -> bool:
    """Whether a node calls SDPA."""
    return node.op == "call_function" and node.target in _TARGETS


def operands(node: fx.Node) -> dict[str, Any]:
    """The arguments of an SDPA call by name, defaults filled in."""
    return {**_DEFAULTS, **dict(zip(_POSITIONAL, node.args, strict=False)), **node.kwargs}


def match(node: fx.Node, prover: MaskProver) -> AttentionSite | Rejected:
    """The attention of an SDPA call (`is_attention` holds), or why it must stay dense."""
    return attempt(_site, node, prover)


def _site(node: fx.Node, prover: MaskProver) -> AttentionSite:
    call = operands(node)
    query, key, value = (Operand(call[name]) for name in _POSITIONAL[:3])
    restore: tuple[Step, ...] = ()
    ranks = {getattr(operand.value, "ndim", 0) for operand in (query, key, value)}
    if ranks == {4}:
        query, key, value = broadcast(query, key, value)
    elif ranks in ({3}, {5}) and call["attn_mask"] is None and call["enable_gqa"] is False:
        scores = (*query.value.shape[:-1], key.value.shape[-2])
        query, key, value, restore = to_heads(query, key, value, None, scores, scores)
    _check_call(call)
    check_tensors(query.value, key.value, value.value, node)
    for operand in (query, key, value):
        prover.mutations.check_shape(operand.node)
    heads, key_heads = value_of(call["query"]).shape[1], value_of(call["key"]).shape[1]
    if not restore and key_heads not in (1, heads) and call["enable_gqa"] is not True:
        raise Refused("%s key heads serve %s query heads without enable_gqa", key_heads, heads)
    mask = _mask(call, query.value.shape[-2], key.value.shape[-2], prover)
    key, value = repeat_kv.unwrapped(key, value, node, prover)
    return AttentionSite(
        node=node,
        query=query,
        key=key,
        value=value,
        mask=mask,
        scale=call["scale"],
        restore=restore,
    )


def _check_call(call: dict[str, Any]) -> None:
    if torch.nn.functional.scaled_dot_product_attention is not scaled_dot_product_attention:
        check_sequence()
        raise Refused("scaled_dot_product_attention is replaced by another function, which keeps its own attention")
    dropout = call["dropout_p"]
    if not isinstance(dropout, int | float) or dropout != 0:
        raise Refused("dropout_p is %s, expected 0: call model.eval()", dropout)
    if not isinstance(call["is_causal"], bool):
        raise Refused("is_causal is %s, which is not known at compile time", call["is_causal"])
    scale = value_of(call["scale"])
    if scale is not None and not isinstance(scale, int | float | torch.SymFloat):
        raise Refused("scale is %s, expected a number", call["scale"])


def _mask(call: dict[str, Any], query_len: Size, key_len: Size, prover: MaskProver) -> MaskProof:
    mask = call["attn_mask"]
    if mask is None:
        if not call["is_causal"]:
            return MaskProof()
        return MaskProof(causal=True, offset=None if known(query_len == key_len) else 0)  # aligned to the top left
    if call["is_causal"]:
        raise Refused("both attn_mask and is_causal are set")
    if not isinstance(mask, fx.Node):
        raise Refused("attn_mask is not a node of the graph")
    proof = prover.proof(mask, query_len, key_len)
    dtype, expected = value_of(mask).dtype, value_of(call["query"]).dtype
    if proof.fully_masked == "mean" and dtype != expected:
        raise Refused("attn_mask is %s, expected %s as the query: rows without any key may differ", dtype, expected)
    return proof
