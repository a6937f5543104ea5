"""One call of the operator, from tensors to output: check, choose a path, plan, execute, record."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from s2o_compile.kernels import schedule as slices
from s2o_compile.kernels.core import head_tau
from s2o_compile.kernels.core.mask import AttentionMask
from s2o_compile.kernels.core.options import OperatorOptions
from s2o_compile.kernels.core.plan import TILE_LEN
from s2o_compile.kernels.core.result import Result
from s2o_compile.kernels.core.tuned import crossover
from s2o_compile.kernels.core.validation import check_inputs, sizes_of
from s2o_compile.kernels.exact.chunked import attend_chunks
from s2o_compile.kernels.exact.fully_masked_rows import fill_fully_masked_rows
from s2o_compile.kernels.exact.sdpa import dense_attention, needs_pairs, sdpa_causal
from s2o_compile.kernels.exact.sinks import add_sinks
from s2o_compile.kernels.impl.flex import forward as flex_forward
from s2o_compile.kernels.impl.torch import exact as torch_exact
from s2o_compile.kernels.impl.torch import forward as torch_forward
from s2o_compile.kernels.observe import ObservedCall, observe, observing
from s2o_compile.kernels.statistics import record, recording
from s2o_compile.kernels.support.errors import ImplementationUnavailableError

try:
    from s2o_compile.kernels.impl.triton import exact as triton_exact
    from s2o_compile.kernels.impl.triton import forward as triton_forward
except ImportError:  # no triton here: only the torch implementation can run
    triton_forward = triton_exact = None


FLEX_DEVICES = ("xpu",)
"""Devices that torch.compile writes FlexAttention kernels for, and our Triton kernels were not made for."""

WIDEST_FLOAT32 = 256
"""Largest head dim whose float32 query tile the Triton kernels can hold on chip."""


def choose_path(query: Tensor, key: Tensor, mask: AttentionMask, *, scale: float, min_seq_len: int | str) -> str:
    """Choose "s2o", "window" or "dense" from lengths alone: nothing waits for the device and no graph recompiles."""
    if scale <= 0 or is_short(query, query.shape[2], key.shape[2], min_seq_len):
        return "dense"
    return "s2o" if mask.window is None else "window"


def is_short(query: Tensor, n_queries: int, n_keys: int, min_seq_len: int | str) -> bool:
    """Whether dense attention is the faster one at these lengths on the query's device."""
    shortest = min_seq_len if isinstance(min_seq_len, int) else crossover(query.device)
    return n_queries < TILE_LEN or n_keys < shortest


def choose_implementation(wanted: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """Choose "triton", "torch" or "flex"; an explicit wish is fulfilled or refused, never replaced."""
    fits = dtype != torch.float32 or head_dim <= WIDEST_FLOAT32
    if wanted == "triton":
        if triton_forward is None:
            raise ImplementationUnavailableError(
                'implementation="triton": expected the triton package, got none. Install triton, or use "auto".'
            )
        if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            raise ImplementationUnavailableError(
                f'implementation="triton": expected CUDA tensors, got {device.type}. Move the model to a GPU, use '
                '"auto", or set TRITON_INTERPRET=1 before the first import to interpret the kernels.'
            )
        if device.type != "cuda" and dtype == torch.bfloat16:
            raise ImplementationUnavailableError(
                'implementation="triton": expected float16 or float32 in the interpreter, got bfloat16, whose products '
                "it computes wrongly. Convert the inputs, or run on a GPU."
            )
        if device.type == "cuda" and not fits:
            raise ImplementationUnavailableError(
                f'implementation="triton": expected a head_dim of at most {WIDEST_FLOAT32} in float32, got {head_dim}, '
                'whose query tile does not fit in shared memory. Use bfloat16 or float16, or "auto".'
            )
    if wanted == "flex" and device.type == "cuda" and triton_forward is None:
        raise ImplementationUnavailableError(
            'implementation="flex": expected the triton package, which torch.compile writes its CUDA kernels for, got '
            'none. Install triton, or use "auto".'
        )
    if wanted == "auto" and device.type in FLEX_DEVICES:
        return "flex"
    if wanted == "auto":
        return "triton" if device.type == "cuda" and triton_forward is not None and fits else "torch"
    return wanted


def run_short(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool,
    causal_offset: int | None,
    scale: float | None,
    options: OperatorOptions,
    site: str = "",
) -> Tensor | None:
    """SDPA's output [B, Hq, Nq, D] for the usual short call, at SDPA's host time; None for every other call.

    A call whose attention takes a few microseconds cannot afford a mask, a plan of what to do, or a second look at its
    tensors. So what SDPA alone can do, `run` would do the same way, and nobody objects to, is done here; anything else,
    errors included, is left to `run`. Arguments as there, under no mask but the causal one; every row of these sees a
    key.
    """
    sizes = sizes_of(query, key, value)
    if sizes is None or options.implementation == "triton":
        return None
    _, heads, kv_heads, n_queries, n_keys, head_dim, value_dim = sizes
    if head_dim != value_dim or not is_short(query, n_queries, n_keys, options.min_seq_len):
        return None
    offset = n_keys - n_queries if causal_offset is None else causal_offset
    is_causal = sdpa_causal(causal, offset, n_keys, scale)
    if is_causal is None:
        return None
    if recording():
        record(site, "dense", query, key, AttentionMask(causal=causal, offset=offset if causal else 0))
    grouped = heads != kv_heads
    return scaled_dot_product_attention(query, key, value, is_causal=is_causal, scale=scale, enable_gqa=grouped)


def run(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: AttentionMask,
    *,
    scale: float | None,
    return_lse: bool,
    options: OperatorOptions,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    fully_masked: str = "zeros",
    dense_heads: Sequence[int] = (),
    site: str = "",
) -> tuple[Tensor, Tensor | None]:
    """Attention output [B, Hq, Nq, Dv] and, if asked, its log-sum-exp float32 [B, Hq, Nq].

    Args:
        query: [B, Hq, Nq, D].
        key: [B, Hkv, Nk, D].
        value: [B, Hkv, Nk, Dv].
        mask: Which keys a query sees.
        scale: Softmax scale, None for 1 / sqrt(D).
        return_lse: Whether the log-sum-exp is wanted.
        options: How to rank, order, stop and run.
        softcap: Bound of the logits, None for none.
        sinks: Floating [Hq], one more logit a head (``sinks.py``).
        fully_masked: What a query that sees no key gets (``fully_masked_rows.py``).
        dense_heads: Key/value heads whose groups run densely beside the others (``dense_heads.py``).
        site: Module path for the report.
    """
    check_inputs(
        query,
        key,
        value,
        mask.key_mask,
        sinks,
        causal=mask.causal,
        window=mask.window,
        attention_chunk=mask.attention_chunk,
        softcap=softcap,
        fully_masked=fully_masked,
        dense_heads=dense_heads,
    )
    head_tau.check(options.tau, query.shape[1])
    marked = sorted(set(dense_heads))
    scale = query.shape[3] ** -0.5 if scale is None else scale
    key_mask = mask.key_mask
    if key_mask is not None and (key_mask.shape[0] != query.shape[0] or not key_mask.is_contiguous()):
        mask = replace(mask, key_mask=key_mask.expand(query.shape[0], -1).contiguous())
    wants_lse = return_lse or sinks is not None

    def attend(query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask) -> tuple[Tensor, Tensor | None]:
        return _attend(
            query,
            key,
            value,
            mask,
            scale=scale,
            softcap=softcap,
            return_lse=wants_lse,
            options=options,
            dense_heads=marked,
            sinks=sinks,
            site=site,
        )

    if mask.attention_chunk is not None and 0 <= mask.offset <= mask.attention_chunk - query.shape[2]:
        mask = replace(mask, attention_chunk=None)  # one chunk holds all queries
    if mask.attention_chunk is None:
        output, lse = attend(query, key, value, mask)
    else:
        output, lse = attend_chunks(query, key, value, mask, attend)
    if sinks is not None and lse is not None:
        output, lse = add_sinks(output, lse, sinks)
    if fully_masked == "mean":
        output = fill_fully_masked_rows(output, value, mask, sinks)
    return output, lse if return_lse else None


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: AttentionMask,
    *,
    scale: float,
    softcap: float | None,
    return_lse: bool,
    options: OperatorOptions,
    dense_heads: Sequence[int],
    sinks: Tensor | None,
    site: str,
) -> tuple[Tensor, Tensor | None]:
    """Attention without chunks, by the path that the lengths ask for; SDPA returns no log-sum-exp.

    Sinks are for observers: `run` puts them in.
    """
    n_keys = key.shape[2]
    if mask.window is not None and mask.window >= n_keys + max(query.shape[2] + mask.offset - n_keys, 0):
        mask = replace(mask, window=None)  # the window hides nothing
    path = choose_path(query, key, mask, scale=scale, min_seq_len=options.min_seq_len)
    # A long mask, pair by pair, takes more memory than keys and values: there our own executor runs.
    by_sdpa = not return_lse and softcap is None and (path == "dense" or not needs_pairs(mask, n_keys, scale))
    if path == "s2o" and len(dense_heads) == key.shape[1]:
        path = "dense"
    if path == "dense" and by_sdpa:
        choose_implementation(options.implementation, query.device, query.dtype, query.shape[3])  # or refuse
        record(site, path, query, key, mask)
        return dense_attention(query, key, value, mask, scale=scale), None
    execute = partial(_execute, query, key, value, mask, scale=scale, softcap=softcap)
    if path == "s2o" and observing():
        call = ObservedCall(
            site=site,
            query=query,
            key=key,
            value=value,
            mask=mask,
            scale=scale,
            softcap=softcap,
            options=options,
            dense_heads=dense_heads,
            wants_lse=return_lse,
            sinks=sinks,
            execute=execute,
        )
        result = observe(call)
    else:
        result = execute(path, options=options, dense_heads=dense_heads, return_lse=return_lse)
    record(site, path, query, key, mask, result.computed)
    return result.output, result.lse


def _execute(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: AttentionMask,
    path: str,
    *,
    scale: float,
    softcap: float | None,
    return_lse: bool,
    options: OperatorOptions,
    dense_heads: Sequence[int],
) -> Result:
    """Attention by our own executors: over a plan on the path "s2o", else exactly in position order."""
    implementation = choose_implementation(options.implementation, query.device, query.dtype, query.shape[3])
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    if mask.causal and mask.window is None:  # beyond these nothing changes, and kernels count in 32 bits
        mask = replace(mask, offset=min(max(mask.offset, -query.shape[2]), key.shape[2]))
    exact = triton_exact if implementation == "triton" else torch_exact
    with torch.cuda.device_of(query):  # Triton launches on the current device
        if implementation == "flex" and path != "s2o":
            return flex_forward.attend_planned(
                query, key, value, mask, None, None, scale=scale, softcap=softcap, wants_lse=return_lse
            )
        if implementation == "flex":
            return flex_forward.attend(
                query,
                key,
                value,
                mask,
                scale=scale,
                softcap=softcap,
                options=options,
                dense_heads=dense_heads,
                wants_lse=return_lse,
            )
        if path != "s2o":
            return exact.attend_exact(query, key, value, mask, scale=scale, softcap=softcap)
        executor = triton_forward if implementation == "triton" else torch_forward
        return slices.attend(
            query,
            key,
            value,
            mask,
            scale=scale,
            softcap=softcap,
            options=options,
            executor=executor,
            exact=exact,
            dense_heads=dense_heads,
            wants_lse=return_lse,
        )
