"""Checks of the operator's tensors: every message says expected, got, and what to do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import FunctionType
from typing import NamedTuple

import torch
from torch import Tensor

from s2o_compile.kernels.core.mask import FULLY_MASKED
from s2o_compile.kernels.core.shards import held_sequence
from s2o_compile.kernels.support.arguments import FLOAT32_MAX, as_integer, as_number, check_device, is_one_of, shown
from s2o_compile.kernels.support.errors import InputError

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_HEAD_DIM = 512
LEAST_SOFTCAP = torch.finfo(torch.float32).tiny
"""Smallest softcap: float32 can divide by no smaller one."""


class CallNumbers(NamedTuple):
    """Arguments of a call that are neither tensors nor names, as the operator's schema takes them."""

    causal_offset: int | None
    window: int | None
    attention_chunk: int | None
    scale: float | None
    softcap: float | None
    dense_heads: Sequence[int]


def check_numbers(
    *, causal: bool, causal_offset: int | None = None, window: int | None = None, attention_chunk: int | None = None,
    scale: float | None = None, softcap: float | None = None, dense_heads: Sequence[int] = (), return_lse: bool = False,
) -> CallNumbers:  # fmt: skip
    """Numbers of a library as Python's; InputError unless they are numbers that the operator can take.

    While torch.compile traces, no number is looked at: a comparison would become a guard, and the operator's schema
    refuses other types.
    """
    for name, flag in (("causal", causal), ("return_lse", return_lse)):
        if not isinstance(flag, (bool, torch.SymBool)):
            raise InputError(name, expected="True or False", got=shown(flag), remedy="Give one of them.")
    if torch.compiler.is_compiling():
        return CallNumbers(causal_offset, window, attention_chunk, scale, softcap, dense_heads)
    return CallNumbers(
        _integer("causal_offset", causal_offset),
        _integer("window", window),
        _integer("attention_chunk", attention_chunk),
        _number("scale", scale),
        _number("softcap", softcap),
        _heads(dense_heads) if not isinstance(dense_heads, tuple) or dense_heads else (),
    )


def _integer(name: str, value: int | None) -> int | None:
    if value is None or isinstance(value, torch.SymInt):
        return value
    integer = as_integer(value)
    if integer is None:
        expected = "an integer between -2**63 and 2**63, or None"
        remedy = "Give a number of tokens; read one out of a tensor with .item()."
        raise InputError(name, expected=expected, got=shown(value), remedy=remedy)
    return integer


def _number(name: str, value: float | None) -> float | None:
    if value is None or isinstance(value, (torch.SymFloat, torch.SymInt)):
        return value
    number = as_number(value, least=-FLOAT32_MAX)
    if number is None:
        expected = "a finite number that float32 can hold, or None"
        remedy = "Leave it None for the default; read one out of a tensor with .item()."
        raise InputError(name, expected=expected, got=shown(value), remedy=remedy)
    return number


def _heads(value: Sequence[int]) -> list[int]:
    is_sequence = isinstance(value, (Sequence, set, frozenset)) and not isinstance(value, (str, bytes, bytearray))
    heads = [head for head in map(as_integer, value) if head is not None] if is_sequence else []
    if not is_sequence or len(heads) < len(value):
        expected = "a sequence of key/value heads, integers >= 0"
        raise InputError("dense_heads", expected=expected, got=shown(value), remedy="Write dense_heads=(0, 2).")
    return heads


OPTIONAL = ("key_mask", "attn_mask", "sinks", "out")
"""Tensors that a caller may leave out."""


def check_kinds(**values: object) -> None:
    """Raise InputError unless these are tensors of one shape each; one of OPTIONAL may be None."""
    for name, x in values.items():
        if x is None and name in OPTIONAL:
            continue
        if not isinstance(x, Tensor):
            got = f"{type(x).__module__}.{type(x).__qualname__}"
            raise InputError(name, expected="a torch.Tensor", got=got, remedy="Convert it with torch.as_tensor.")
        if x.is_nested:
            remedy = "Pad it with .to_padded_tensor(0.0), and say by key_mask which keys are real."
            raise InputError(name, expected="a tensor of one length", got="a nested tensor", remedy=remedy)


def check_whole() -> None:
    """Raise InputError where a rank holds a shard of the keys, and a call needs all of them.

    That is so inside torch's ``context_parallel``, and inside ours for calls that do not look for the other shards.
    """
    if in_torch_context_parallel():
        raise InputError(
            "context_parallel",
            expected="all keys of the sequence on this rank",
            got="a call inside torch's context_parallel, where each rank holds a shard of them",
            remedy="Use s2o_compile.distributed.context_parallel, which gathers them, or attend outside of the block, "
            'or by SDPA (in transformers attn_implementation="sdpa"), which torch runs densely in a ring.',
        )
    # Dynamo cannot trace the state of a context; `rewriting.rewrite` sees to the graphs that are captured here.
    if not torch.compiler.is_compiling() and held_sequence() is not None:
        raise InputError(
            "context parallel",
            expected="a proven mask, no gradients and no plan: a call of s2o::attention or s2o::packed_attention",
            got="another call on a shard of the sequence (or over pages), which needs all keys",
            remedy="Attend outside of the block, or on one rank.",
        )


def in_torch_context_parallel() -> bool:
    """Whether torch's ``context_parallel`` is open: it puts another function in the place of SDPA."""
    replaced = torch.nn.functional.scaled_dot_product_attention
    return isinstance(replaced, FunctionType) and replaced.__module__.startswith("torch.distributed.")


def check_arguments(
    query: Tensor, key: Tensor, key_mask: Tensor | None, sinks: Tensor | None, *, causal: bool, window: int | None,
    attention_chunk: int | None, softcap: float | None, fully_masked: str, dense_heads: Sequence[int],
) -> None:  # fmt: skip
    """Raise InputError unless the operator can take these arguments beside tensors that `check_tensors` accepts."""
    batch, n_keys = key.shape[0], key.shape[2]
    for name, length in (("window", window), ("attention_chunk", attention_chunk)):
        if length is not None and (not causal or length < 1):
            raise InputError(
                name,
                expected="at least 1, together with causal=True",
                got=f"{name}={length}, causal={causal}",
                remedy=f"Pass causal=True, or drop {name}.",
            )
    if key_mask is not None:
        if key_mask.dtype != torch.bool or tuple(key_mask.shape) not in ((batch, n_keys), (1, n_keys)):
            raise InputError(
                "key_mask",
                expected=f"bool of shape ({batch}, {n_keys}) or (1, {n_keys}), True for a key to attend",
                got=f"{key_mask.dtype} of shape {tuple(key_mask.shape)}",
                remedy="Pass the padding mask as [batch, keys]; causal and window terms have arguments of their own.",
            )
        check_device("key_mask", key_mask, query)
    if sinks is not None:
        check_sinks(sinks, query)
    if softcap is not None and as_number(softcap, least=LEAST_SOFTCAP) is None:
        raise InputError(
            "softcap",
            expected="a positive finite number that float32 can hold, or None",
            got=shown(softcap),
            remedy="Leave it None for logits without a bound.",
        )
    if not is_one_of(fully_masked, FULLY_MASKED):
        raise InputError(
            "fully_masked",
            expected=f"one of {', '.join(map(repr, FULLY_MASKED))}",
            got=shown(fully_masked),
            remedy='Use "mean" for what a finite additive mask gives a query that sees no key.',
        )
    if any(not 0 <= head < key.shape[1] for head in dense_heads):
        raise InputError(
            "dense_heads",
            expected=f"key/value heads from 0 to {key.shape[1] - 1}",
            got=list(dense_heads),
            remedy="Mark a group of query heads by the key/value head that it shares.",
        )


def check_like(name: str, x: Tensor, query: Tensor, remedy: str) -> None:
    """Raise InputError unless a tensor has the query's dtype, which is one of DTYPES, and is where the query is."""
    if x.dtype != query.dtype or x.dtype not in DTYPES:
        expected = "one of float16, bfloat16, float32, the same for query, key and value"
        raise InputError(
            f"dtype of {name}", expected=expected, got=f"{x.dtype} beside a {query.dtype} query", remedy=remedy
        )
    check_device(name, x, query)


def check_groups(heads: int, kv_heads: int) -> None:
    """Raise InputError unless query heads share key/value heads in groups of one size."""
    if not heads or not kv_heads or heads % kv_heads:
        expected = f"query heads divisible by the {kv_heads} key/value heads"
        remedy = "Give groups of query heads of one size, each sharing one key/value head."
        raise InputError("number of heads", expected=expected, got=heads, remedy=remedy)


def sizes_of(query: Tensor, key: Tensor, value: Tensor) -> tuple[int, int, int, int, int, int, int] | None:
    """B, Hq, Hkv, Nq, Nk, D and Dv of tensors that the operator can run on; None for others: `check_tensors` says why.

    Every attribute is read once: a short call cannot afford more.
    """
    query_shape, key_shape, value_shape = query.shape, key.shape, value.shape
    if not len(query_shape) == len(key_shape) == len(value_shape) == 4:
        return None
    batch, heads, n_queries, head_dim = query_shape
    key_batch, kv_heads, n_keys, key_dim = key_shape
    value_batch, value_heads, n_values, value_dim = value_shape
    accepted = (
        batch == key_batch == value_batch
        and kv_heads == value_heads
        and n_keys == n_values
        and head_dim == key_dim
        and batch * heads * n_queries * kv_heads * n_keys > 0
        and heads % kv_heads == 0
        and 0 < head_dim <= MAX_HEAD_DIM
        and 0 < value_dim <= MAX_HEAD_DIM
        and query.dtype is key.dtype is value.dtype
        and query.dtype in DTYPES
        and query.device == key.device == value.device
    )
    return (batch, heads, kv_heads, n_queries, n_keys, head_dim, value_dim) if accepted else None


def check_tensors(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Raise InputError, by the first reason, unless the operator can run on these tensors."""
    if sizes_of(query, key, value) is not None:
        return
    tensors = {"query": query, "key": key, "value": value}
    for name, x in tensors.items():
        if x.dim() != 4:
            raise InputError(
                f"rank of {name}",
                expected="4 dimensions [batch, heads, length, head_dim]",
                got=f"{x.dim()} of shape {tuple(x.shape)}",
                remedy="Add the missing dimension with unsqueeze, or transpose to this order.",
            )
        if x.numel() == 0:
            raise InputError(
                f"size of {name}",
                expected="at least one element",
                got=f"shape {tuple(x.shape)}",
                remedy="Skip attention for empty inputs.",
            )
    for name, x in tensors.items():
        check_like(name, x, query, "Convert the inputs with .to(dtype).")
    batch, heads, _, head_dim = query.shape
    if key.shape[:3] != value.shape[:3]:
        raise InputError(
            "shape of value",
            expected=f"{tuple(key.shape[:3])} and a head_dim of its own, for a key of shape {tuple(key.shape)}",
            got=tuple(value.shape),
            remedy="Give one value for each key; only its head_dim may differ.",
        )
    if key.shape[0] != batch or key.shape[3] != head_dim:
        raise InputError(
            "shape of key",
            expected=f"[{batch}, kv_heads, keys, {head_dim}] for a query of shape {tuple(query.shape)}",
            got=tuple(key.shape),
            remedy="Make batch and head_dim of query and key equal.",
        )
    check_groups(heads, key.shape[1])
    for name, x in (("query", query), ("value", value)):
        if x.shape[3] > MAX_HEAD_DIM:
            expected = f"at most {MAX_HEAD_DIM}"
            raise InputError(f"head_dim of {name}", expected=expected, got=x.shape[3], remedy="Call dense attention.")


def check_no_lse(return_lse: bool) -> None:
    """Raise InputError if a call that runs densely for others, and returns no log-sum-exp, is asked for one."""
    if return_lse:
        raise InputError(
            "return_lse",
            expected="no gradients, no tangents and no export to ONNX",
            got="inputs that require grad, forward-mode derivatives, or torch.onnx.export",
            remedy="Use torch.no_grad(), or leave return_lse out.",
        )


def check_sinks(sinks: Tensor, query: Tensor) -> None:
    """Raise InputError unless these are the sinks of the query's heads [..., Hq, Nq, D]."""
    heads = query.shape[-3]
    if not sinks.is_floating_point() or tuple(sinks.shape) != (heads,):
        raise InputError(
            "sinks",
            expected=f"floating of shape ({heads},), one logit for each query head",
            got=f"{sinks.dtype} of shape {tuple(sinks.shape)}",
            remedy="Flatten them, or drop the dimensions of batch and length.",
        )
    check_device("sinks", sinks, query)


def check_attn_mask(attn_mask: Tensor, query: Tensor, key: Tensor) -> None:
    """Raise InputError unless this is a mask that SDPA takes, for [B, Hq, Nq, D] and [B, Hkv, Nk, D]."""
    wanted = (*query.shape[:3], key.shape[2])
    shape = (1,) * (4 - attn_mask.dim()) + tuple(attn_mask.shape)
    if not 2 <= attn_mask.dim() <= 4 or any(a not in (1, b) for a, b in zip(shape, wanted, strict=True)):
        raise InputError(
            "shape of attn_mask",
            expected=f"2 to 4 dimensions that broadcast to {wanted}, [batch, heads, queries, keys]",
            got=tuple(attn_mask.shape),
            remedy="Pass padding [batch, keys] as key_mask, or as attn_mask[:, None, None, :].",
        )
    if attn_mask.dtype not in (torch.bool, query.dtype, torch.float32):
        raise InputError(
            "dtype of attn_mask",
            expected=f"bool (True for a key to attend), or {query.dtype} as the query",
            got=attn_mask.dtype,
            remedy="Compare a mask of numbers with 0, or convert it with .to(query.dtype).",
        )
    check_device("attn_mask", attn_mask, query)


def check_fill(fill: float | None, attn_mask: Tensor) -> None:
    """Raise InputError unless this is None, or a finite number that fills the scores which a bool mask hides."""
    if fill is not None and (attn_mask.dtype is not torch.bool or not math.isfinite(fill)):
        raise InputError(
            "fill",
            expected="a finite number beside a bool mask",
            got=f"{fill} beside a mask of {attn_mask.dtype}",
            remedy="Leave it out: scores are hidden by -inf, or by the numbers of the mask.",
        )


def check_documents(documents: Tensor, key_documents: Tensor | None, query: Tensor, key: Tensor) -> None:
    """Raise InputError unless these are the documents of [B, Hq, Nq, D] and [B, Hkv, Nk, D]."""
    both = (("documents", documents, query), ("key_documents", key_documents, key))
    for name, ids, of in both:
        if ids is None:
            continue
        batch, length = query.shape[0], of.shape[2]
        if ids.is_floating_point() or ids.is_complex() or tuple(ids.shape) not in ((batch, length), (1, length)):
            raise InputError(
                name,
                expected=f"integers of shape ({batch}, {length}) or (1, {length}), equal inside of a document",
                got=f"{ids.dtype} of shape {tuple(ids.shape)}",
                remedy="Number the documents of each row; cumsum(position_ids == 0) does.",
            )
        check_device(name, ids, query)
    if key_documents is None and query.shape[2] != key.shape[2]:
        raise InputError(
            "key_documents",
            expected=f"the documents of {key.shape[2]} keys beside {query.shape[2]} queries",
            got=None,
            remedy="Leave them out in self-attention alone.",
        )
