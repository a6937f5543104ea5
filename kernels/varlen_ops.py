"""``s2o::attention_varlen`` and ``s2o::attention_paged``: attention over packed sequences as opaque nodes.

They are made as the operators of ``ops.py`` are; `packed_of` and `paged_of` check arguments and complete a call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from s2o_compile.kernels import dtensors
from s2o_compile.kernels.calls.checks import check_packed, check_paged
from s2o_compile.kernels.calls.lengths import as_integers, check_counts, check_starts, read_starts
from s2o_compile.kernels.calls.varlen import Packed, attend_packed_differentiably, run_packed
from s2o_compile.kernels.core.call import AttentionCall, scale_of
from s2o_compile.kernels.core.documents import ids_of, same_documents
from s2o_compile.kernels.core.mask import AttentionMask
from s2o_compile.kernels.core.options import from_op_kwargs, takes_options
from s2o_compile.kernels.core.shards import held_sequence
from s2o_compile.kernels.core.validation import check_arguments, check_no_lse, check_whole
from s2o_compile.kernels.ops import UNSAFE, autocast, packed_attention
from s2o_compile.kernels.pages.prefill_cache import PrefillCache
from s2o_compile.kernels.pages.table import BlockTable, flat_view
from s2o_compile.kernels.support.arguments import shown
from s2o_compile.kernels.support.define_op import define_operator
from s2o_compile.kernels.support.errors import InputError


def _call_of(
    query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, *, causal: bool = True, window: int | None = None,
    scale: float | None = None, softcap: float | None = None, return_lse: bool = False,
    dense_heads: Sequence[int] | None = None, site: str = "",
) -> AttentionCall:  # fmt: skip
    """The call that sequences are cut from, of query [T, Hq, D] and key and value [1, Hkv, rows, D]."""
    check_whole()
    packed = query.transpose(0, 1)[None]
    dense = tuple(dense_heads or ())
    mask = AttentionMask.aligned(packed, packed, causal=causal, window=window)  # an offset of 0: each has its own
    check_arguments(
        packed, key, None, sinks, causal=causal, window=window, attention_chunk=None, softcap=softcap,
        fully_masked="zeros", dense_heads=dense,
    )  # fmt: skip
    return AttentionCall(
        query=packed, key=key, value=value, mask=mask, sinks=sinks,
        scale=scale_of(query, scale), softcap=softcap, return_lse=return_lse, dense_heads=sorted({*dense}), site=site,
    )  # fmt: skip


def packed_of(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, sinks: Tensor | None = None,
    *, max_seqlen_q: int | None = None, max_seqlen_k: int | None = None, **shared: Any,  # noqa: ANN401 (as `_call_of`)
) -> Packed:  # fmt: skip
    """Packed sequences of the arguments of `attention_varlen`.

    Raises:
        InputError: Arguments that the operator cannot take, as far as the host sees them without waiting.
    """
    check_packed(query, key, value)
    starts = as_integers("cu_seqlens_q", cu_seqlens_q, query)
    keys = as_integers("cu_seqlens_k", cu_seqlens_k, query)
    check_starts("cu_seqlens_q", starts)
    check_starts("cu_seqlens_k", keys)
    check_counts(cu_seqlens_q=len(starts) - 1, cu_seqlens_k=len(keys) - 1)
    call = _call_of(query, key.transpose(0, 1)[None], value.transpose(0, 1)[None], sinks, **shared)
    return Packed(call=call, query_starts=starts, keys=keys, longest_query=max_seqlen_q, longest_key=max_seqlen_k)


def paged_of(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, block_table: Tensor, cu_seqlens_q: Tensor, seq_lens: Tensor,
    sinks: Tensor | None = None, *, max_seqlen_q: int | None = None, max_seqlen_k: int | None = None,
    chunks: PrefillCache | None = None, **shared: Any,  # noqa: ANN401 (as `_call_of`)
) -> Packed:  # fmt: skip
    """Packed sequences of the arguments of `attention_paged`.

    Raises:
        InputError: Arguments that the operator cannot take, as far as the host sees them without waiting.
    """
    check_paged(query, key_cache, value_cache)
    starts, keys = as_integers("cu_seqlens_q", cu_seqlens_q, query), as_integers("seq_lens", seq_lens, query)
    table = as_integers("block_table", block_table, query, 2)
    check_starts("cu_seqlens_q", starts)
    check_counts(cu_seqlens_q=len(starts) - 1, seq_lens=len(keys), block_table=len(table))
    views = [flat_view(cache) for cache in (key_cache, value_cache)]
    if None in views or views[0][1] != views[1][1]:  # pyright: ignore[reportOptionalSubscript]
        strides = [tuple(cache.stride()) for cache in (key_cache, value_cache)]
        raise InputError(
            "strides of kv_cache",
            expected="pages at a whole number of slots from each other, as many for keys as for values",
            got=strides,
            remedy="Give the cache as it was allocated, or permuted views of it.",
        )
    (key, page_rows), (value, _) = views  # pyright: ignore
    if key.shape[2] >= 2**31:
        raise InputError(
            "rows of kv_cache", expected="less than 2**31 slots", got=key.shape[2], remedy="Split the cache."
        )
    if chunks is not None and len(keys) != 1:
        raise InputError("chunks", expected="one sequence", got=len(keys), remedy="Call once for each sequence.")
    on_device = table.to(query.device, torch.int32, non_blocking=True)
    on_device = on_device if on_device.stride(1) == 1 else on_device.contiguous()
    pages, page_len = key_cache.shape[:2]
    blocks = BlockTable(table=on_device, page_len=page_len, page_rows=page_rows, last=pages - 1)
    call = _call_of(query, key, value, sinks, **shared).but(kept=chunks)
    return Packed(
        call=call, query_starts=starts, keys=keys, blocks=blocks, host_table=table if table.is_cpu else None,
        longest_query=max_seqlen_q, longest_key=max_seqlen_k,
    )  # fmt: skip


@takes_options
def attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    sinks: Tensor | None = None,
    *,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
    dense_heads: Sequence[int] | None = None,
    site: str = "",
    **options: Any,  # noqa: ANN401 (of `from_op_kwargs`)
) -> tuple[Tensor, Tensor]:
    """Attention over packed sequences; see ``s2o_compile.attention_varlen`` for the arguments.

    Returns:
        Output [T, Hq, Dv], contiguous, and the log-sum-exp float32 [Hq, T], empty unless asked for.
    """
    if (sequence := held_sequence()) is not None:
        shared = {"causal": causal, "window": window, "scale": scale, "softcap": softcap, "site": site, **options}
        with sequence.ranks.checking("attention_varlen over a sharded sequence"):
            check_packed(query, key, value)
            ids = _documents_of_shard(sequence, query.device, cu_seqlens_q, cu_seqlens_k, return_lse)
        query, key, value = (x.transpose(0, 1)[None] for x in (query, key, value))
        output, lse = packed_attention(query, key, value, ids, None, None, sinks, dense_heads=dense_heads, **shared)
        return output[0].transpose(0, 1).contiguous(), lse
    packed = packed_of(
        query, key, value, cu_seqlens_q, cu_seqlens_k, sinks, max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k,
        causal=causal, window=window, scale=scale, softcap=softcap, return_lse=return_lse, dense_heads=dense_heads,
        site=site,
    )  # fmt: skip
    output, lse = run_packed(packed, from_op_kwargs(**options))
    return output, lse if return_lse else lse.new_empty(0)


def _documents_of_shard(
    sequence: Any, device: torch.device, query_starts: Tensor, key_starts: Tensor, return_lse: bool  # noqa: ANN401
) -> Tensor:  # fmt: skip
    """The documents [1, n] of this rank's tokens, by the lengths of the whole sequence."""
    length, named = sequence.layout.length, sequence.documents
    starts = read_starts("cu_seqlens_q", query_starts, length)
    ids = ids_of(query_starts.to(device), length)
    alike = named is not None and same_documents(ids, named.to(device))
    if return_lse or not alike or starts != read_starts("cu_seqlens_k", key_starts, length):
        raise InputError(
            "attention_varlen over a sharded sequence",
            expected="the documents of the sequence as cu_seqlens of queries and keys, and no return_lse",
            got=f"return_lse={return_lse}, {shown(starts)} beside {'no' if named is None else 'other'} documents",
            remedy="Name them: shard_sequence(..., documents=ids). Attend to other keys outside of the block.",
        )
    return sequence.shard(ids, 1)


@takes_options
def attention_paged(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    cu_seqlens_q: Tensor,
    seq_lens: Tensor,
    sinks: Tensor | None = None,
    *,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
    dense_heads: Sequence[int] | None = None,
    site: str = "",
    **options: Any,  # noqa: ANN401 (of `from_op_kwargs`)
) -> tuple[Tensor, Tensor]:
    """Attention over sequences whose keys lie in pages; see ``s2o_compile.attention_paged`` for the arguments.

    Key and value are caches [pages, page_len, Hkv, D] and [pages, page_len, Hkv, Dv], with a unit last stride.

    Returns:
        Output [T, Hq, Dv], contiguous, and the log-sum-exp float32 [Hq, T], empty unless asked for.
    """
    packed = paged_of(
        query, key_cache, value_cache, block_table, cu_seqlens_q, seq_lens, sinks, max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k, causal=causal, window=window, scale=scale, softcap=softcap,
        return_lse=return_lse, dense_heads=dense_heads, site=site,
    )  # fmt: skip
    output, lse = run_packed(packed, from_op_kwargs(**options))
    return output, lse if return_lse else lse.new_empty(0)


_EXACT = ("max_seqlen_q", "max_seqlen_k", "causal", "window", "scale", "softcap", "dense_heads")
"""Arguments that change the result of exact attention, or are checked there, too."""


def _differentiable(complete: Callable[..., Packed]) -> Callable[..., tuple[Tensor, Tensor]]:
    """An operator by operators that have every derivative: exact, and without a log-sum-exp."""

    def attend(*tensors: Any, return_lse: bool = False, **keywords: Any) -> tuple[Tensor, Tensor]:  # noqa: ANN401
        check_no_lse(return_lse)
        packed = complete(*tensors, **{name: keywords[name] for name in _EXACT if name in keywords})
        return attend_packed_differentiably(packed), packed.call.query.new_empty(0, dtype=torch.float32)

    return attend


differentiable_varlen, differentiable_paged = _differentiable(packed_of), _differentiable(paged_of)


def _fake(
    query: Tensor, _key: Tensor, value: Tensor, *_: object, return_lse: bool = False, **__: object
) -> tuple[Tensor, Tensor]:
    tokens, heads, _dim = query.shape
    lse = query.new_empty((heads, tokens) if return_lse else (0,), dtype=torch.float32)
    return query.new_empty(tokens, heads, value.shape[-1]), lse


_library = torch.library.Library("s2o", "FRAGMENT")
# They may wait for lengths, and no CUDA graph can record that: with this tag Inductor leaves them out of graphs.
_of_packed = {"fake": _fake, "tags": UNSAFE, "host_too": ("block_table", "cu_seqlens_q", "cu_seqlens_k", "seq_lens")}
_varlen = define_operator(
    _library, attention_varlen, on_dtensors=dtensors.attention_varlen, differentiable=differentiable_varlen,
    **_of_packed,
)  # fmt: skip
_paged = define_operator(
    _library, attention_paged, on_dtensors=dtensors.attention_paged, differentiable=differentiable_paged, **_of_packed
)


def _paged_autocast(device_type: str) -> Any:  # noqa: ANN401
    def in_its_dtype(query: Tensor, key_cache: Tensor, *rest: Tensor | None, **keywords: object) -> Any:  # noqa: ANN401
        """A cache is not converted: the operator runs in its dtype."""
        with torch.autocast(device_type, enabled=False):
            return _paged(query.to(key_cache.dtype), key_cache, *rest, **keywords)

    return in_its_dtype


for _device_type, _key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
    _library.impl("attention_varlen", autocast(_device_type, _varlen), _key)
    _library.impl("attention_paged", _paged_autocast(_device_type), _key)
