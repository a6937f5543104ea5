"""What it costs and saves that a list is ranked by 2048 queries at most: one attention call, all queries and these.

    python benchmarks/scored_rows.py [--lengths 65536 131072] [--json benchmarks/results/scored-rows-h100.json]

B=1, Hq=32, Hkv=8, D=128, bf16, causal, topical input. ``score_ms`` is the scoring pass of all heads at once, ``ms`` the
whole call at a tau, ``error`` its relative L2 difference to SDPA. ``--scale 64`` divides lengths, for a CPU.
"""

from __future__ import annotations

import argparse
import itertools
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from attention import score_all
from calls import DEVICE, call_of, make_inputs, milliseconds, run
from results_file import Rows
from torch.nn.functional import scaled_dot_product_attention

from s2o_compile.kernels import planner
from s2o_compile.kernels.core.plan import default_segment_len
from s2o_compile.kernels.ranking import per_query as ranking_per_query
from s2o_compile.kernels.statistics import record_calls

TAUS = (0.5, 1.0)


@torch.no_grad()
def bench_length(length: int, rows: Rows) -> None:
    """The rows of one length."""
    shape = (32, 8, 128) if DEVICE == "cuda" else (4, 2, 32)
    inputs = make_inputs("topical", length, *shape)
    exact = scaled_dot_product_attention(*inputs, is_causal=True, enable_gqa=True)
    rankings = planner.PREPARE_BY_TRITON if DEVICE == "cuda" else planner.PREPARE
    every = default_segment_len(length) * shape[0] // shape[1]
    for queries, tau in itertools.product((min(ranking_per_query.ROWS, every), every), TAUS):

        def measure(queries: int = queries, tau: float = tau) -> dict[str, float]:
            with patch.object(ranking_per_query, "ROWS", queries):
                score = partial(score_all, rankings["per_query"], call_of(inputs), default_segment_len(length))
                call = partial(run, inputs, tau=tau)
                with record_calls() as calls:
                    output = call()
                error = ((output - exact).float().norm() / exact.float().norm()).item()
                return {
                    "score_ms": round(milliseconds(score), 2),
                    "ms": round(milliseconds(call), 2),
                    "density": round(calls[0].density, 4),
                    "error": round(error, 4),
                }

        rows.measure("scored rows", {"N": length, "queries of a list": queries, "tau": tau}, measure)


def main() -> None:
    """Run and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[65536, 131072])
    parser.add_argument("--scale", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = Rows(args.json)
    for length in args.lengths:
        bench_length(length // args.scale, rows)


if __name__ == "__main__":
    main()
