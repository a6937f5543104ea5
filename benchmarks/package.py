"""SmolLM2-135M as a package against the same program in Python and under torch.compile: time and equality.

python benchmarks/package.py --tokens 8192 32768 [--layers 8] [--json benchmarks/results/package-h100.json]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from results_file import Rows
from torch import Tensor, nn

import s2o_compile
from s2o_compile import S2OConfig, backend
from s2o_compile.demo import MODEL, build_prompt, load_model


class LastLogits(nn.Module):
    """Token ids in, the logits of the last token out: a prefill."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        """[B, N] -> [B, 1, vocabulary]."""
        return self.model(input_ids=ids, use_cache=False, logits_to_keep=1).logits


def seconds_of(runs: dict[str, Callable[[Tensor], Tensor]], ids: Tensor) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Outputs, and the best of five runs behind a warm one; the candidates take turns."""
    wait = torch.cuda.synchronize if ids.is_cuda else lambda: None
    outputs, best = {name: run(ids) for name, run in runs.items()}, dict.fromkeys(runs, float("inf"))
    for _ in range(5):
        for name, run in runs.items():
            wait()
            start = time.perf_counter()
            run(ids)
            wait()
            best[name] = min(best[name], time.perf_counter() - start)
    return outputs, best


@torch.no_grad()
def bench(args: argparse.Namespace, rows: Rows) -> None:
    """One row a length, all through one package."""
    longest, start = max(args.tokens), time.perf_counter()

    def stage(name: str) -> None:
        print(f"{time.perf_counter() - start:6.0f} s  {name}", flush=True)

    model, tokenizer = load_model(longest, args.device)
    model.model.layers = model.model.layers[: args.layers]
    layers, model = len(model.model.layers), LastLogits(model).eval()
    dims = {1: torch.export.Dim("length", min=1, max=longest)}
    config = S2OConfig(min_seq_len=args.min_seq_len)
    ids = build_prompt(tokenizer, longest).to(args.device)
    program = s2o_compile.export(model, (ids[:, :4096],), config=config, dynamic_shapes=(dims,))
    stage("exported")
    with tempfile.TemporaryDirectory() as folder:
        packaged = s2o_compile.package(program, Path(folder) / "model.pt2")
        stage(f"packaged: {packaged}")
        runs = {
            "package": torch._inductor.aoti_load_package(str(packaged.path)),
            "program": program.module(),
            "torch.compile": torch.compile(
                model, backend=backend.s2o, dynamic=True, options={"s2o.min_seq_len": args.min_seq_len}
            ),
        }
        for run in runs.values():
            run(ids[:, : longest // 2])
        stage("all compiled")
        while args.wait_for and not args.wait_for.exists():
            time.sleep(0.1)
        for length in args.tokens:

            def measure(length: int = length) -> dict[str, object]:
                outputs, seconds = seconds_of(runs, ids[:, :length])
                output, expected = outputs["package"], outputs["program"]
                error = ((output - expected).float().norm() / expected.float().norm()).item()
                return {
                    **{name: round(x, 5) for name, x in seconds.items()},
                    "package over torch.compile": round(seconds["package"] / seconds["torch.compile"], 4),
                    "relative_error": error,
                    "same_next_token": bool((output.argmax(-1) == expected.argmax(-1)).all()),
                }

            rows.measure("package", {"tokens": length, "layers": layers}, measure)


def main() -> None:
    """Run and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192])
    parser.add_argument("--min-seq-len", type=int, default=2048)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--layers", type=int, help="only so many of the first; packaging takes seconds a layer")
    parser.add_argument("--wait-for", type=Path, help="a file; no time is taken before it exists")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    bench(args, Rows(args.json, model=MODEL, dtype="bfloat16" if args.device == "cuda" else "float32"))


if __name__ == "__main__":
    main()
