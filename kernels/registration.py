"""``s2o::attention``: the operator as one opaque node that torch.compile keeps whole.

Opaque on purpose: which path runs (S2O, sliding window, dense) is decided from lengths inside, so a graph needs no
guard and no recompilation. Inference only: the public function and the graph pass send anything that wants gradients
to dense SDPA.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from s2o_compile.kernels.layout import as_sdpa, empty_output
from s2o_compile.kernels.mask import AttentionMask
from s2o_compile.kernels.operator import run
from s2o_compile.kernels.options import OperatorOptions
from s2o_compile.kernels.sinks import add_sinks
from s2o_compile.kernels.validation import check_sinks

_DEFAULT = OperatorOptions()


@torch.library.custom_op("s2o::attention", mutates_args=())
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
    blind: str = "zeros",
    return_lse: bool = False,
    tau: float = _DEFAULT.tau,
    min_seq_len: int | None = _DEFAULT.min_seq_len,
    segment_len: int | None = _DEFAULT.segment_len,
    ranking: str = _DEFAULT.ranking,
    query_order: str = _DEFAULT.query_order,
    implementation: str = _DEFAULT.implementation,
    site: str = "",
    layout: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Sparse attention by ranked keys and early stop; see ``s2o_compile.attention`` for the arguments.

    Returns:
        Output [B, Hq, Nq, Dv] with SDPA's layout, and the log-sum-exp float32 [B, Hq, Nq], empty unless asked for.
    """
    options = OperatorOptions(
        tau=tau,
        min_seq_len=min_seq_len,
        segment_len=segment_len,
        ranking=ranking,
        query_order=query_order,
        implementation=implementation,
    )
    mask = AttentionMask.aligned(
        query,
        key,
        causal=causal,
        causal_offset=causal_offset,
        window=window,
        attention_chunk=attention_chunk,
        key_mask=key_mask,
    )
    output, lse = run(
        query,
        key,
        value,
        mask,
        scale=scale,
        softcap=softcap,
        sinks=sinks,
        blind=blind,
        return_lse=return_lse,
        options=options,
        site=site,
    )
    output = as_sdpa(output, query, layout)
    return output, query.new_empty(0, dtype=torch.float32) if lse is None else lse


@attention.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *_: object,
    return_lse: bool = False,
    layout: str = "auto",
    **__: object,
) -> tuple[Tensor, Tensor]:
    shape = query.shape[:3] if return_lse else (0,)
    return empty_output(query, value.shape[3], layout), query.new_empty(shape, dtype=torch.float32)


@attention.register_vmap
def _(
    info: object, in_dims: tuple[int | None, ...], *tensors: Tensor | None, **keywords: object
) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    """Fold the mapped dimension into the batch."""
    size = info.batch_size  # pyright: ignore[reportAttributeAccessIssue]
    given = [
        (None if x is None else x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0), dim)
        for x, dim in zip(tensors, in_dims, strict=True)
    ]
    stacked, mapped = zip(*given, *[(None, None)] * (5 - len(given)), strict=True)
    query, key, value, key_mask, sinks = stacked
    if key_mask is not None:  # one row may serve the whole batch
        key_mask = key_mask.expand(size, query.shape[1], -1).flatten(0, 1)
    flat = *(x.flatten(0, 1) for x in (query, key, value)), key_mask
    wants_lse = bool(keywords.get("return_lse"))
    if sinks is None or mapped[4] is None:
        output, lse = attention(*flat, None if sinks is None else sinks[0], **keywords)
        output, lse = output.unflatten(0, (size, -1)), lse.unflatten(0, (size, -1)) if wants_lse else lse
    else:  # sinks differ along the folded dimension, which the operator has no place for: they are added here
        check_sinks(sinks[0], query)
        output, lse = attention(*flat, **{**keywords, "return_lse": True, "blind": "zeros"})
        output, lse = add_sinks(output.unflatten(0, (size, -1)), lse.unflatten(0, (size, -1)), sinks[:, None])
    return (output, lse if wants_lse else lse.new_empty(size, 0)), (0, 0)


def _autocast(device_type: str) -> Callable[..., tuple[Tensor, Tensor]]:
    def call(query: Tensor, key: Tensor, value: Tensor, *rest: object, **keywords: object) -> tuple[Tensor, Tensor]:
        """Under autocast SDPA runs in the autocast dtype, and so does the operator."""
        dtype = torch.get_autocast_dtype(device_type)
        with torch.autocast(device_type, enabled=False):
            return attention(query.to(dtype), key.to(dtype), value.to(dtype), *rest, **keywords)

    return call


_library = torch.library.Library("s2o", "FRAGMENT")
for _device_type, _key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
    _library.impl("attention", _autocast(_device_type), _key)
