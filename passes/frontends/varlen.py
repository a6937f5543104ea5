"""The frontend for attention over packed sequences that are given by their bounds.

    flash_attn_varlen_func(q [T, Hq, D], k [Tk, Hkv, D], v, cu_seqlens_q, cu_seqlens_k, ..., causal=..., window_size=)
    torch.nn.attention.varlen.varlen_attn(query, key, value, cu_seq_q, cu_seq_k, ..., window_size=...)

Document d holds the tokens ``cu_seqlens[d]`` to ``cu_seqlens[d + 1]``, and its last query is aligned with its last key.
The bounds are operands, so the mask is proven whatever they hold. flash-attn's function is known by the module that it
stands in, its operator and torch's by their names.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import fx

from s2o_compile.kernels.support.torch_compat import VARLEN_OPERATOR, OpOverload, OpOverloadPacket
from s2o_compile.passes.frontends.checks import check_tensors, fixed
from s2o_compile.passes.graph.calls import is_varlen_function, schemas_of
from s2o_compile.passes.graph.nodes import known, value_of
from s2o_compile.passes.graph.operand import Operand, Step
from s2o_compile.passes.graph.rejected import Refused, Rejected, attempt
from s2o_compile.passes.masks.proof import DocumentBounds, MaskProof, PackedDocuments
from s2o_compile.passes.masks.prover import MaskProver
from s2o_compile.passes.site import AttentionSite

OPERATORS = (VARLEN_OPERATOR, "flash_attn::_flash_attn_varlen_forward")

_NAMES = {
    "q": "query",
    "k": "key",
    "v": "value",
    "cu_seqlens_q": "cu_seq_q",
    "cu_seqlens_k": "cu_seq_k",
    "causal": "is_causal",
    "softmax_scale": "scale",
}
"""flash-attn's names of torch's arguments."""
_READ = ("query", "key", "value", "cu_seq_q", "cu_seq_k", "is_causal", "scale", "softcap")
_WINDOWS = ("window_size", "window_size_left", "window_size_right")
# How a kernel goes about it. Lengths are in the bounds, and groups of heads in the shapes.
_FREE = frozenset(
    {
        *("max_q", "max_k", "max_seqlen_q", "max_seqlen_k", "enable_gqa", "deterministic", "zero_tensors"),
        *("num_splits", "pack_gqa", "sm_margin"),
    }
)


def is_attention(node: fx.Node) -> bool:
    """Whether a node calls one of the functions."""
    if node.op != "call_function":
        return False
    target = node.target
    if isinstance(target, OpOverload | OpOverloadPacket):
        return any(schema.name in OPERATORS for schema in schemas_of(target))
    return is_varlen_function(target)


def operands(node: fx.Node) -> dict[str, Any]:
    """The arguments of a call by torch's names, as far as they are given."""
    given = dict(zip(_parameters(node), node.args, strict=False)) | dict(node.kwargs)
    return {_NAMES.get(name, name): argument for name, argument in given.items()}


def match(node: fx.Node, prover: MaskProver) -> AttentionSite | Rejected:
    """The attention of a call, or why it must stay as it is."""
    return attempt(_site, node, prover)


def _parameters(node: fx.Node) -> dict[str, Any]:
    """The parameters of a function in their order, with their defaults; None for none."""
    target: Any = node.target
    if is_varlen_function(target):
        parameters = inspect.signature(target).parameters.values()
        return {it.name: None if it.default is it.empty else it.default for it in parameters}
    (schema,) = schemas_of(target)
    return {argument.name: argument.default_value for argument in schema.arguments}


def _site(node: fx.Node, prover: MaskProver) -> AttentionSite:
    defaults = {_NAMES.get(name, name): default for name, default in _parameters(node).items()}
    call = operands(node)
    for name, argument in call.items():
        free = name in _FREE or name in _READ or name in _WINDOWS
        if not free and argument not in (None, 0, defaults.get(name)):  # False is 0
            raise Refused("%s=%s is an argument that the sparse operator does not have", name, argument)
    call = {**defaults, **call}
    if not isinstance(call["is_causal"], bool) or isinstance(value_of(call["scale"]), torch.Tensor):
        raise Refused("causal=%s and scale=%s, expected numbers", call["is_causal"], call["scale"])
    softcap = fixed(call.get("softcap"), node) or None
    if not isinstance(softcap, float | int | None):
        raise Refused("softcap is %s, expected a number", softcap)
    bounds = [_bounds(call[name], prover) for name in ("cu_seq_q", "cu_seq_k")]
    operands_ = [_heads(call[name], name, prover) for name in ("query", "key", "value")]
    query, key, value = operands_
    check_tensors(query.value, key.value, value.value, node)
    output, rest = _output(node)
    restore: tuple[Step, ...] = ((torch.transpose, (1, 2)), (torch.select, (0, 0)))
    interior = () if output is node else (node, *rest)
    mask = _mask(call, PackedDocuments(*bounds, bottom_right=True))
    return AttentionSite(
        node=output, query=query, key=key, value=value, mask=mask, scale=call["scale"], softcap=softcap,
        restore=restore, interior=interior,
    )  # fmt: skip


def _heads(node: object, name: str, prover: MaskProver) -> Operand:
    """[1, H, T, D] of a tensor [T, H, D]."""
    value = value_of(node)
    if not isinstance(node, fx.Node) or not isinstance(value, torch.Tensor) or value.ndim != 3:
        raise Refused("%s is %s, expected a tensor [tokens, heads, head_dim]", name, node)
    prover.mutations.check_shape(node)
    return Operand(node).then(torch.unsqueeze, 0).then(torch.transpose, 1, 2)


def _bounds(node: object, prover: MaskProver) -> DocumentBounds:
    value = value_of(node)
    integers = isinstance(value, torch.Tensor) and value.dtype in (torch.int32, torch.int64) and value.ndim == 1
    if not isinstance(node, fx.Node) or not integers or known(value.shape[0] < 2):
        raise Refused("the bounds of its sequences are %s, expected int32 of [sequences + 1]", node)
    if prover.indices.is_written(node):
        raise Refused("the bounds of its sequences %s are changed in place", node)
    return DocumentBounds(node)


def _mask(call: dict[str, Any], documents: PackedDocuments) -> MaskProof:
    """The mask of a call: flash-attn's window counts keys before and behind a query's own, -1 for all of them."""
    window = call.get("window_size")
    if "window_size_left" in call:
        window = call["window_size_left"], call["window_size_right"]
    left, right = (-1, -1) if window is None else window
    if not isinstance(left, int) or not isinstance(right, int):
        raise Refused("its window is %s, expected numbers", window)
    right = 0 if call["is_causal"] else right
    if right < 0 <= left:
        raise Refused("its window of %s keys before a query hides none behind it", left)
    if right < 0:
        return MaskProof(documents=documents)
    return MaskProof(
        causal=True,
        offset=right or None,
        window=left + right + 1 if left >= 0 else None,
        documents=documents,
        ahead=right,
    )


def _output(node: fx.Node) -> tuple[fx.Node, tuple[fx.Node, ...]]:
    """The node of the output, and those of the other results, which nobody may read."""
    if isinstance(value_of(node), torch.Tensor):
        return node, ()
    outputs = [user for user in node.users if user.args[1:] == (0,)]
    rest = tuple(user for user in node.users if user not in outputs)
    if len(outputs) != 1 or any(user.users for user in rest):
        raise Refused("more than the output of %s is read", node)
    return outputs[0], rest
