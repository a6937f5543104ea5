"""Attention that gradients flow through, sparse inside a graph that is being traced.

    keys and their order    an opaque operator: plan, estimate and layout, through which no gradient goes
    attention               the higher-order operator of flex_attention over gathered keys, which autograd knows

Sizes follow from lengths alone, so lengths are integers here. Outside a trace the call is ``attend_sparsely``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.attention import flex_attention as torch_flex

from s2o_compile.kernels.autograd import attend_sparsely
from s2o_compile.kernels.core.layout import as_sdpa
from s2o_compile.kernels.core.mask import AttentionMask
from s2o_compile.kernels.core.options import OperatorOptions, options_of
from s2o_compile.kernels.core.plan import Plan, default_segment_len, n_segments
from s2o_compile.kernels.exact.blind_rows import fill_blind_rows
from s2o_compile.kernels.impl.flex import forward as flex_forward
from s2o_compile.kernels.impl.flex.layout import FlexLayout, lay_out, pool_blocks
from s2o_compile.kernels.support.define_op import define_operator
from s2o_compile.kernels.support.torch_compat import fake_mode_of

_DEFAULT = OperatorOptions()


def attend_trained(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None = None,
    *,
    causal: bool = False,
    causal_offset: int | None = None,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    blind: str = "zeros",
    tau: float = _DEFAULT.tau,
    min_seq_len: int | None = None,
    segment_len: int | None = _DEFAULT.segment_len,
    ranking: str = _DEFAULT.ranking,
    list_per: str = _DEFAULT.list_per,
    query_order: str = _DEFAULT.query_order,
    implementation: str = _DEFAULT.implementation,
    head_tau: Sequence[float] | None = None,
    dense_heads: Sequence[int] | None = None,
    site: str = "",
    layout: str = "auto",
) -> tuple[Tensor, Tensor]:
    """``s2o::attention`` with the gradient of its sparse forward; arguments and results as there."""
    taus = () if head_tau is None else tuple(head_tau)
    options = options_of(tau, min_seq_len, segment_len, ranking, list_per, query_order, implementation, taus)
    mask = AttentionMask.aligned(
        query,
        key,
        causal=causal,
        causal_offset=causal_offset,
        window=window,
        attention_chunk=None,
        key_mask=key_mask,
    )
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    if fake_mode_of([query]) is None:
        output = attend_sparsely(
            query,
            key,
            value,
            mask,
            scale=factor,
            softcap=softcap,
            sinks=None,
            blind=blind,
            options=options,
            dense_heads=dense_heads or (),
        )
    else:
        with torch.no_grad():
            places = _place_keys(
                query, key, value, key_mask, causal, mask.offset, window, factor, softcap, tau, segment_len, ranking,
                list_per, query_order, taus, tuple(dense_heads or ()),
            )  # fmt: skip
        output = _attend(query, key, value, FlexLayout(*places), factor, softcap)
        output = fill_blind_rows(output, value, mask) if blind == "mean" else output
    return as_sdpa(output, query, layout), query.new_empty(0, dtype=torch.float32)


def place_keys(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    causal: bool,
    offset: int,
    window: int | None,
    scale: float,
    softcap: float | None,
    tau: float,
    segment_len: int | None,
    ranking: str,
    list_per: str,
    query_order: str,
    head_tau: Sequence[float],
    dense_heads: Sequence[int],
) -> list[Tensor]:
    """The tensors of a `FlexLayout`; under a window everything is visited in natural order."""
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    if key_mask is not None:
        key_mask = key_mask.expand(len(query), -1).contiguous()
    mask = AttentionMask(causal=causal, offset=offset, window=window, key_mask=key_mask)
    options = options_of(tau, None, segment_len, ranking, list_per, query_order, "auto", tuple(head_tau))
    plan = visits = None
    with torch.cuda.device_of(query):  # Triton launches on the current device
        if window is None:
            plan, visits = flex_forward.plan_visits(
                query, key, value, mask, scale=scale, softcap=softcap, options=options, dense_heads=dense_heads
            )  # fmt: skip
        return list(flex_forward.place(query, key, mask, plan, visits, with_gradient=True))


_library = torch.library.Library("s2o", "FRAGMENT")
_place_keys = define_operator(_library, place_keys)


@torch.library.register_fake("s2o::place_keys", lib=_library)
def _(
    query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None, causal: bool, offset: int, window: int | None,
    scale: float, softcap: float | None, tau: float, segment_len: int | None, *_: object,
) -> list[Tensor]:  # fmt: skip
    batch, heads, n_queries, _ = query.shape
    kv_heads, n_keys = key.shape[1:3]
    mask = AttentionMask(causal=causal, offset=offset, window=window, key_mask=key_mask)
    shape, pool = (batch, heads, kv_heads, n_queries, n_keys), 0
    plan = visits = None
    if window is None:
        length = segment_len or default_segment_len(n_queries)
        segments = n_segments(n_queries, length)
        numbers = {"dtype": torch.int32, "device": query.device}
        plan = Plan(
            segment_len=length,
            chunk_len=0,
            key_index=torch.empty(batch, kv_heads, segments, n_keys, **numbers),
            prefix_count=torch.empty(batch, segments, **numbers),
            query_order=None,
        )
        visits = torch.empty(batch, heads, segments, **numbers)
        pool = pool_blocks(mask, shape, length, key.shape[3] * key.element_size(), on_gpu=True, with_gradient=True)
    return list(lay_out(mask, shape=shape, device=query.device, plan=plan, visits=visits, pool=pool))


def _attend(
    query: Tensor, key: Tensor, value: Tensor, layout: FlexLayout, scale: float, softcap: float | None
) -> Tensor:
    """FlexAttention over placed keys, [B, Hq, Nq, Dv]."""

    def score(score: Tensor, *_: Tensor) -> Tensor:
        return score if softcap is None else softcap * torch.tanh(score / softcap)

    folded = query.unflatten(1, (key.shape[1], -1)).flatten(0, 1)
    keys, values = (flex_forward.take(x, layout.index) for x in (key, value))
    blocks = flex_forward.block_mask(query, keys, layout, with_gradient=True)
    options = torch_flex._apply_kernel_options(query, key, value, False, None)
    # What a mask_mod looks up is an argument here, where nobody captures it.
    table = (*blocks.as_tuple()[:-1], flex_forward.visible)
    output = torch.ops.higher_order.flex_attention(
        folded, keys, values, score, table, scale, options, (), layout[flex_forward.LOOKED_UP]
    )[0]
    return output.unflatten(0, key.shape[:2]).flatten(1, 2)
