"""Build wheel and sdist, check them with twine, and use each in clean environments: `make dist-check`.

    python .ci/dist_check.py [--pythons python3.11 /opt/python3.14/bin/python3.14] [--extras cli plot]

Every environment gets the wheel from its file and all else from the package index. With torch alone the quickest real
use runs: the operator, and a report on a module. With an extra, what it is for is imported. Pythons that are not on
the machine are named. It takes minutes, and gigabytes of disk in build/dist-check.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tomllib
import venv
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "build" / "dist-check"
PYTHONS = ("python3.11", "python3.12", "python3.13", "python3.14")

USE = """
import torch, s2o_compile
from s2o_compile import S2OConfig
q, k, v = torch.randn(3, 1, 2, 2048, 64)
exact = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
ours = s2o_compile.attention(q, k, v, causal=True, config=S2OConfig(tau=0.0, min_seq_len=0))
assert (ours - exact).abs().max() < 1e-4
class Model(torch.nn.Module):
    def forward(self, q, k, v):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
with torch.no_grad():
    report = s2o_compile.explain(Model(), q, k, v, config=S2OConfig(min_seq_len=0, inner_backend="eager"))
assert report.rewritten == 1, report
print("torch", torch.__version__, "s2o_compile", s2o_compile.__version__, s2o_compile.__file__)
"""
IMPORTS = {
    "cli": "import s2o_compile.cli.main",
    "demo": "import transformers, gguf, s2o_compile.transformers, s2o_compile.cli.main",
    "diffusers": "import s2o_compile.diffusers",
    "onnx": "import onnx, onnxscript, s2o_compile.onnx",
    "plot": "import matplotlib, s2o_compile.quality.pictures",
}
NOT_TRIED = {"dev": "the environment of this repository", "docs": "as dev", "tensorrt": "needs CUDA's libraries"}


def run(*command: str | Path, cwd: Path = WORK) -> str:
    """Output of a command; its failure ends the check with what it said."""
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command[:6]))}\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    return done.stdout.strip()


def build() -> list[Path]:
    """The wheel and the sdist, checked by twine."""
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", WORK / "dist", ROOT)
    files = sorted((WORK / "dist").iterdir(), key=lambda path: path.suffix != ".whl")
    print(run(sys.executable, "-m", "twine", "check", "--strict", *files))
    return files


def use(name: str, python: str, installed: str, imports: str = "") -> None:
    """Install into a new environment, and run what should work there."""
    where = WORK / name
    if python == sys.executable:
        venv.create(where, with_pip=True)
    else:
        run(python, "-m", "venv", where)
    run(where / "bin" / "pip", "install", "--quiet", installed)
    print(f"{name}: {run(where / 'bin' / 'python', '-W', 'ignore', '-c', USE + imports)}", flush=True)
    shutil.rmtree(where)


def main() -> None:
    """Build, check, and try every environment that this machine can make."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pythons", nargs="*", default=PYTHONS)
    parser.add_argument("--extras", nargs="*", default=list(IMPORTS))
    options = parser.parse_args()
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    if missing := known.keys() - IMPORTS.keys() - NOT_TRIED.keys():
        sys.exit(f"dist_check: expected every extra in IMPORTS or NOT_TRIED, got none for {sorted(missing)}. Add them.")
    wheel, sdist = build()
    _every_python(options.pythons, wheel)
    use("sdist", sys.executable, str(sdist))
    for extra in options.extras:
        use(f"extra-{extra}", sys.executable, f"{wheel}[{extra}]", IMPORTS[extra])
    print("not tried:", "; ".join(f"[{name}]: {why}" for name, why in NOT_TRIED.items()))


def _every_python(pythons: Sequence[str], wheel: Path) -> None:
    for python in pythons:
        found = shutil.which(python)
        # pyenv has a shim of every Python that it knows, which fails if another one is chosen.
        if found and subprocess.run([found, "--version"], capture_output=True, check=False).returncode == 0:
            use(f"with-{Path(python).name}", python, str(wheel))
        else:
            print(f"{python}: not on this machine, so not run")


if __name__ == "__main__":
    main()
