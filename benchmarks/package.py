"""SmolLM2-135M as a package against the same program in Python and under torch.compile: time and equality.

    python benchmarks/package.py --tokens 8192 32768 [--layers 8] [--cpp build/run_package]
                                 [--json benchmarks/results/package-h100.json]

One package takes any length up to the longest of ``--tokens``. Seconds are the best of five runs.

    error of ...       relative L2 error of the last token's logits, from those of the program; that of torch.compile is
                       what another order of summation makes of them. The longest length decides how lists are cut in
                       the package: below it, its tiles may stop elsewhere than the program's
    bare process, C++  whether a process that has torch alone, and the program of examples/cpp (``--cpp``, built), give
                       the package's own logits, bit for bit
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from results_file import Rows
from torch import Tensor, nn

import s2o_compile
from s2o_compile import S2OConfig, backend
from s2o_compile.cli.demo import MODEL, build_prompt, load_model

SHORT = (1, 2, 127, 128, 2047, 2048, 3001)
"""Lengths that are not timed: one, few, around a tile and around where attention becomes sparse."""

BARE = """
import sys, torch
package, device, *files = sys.argv[1:]
run = torch._inductor.aoti_load_package(package)
for file in files:
    torch.save(run(torch.load(file).to(device)).cpu(), file + ".bare")
assert "s2o_compile" not in sys.modules
"""

Runs = dict[str, Callable[[Tensor], Tensor]]


class LastLogits(nn.Module):
    """Token ids in, the logits of the last token out: a prefill."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        """[B, N] -> [B, 1, vocabulary]."""
        return self.model(input_ids=ids, use_cache=False, logits_to_keep=1).logits


def seconds_of(runs: Runs, ids: Tensor) -> dict[str, float]:
    """The best of five runs behind a warm one; the candidates take turns."""
    wait = torch.cuda.synchronize if ids.is_cuda else lambda: None
    best = dict.fromkeys(runs, float("inf"))
    for turn in range(6):
        for name, run in runs.items():
            wait()
            start = time.perf_counter()
            run(ids)
            wait()
            if turn:
                best[name] = min(best[name], time.perf_counter() - start)
    return best


def run_bare(package: Path, cases: list[tuple[Tensor, Tensor]]) -> list[bool]:
    """Whether a process without this project gives the logits of every (ids, logits)."""
    files = [package.with_name(f"{ids.shape[1]}.pt") for ids, _ in cases]
    for file, (ids, _) in zip(files, cases, strict=True):
        torch.save(ids.cpu(), file)
    device = cases[0][0].device.type
    subprocess.run([sys.executable, "-c", BARE, str(package), device, *map(str, files)], check=True, cwd="/")
    made = [torch.load(f"{file}.bare") for file in files]
    return [torch.equal(logits, expected.cpu()) for logits, (_, expected) in zip(made, cases, strict=True)]


def run_cpp(program: Path, package: Path, ids: Tensor, expected: Tensor) -> bool:
    """Whether C++ gives the same logits."""
    tokens, out = package.with_name("ids.i64"), package.with_name("logits.f32")
    ids.cpu().numpy().tofile(tokens)
    given = ["--tokens", str(tokens), "--out", str(out), *(["--cuda"] if ids.is_cuda else [])]
    subprocess.run([str(program), str(package), *given], check=True)
    return torch.equal(torch.from_file(str(out), size=expected.numel()), expected.float().cpu().flatten())


@torch.no_grad()
def bench(args: argparse.Namespace, rows: Rows, folder: Path) -> None:
    """One row a length, all through one package."""
    longest, start = max(args.tokens), time.perf_counter()
    model, tokenizer = load_model(longest, args.device)
    model.model.layers = model.model.layers[: args.layers]
    layers, model = len(model.model.layers), LastLogits(model).eval()
    dims = {1: torch.export.Dim("length", min=1, max=longest)}
    config = S2OConfig(min_seq_len=args.min_seq_len)
    ids = build_prompt(tokenizer, longest).to(args.device)
    program = s2o_compile.export(model, (ids[:, :4096],), config=config, dynamic_shapes=(dims,))
    exported = time.perf_counter()
    packaged = s2o_compile.package(program, folder / "model.pt2")
    made = {"seconds to export": exported - start, "seconds to package": time.perf_counter() - exported}
    size = packaged.path.stat().st_size / 2**20
    about = {"layers": layers, "sparse": len(packaged.sparse), "MiB": round(size)}
    rows.measure("made", about, lambda: {name: round(seconds, 1) for name, seconds in made.items()})
    options = {"s2o.min_seq_len": args.min_seq_len}
    short: Runs = {"package": torch._inductor.aoti_load_package(str(packaged.path)), "program": program.module()}
    runs = short | {"torch.compile": torch.compile(model, backend=backend.s2o, dynamic=True, options=options)}
    for run in runs.values():
        run(ids[:, : longest // 2])
    while args.wait_for and not args.wait_for.exists():
        time.sleep(0.1)
    cases: list[tuple[Tensor, Tensor]] = []
    for length in dict.fromkeys((*args.tokens, *(length for length in SHORT if length < longest))):

        def measure(length: int = length) -> dict[str, object]:
            some, candidates = ids[:, :length], runs if length in args.tokens else short
            outputs = {name: run(some) for name, run in candidates.items()}
            cases.append((some, outputs["package"]))
            expected = outputs["program"].float()
            found: dict[str, object] = {
                f"error of {name}": float(f"{(output.float() - expected).norm() / expected.norm():.3g}")
                for name, output in outputs.items()
                if name != "program"
            }
            found["same next token"] = bool((outputs["package"].argmax(-1) == expected.argmax(-1)).all())
            if length in args.tokens:
                seconds = seconds_of(runs, some)
                found |= {name: round(x, 5) for name, x in seconds.items()}
                found["package over torch.compile"] = round(seconds["package"] / seconds["torch.compile"], 4)
            return found

        rows.measure("package", {"tokens": length, "layers": layers}, measure)
    tokens = {"tokens": ", ".join(str(ids.shape[1]) for ids, _ in cases)}
    rows.measure("elsewhere", tokens, lambda: {"bare process": all(run_bare(packaged.path, cases))})
    if args.cpp and cases:
        runs_cpp = (run_cpp(args.cpp, packaged.path, *case) for case in cases)
        rows.measure("elsewhere", tokens, lambda: {"C++": all(runs_cpp)})


def main() -> None:
    """Run and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192])
    parser.add_argument("--min-seq-len", type=int, default=2048)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--layers", type=int, help="only so many of the first")
    parser.add_argument("--cpp", type=Path, help="the program of examples/cpp")
    parser.add_argument("--wait-for", type=Path, help="a file; nothing is measured before it exists")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        dtype = "bfloat16" if args.device == "cuda" else "float32"
        bench(args, Rows(args.json, model=MODEL, dtype=dtype), Path(folder))


if __name__ == "__main__":
    main()
