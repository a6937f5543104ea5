"""The frontend for ``torch.nn.functional.scaled_dot_product_attention``, however it is spelt in the graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._C._functorch import is_batchedtensor  # pyright: ignore[reportMissingImports]
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from s2o_compile.kernels.validation import DTYPES, MAX_HEAD_DIM
from s2o_compile.passes import repeat_kv
from s2o_compile.passes.graph_values import Size, known, value_of
from s2o_compile.passes.mask_prover import MaskProof, MaskProver
from s2o_compile.passes.site import AttentionSite, Rejected, module_path

_SDPA = torch._C._nn.scaled_dot_product_attention  # pyright: ignore[reportAttributeAccessIssue]
_TARGETS = frozenset(
    (
        _SDPA,
        torch.ops.aten.scaled_dot_product_attention,
        torch.ops.aten.scaled_dot_product_attention.default,
    )
)
_POSITIONAL = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
_DEFAULTS = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None, "enable_gqa": False}


def is_attention(node: fx.Node) -> bool:
    """Whether a node calls SDPA."""
    return node.op == "call_function" and node.target in _TARGETS


def operands(node: fx.Node) -> dict[str, Any]:
    """The arguments of an SDPA call by name, defaults filled in."""
    return {**_DEFAULTS, **dict(zip(_POSITIONAL, node.args, strict=False)), **node.kwargs}


def match(node: fx.Node, prover: MaskProver) -> AttentionSite | Rejected:
    """The attention of an SDPA call, or why it must stay dense.

    Args:
        node: A node for which `is_attention` holds.
        prover: The mask prover of the graph.
    """
    call = operands(node)
    query, key, value = call["query"], call["key"], call["value"]
    rejected = _check_call(node, call)
    if rejected is None:  # not `or`: a rejection is false
        rejected = _check_tensors(value_of(query), value_of(key), value_of(value), call)
    if rejected is not None:
        return rejected
    mask = _mask(call, value_of(query).shape[-2], value_of(key).shape[-2], prover)
    if isinstance(mask, Rejected):
        return mask
    keys, values = (repeat_kv.unwrap(operand, node, prover) for operand in (key, value))
    if known(value_of(keys).shape[1] == value_of(values).shape[1]):
        key, value = keys, values
    return AttentionSite(
        name=module_path(node), node=node, query=query, key=key, value=value, mask=mask, scale=call["scale"]
    )


def _check_call(node: fx.Node, call: dict[str, Any]) -> Rejected | None:
    if torch.nn.functional.scaled_dot_product_attention is not _SDPA:
        return Rejected(
            "scaled_dot_product_attention is replaced, as context parallelism does; it keeps its own attention"
        )
    output = value_of(node)
    if isinstance(output, torch.Tensor) and output.requires_grad:
        return Rejected("gradients are wanted and the sparse operator has none: call the model under torch.no_grad()")
    query = value_of(call["query"])
    if isinstance(output, torch.Tensor) and isinstance(query, torch.Tensor) and output.dtype != query.dtype:
        return Rejected(
            "autocast turns its %s query into %s; convert the model to %s instead",
            query.dtype,
            output.dtype,
            output.dtype,
        )
    dropout = call["dropout_p"]
    if not isinstance(dropout, int | float) or dropout != 0:
        return Rejected("dropout_p is %s, expected 0: call model.eval()", dropout)
    if not isinstance(call["is_causal"], bool):
        return Rejected("is_causal is %s, which is not known at compile time", call["is_causal"])
    scale = value_of(call["scale"])
    if scale is not None and not isinstance(scale, int | float | torch.SymFloat):
        return Rejected("scale is %s, expected a number", call["scale"])
    return None


def _check_tensors(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: dict[str, Any]
) -> Rejected | None:
    tensors = (query, key, value)
    if not all(isinstance(tensor, torch.Tensor) for tensor in tensors):
        return Rejected("the shapes of query, key and value are not recorded in the graph")
    if any(is_traceable_wrapper_subclass(tensor) for tensor in tensors):
        return Rejected("query, key or value is a %s, expected plain tensors", type(query).__name__)
    if any(is_batchedtensor(tensor) for tensor in tensors):
        return Rejected("it is under torch.vmap, which the sparse operator does not know")
    if any(tensor.ndim != 4 for tensor in tensors):
        ranks = ", ".join(str(tensor.ndim) for tensor in tensors)
        return Rejected("query, key and value have ranks %s, expected 4: [B, H, N, D]", ranks)
    if query.dtype not in DTYPES or any(tensor.dtype != query.dtype for tensor in tensors):
        return Rejected("dtype %s is not one of float16, bfloat16, float32 for all operands", query.dtype)
    if any(tensor.device != query.device for tensor in tensors):
        return Rejected("query, key and value are on different devices")
    if not known(key.shape[-1] == query.shape[-1]) or not known(value.shape[-1] == query.shape[-1]):
        return Rejected(
            "head dims of query, key and value are %s, %s and %s, expected one",
            *(tensor.shape[-1] for tensor in tensors),
        )
    if not known(query.shape[-1] <= MAX_HEAD_DIM):
        return Rejected("head dim is %s, expected a constant of at most %s", query.shape[-1], MAX_HEAD_DIM)
    # Sizes that only *may* differ need no proof: where they do, SDPA fails, and so does the operator.
    if any(known(tensor.shape[0] != query.shape[0]) for tensor in tensors):
        return Rejected("query, key and value have different batch sizes")
    if any(known(a != b) for a, b in zip(key.shape[1:3], value.shape[1:3], strict=True)):
        return Rejected("key and value differ in shape: %s and %s", tuple(key.shape), tuple(value.shape))
    heads, key_heads = query.shape[1], key.shape[1]
    if not isinstance(heads, int) or not isinstance(key_heads, int):
        return Rejected("head counts are %s and %s, expected constants", heads, key_heads)
    if heads % key_heads:
        return Rejected("%s query heads are no multiple of %s key heads", heads, key_heads)
    if key_heads not in (1, heads) and call["enable_gqa"] is not True:
        return Rejected("%s key heads serve %s query heads without enable_gqa", key_heads, heads)
    if known(query.shape[-2] == 1):
        return Rejected("one query token: decode stays dense")
    return None


def _mask(call: dict[str, Any], query_len: Size, key_len: Size, prover: MaskProver) -> MaskProof | Rejected:
    mask = call["attn_mask"]
    if mask is None:
        return prover.top_left_causal(query_len, key_len) if call["is_causal"] else MaskProof()
    if call["is_causal"]:
        return Rejected("both attn_mask and is_causal are set")
    if not isinstance(mask, fx.Node):
        return Rejected("attn_mask is not a node of the graph")
    proof = prover.prove(mask, query_len, key_len)
    dtype, expected = value_of(mask).dtype, value_of(call["query"]).dtype
    if not isinstance(proof, Rejected) and proof.blind == "mean" and dtype != expected:
        return Rejected("attn_mask is %s, expected %s as the query: rows without any key may differ", dtype, expected)
    return proof
