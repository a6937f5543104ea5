"""The operator as a plain function, for eager users."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from s2o_compile.config import S2OConfig, config_or_default, refuse_keywords
from s2o_compile.errors import DenseExportWarning
from s2o_compile.kernels import dtensors, ops
from s2o_compile.kernels.core.call import AttentionCall, MaskTerms
from s2o_compile.kernels.core.layout import as_sdpa
from s2o_compile.kernels.core.validation import check_attn_mask, check_kinds, check_no_lse, check_numbers
from s2o_compile.kernels.dispatch import run_planned, warn_of_derivatives
from s2o_compile.kernels.exact.formula import attend_outside_torch
from s2o_compile.kernels.support.arguments import shown
from s2o_compile.kernels.support.define_op import can_skip_dispatcher
from s2o_compile.kernels.support.derivatives import is_differentiated
from s2o_compile.kernels.support.dtensors import is_dtensor
from s2o_compile.kernels.support.errors import InputError, warn
from s2o_compile.kernels.support.torch_compile import is_exporting, never_captured
from s2o_compile.planning import S2OPlan

_INSTEAD = {
    "is_causal": "Write causal=True, causal_offset=0. Without an offset the last query is aligned with the last key.",
    "enable_gqa": "Leave it out: query heads share key/value heads wherever there are more of them.",
    "dropout_p": "Leave it out: there is no dropout.",
}
"""SDPA's keywords, and what to write for them."""


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    key_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    sinks: Tensor | None = None,
    causal: bool = False,
    causal_offset: int | None = None,
    window: int | None = None,
    attention_chunk: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    fully_masked: str = "zeros",
    return_lse: bool = False,
    dense_heads: Sequence[int] = (),
    config: S2OConfig | None = None,
    plan: S2OPlan | None = None,
    blind: str | None = None,
    **unknown: object,
) -> Tensor | tuple[Tensor, Tensor]:
    """Sparse attention by ranked keys and early stop (S2O, arXiv 2602.22575).

    Legend: B batch, Hq query heads, Hkv key/value heads, Nq queries, Nk keys, D and Dv head dims (at most 512).

    Args:
        query: [B, Hq, Nq, D], float16, bfloat16 or float32, any strides.
        key: [B, Hkv, Nk, D], Hq divisible by Hkv; heads are shared, never repeated.
        value: [B, Hkv, Nk, Dv]; Dv may be larger or smaller than D.
        key_mask: bool [B, Nk] or [1, Nk], True where a key may be attended (padding is False).
        attn_mask: Any mask that SDPA takes, instead of all arguments about which keys are seen: bool (True for a key to
            attend) or added to the scores, of rank 2 to 4 and broadcastable to [B, Hq, Nq, Nk]. From ``min_seq_len`` on
            it is read, which waits for the device: if every value agrees with a causal, sliding or padding mask, that
            runs; under any other mask SDPA does.
        sinks: Floating [Hq], one more logit for each query head: it takes its share of the softmax, and its value is
            zero. A query that sees no key gets zeros beside a sink, and what ``fully_masked`` says beside one of -inf.
        causal: Key j is visible to query i iff ``j <= i + causal_offset``.
        causal_offset: Tokens; None aligns the last query with the last key (``Nk - Nq``), which is what a cached
            prefill wants. SDPA's ``is_causal=True`` is ``causal_offset=0``.
        window: Sliding window in tokens, the query's own position included; computed exactly. Needs ``causal``.
        attention_chunk: Chunked attention (Llama 4): the keys are cut into chunks of this many tokens, and a query
            sees only those of the chunk it stands in. Every chunk is ranked, or runs dense, by itself. Needs
            ``causal``.
        scale: Softmax scale; None for ``1 / sqrt(D)``. Under 0.0 all visible keys weigh the same; SDPA with
            ``is_causal=True`` gives NaN there on a CPU, because it multiplies -inf by the scale.
        softcap: Positive bound of the logits: ``softcap * tanh(q . k * scale / softcap)``, before the mask. None for
            none. SDPA has neither softcap nor sinks: short lengths run exactly in position order instead.
        fully_masked: Output of a query that sees no key: "zeros", or "mean" for the mean of all Nk values of its head.
            A finite additive mask (``finfo.min``) gives that mean in SDPA and in eager attention.
        return_lse: Whether to return the log-sum-exp too.
        dense_heads: Key/value heads whose groups of query heads run dense beside the sparse ones. It stands for
            ``config.dense_heads``, which goes by the names of sites in a model: a call of this function has none.
        config: Quality and implementation; None for the defaults. Short lengths run dense, see ``min_seq_len``.
        plan: Of `s2o_compile.plan`, for a call of the same shapes, dtype, device and mask: keys are not ranked again.
            The mask is given as without a plan, and compared with the plan's. It runs at every length, and goes by the
            ``tau``, ``error`` and ``implementation`` of ``config`` alone. Under torch.compile it breaks the graph.
        blind: The old name of ``fully_masked``.
        **unknown: None: a keyword that this function does not have raises TypeError, which says what to write instead.

    Returns:
        Output [B, Hq, Nq, Dv] in the query's dtype and SDPA's layout. With ``return_lse`` also the natural
        log-sum-exp of the visited logits and the sink, float32 [B, Hq, Nq]; -inf for a query that sees none.

    Raises:
        InputError: Shapes, dtypes, devices or numbers that do not fit; the message says what to do.
        ImplementationUnavailableError: ``config.implementation`` names one that cannot run here.

    Inputs that require grad, in grad mode, are attended densely and stay differentiable: by SDPA, or with softcap or
    sinks in plain torch, which holds all Nq x Nk logits. Derivatives in forward mode (``torch.func.jvp``,
    ``dual_level``) and of derivatives go through plain torch, too: SDPA's kernels have none. In the forward of an
    ``autograd.Function``, which a reentrant checkpoint runs again with gradients, attention is dense.
    While ``torch.onnx.export`` looks on, everything is attended densely.
    """
    if blind is not None:
        warn("blind is now called fully_masked; the old name will go.", DeprecationWarning)
        fully_masked = blind
    if unknown:
        refuse_keywords("attention", unknown, _INSTEAD)
    check_kinds(query=query, key=key, value=value, key_mask=key_mask, attn_mask=attn_mask, sinks=sinks)
    config = None if config is None else config_or_default(config, "attention")
    numbers = check_numbers(
        causal=causal, causal_offset=causal_offset, window=window, attention_chunk=attention_chunk, scale=scale,
        softcap=softcap, dense_heads=dense_heads, return_lse=return_lse,
    )  # fmt: skip
    given: dict[str, Any] = {"causal": causal, "fully_masked": fully_masked, **numbers._asdict()}
    dense_heads = given.pop("dense_heads")
    if attn_mask is not None:
        others = {"key_mask": key_mask, "plan": plan, **{name: given[name] for name in MaskTerms.__annotations__}}
        others |= {"causal": causal or None, "return_lse": return_lse or None}
        named = [name for name, argument in others.items() if argument is not None]
        if named:
            raise InputError(
                "attn_mask",
                expected="no other argument about which keys are seen, and no return_lse",
                got=", ".join(named),
                remedy="Merge them into attn_mask, or leave it out.",
            )
        return _masked(query, key, value, attn_mask, sinks, given, dense_heads, config)
    if _leaves_for_onnx():
        check_no_lse(return_lse)
        call = AttentionCall.of(query, key, value, key_mask, sinks, dense_heads=dense_heads, **given)
        return attend_outside_torch(call)
    if is_differentiated(query, key, value, sinks):
        tensors = (query, key, value, key_mask, sinks)
        output, _ = ops.differentiable_attention(*tensors, return_lse=return_lse, dense_heads=dense_heads, **given)
        shortest = 0 if plan is not None else (config or S2OConfig()).min_seq_len
        warn_of_derivatives(query, key, shortest)
        return output
    if plan is not None:
        if not isinstance(plan, S2OPlan):
            raise InputError("plan", expected="an S2OPlan", got=shown(plan), remedy="Make one with s2o_compile.plan.")
        call = AttentionCall.of(query, key, value, key_mask, sinks, return_lse=return_lse, **given)
        output, lse = _over_plan(call, plan, dense_heads, config)
        return (output, lse) if return_lse and lse is not None else output
    if config is not None:
        given |= config.operator_options()
    attend = ops.attention
    if not can_skip_dispatcher(query, key, value, key_mask, sinks):
        attend = dtensors.attention if is_dtensor(query) else torch.ops.s2o.attention.default
    output, lse = attend(
        query, key, value, key_mask, sinks, return_lse=return_lse, dense_heads=list(dense_heads), **given
    )
    return (output, lse) if return_lse else output


def _leaves_for_onnx() -> bool:
    """Whether an exporter that has no operator for S2O looks on."""
    if not (is_exporting() and torch.onnx.is_in_onnx_export()):
        return False
    warn("attention runs densely in ONNX, which has no operator for S2O.", DenseExportWarning)
    return True


@never_captured
def _over_plan(
    call: AttentionCall, plan: S2OPlan, dense_heads: Sequence[int], config: S2OConfig | None
) -> tuple[Tensor, Tensor | None]:
    if dense_heads:
        raise InputError(
            "dense_heads",
            expected="none beside a plan, which ranks keys for all heads",
            got=list(dense_heads),
            remedy="Give these heads a tau of 0 in config.tau.",
        )
    mask = call.mask.for_batch(call.query.shape[0])
    plan.check(*call.tensors, mask.within(call.n_queries, call.n_keys))
    options = (config or S2OConfig()).options
    output, lse = run_planned(call.but(mask=plan.mask), plan.lists, plan.unvisited, options)
    return as_sdpa(output, call.query), lse


def _masked(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor, sinks: Tensor | None, given: dict[str, Any],
    dense_heads: Sequence[int], config: S2OConfig | None,
) -> Tensor:  # fmt: skip
    """Attention under a mask tensor, with the scale, softcap and ``fully_masked`` of the given arguments."""
    arguments = {name: given[name] for name in ("scale", "softcap", "fully_masked")}
    tensors = (query, key, value, attn_mask, sinks)
    if _leaves_for_onnx():
        check_attn_mask(attn_mask, query, key)
        return attend_outside_torch(AttentionCall.of(query, key, value, None, sinks, **arguments), attn_mask)
    if is_differentiated(*tensors):
        output, _ = ops.differentiable_masked_attention(*tensors, **arguments, dense_heads=dense_heads)
        warn_of_derivatives(query, key, (config or S2OConfig()).min_seq_len)
        return output
    options = {} if config is None else config.operator_options()
    attend = ops.masked_attention
    if not can_skip_dispatcher(*tensors):
        attend = dtensors.masked_attention if is_dtensor(query) else torch.ops.s2o.masked_attention.default
    return attend(*tensors, **arguments, dense_heads=list(dense_heads), **options)[0]
