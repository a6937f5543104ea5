"""Conditions that every attention must meet before its mask is proven, in whatever form it is written."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import fx

from s2o_compile.kernels.core.validation import DTYPES, MAX_HEAD_DIM, in_torch_context_parallel
from s2o_compile.kernels.support.dtensors import is_dtensor, is_sharded_inside
from s2o_compile.kernels.support.torch_compat import (
    free_unbacked_symbols,
    is_transformed,
    is_wrapper,
    make_dual_functions,
    tree_leaves,
)
from s2o_compile.passes.graph.nodes import known, value_of
from s2o_compile.passes.graph.rejected import Refused

T = TypeVar("T")


def check_derivatives(node: fx.Node) -> None:
    """Raises `Refused` if derivatives of a node's value are wanted: the operator has none."""
    if any(isinstance(x, torch.Tensor) and x.requires_grad for x in tree_leaves(value_of(node))):
        raise Refused("gradients are wanted and the sparse operator has none: call the model under torch.no_grad()")
    check_tangents(node)


def check_tangents(node: fx.Node) -> None:
    """Raises `Refused` if anything in a node's graph is differentiated in forward mode."""
    if any(node.graph.find_nodes(op="call_function", target=function) for function in make_dual_functions):
        raise Refused("its graph takes derivatives in forward mode, which the sparse operator does not have")


def check_sequence(*tensors: object) -> None:
    """Raises `Refused` if ranks hold shards of the sequence, as inside of torch's ``context_parallel``."""
    if in_torch_context_parallel() or (tensors and all(map(is_dtensor, tensors)) and is_sharded_inside(*tensors)):
        raise Refused(
            "its sequence is in shards, as in torch's context_parallel, which runs its own dense attention in a ring: "
            "s2o_compile.distributed.context_parallel is sparse"
        )


def check_untransformed(*tensors: Any) -> None:  # noqa: ANN401 (fake tensors)
    """Raises `Refused` if a transform of ``torch.func`` hides dimensions of tensors."""
    if any(map(is_transformed, tensors)):
        raise Refused("it is under a transform such as torch.vmap or torch.func.jvp, where attention stays dense")


def check_tensors(query: Any, key: Any, value: Any, node: fx.Node) -> None:  # noqa: ANN401 (fake tensors)
    """Raises `Refused` if the operator cannot compute an attention, the value of a node, over these operands.

    Their fake values are [B, Hq, Nq, D], [B, Hkv, Nk, D] and [B, Hkv, Nk, Dv].
    """
    output = value_of(node)
    dtypes = {operand.dtype for operand in (query, key, value) if isinstance(operand, torch.Tensor)}
    if isinstance(output, torch.Tensor) and len(dtypes) == 1 and output.dtype not in dtypes:
        raise Refused(
            "autocast turns its %s query into %s; convert the model to %s instead",
            query.dtype,
            output.dtype,
            output.dtype,
        )
    tensors = (query, key, value)
    if not all(isinstance(tensor, torch.Tensor) for tensor in tensors):
        raise Refused("the shapes of query, key and value are not recorded in the graph")
    check_sequence(*tensors)
    if not all(map(is_dtensor, tensors)) and any(is_wrapper(tensor) for tensor in tensors):
        raise Refused("query, key or value is a %s, expected plain tensors", type(query).__name__)
    check_untransformed(*tensors)
    if any(tensor.ndim != 4 for tensor in tensors):
        ranks = ", ".join(str(tensor.ndim) for tensor in tensors)
        raise Refused("query, key and value have ranks %s, expected 4: [B, H, N, D]", ranks)
    if any(known(size == 0) for tensor in tensors for size in tensor.shape):
        raise Refused("its query, key or value holds no element")
    if query.dtype not in DTYPES or len(dtypes) > 1:
        got = ", ".join(str(tensor.dtype) for tensor in tensors)
        raise Refused("query, key and value are %s, expected one of float16, bfloat16, float32 for all", got)
    if any(tensor.device != query.device for tensor in tensors):
        raise Refused("query, key and value are on different devices")
    if not known(key.shape[-1] == query.shape[-1]):
        raise Refused("head dims of query and key are %s and %s, expected one", query.shape[-1], key.shape[-1])
    for name, tensor in (("head dim", query), ("head dim of the values", value)):
        if not _ensured(tensor.shape[-1] <= MAX_HEAD_DIM, node):
            remedy = ": give its dimension a maximum" if _is_exported(node) else ""
            raise Refused("%s is %s, expected at most %s%s", name, tensor.shape[-1], MAX_HEAD_DIM, remedy)
    # Sizes that only *may* differ need no proof: if they do differ, SDPA fails, and so does the operator.
    if any(known(tensor.shape[0] != query.shape[0]) for tensor in tensors):
        raise Refused("query, key and value have different batch sizes")
    if any(known(a != b) for a, b in zip(key.shape[1:3], value.shape[1:3], strict=True)):
        raise Refused("key and value differ in shape: %s and %s", tuple(key.shape), tuple(value.shape))
    heads, key_heads = query.shape[1], key.shape[1]
    if _is_exported(node) and not (isinstance(heads, int) and isinstance(key_heads, int)):
        raise Refused("head counts are %s and %s, expected constants in an exported program", heads, key_heads)
    if not _ensured(heads % key_heads == 0, node):
        raise Refused("%s query heads are no multiple of %s key heads", heads, key_heads)
    if known(query.shape[-2] == 1):
        raise Refused("one query token: decode stays dense")


def _ensured(condition: bool | torch.SymBool, node: fx.Node) -> bool:
    """Whether a condition on sizes that layers differ in holds; a guard of Dynamo's sees to it for the next layer.

    An exported program takes no more guards, and a size that data decide has no value: there it must be `known`.
    """
    if known(condition):
        return True
    if _is_exported(node) or (isinstance(condition, torch.SymBool) and free_unbacked_symbols(condition)):
        return False
    return bool(condition)


def fixed(number: T, node: fx.Node) -> T | float:
    """A number as a constant, also where Dynamo made a module's float an input of the graph: a guard sees to it."""
    value = value_of(number)
    enters = isinstance(value, torch.SymFloat) and not free_unbacked_symbols(value) and not _is_exported(node)
    return float(value) if enters else number


def _is_exported(node: fx.Node) -> bool:
    return "example_value" not in node.meta
