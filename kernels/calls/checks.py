"""What the operators over packed sequences and pages are given, checked once."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from s2o_compile.kernels.core.validation import MAX_HEAD_DIM, check_groups, check_like
from s2o_compile.kernels.support.errors import InputError


def check_packed(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Raise InputError unless these are packed sequences, [T, Hq, D], [Tk, Hkv, D] and [Tk, Hkv, Dv]; T may be 0."""
    _check_tokens(
        {"query": query, "key": key, "value": value}, {"query": 3, "key": 3, "value": 3}, "[tokens, heads, D]"
    )
    _check_heads(query, key.shape, value.shape, places=1)


def check_paged(query: Tensor, key_cache: Tensor, value_cache: Tensor) -> None:
    """Raise InputError unless these are packed queries [T, Hq, D] and caches [pages, page_len, Hkv, D or Dv]."""
    caches = {"query": query, "key cache": key_cache, "value cache": value_cache}
    ranks = {"query": 3, "key cache": 4, "value cache": 4}
    _check_tokens(caches, ranks, "[tokens, heads, D] of the query, [pages, page_len, kv_heads, D] of a cache")
    _check_heads(query, key_cache.shape, value_cache.shape, places=2)
    for name, cache in (("key cache", key_cache), ("value cache", value_cache)):
        if cache.stride(-1) != 1 or not cache.numel():
            raise InputError(
                name,
                expected="pages, with the numbers of a head side by side",
                got=f"shape {tuple(cache.shape)}, strides {cache.stride()}",
                remedy="Give the cache as it was allocated: it is read in place.",
            )


def _check_tokens(tensors: dict[str, Tensor], ranks: dict[str, int], form: str) -> None:
    query = tensors["query"]
    for name, x in tensors.items():
        if x.dim() != ranks[name]:
            expected, got = f"{ranks[name]} dimensions: {form}", f"{x.dim()} of shape {tuple(x.shape)}"
            remedy = "Join the sequences, without a dimension for the batch."
            raise InputError(f"rank of {name}", expected=expected, got=got, remedy=remedy)
        check_like(name, x, query, "Convert the query to the dtype of the cache. Caches of 8 bits are not read.")


def _check_heads(query: Tensor, key_shape: Sequence[int], value_shape: Sequence[int], places: int) -> None:
    """Heads and head dims behind one dimension of tokens, or two of places in pages."""
    _, heads, head_dim = query.shape
    kv_heads, key_dim = key_shape[places:]
    if key_shape[: places + 1] != value_shape[: places + 1] or key_dim != head_dim:
        raise InputError(
            "shape of key and value",
            expected=f"one value for each key, and keys of {head_dim} numbers, as the queries",
            got=f"{tuple(key_shape)} and {tuple(value_shape)}",
            remedy="Only the head_dim of values may differ.",
        )
    check_groups(heads, kv_heads)
    for name, dim in (("query", head_dim), ("value", value_shape[-1])):
        if not 0 < dim <= MAX_HEAD_DIM:
            expected = f"1 to {MAX_HEAD_DIM}"
            raise InputError(f"head_dim of {name}", expected=expected, got=dim, remedy="Call dense attention.")
