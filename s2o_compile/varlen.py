"""Attention over packed sequences and over caches of pages as plain functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from s2o_compile.config import S2OConfig, config_or_default
from s2o_compile.kernels import dtensors, varlen_ops
from s2o_compile.kernels.calls.lengths import as_integers, as_longest
from s2o_compile.kernels.calls.varlen import run_packed
from s2o_compile.kernels.core.options import from_op_kwargs
from s2o_compile.kernels.core.validation import check_kinds, check_numbers
from s2o_compile.kernels.dispatch import is_short, warn_of_dense
from s2o_compile.kernels.pages.prefill_cache import PrefillCache
from s2o_compile.kernels.support.arguments import shown
from s2o_compile.kernels.support.define_op import can_skip_dispatcher
from s2o_compile.kernels.support.derivatives import is_differentiated
from s2o_compile.kernels.support.dtensors import is_dtensor
from s2o_compile.kernels.support.errors import InputError
from s2o_compile.kernels.support.torch_compile import never_captured

Lengths = Tensor | Sequence[int]


def attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Lengths,
    cu_seqlens_k: Lengths,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    config: S2OConfig | None = None,
    site: str = "",
) -> Tensor | tuple[Tensor, Tensor]:
    """Sparse attention over packed sequences, each ranked and stopped by itself; short ones run exactly.

    Legend: T queries and Tk keys of all S sequences, Hq query heads, Hkv key/value heads, D and Dv head dims.

    Args:
        query: [T, Hq, D], float16, bfloat16 or float32, any strides.
        key: [Tk, Hkv, D], Hq divisible by Hkv.
        value: [Tk, Hkv, Dv].
        cu_seqlens_q: int32 or int64 [S + 1], or a list: sequence s has the queries from entry s up to entry s + 1.
        cu_seqlens_k: The same of keys.
        max_seqlen_q: Queries of the longest sequence at least; None if it is not known.
        max_seqlen_k: Keys of the longest sequence at least.
        causal: Each sequence is bottom-right causal: of n_q queries on n_k keys, query i sees the keys
            ``j <= i + n_k - n_q``.
        window: Sliding window in tokens, the query's own position included; computed exactly. Needs ``causal``.
        scale: Softmax scale; None for ``1 / sqrt(D)``.
        softcap: Bound of the logits, None for none.
        sinks: Floating [Hq], one more logit for each query head.
        return_lse: Whether to return the log-sum-exp too.
        config: Quality and implementation, None for the defaults. A sequence of fewer than 128 queries, or of fewer
            keys than ``min_seq_len``, runs exactly.
        site: Name for reports, and for ``site_tau`` and ``dense_heads`` of the configuration.

    Returns:
        Output [T, Hq, Dv], contiguous, in the query's dtype; with ``return_lse`` also float32 [Hq, T]. A query that
        sees no key gets zeros and -inf.

    Raises:
        InputError: Shapes, dtypes, devices or lengths that do not fit; the message says what to do.

    Lengths on the host, as CPU tensors or lists, cost no wait. Lengths on a GPU stay there: nothing waits, a CUDA graph
    can record the call, and the device says which sequences are sparse. The host plans for ``max_seqlen_q`` and
    ``max_seqlen_k``, or else for all tokens: the closer they are, the less memory and time. A longer sequence runs
    exactly. Lengths that are no lengths are cut to the tokens that exist: nothing is read or written outside, and
    queries of no sequence get zeros. A recording, an observer, ``dense_heads`` and ``ranking="mean_query"`` read
    lengths. Inputs that require grad are attended exactly.
    """
    check_kinds(query=query, key=key, value=value, sinks=sinks)
    lengths = as_integers("cu_seqlens_q", cu_seqlens_q, query), as_integers("cu_seqlens_k", cu_seqlens_k, query)
    shared = _shared(max_seqlen_q, max_seqlen_k, causal, window, scale, softcap, return_lse, site)
    tensors = (query, key, value, *lengths, sinks)
    if is_differentiated(query, key, value, sinks):
        _warn_of_derivatives(query, lengths[0].diff(), lengths[1].diff(), config)
        output, lse = varlen_ops.differentiable_varlen(*tensors, **shared)
        return (output, lse) if return_lse else output
    options = config_or_default(config, "attention_varlen").operator_options(site)
    output, lse = _operator("attention_varlen", tensors)(*tensors, **shared, **options)
    return (output, lse) if return_lse else output


def attention_paged(
    query: Tensor,
    kv_cache: Tensor | tuple[Tensor, Tensor],
    block_table: Tensor,
    cu_seqlens_q: Lengths,
    seq_lens: Lengths,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    config: S2OConfig | None = None,
    out: Tensor | None = None,
    chunks: PrefillCache | None = None,
    site: str = "",
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention_varlen` over keys and values in pages of a cache. Triton kernels read them in place.

    Args:
        query: [T, Hq, D], float16, bfloat16 or float32, any strides.
        kv_cache: One tensor [pages, Hkv, page_len, 2 D] (key, then value), one tensor [2, pages, page_len, Hkv, D], or
            a pair of tensors [pages, page_len, Hkv, D] and [pages, page_len, Hkv, Dv]. Permuted views are fine.
        block_table: int32 or int64 [S, most pages]: the pages of each sequence in order. Entries behind its last key
            may be any. Sequences may share pages.
        cu_seqlens_q: int32 or int64 [S + 1], or a list: cumulative numbers of queries.
        seq_lens: int32 or int64 [S], or a list: keys of each sequence, those of its queries included.
        max_seqlen_q: As for `attention_varlen`.
        max_seqlen_k: As for `attention_varlen`; None for the room of ``block_table``.
        causal: As for `attention_varlen`, and the arguments up to ``config``.
        window: Sliding window in tokens.
        scale: Softmax scale.
        softcap: Bound of the logits.
        sinks: Floating [Hq].
        return_lse: Whether to return the log-sum-exp too.
        config: Quality and implementation.
        out: [T, Hq, Dv] in the query's dtype, unit last stride: where the output goes.
        chunks: Of the caller, for a prefill in chunks of one sequence: keeps between chunks what ranks its keys.
        site: Name for reports, and for ``site_tau`` and ``dense_heads`` of the configuration.

    Returns:
        As `attention_varlen`; ``out`` if it was given.

    Raises:
        InputError: Shapes, dtypes, devices, lengths or pages that do not fit; the message says what to do.

    On a CPU, under FlexAttention and for observers the keys of one sequence at a time are copied out of their pages.
    Pages of a table on a GPU are not checked: a number that no page has stands for the nearest that exists. Lengths on
    a GPU stay there as for `attention_varlen`, but not beside ``chunks``.
    """
    key_cache, value_cache = _caches(kv_cache, query)
    check_kinds(query=query, key_cache=key_cache, value_cache=value_cache, sinks=sinks, out=out)
    lengths = as_integers("cu_seqlens_q", cu_seqlens_q, query), as_integers("seq_lens", seq_lens, query)
    shared = _shared(max_seqlen_q, max_seqlen_k, causal, window, scale, softcap, return_lse, site)
    tensors = (query, key_cache, value_cache, as_integers("block_table", block_table, query, 2), *lengths, sinks)
    if out is not None:
        _check_out(out, query, value_cache)
    options = config_or_default(config, "attention_paged").operator_options(site)
    if chunks is not None and (not isinstance(chunks, PrefillCache) or is_dtensor(query)):
        raise InputError(
            "chunks",
            expected="a PrefillCache, beside local tensors",
            got=f"{shown(chunks)} beside a {type(query).__name__}",
            remedy="Make one a layer and sequence. Of DTensors pass .to_local().",
        )
    if is_differentiated(query, key_cache, value_cache, sinks):
        _warn_of_derivatives(query, lengths[0].diff(), lengths[1], config)
        if chunks is not None:
            chunks.begin(0)
        output, lse = varlen_ops.differentiable_paged(*tensors, **shared)
    elif chunks is not None or (out is not None and can_skip_dispatcher(*tensors, out)):
        output, lse = _into(out, chunks, tensors, shared, options)
    else:
        output, lse = _operator("attention_paged", tensors)(*tensors, **shared, **options)
    if out is not None and output is not out:
        output = out.copy_(output)
    return (output, lse) if return_lse else output


def _operator(name: str, tensors: tuple[Any, ...]) -> Callable[..., tuple[Tensor, Tensor]]:
    """The function of an operator where it can be called alone, or what calls it on these tensors."""
    if can_skip_dispatcher(*tensors):
        return getattr(varlen_ops, name)
    return getattr(dtensors, name) if is_dtensor(tensors[0]) else getattr(torch.ops.s2o, name).default


@never_captured
def _into(
    out: Tensor | None, chunks: PrefillCache | None, tensors: tuple[Any, ...], shared: dict[str, Any],
    options: dict[str, Any],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The operator's function with what no operator takes: an output that is there, and a cache of the ranking."""
    marked = options.pop("dense_heads", None)
    packed = varlen_ops.paged_of(*tensors, chunks=chunks, dense_heads=marked, **shared)
    return run_packed(packed, from_op_kwargs(**options), out)


def _warn_of_derivatives(query: Tensor, n_queries: Tensor, n_keys: Tensor, config: S2OConfig | None) -> None:
    """Say of a sequence that could be sparse that it is dense, because derivatives of it are wanted."""
    if torch.compiler.is_compiling():  # a compiled graph says so itself
        return
    shortest = config_or_default(config, "attention").min_seq_len
    for count, keys in zip(n_queries.tolist(), n_keys.tolist(), strict=False):
        if not is_short(query, count, keys, shortest):
            warn_of_dense(keys)
            return


def _shared(
    max_seqlen_q: int | None, max_seqlen_k: int | None, causal: bool, window: int | None, scale: float | None,
    softcap: float | None, return_lse: bool, site: str,
) -> dict[str, Any]:  # fmt: skip
    """The arguments that all sequences share, checked."""
    longest = {"max_seqlen_q": max_seqlen_q, "max_seqlen_k": max_seqlen_k}
    longest = {name: as_longest(name, length) for name, length in longest.items()}
    found = check_numbers(causal=causal, window=window, scale=scale, softcap=softcap, return_lse=return_lse)
    numbers = {"window": found.window, "scale": found.scale, "softcap": found.softcap}
    return {"causal": causal, "return_lse": return_lse, "site": site, **numbers, **longest}


def _caches(kv_cache: Tensor | tuple[Tensor, Tensor], query: Tensor) -> tuple[Tensor, Tensor]:
    """Key and value cache as views [pages, page_len, Hkv, D]."""
    if isinstance(kv_cache, (tuple, list)) and len(kv_cache) == 2:
        return kv_cache[0], kv_cache[1]
    head_dim = query.shape[-1] if isinstance(query, Tensor) and query.dim() else 0
    if isinstance(kv_cache, Tensor) and kv_cache.dim() == 5 and kv_cache.shape[0] == 2:
        return kv_cache[0], kv_cache[1]
    if isinstance(kv_cache, Tensor) and kv_cache.dim() == 4 and kv_cache.shape[3] == 2 * head_dim:
        slots = kv_cache.transpose(1, 2)
        return slots[..., :head_dim], slots[..., head_dim:]
    raise InputError(
        "kv_cache",
        expected=f"[pages, kv_heads, page_len, {2 * head_dim}], [2, pages, page_len, kv_heads, {head_dim}], or a pair",
        got=f"shape {tuple(kv_cache.shape)}" if isinstance(kv_cache, Tensor) else shown(kv_cache),
        remedy="Give the cache of one layer; permute it to one of these.",
    )


def _check_out(out: Tensor, query: Tensor, value_cache: Tensor) -> None:
    wanted = (*query.shape[:2], value_cache.shape[-1])
    if tuple(out.shape) != wanted or out.dtype != query.dtype or out.device != query.device or out.stride(-1) != 1:
        raise InputError(
            "out",
            expected=f"{query.dtype} of shape {wanted} on {query.device}, unit last stride",
            got=f"{out.dtype} of shape {tuple(out.shape)} on {out.device}, strides {out.stride()}",
            remedy="Leave it out for a new one.",
        )
