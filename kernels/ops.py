"""``s2o::attention``, and beside it ``masked_attention`` and ``packed_attention``: opaque nodes of compiled graphs.

The functions of these names are what the operators run; ``torch.ops.s2o`` has the operators.

They are opaque on purpose: lengths decide inside whether S2O, the sliding window or dense attention runs, so a graph
needs no guard and no recompilation. They serve inference: the public function and the graph pass send calls that want
gradients to dense attention. So do the operators themselves where a derivative is taken for sure (`define_operator`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from s2o_compile.kernels import dtensors, prepared
from s2o_compile.kernels.calls.context_parallel import run as run_sharded
from s2o_compile.kernels.calls.masked import run_masked
from s2o_compile.kernels.calls.packed import run_packed
from s2o_compile.kernels.core.call import AttentionCall
from s2o_compile.kernels.core.documents import Documents
from s2o_compile.kernels.core.layout import as_sdpa, empty_output
from s2o_compile.kernels.core.mask import FULLY_MASKED, UNKNOWN_MASK
from s2o_compile.kernels.core.options import from_op_kwargs, takes_options
from s2o_compile.kernels.core.shards import held_sequence, sharded
from s2o_compile.kernels.core.validation import (
    check_attn_mask,
    check_documents,
    check_fill,
    check_no_lse,
    check_sinks,
    check_whole,
)
from s2o_compile.kernels.dispatch import run, run_short
from s2o_compile.kernels.exact.epilogue import add_sinks, fill_rows
from s2o_compile.kernels.exact.formula import attend_differentiably, attend_under
from s2o_compile.kernels.support.define_op import define_operator

UNSAFE = tuple(tag for tag in (getattr(torch.Tag, "cudagraph_unsafe", None),) if tag is not None)


@takes_options
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None = None,
    sinks: Tensor | None = None,
    *,
    causal: bool = False,
    causal_offset: int | None = None,
    window: int | None = None,
    attention_chunk: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    fully_masked: str = "zeros",
    return_lse: bool = False,
    dense_heads: Sequence[int] | None = None,
    site: str = "",
    layout: str = "auto",
    **options: Any,  # noqa: ANN401 (of `from_op_kwargs`)
) -> tuple[Tensor, Tensor]:
    """Sparse attention by ranked keys and early stop; see ``s2o_compile.attention`` for the arguments.

    Returns:
        Output [B, Hq, Nq, Dv] with SDPA's layout, and the log-sum-exp float32 [B, Hq, Nq], empty unless asked for.
    """
    chosen, output, lse = from_op_kwargs(**options), None, None
    sequence = held_sequence()
    if sequence is None:
        check_whole()
    usual = key_mask is sinks is window is attention_chunk is softcap is None and not return_lse and not dense_heads
    if usual and sequence is None and fully_masked in FULLY_MASKED:
        output = run_short(
            query, key, value, causal=causal, causal_offset=causal_offset, scale=scale, options=chosen, site=site
        )
    known = kind = None
    if output is None and sequence is sinks is None and fully_masked == "zeros" and not dense_heads:
        terms = causal, causal_offset, window, attention_chunk, scale, softcap
        known, kind = prepared.again(query, key, value, key_mask, terms, chosen, return_lse=return_lse)
    if known is not None:
        output, lse = known
    elif output is None:
        with nullcontext() if sequence is None else sharded(None):
            call = AttentionCall.of(
                query, key, value, key_mask, sinks, causal=causal, causal_offset=causal_offset, window=window,
                attention_chunk=attention_chunk, scale=scale, softcap=softcap, fully_masked=fully_masked,
                return_lse=return_lse, dense_heads=dense_heads or (), site=site,
            )  # fmt: skip
        prepared.expect(call, kind)
        output, lse = run(call, chosen) if sequence is None else run_sharded(call, chosen, sequence)
    if known is None or layout != "auto":
        output = as_sdpa(output, query, layout)
    return output, query.new_empty(0, dtype=torch.float32) if lse is None else lse


@takes_options
def masked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor,
    sinks: Tensor | None = None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    fully_masked: str = "zeros",
    fill: float | None = None,
    dense_heads: Sequence[int] | None = None,
    site: str = "",
    layout: str = "auto",
    **options: Any,  # noqa: ANN401 (of `from_op_kwargs`)
) -> tuple[Tensor, Tensor]:
    """Attention under a mask that is read when it runs; see ``s2o_compile.attention`` for the arguments.

    ``fill`` is a finite number that takes the place of the scores which a bool mask hides, instead of -inf.

    Returns:
        Output [B, Hq, Nq, Dv] with SDPA's layout, and nothing where ``s2o::attention`` returns the log-sum-exp.
    """
    call = AttentionCall.of(
        query, key, value, None, sinks, scale=scale, softcap=softcap, fully_masked=fully_masked,
        dense_heads=dense_heads or (), site=site,
    )  # fmt: skip
    output = run_masked(call.but(mask=UNKNOWN_MASK), attn_mask, from_op_kwargs(**options), fill)
    return as_sdpa(output, query, layout), query.new_empty(0, dtype=torch.float32)


@takes_options
def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    documents: Tensor,
    key_documents: Tensor | None = None,
    key_mask: Tensor | None = None,
    sinks: Tensor | None = None,
    *,
    causal: bool = False,
    causal_offset: int | None = None,
    window: int | None = None,
    bottom_right: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
    fully_masked: str = "zeros",
    dense_heads: Sequence[int] | None = None,
    site: str = "",
    layout: str = "auto",
    **options: Any,  # noqa: ANN401 (of `from_op_kwargs`)
) -> tuple[Tensor, Tensor]:
    """Attention of packed sequences, each to itself alone; see ``s2o_compile.attention`` for the other arguments.

    Query i sees key j only where ``documents[b, i] == key_documents[b, j]``, integers [B or 1, Nq] and [B or 1, Nk];
    without ``key_documents`` they are those of the queries. With ``bottom_right`` a causal offset counts from the
    alignment of each document's last query with its last key, and is 0 unless given (`core.documents`).

    Returns:
        Output [B, Hq, Nq, Dv] with SDPA's layout, and nothing where ``s2o::attention`` returns the log-sum-exp.
    """
    chosen, sequence = from_op_kwargs(**options), held_sequence()
    with nullcontext() if sequence is None else sharded(None):
        call, packed = _packed_call(
            query, key, value, documents, key_documents, key_mask, sinks, bottom_right=bottom_right, causal=causal,
            causal_offset=causal_offset, window=window, scale=scale, softcap=softcap, fully_masked=fully_masked,
            dense_heads=dense_heads or (), site=site,
        )  # fmt: skip
    if sequence is None:
        output = run_packed(call, packed, chosen)
    else:
        output, _ = run_sharded(call, chosen, sequence, packed)
    return as_sdpa(output, query, layout), query.new_empty(0, dtype=torch.float32)


def _packed_call(
    query: Tensor, key: Tensor, value: Tensor, documents: Tensor, key_documents: Tensor | None,
    key_mask: Tensor | None, sinks: Tensor | None, *, bottom_right: bool = False, **given: Any,  # noqa: ANN401
) -> tuple[AttentionCall, Documents]:  # fmt: skip
    if bottom_right and given.get("causal_offset") is None:
        given["causal_offset"] = 0
    call = AttentionCall.of(query, key, value, key_mask, sinks, **given)
    check_documents(documents, key_documents, query, key)
    return call, Documents.of(documents, key_documents, bottom_right=bottom_right)


_DENSE = ("causal", "causal_offset", "window", "attention_chunk", "scale", "softcap", "fully_masked", "dense_heads")
"""Arguments that change the result of dense attention, or are checked there, too."""


def differentiable_attention(
    query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None = None, sinks: Tensor | None = None, *,
    return_lse: bool = False, layout: str = "auto", **keywords: Any,  # noqa: ANN401 (as `attention`)
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`attention` by operators that have every derivative: dense, and without a log-sum-exp."""
    check_no_lse(return_lse)
    given = {name: keywords[name] for name in _DENSE if keywords.get(name) is not None}
    output = attend_differentiably(AttentionCall.of(query, key, value, key_mask, sinks, **given))
    return as_sdpa(output, query, layout), query.new_empty(0, dtype=torch.float32)


def differentiable_masked_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor, sinks: Tensor | None = None, *,
    fill: float | None = None, layout: str = "auto", **keywords: Any,  # noqa: ANN401 (as `masked_attention`)
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`masked_attention` by operators that have every derivative: dense, under the mask as it is."""
    given = {name: keywords[name] for name in _DENSE if keywords.get(name) is not None}
    call = AttentionCall.of(query, key, value, None, sinks, **given)
    check_attn_mask(attn_mask, query, key)
    check_fill(fill, attn_mask)
    output = attend_under(call, attn_mask[(None,) * (4 - attn_mask.dim())], fill)
    return as_sdpa(output, query, layout), query.new_empty(0, dtype=torch.float32)


def differentiable_packed_attention(
    query: Tensor, key: Tensor, value: Tensor, documents: Tensor, key_documents: Tensor | None = None,
    key_mask: Tensor | None = None, sinks: Tensor | None = None, *, bottom_right: bool = False, layout: str = "auto",
    **keywords: Any,  # noqa: ANN401 (as `packed_attention`)
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`packed_attention` by operators that have every derivative: dense, under the mask of all pairs."""
    given = {name: keywords[name] for name in _DENSE if keywords.get(name) is not None}
    tensors = (query, key, value, documents, key_documents, key_mask, sinks)
    call, packed = _packed_call(*tensors, bottom_right=bottom_right, **given)
    return as_sdpa(attend_under(call, packed.visible(call.mask)), query, layout), query.new_empty(0).float()


def _fake(
    query: Tensor, key: Tensor, value: Tensor, *_: object, return_lse: bool = False, layout: str = "auto", **__: object
) -> tuple[Tensor, Tensor]:
    shape = query.shape[:3] if return_lse else (0,)
    return empty_output(query, value.shape[3], layout), query.new_empty(shape, dtype=torch.float32)


_library = torch.library.Library("s2o", "FRAGMENT")
_attention = define_operator(_library, attention, _fake, differentiable_attention, on_dtensors=dtensors.attention)
# They wait for the numbers of mask or ids, and no CUDA graph can record that: by this tag Inductor leaves them out.
_masked_attention = define_operator(
    _library, masked_attention, _fake, differentiable_masked_attention, tags=UNSAFE,
    on_dtensors=dtensors.masked_attention,
)  # fmt: skip
_packed_attention = define_operator(
    _library, packed_attention, _fake, differentiable_packed_attention, tags=UNSAFE,
    on_dtensors=dtensors.packed_attention,
)  # fmt: skip
dtensors.register_if_used()  # who imports it later calls the operators from `s2o_compile.attention`, or in a graph


def _stacked(x: Tensor, dim: int | None, size: int) -> Tensor:
    """A tensor with the mapped dimension first, repeated where it is not mapped."""
    return x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)


@torch.library.register_vmap("s2o::attention", lib=_library)
def _(
    info: object, in_dims: tuple[int | None, ...], *tensors: Tensor | None, **keywords: object
) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    """Fold the mapped dimension into the batch."""
    size = info.batch_size  # pyright: ignore[reportAttributeAccessIssue]
    pairs = [(None if x is None else _stacked(x, dim, size), dim) for x, dim in zip(tensors, in_dims, strict=True)]
    stacked, mapped = zip(*pairs, *[(None, None)] * (5 - len(pairs)), strict=True)
    query, key, value, key_mask, sinks = stacked
    if key_mask is not None:  # one row may serve the whole batch
        key_mask = key_mask.expand(size, query.shape[1], -1).flatten(0, 1)
    flat = *(x.flatten(0, 1) for x in (query, key, value)), key_mask
    wants_lse = bool(keywords.get("return_lse"))
    if sinks is None or mapped[4] is None:
        output, lse = _attention(*flat, None if sinks is None else sinks[0], **keywords)
        output, lse = output.unflatten(0, (size, -1)), lse.unflatten(0, (size, -1)) if wants_lse else lse
    else:  # sinks differ along the folded dimension, and the operator takes one row of them: they are added here
        check_sinks(sinks[0], query)
        output, lse = _attention(*flat, **{**keywords, "return_lse": True, "fully_masked": "zeros"})
        fully_masked = (lse == -torch.inf).unflatten(0, (size, -1)) & (sinks == -torch.inf)[:, None, :, None]
        output, lse = add_sinks(output.unflatten(0, (size, -1)), lse.unflatten(0, (size, -1)), sinks[:, None])
        if keywords.get("fully_masked") == "mean":
            assert flat[2] is not None
            filled = fill_rows(output.flatten(0, 1), flat[2], fully_masked.flatten(0, 1)[..., None])
            output = filled.unflatten(0, (size, -1))
    return (output, lse if wants_lse else lse.new_empty(size, 0)), (0, 0)


def _one_by_one(operator: Callable[..., Any]) -> Callable[..., Any]:
    def each(
        info: object, in_dims: tuple[int | None, ...], *tensors: Tensor | None, **keywords: object
    ) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
        """One call for each entry: every one has a mask of its own."""
        size = info.batch_size  # pyright: ignore[reportAttributeAccessIssue]
        stacked = [None if x is None else _stacked(x, dim, size) for x, dim in zip(tensors, in_dims, strict=True)]
        outputs = [operator(*(None if x is None else x[at] for x in stacked), **keywords) for at in range(size)]
        return (torch.stack([output for output, _ in outputs]), outputs[0][1].new_empty(size, 0)), (0, 0)

    return each


for _operator in (_masked_attention, _packed_attention):
    torch.library.register_vmap(_operator, _one_by_one(_operator), lib=_library)


def autocast(device_type: str, call: Callable[..., Any]) -> Callable[..., Any]:
    """An operator on query, key and value, as it is called under autocast of a device."""

    def in_its_dtype(query: Tensor, key: Tensor, value: Tensor, *rest: Tensor | None, **keywords: object) -> Any:  # noqa: ANN401
        """Under autocast SDPA runs in the autocast dtype, masks that are added included, and so does the operator."""
        dtype = torch.get_autocast_dtype(device_type)
        if call is _masked_attention and rest and rest[0] is not None and rest[0].is_floating_point():
            rest = (rest[0].to(dtype), *rest[1:])
        with torch.autocast(device_type, enabled=False):
            return call(query.to(dtype), key.to(dtype), value.to(dtype), *rest, **keywords)

    return in_its_dtype


for _device_type, _key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
    _library.impl("attention", autocast(_device_type, _attention), _key)
    _library.impl("masked_attention", autocast(_device_type, _masked_attention), _key)
    _library.impl("packed_attention", autocast(_device_type, _packed_attention), _key)
