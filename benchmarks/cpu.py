"""S2O on a CPU against dense SDPA, by the default and at a held density; ratios within one run.

    python benchmarks/cpu.py [--lengths 4096 8192 16384] [--json benchmarks/results/cpu.json]

Causal, topical input, every dtype and shape of heads. "default" is one call with the default configuration. With
``--densities`` every list is also cut to the density and walked to its end (``calls.held_density``), so that figures do
not hang on the input. "whole" is the operator with ranking, "forward" the attention over a finished plan. Dense and
S2O take turns, and each counts its fastest run: other work on the cores only ever adds. ``--threads 1`` counts the
processor time of one thread, which other work disturbs less.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import calls
import torch
from results_file import Rows

from s2o_compile.kernels.core import tuned
from s2o_compile.kernels.core.options import OperatorOptions
from s2o_compile.kernels.impl.cpp import forward as cpp_forward
from s2o_compile.kernels.impl.torch import forward as torch_forward
from s2o_compile.kernels.planner import build_plan
from s2o_compile.kernels.statistics import record_calls
from s2o_compile.kernels.support.torch_compat import has_amx

EXECUTORS = {"cpp": cpp_forward, "torch": torch_forward}


def bench(
    length: int, density: float | None, shape: tuple[int, int, int], args: argparse.Namespace
) -> dict[str, object]:
    """One length at one density, None for that of the default configuration."""
    inputs = calls.make_inputs("topical", length, *shape)
    calls.check_exact(inputs, prefix=2048)
    options = OperatorOptions(implementation=args.implementation)
    (dense,) = calls.sdpa_calls(*inputs).values()
    with nullcontext() if density is None else calls.held_density(density, length):
        call = calls.call_of(inputs)
        plan = build_plan(call, options, args.implementation)
        forward = partial(EXECUTORS[args.implementation].attend, call, plan, options.tau)
        whole = partial(calls.run, inputs, implementation=args.implementation)
        with record_calls() as recorded:
            whole()
        competitors = {"dense": dense, "whole": whole, "forward": forward}
        best = dict.fromkeys(competitors, float("inf"))
        for _ in range(args.rounds):
            for name, call in competitors.items():
                best[name] = min(best[name], seconds(call))
    return {
        "density": round(recorded[0].density, 3),
        **{f"{name}_s": round(seconds, 3) for name, seconds in best.items()},
        "speedup": round(best["dense"] / best["whole"], 2),
        "forward_speedup": round(best["dense"] / best["forward"], 2),
    }


def seconds(call: Callable[[], object]) -> float:
    """Time of one call: that of the processor if one thread does everything, else that of the clock."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    call()
    return clock() - start


@torch.no_grad()
def main() -> None:
    """Run and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 16384])
    parser.add_argument("--densities", type=float, nargs="*", default=[], help="densities to hold, beside the default")
    parser.add_argument("--dtypes", nargs="+", choices=tuned.DTYPES, default=["float32", "bfloat16"])
    parser.add_argument("--shapes", nargs="+", default=["8x2x128", "9x3x64"], help="query heads x kv heads x head dim")
    parser.add_argument("--implementation", choices=EXECUTORS, default="cpp")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=3, help="runs of each, in turns")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if calls.ON_GPU:
        sys.exit("benchmarks/cpu.py: expected no CUDA device, got one. Hide it: CUDA_VISIBLE_DEVICES= python ...")
    torch.set_num_threads(args.threads)
    rows = Rows(args.json, threads=args.threads, amx=has_amx())
    for dtype, text, length in itertools.product(args.dtypes, args.shapes, args.lengths):
        calls.DTYPE = tuned.DTYPES[dtype]
        heads, kv_heads, head_dim = map(int, text.split("x"))
        for density in (None, *args.densities):
            what = {"dtype": dtype, "heads": text, "N": length, "density_held": density or "default"}
            run = partial(bench, length, density, (heads, kv_heads, head_dim), args)
            rows.measure(f"CPU, implementation {args.implementation!r}", what, run)


if __name__ == "__main__":
    main()
