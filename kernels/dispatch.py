"""One call of the operator, from a checked call to its output: choose a path and an executor, run it, record it."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from s2o_compile.kernels import planner, schedule
from s2o_compile.kernels.core import tuned
from s2o_compile.kernels.core.call import AttentionCall
from s2o_compile.kernels.core.mask import AttentionMask
from s2o_compile.kernels.core.options import OperatorOptions
from s2o_compile.kernels.core.plan import TILE_LEN, Plan
from s2o_compile.kernels.core.result import Result, empty_result
from s2o_compile.kernels.core.tuned import why_never
from s2o_compile.kernels.core.validation import sizes_of
from s2o_compile.kernels.exact.chunked import attend_chunks
from s2o_compile.kernels.exact.epilogue import finish
from s2o_compile.kernels.exact.sdpa import attend_by_sdpa, needs_pairs, sdpa_causal
from s2o_compile.kernels.impl.cpp import exact as cpp_exact
from s2o_compile.kernels.impl.flex import forward as flex_forward
from s2o_compile.kernels.impl.torch import exact as torch_exact
from s2o_compile.kernels.observe import ObservedCall, observe, observing
from s2o_compile.kernels.ranking.unvisited import blocks_to_visit
from s2o_compile.kernels.statistics import count, record, recording
from s2o_compile.kernels.support import cpp_library
from s2o_compile.kernels.support.errors import DenseGradientWarning, ImplementationUnavailableError, warn

EXACT: dict[str, Callable[[AttentionCall], Result]] = {
    "torch": torch_exact.attend_exact,
    "cpp": cpp_exact.attend_exact,
    "flex": flex_forward.attend_exact,
}
"""Attention over every visible key, by implementation."""

try:
    from s2o_compile.kernels.impl.triton import exact as triton_exact
    from s2o_compile.kernels.impl.triton import forward as triton_forward
    from s2o_compile.kernels.impl.triton.packed import attend_packed

    EXACT["triton"] = triton_exact.attend_exact
except ImportError:  # no triton here: it is then never chosen
    triton_forward = triton_exact = attend_packed = None


FLEX_DEVICES = ("xpu",)
"""Devices with FlexAttention kernels of torch.compile, for which our Triton kernels were not made."""

WIDEST_FLOAT32 = 256
"""Largest head dim whose float32 query tile the Triton kernels can hold on chip."""


def choose_path(call: AttentionCall, min_seq_len: int | str) -> str:
    """Choose "s2o", "window" or "dense" from lengths alone: nothing waits for the device and no graph recompiles."""
    if call.scale <= 0 or is_short(call.query, call.n_queries, call.n_keys, min_seq_len):
        return "dense"
    return "s2o" if call.mask.window is None else "window"


def is_short(query: Tensor, n_queries: int, n_keys: int, min_seq_len: int | str) -> bool:
    """Whether dense attention is the faster one at these lengths, on the query's device and in its dtype."""
    return n_queries < TILE_LEN or tuned.is_short(n_keys, min_seq_len, query.device, query.dtype)


def warn_of_derivatives(query: Tensor, key: Tensor, min_seq_len: int | str) -> None:
    """Say of a call that could be sparse that it is dense, because derivatives of it are wanted.

    A compiled graph says so itself.
    """
    if not torch.compiler.is_compiling() and not is_short(query, query.shape[2], key.shape[2], min_seq_len):
        warn_of_dense(key.shape[2])


def warn_of_dense(n_keys: int) -> None:
    """Say that attention over so many keys is dense, because derivatives of it are wanted."""
    warn(
        f"s2o attention over {n_keys} keys is dense: derivatives of it are wanted, and the sparse operator has "
        "none. Call it under torch.no_grad(), or detach its inputs.",
        DenseGradientWarning,
    )


def choose_implementation(wanted: str, query: Tensor) -> str:
    """Choose "triton", "cpp", "torch" or "flex"; a named implementation runs or is refused, and is never replaced."""
    device, dtype, head_dim = query.device, query.dtype, query.shape[3]
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
    if wanted == "cpp" and device.type != "cpu":
        raise ImplementationUnavailableError(
            f'implementation="cpp": expected tensors of the CPU, got {device.type}. Move the model to the CPU, or use '
            '"auto".'
        )
    if wanted == "cpp" and not cpp_library.serves(device):
        raise ImplementationUnavailableError(
            f'implementation="cpp": {cpp_library.why_not()}. {cpp_library.remedy()}, or use "auto".'
        )
    if wanted != "auto":
        return wanted
    if device.type in FLEX_DEVICES:
        return "flex"
    if device.type == "cuda" and triton_forward is not None and fits:
        return "triton"
    return "cpp" if cpp_library.serves(device) else "torch"


def run_short(
    query: Tensor, key: Tensor, value: Tensor, *, causal: bool, causal_offset: int | None, scale: float | None,
    options: OperatorOptions, site: str = "",
) -> Tensor | None:  # fmt: skip
    """SDPA's output [B, Hq, Nq, D] for the usual short call, at SDPA's host time; None for every other call.

    This is the fast path of calls that `run` would hand to SDPA unchanged. Their attention takes a few microseconds, so
    they cannot afford a mask object or a second look at their tensors. Everything else, errors included, is left to
    `run`. Arguments as of `AttentionCall.of`, under no mask but the causal one: every row sees a key.
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
    never = _why_never(query, n_queries, n_keys, options)
    if recording():
        mask = AttentionMask(causal=causal, offset=offset if causal else 0)
        call = AttentionCall(query=query, key=key, value=value, mask=mask, scale=scale or 0.0, site=site)
        record(call, "dense", never=never)
    else:
        count("dense", never)
    grouped = heads != kv_heads
    return scaled_dot_product_attention(query, key, value, is_causal=is_causal, scale=scale, enable_gqa=grouped)


def run(call: AttentionCall, options: OperatorOptions, output: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Attention output [B, Hq, Nq, Dv] and, if asked, its log-sum-exp float32 [B, Hq, Nq].

    ``output``, with a unit last stride, may be used for the output, but need not be.
    """
    options.check_heads(call.query.shape[1])
    if call.pages is not None and not reads_pages(call, options):
        call = call.out_of_pages()
    mask = call.mask.for_batch(call.query.shape[0])
    call = call if mask is call.mask else call.but(mask=mask)
    chunk = mask.attention_chunk
    if chunk is not None and 0 <= mask.offset <= chunk - call.n_queries:  # one chunk holds all queries
        call, chunk = call.but(mask=replace(mask, attention_chunk=None)), None
    if chunk is None:
        return finish(call, *_attend(call, options, output))
    return finish(call, *attend_chunks(call, lambda part: _attend(part, options)))


def run_planned(
    call: AttentionCall, plan: Plan, unvisited: Tensor, options: OperatorOptions
) -> tuple[Tensor, Tensor | None]:
    """The results of `run` over a plan made before, under its mask; options say tau, error and the implementation.

    ``unvisited`` is of ``estimate_unvisited``, for implementations that decide before they start.
    """
    options.check_heads(call.query.shape[1])
    implementation = choose_implementation(options.implementation, call.query)
    ready, tau = call.over_seen_keys().for_kernels(), options.tau_on(call.query.device)
    # As the operator does: a product of float32 must not become one of bfloat16 on the way.
    with ready.on_device(), torch.autocast(call.query.device.type, enabled=False):
        if implementation == "flex":
            _refuse_budget(options)
            result = flex_forward.attend(ready, plan, blocks_to_visit(unvisited, tau))
        else:
            plan = replace(plan, tail_value=planner.tail_values(ready, plan.segment_len, implementation))
            result = empty_result(ready.query, ready.value.shape[3])
            schedule.attend_planned(ready, plan, tau, options.ceiling, implementation, result)
        measured = measure(ready, result, options)
    record(call, "s2o", result.computed, measured, unheld_error=_unheld(options, call.query))
    return finish(call, result.output, result.lse)


def measure(call: AttentionCall, result: Result, options: OperatorOptions) -> Tensor | None:
    """The sums of a call's sampled error, if anybody records; beside FlexAttention the device's own way measures."""
    if not recording():
        return None
    implementation = choose_implementation(options.implementation, call.query)
    if implementation == "flex":
        implementation = choose_implementation("auto", call.query)
    return schedule.measure_error(call, result, implementation)


def _refuse_budget(options: OperatorOptions) -> None:
    """FlexAttention decides before it starts how many keys a tile visits, and cannot go on.

    It leaves out the default's ceiling, which nobody asked for; records say so (`_unheld`).
    """
    if options.ceiling and not options.has_default_ceiling:
        raise ImplementationUnavailableError(
            f'implementation="flex": expected a tau alone, got error={options.error:g}, which it cannot measure. Give '
            "a tau, drop the budget of a calibrated configuration by dataclasses.replace(config, tau=0.5, error=None), "
            'or use "auto" on a CPU or a CUDA device.'
        )


def _unheld(options: OperatorOptions, query: Tensor) -> float | None:
    """The ceiling of a sparse call whose executor measures nothing, if anybody records; None where it is held."""
    by_flex = recording() and choose_implementation(options.implementation, query) == "flex"
    return options.ceiling if by_flex else None


def reads_pages(call: AttentionCall, options: OperatorOptions) -> bool:
    """Whether the executor of a call reads pages in place, and no observer wants to look at its keys."""
    return choose_implementation(options.implementation, call.query) == "triton" and not observing()


def settle(call: AttentionCall, options: OperatorOptions) -> tuple[AttentionCall, str]:
    """A call without a window that hides nothing, and its path."""
    mask, n_keys = call.mask, call.n_keys
    if mask.window is not None and mask.window >= n_keys + max(call.n_queries + mask.offset - n_keys, 0):
        call = call.but(mask=replace(mask, window=None))
    path = choose_path(call, options.min_seq_len)
    return call, "dense" if path == "s2o" and len(call.dense_heads) == call.key.shape[1] else path


def _attend(
    call: AttentionCall, options: OperatorOptions, output: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Attention without chunks, by the path that the lengths ask for; SDPA returns no log-sum-exp.

    Sinks are for observers: `finish` puts them in.
    """
    call, path = settle(call, options)
    never = _why_never(call.query, call.n_queries, call.n_keys, options, call.scale) if path == "dense" else ""
    # A long mask takes more memory pair by pair than keys and values: there our own executor runs.
    by_length = choose_path(call, options.min_seq_len) == "dense"
    by_sdpa = call.pages is None and (by_length or not needs_pairs(call.mask, call.n_keys, call.scale))
    if path == "dense" and by_sdpa and not call.wants_lse and call.softcap is None:
        if options.implementation != "auto":
            choose_implementation(options.implementation, call.query)  # or refuse
        record(call, path, never=never)
        return attend_by_sdpa(call), None
    replaced = False
    if path == "s2o" and observing():
        observed = ObservedCall(**vars(call.but(kept=None)), options=options, execute=execute)
        result = observe(observed)
        replaced = result is not vars(observed).get("result")
    else:
        result = execute(call, path, options, output)
    by_s2o = path == "s2o" and not replaced
    measured = measure(call, result, options) if by_s2o else None
    unheld = _unheld(options, call.query) if by_s2o else None
    record(call, path, result.computed, measured, unheld_error=unheld, never=never)
    return result.output, result.lse


def _why_never(query: Tensor, n_queries: int, n_keys: int, options: OperatorOptions, scale: float = 1.0) -> str:
    """`why_never` of a call, or that its scale makes it dense; empty if its queries alone do."""
    if n_queries < TILE_LEN:
        return ""
    if scale <= 0 and not is_short(query, n_queries, n_keys, options.min_seq_len):
        return f"a scale of {scale:g}, by which keys cannot be ranked; expected one above 0"
    return why_never(n_keys, options.min_seq_len, query.device, query.dtype)


def execute(
    call: AttentionCall,
    path: str,
    options: OperatorOptions,
    output: Tensor | None = None,
    lse: Tensor | None = None,
) -> Result:
    """Attention by our own executors: over a plan on the path "s2o", else over every visible key.

    Sparse results go to ``output`` and ``lse``, if they are given.
    """
    implementation = choose_implementation(options.implementation, call.query)
    call = (call.over_seen_keys() if path == "s2o" else call).for_kernels()
    with call.on_device():
        if path != "s2o":
            return EXACT[implementation](call)
        if implementation == "flex":
            _refuse_budget(options)
            return flex_forward.attend(call, *planner.plan_visits(call, options))
        return schedule.attend(call, options, implementation, EXACT[implementation], output, lse)
