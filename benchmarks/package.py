"""SmolLM2-135M as a package against the same program in Python and under torch.compile: time and equality.

python benchmarks/package.py --tokens 8192 32768 [--json benchmarks/results/package.json]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import results_file
import torch
from torch import Tensor, nn

import s2o_compile
from s2o_compile import S2OConfig
from s2o_compile.demo import MODEL, build_prompt, load_model


class LastLogits(nn.Module):
    """Token ids in, the logits of the last token out: a prefill."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        """[B, N] -> [B, 1, vocabulary]."""
        return self.model(input_ids=ids, use_cache=False, logits_to_keep=1).logits


def seconds_of(run: object, ids: Tensor) -> tuple[Tensor, float]:
    """Output and the best of three runs behind a warm one."""
    wait = torch.cuda.synchronize if ids.is_cuda else lambda: None
    output, best = run(ids), float("inf")  # pyright: ignore[reportCallIssue]
    for _ in range(3):
        wait()
        start = time.perf_counter()
        output = run(ids)  # pyright: ignore[reportCallIssue]
        wait()
        best = min(best, time.perf_counter() - start)
    return output, best


@torch.no_grad()
def bench(lengths: list[int], device: str, shortest: int) -> list[dict[str, object]]:
    """One row a length, all through one package."""
    model, tokenizer = load_model(max(lengths), device)
    model = LastLogits(model).eval()
    dims = {1: torch.export.Dim("length", min=1, max=max(lengths))}
    config = S2OConfig(min_seq_len=shortest)
    ids = build_prompt(tokenizer, max(lengths)).to(device)
    program = s2o_compile.export(model, (ids[:, :4096],), config=config, dynamic_shapes=(dims,))
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        packaged = s2o_compile.package(program, Path(folder) / "model.pt2")
        print(f"{packaged}\npackaged in {time.perf_counter() - start:.0f} s", flush=True)
        run = torch._inductor.aoti_load_package(str(packaged.path))
        python = program.module()
        compiled = torch.compile(model, backend="s2o", dynamic=True, options={"s2o.min_seq_len": shortest})
        for length in lengths:
            some = ids[:, :length]
            output, package_seconds = seconds_of(run, some)
            expected, python_seconds = seconds_of(python, some)
            _, compiled_seconds = seconds_of(compiled, some)
            row = {
                "tokens": length,
                "package": round(package_seconds, 4),
                "program": round(python_seconds, 4),
                "torch.compile": round(compiled_seconds, 4),
                "relative_error": ((output - expected).float().norm() / expected.float().norm()).item(),
                "same_next_token": bool((output.argmax(-1) == expected.argmax(-1)).all()),
            }
            rows.append(row)
            print(row, flush=True)
    return rows


def main() -> None:
    """Run and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192])
    parser.add_argument("--min-seq-len", type=int, default=2048)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = bench(args.tokens, args.device, args.min_seq_len)
    if args.json:
        results_file.write(args.json, rows, model=MODEL, dtype="bfloat16" if args.device == "cuda" else "float32")


if __name__ == "__main__":
    main()
