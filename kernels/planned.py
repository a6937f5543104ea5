"""One call of the operator over a plan that was made before: check, execute, record."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from s2o_compile.kernels.core import head_tau
from s2o_compile.kernels.core.mask import AttentionMask
from s2o_compile.kernels.core.options import OperatorOptions
from s2o_compile.kernels.core.plan import Plan
from s2o_compile.kernels.dispatch import choose_implementation, triton_forward
from s2o_compile.kernels.exact.fully_masked_rows import fill_fully_masked_rows
from s2o_compile.kernels.exact.sinks import add_sinks
from s2o_compile.kernels.impl.flex import forward as flex_forward
from s2o_compile.kernels.impl.torch import forward as torch_forward
from s2o_compile.kernels.planner import tail_values
from s2o_compile.kernels.ranking.unvisited import blocks_to_visit
from s2o_compile.kernels.statistics import record


def run_planned(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: AttentionMask,
    plan: Plan,
    unvisited: Tensor,
    *,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    fully_masked: str,
    return_lse: bool,
    options: OperatorOptions,
) -> tuple[Tensor, Tensor | None]:
    """Attention output [B, Hq, Nq, Dv] and, if asked, its log-sum-exp float32 [B, Hq, Nq].

    Args:
        query: [B, Hq, Nq, D].
        key: [B, Hkv, Nk, D].
        value: [B, Hkv, Nk, Dv].
        mask: That of the plan; its key mask is contiguous, [B, Nk].
        plan: Lists of every segment.
        unvisited: Of ``estimate_unvisited``, for implementations that decide before they start.
        scale: Softmax scale.
        softcap: Bound of the logits, None for none.
        sinks: Floating [Hq], or None.
        fully_masked: What a query that sees no key gets.
        return_lse: Whether the log-sum-exp is wanted.
        options: How to stop and run; rankings and lengths are the plan's.
    """
    head_tau.check(options.tau, query.shape[1])
    implementation = choose_implementation(options.implementation, query.device, query.dtype, query.shape[3])
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    tau = options.tau if isinstance(options.tau, float | int) else head_tau.on_device(options.tau, query.device)
    wants_lse = return_lse or sinks is not None
    with torch.cuda.device_of(query):  # Triton launches on the current device
        if implementation == "flex":
            visits = blocks_to_visit(unvisited, tau)
            result = flex_forward.attend_planned(
                query, key, value, mask, plan, visits, scale=scale, softcap=softcap, wants_lse=wants_lse
            )
        else:
            executor = triton_forward if implementation == "triton" else torch_forward
            assert executor is not None
            tail_value = tail_values(
                value,
                mask,
                n_queries=query.shape[2],
                segment_len=plan.segment_len,
                implementation=implementation,
            )
            plan = replace(plan, tail_value=tail_value)
            result = executor.attend(query, key, value, mask, plan, scale=scale, tau=tau, softcap=softcap)
    record("", "s2o", query, key, mask, result.computed)
    output, lse = result.output, result.lse
    if sinks is not None:
        output, lse = add_sinks(output, lse, sinks)
    if fully_masked == "mean":
        output = fill_fully_masked_rows(output, value, mask, sinks)
    return output, lse if return_lse else None
