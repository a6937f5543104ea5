"""The torch implementation on a CPU against dense SDPA, at a held density; ratios within one run.

    python benchmarks/cpu.py [--lengths 4096 8192 16384] [--json benchmarks/results/cpu.json]

float32, causal. Every list is cut to the density and walked to its end (``calls.held_density``), so that the figures
do not hang on the input. "whole" is the operator with ranking, "forward" the attention over a finished plan. Dense and
S2O take turns, and each counts its fastest run: other work on the cores only ever adds.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

import calls
import torch
from results_file import Rows

from s2o_compile.kernels.core.options import OperatorOptions
from s2o_compile.kernels.impl.torch import forward as torch_forward
from s2o_compile.kernels.planner import build_plan
from s2o_compile.kernels.statistics import record_calls


def bench(length: int, density: float, args: argparse.Namespace) -> dict[str, object]:
    """One length at one density."""
    inputs = calls.make_inputs("topical", length, args.heads, args.kv_heads, args.head_dim)
    calls.check_exact(inputs, prefix=2048)
    options = OperatorOptions()
    (dense,) = calls.sdpa_calls(*inputs).values()
    with calls.held_density(density, length):
        call = calls.call_of(inputs)
        forward = partial(torch_forward.attend, call, build_plan(call, options), options.tau)
        with record_calls() as recorded:
            calls.run(inputs)
        competitors = {"dense": dense, "whole": partial(calls.run, inputs), "forward": forward}
        best = dict.fromkeys(competitors, float("inf"))
        for _ in range(args.rounds):
            for name, call in competitors.items():
                best[name] = min(best[name], calls.seconds(call))
    return {
        "density": round(recorded[0].density, 3),
        **{f"{name}_s": round(seconds, 3) for name, seconds in best.items()},
        "speedup": round(best["dense"] / best["whole"], 2),
        "forward_speedup": round(best["dense"] / best["forward"], 2),
    }


@torch.no_grad()
def main() -> None:
    """Run and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 16384])
    parser.add_argument("--densities", type=float, nargs="+", default=[0.1, 0.2])
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3, help="runs of each, in turns")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if calls.ON_GPU:
        sys.exit("benchmarks/cpu.py: expected no CUDA device, got one. Hide it: CUDA_VISIBLE_DEVICES= python ...")
    shape = {"heads": args.heads, "kv_heads": args.kv_heads, "head_dim": args.head_dim}
    rows = Rows(args.json, **shape, threads=torch.get_num_threads(), dtype="float32")
    for length in args.lengths:
        for density in args.densities:
            what = {"N": length, "density_held": density}
            rows.measure("CPU, torch implementation", what, partial(bench, length, density, args))


if __name__ == "__main__":
    main()
