"""Quality and time of SmolLM2-135M over tau and ranking, on real text (the demo's prompt).

python benchmarks/smollm2.py --tokens 65536 8192 [--json benchmarks/results/smollm2-h100.json]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import results_file
import torch

import s2o_compile
from s2o_compile import S2OConfig
from s2o_compile.cli.demo import MODEL, build_prompt, load_model, timed

SETTINGS = [(0.25, "per_query"), (0.5, "per_query"), (0.75, "per_query"), (1.0, "per_query"), (1.5, "per_query")]
SETTINGS += [(0.75, "mean_query")]


@torch.no_grad()
def bench_length(tokens: int, device: str) -> list[dict[str, object]]:
    """One row for dense and one a setting; S2O is forced where the default would run dense for being short."""
    model, tokenizer = load_model(tokens, device)
    ids = build_prompt(tokenizer, tokens).to(device)
    timed(model, ids)
    best, loss, seconds = timed(model, ids)
    rows: list[dict[str, object]] = [{"tokens": tokens, "tau": "dense", "density": 1.0, "seconds": round(seconds, 3)}]
    print(rows[-1], flush=True)
    for tau, ranking in SETTINGS:
        torch.compiler.reset()
        config = S2OConfig(tau=tau, ranking=ranking, min_seq_len=2048, inner_backend="eager")
        fast = s2o_compile.optimize(model, config)
        with s2o_compile.record() as recording:
            timed(fast, ids)
        fast_best, fast_loss, seconds = timed(fast, ids)
        row = {
            "tokens": tokens,
            "tau": tau,
            "ranking": ranking,
            "density": round(recording.report.density or 0.0, 3),
            "seconds": round(seconds, 3),
            "top1_agreement": round((fast_best == best).float().mean().item(), 4),
            "loss_difference": round((fast_loss.mean() - loss.mean()).item(), 4),
        }
        rows.append(row)
        print(row, flush=True)
    return rows


def main() -> None:
    """Run and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = [row for tokens in args.tokens for row in bench_length(tokens, args.device)]
    if args.json:
        results_file.write(args.json, rows, model=MODEL, dtype="bfloat16" if args.device == "cuda" else "float32")


if __name__ == "__main__":
    main()
