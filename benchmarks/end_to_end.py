"""Time to first token of Llama-3.1-8B's shape with random weights: the model as it is against the optimized one.

    python benchmarks/end_to_end.py [--lengths 131072] [--density 0.1] [--json benchmarks/results/end-to-end-h100.json]

One prefill as ``generate`` does it: the key/value cache is filled, logits of the last position only.

    dense, as users run it    the original model, not compiled; transformers then calls SDPA with is_causal and no mask,
                              here by its flash backend, and once more by cuDNN
    dense, same graph         the optimized model's own compiled graph with its operator sent to dense flash: what
                              Inductor makes of the rest of the model is in both, so only attention differs
    S2O, density held         random weights have no structure that could stop a tile early. So every list is cut to the
                              density and walked to its end (``calls.held_density``): the time of a model whose tiles
                              stop there, and an output that means nothing. Ranking and ordering run in full.

    dense, torch.compile      with ``--compiled``: the original model through ``torch.compile``

"attention" is the time inside SDPA or the operator, by events; the bound on the speed-up is that of dense attention
removed altogether (Amdahl). Dense rows say how far their logits are from the first row's. Peak memory includes weights
and cache. ``--free`` adds a row with nothing cut: with random weights tiles walk most of their lists, the worst case.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import calls
import torch
from calls import DEVICE, DTYPE, ON_GPU
from results_file import Rows
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import s2o_compile
from s2o_compile import S2OConfig
from s2o_compile.kernels import dispatch as operator
from s2o_compile.kernels import ops as registration
from s2o_compile.kernels.core.call import AttentionCall
from s2o_compile.kernels.statistics import record_calls

WARM_UP = 1024
"""Tokens of the call before the dense ones that are timed: libraries load, nothing compiles."""


def llama(args: argparse.Namespace) -> Any:  # noqa: ANN401 (a transformers model)
    """LlamaForCausalLM with random weights; by default Llama-3.1-8B's shape."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        hidden_size=args.hidden,
        intermediate_size=args.hidden * 7 // 2,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // args.head_dim,
        num_key_value_heads=args.hidden // args.head_dim // 4,
        head_dim=args.head_dim,
        vocab_size=args.vocab,
        max_position_embeddings=max(args.lengths),
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )
    with torch.device(DEVICE):
        return AutoModelForCausalLM.from_config(config, dtype=DTYPE, attn_implementation="sdpa").eval()


class Stopwatch:
    """Time spent inside functions that ran while it was patched into them; on a GPU by events, so nothing waits."""

    def __init__(self) -> None:
        self._spans: list[tuple[Any, Any]] = []

    def around(self, function: Callable[..., object]) -> Callable[..., object]:
        """The function, timed."""

        def timed(*args: object, **keywords: object) -> object:
            start = self._now()
            output = function(*args, **keywords)
            self._spans.append((start, self._now()))
            return output

        return timed

    def _now(self) -> Any:  # noqa: ANN401 (an event or a time)
        if not ON_GPU:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @property
    def seconds(self) -> float:
        """The sum; call it once the device has finished."""
        if ON_GPU:
            return sum(start.elapsed_time(stop) for start, stop in self._spans) / 1e3
        return sum(stop - start for start, stop in self._spans)


@contextmanager
def dense_operator(backend: SDPBackend) -> Iterator[None]:
    """Inside the block every call of the operator runs dense, by this backend of SDPA."""
    dense = operator.attend_by_sdpa

    def attend(call: AttentionCall) -> Tensor:
        with sdpa_kernel(backend):
            return dense(call)

    to_dense = patch.object(operator, "choose_path", lambda *_, **__: "dense")
    with to_dense, patch.object(operator, "attend_by_sdpa", attend):
        yield


def prefill(model: Any, ids: Tensor) -> Tensor:  # noqa: ANN401 (a transformers model)
    """Logits of the last position [B, vocab]; the cache is filled and dropped."""
    return model(ids, use_cache=True, logits_to_keep=1).logits[:, -1]


def measure(
    model: Any,  # noqa: ANN401 (a transformers model)
    ids: Tensor,
    attention: tuple[object, str] | None,
    inside: AbstractContextManager[object],
    first: Tensor | None,
    repeats: int,
) -> dict[str, Any]:
    """Best time of a prefill, the part of it that is attention, peak memory, and the logits.

    Args:
        model: What to call.
        ids: int64 [1, N].
        attention: Object and name of the function that attention goes through; None where it is compiled.
        inside: What the calls run in.
        first: int64 [1, n] of a call that does not count, None for none.
        repeats: Prefills, of which the fastest counts.
    """
    gc.collect()
    if ON_GPU:
        torch.cuda.empty_cache()
    runs = []
    with inside:
        if first is not None:
            prefill(model, first)
        for _ in range(repeats):
            if ON_GPU:
                torch.cuda.reset_peak_memory_stats()
            watch = Stopwatch()
            logits = []
            watched = patch.object(*attention, watch.around(getattr(*attention))) if attention else nullcontext()
            with watched:
                seconds = calls.seconds(lambda: logits.append(prefill(model, ids)))  # noqa: B023 (called at once)
            found = {"seconds": round(seconds, 4)} | ({"attention_s": round(watch.seconds, 4)} if attention else {})
            if ON_GPU:
                found["peak_GiB"] = round(torch.cuda.max_memory_allocated() / 2**30, 1)
            runs.append(found | {"logits": logits[0]})
    return min(runs, key=lambda run: run["seconds"])


def bench_length(length: int, model: Any, args: argparse.Namespace, rows: Rows) -> None:  # noqa: ANN401
    """All rows of one length."""
    ids = torch.randint(0, args.vocab, (1, length), device=DEVICE)
    baseline: dict[str, Any] = {}

    def row(what: str, measured: Callable[[], dict[str, Any]]) -> None:
        def compared() -> dict[str, object]:
            found = measured()
            logits = found.pop("logits").float()
            baseline.update(baseline or {"seconds": found["seconds"], "logits": logits})  # flash, as users run it
            found["speedup"] = round(baseline["seconds"] / found["seconds"], 2)
            if "attention_s" in found:
                share = found["attention_s"] / found["seconds"]
                found["attention_share"] = round(share, 3)
                found |= {"bound": round(1 / max(1 - share, 1e-3), 2)} if what.startswith("dense") else {}
            if what.startswith("dense"):
                difference = (logits - baseline["logits"]).norm() / baseline["logits"].norm()
                found["logits_difference"] = round(difference.item(), 5)
            return found

        rows.measure("time to first token", {"what": what, "tokens": length}, compared)

    through_sdpa = (torch.nn.functional, "scaled_dot_product_attention")
    through_s2o = (registration, "run")
    backends = {"flash": SDPBackend.FLASH_ATTENTION} | ({"cuDNN": SDPBackend.CUDNN_ATTENTION} if ON_GPU else {})
    short = ids[:, :WARM_UP]
    for name, backend in backends.items():
        inside = sdpa_kernel(backend)
        row(f"dense {name}, as users run it", partial(measure, model, ids, through_sdpa, inside, short, args.repeats))

    if args.compiled:
        torch.compiler.reset()
        compiled = torch.compile(model, dynamic=False)
        row("dense, torch.compile", partial(measure, compiled, ids, None, nullcontext(), ids, args.repeats))
    torch.compiler.reset()
    fast = s2o_compile.optimize(model, S2OConfig(min_seq_len=0, inner_backend=args.inner_backend))
    held = partial(calls.held_density, args.density, length)

    def sparse(hold: Callable[[], AbstractContextManager[object]], first: Tensor | None) -> dict[str, Any]:
        with record_calls() as recorded:
            found = measure(fast, ids, through_s2o, hold(), first, args.repeats)
        prefills = args.repeats + (first is not None)
        if len(recorded) != args.layers * prefills:
            raise RuntimeError(f"{len(recorded)} calls of S2O in {prefills} prefills of {args.layers} layers")
        return found | {"density": round(sum(call.density for call in recorded) / len(recorded), 4)}

    row(f"S2O, lists cut to density {args.density}", partial(sparse, held, ids))  # the first call compiles
    if args.free:
        row("S2O, nothing cut", partial(sparse, nullcontext, None))
    if args.compiled:
        return
    same = partial(measure, fast, ids, through_s2o, dense_operator(SDPBackend.FLASH_ATTENTION), None, args.repeats)
    row("dense flash, same graph", same)


@torch.no_grad()
def main() -> None:
    """Run and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[131072])
    parser.add_argument("--density", type=float, default=0.1)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4096, help="a multiple of 4 head dims")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--vocab", type=int, default=128256)
    parser.add_argument("--repeats", type=int, default=1, help="prefills a row, of which the fastest counts")
    parser.add_argument("--inner-backend", default="inductor")
    parser.add_argument("--free", action="store_true", help="also time S2O with nothing cut")
    parser.add_argument("--compiled", action="store_true", help="also time torch.compile, not the same graph")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    model = llama(args)
    shape = {"layers": args.layers, "hidden": args.hidden, "head_dim": args.head_dim, "vocab": args.vocab}
    rows = Rows(args.json, density_held=args.density, dtype=str(DTYPE).removeprefix("torch."), model=shape)
    for length in args.lengths:
        bench_length(length, model, args, rows)


if __name__ == "__main__":
    main()
