"""Attention calls that the benchmarks share: inputs, dense rivals, the operator at a held density, and the clock.

Without a GPU everything runs in float32 on the CPU: small shapes then try a benchmark out.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from unittest.mock import patch

import cut
import torch
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from s2o_compile.cli.tune import add_topics, cut_to_density
from s2o_compile.kernels import dispatch as operator
from s2o_compile.kernels import prepared, schedule
from s2o_compile.kernels.core.call import AttentionCall
from s2o_compile.kernels.core.mask import AttentionMask
from s2o_compile.kernels.core.options import OperatorOptions
from s2o_compile.kernels.core.plan import Plan
from s2o_compile.kernels.impl.cpp import forward as cpp_forward
from s2o_compile.kernels.impl.torch import forward as torch_forward
from s2o_compile.kernels.impl.triton import forward as triton_forward
from s2o_compile.kernels.planner import Planner, build_plan
from s2o_compile.kernels.statistics import record_calls
from s2o_compile.speed.measure import UNTIMED

ON_GPU = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if ON_GPU else ("cpu", torch.float32)
CAUSAL = AttentionMask(causal=True)
SDPA_BACKENDS = {"SDPA flash": SDPBackend.FLASH_ATTENTION} | (
    {"SDPA cuDNN": SDPBackend.CUDNN_ATTENTION} if ON_GPU else {}
)
LONG_CALL = 100.0
"""Milliseconds from which three runs give a call's time well enough."""

Inputs = tuple[Tensor, Tensor, Tensor]


def make_inputs(kind: str, length: int, heads: int, kv_heads: int, head_dim: int, batch: int = 1) -> Inputs:
    """Query, key, value, laid out [B, N, H, D] as a model's projections leave them: "topical", or "random" noise."""
    torch.manual_seed(0)

    def noise(h: int) -> Tensor:
        return torch.randn(batch, length, h, head_dim, device=DEVICE, dtype=DTYPE).transpose(1, 2)

    query, key, value = noise(heads), noise(kv_heads), noise(kv_heads)
    if kind == "topical":
        add_topics(query, key)
    return query, key, value


def synchronize() -> None:
    """Wait for the GPU, where there is one."""
    if ON_GPU:
        torch.cuda.synchronize()


def seconds(call: Callable[[], object]) -> float:
    """Time of one call, the device's work included."""
    synchronize()
    start = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - start


def milliseconds(call: Callable[[], object]) -> float:
    """Median time of a call, after some that do not count (`UNTIMED`)."""
    for _ in range(UNTIMED.get(DEVICE, 1)):
        call()
    first = seconds(call) * 1e3
    if first < LONG_CALL and ON_GPU:
        return triton.testing.do_bench(call, warmup=50, rep=300, return_mode="median")
    return statistics.median([first, *(seconds(call) * 1e3 for _ in range(2))])


def sdpa_calls(query: Tensor, key: Tensor, value: Tensor, *, causal: bool = True) -> dict[str, Callable[[], Tensor]]:
    """SDPA by each of its fast backends."""

    def through(backend: SDPBackend) -> Callable[[], Tensor]:
        def call() -> Tensor:
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=True)

        return call

    return {name: through(backend) for name, backend in SDPA_BACKENDS.items()}


def fastest(calls: dict[str, Callable[[], Tensor]], clock: Callable[..., float] = milliseconds) -> tuple[str, float]:
    """Name and time of the fastest call; a backend that refuses these inputs does not take part."""
    times = {}
    for name, call in calls.items():
        try:
            times[name] = clock(call)
        except RuntimeError as error:
            print(f"  {name} does not run here: {str(error).partition(chr(10))[0]}", flush=True)
    if not times:
        raise RuntimeError("no dense backend runs on these inputs")
    return min(times.items(), key=lambda item: item[1])


@contextmanager
def held_density(density: float, length: int, *, causal: bool = True) -> Iterator[None]:
    """Inside the block calls of ``length`` tokens cut their lists to a density and walk them to the end.

    Ranking and ordering are as ever, and so are calls whose launches are known: on a GPU a kernel cuts. No error is
    measured.
    """
    plan, to_density = Planner.plan, cut.by_kernel if ON_GPU else cut_to_density

    def cut_plan(*given: object) -> Plan:
        return to_density(plan(*given), density, length, causal=causal)  # pyright: ignore

    def to_the_end(call: AttentionCall, plan: Plan, _tau: object, _error: object, *where: object) -> None:
        attend(call, plan, 0.0, None, *where)  # pyright: ignore

    attend = schedule.attend_planned
    prepared.forget()  # launches of calls that are not cut
    try:
        with patch.object(Planner, "plan", cut_plan), patch.object(schedule, "attend_planned", to_the_end):
            yield
    finally:
        prepared.forget()  # and of those that are: a row that fails is not the last


def run(inputs: Inputs, mask: AttentionMask = CAUSAL, **options: object) -> Tensor:
    """The operator's output; it is never dense for being short."""
    chosen = OperatorOptions(**{"min_seq_len": 0, **options})  # pyright: ignore
    return operator.run(call_of(inputs, mask), chosen)[0]


def call_of(inputs: Inputs, mask: AttentionMask = CAUSAL) -> AttentionCall:
    """The call of these tensors."""
    query, key, value = inputs
    return AttentionCall(query=query, key=key, value=value, mask=mask, scale=query.shape[3] ** -0.5)


def time_held(
    inputs: Inputs, density: float, mask: AttentionMask = CAUSAL, *, ranking: str = OperatorOptions().ranking
) -> dict[str, float]:
    """The operator at a held density: its time, that of the forward kernel in it, and what was computed."""
    batch, heads, length, head_dim = inputs[0].shape
    implementation = operator.choose_implementation("auto", inputs[0])
    executor = {"triton": triton_forward, "cpp": cpp_forward, "torch": torch_forward}[implementation]
    with held_density(density, length, causal=mask.causal):
        with record_calls() as calls:
            run(inputs, mask, ranking=ranking)
        real = calls[0].density
        whole_ms = milliseconds(partial(run, inputs, mask, ranking=ranking))
        call = call_of(inputs, mask)
        plan = build_plan(call, OperatorOptions(ranking=ranking), implementation)
        forward = partial(executor.attend, call, plan, 0.0)
        forward_ms = milliseconds(forward)
    flops = 4 * head_dim * heads * real * mask.area(batch, length, length).sum().item()
    return {
        "density": round(real, 4),
        "s2o_ms": round(whole_ms, 3),
        "forward_ms": round(forward_ms, 3),
        "forward_tflops": round(flops / forward_ms / 1e9, 1),
    }


def check_exact(inputs: Inputs, mask: AttentionMask = CAUSAL, *, prefix: int = 4096) -> float:
    """Largest error of the operator at tau=0 relative to SDPA's own, on a prefix; both against float64.

    Raises:
        RuntimeError: It is not below 2: nothing should be reported then.
    """
    query, key, value = (x[:, :, :prefix] for x in inputs)
    ours = run((query, key, value), mask, tau=0.0)
    if mask.window is None and mask.key_mask is None:
        dense, sees = partial(scaled_dot_product_attention, is_causal=mask.causal, enable_gqa=True), torch.tensor(True)
    else:  # with a mask, SDPA's fused kernels want equal head counts
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
        seen = mask.visible_pairs(query.shape[2], key.shape[2], query.device)
        dense, sees = partial(scaled_dot_product_attention, attn_mask=seen), seen.any(-1, keepdim=True)
    exact = dense(query.double(), key.double(), value.double())

    def error(output: Tensor) -> float:
        """The largest, over the rows that see a key: backends differ in what the others get."""
        return (output - exact).masked_fill(~sees.to(output.device), 0.0).abs().max().item()

    ratio = error(ours) / error(dense(query, key, value))
    if not ratio < 2:
        raise RuntimeError(f"S2O at tau=0 is {ratio:.1f}x further from float64 than SDPA: no time is reported")
    return ratio
