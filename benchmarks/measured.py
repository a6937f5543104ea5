"""What the files in benchmarks/results say, in the words of tables: newest device, times, ratios, sources."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from s2o_compile.kernels.core import tuned

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DEVICES = ("h200", "h100")
DENSE = {"SDPA flash": "SDPA, flash kernel", "SDPA cuDNN": "SDPA, cuDNN kernel"}
FA3 = "FlashAttention-3"

Row = dict[str, Any]


def newest(name: str) -> Path:
    """The results file of a benchmark, of the first of DEVICES that has one."""
    paths = [RESULTS / f"{name}-{device}.json" for device in DEVICES]
    return next((path for path in paths if path.exists()), paths[-1])


def read(path: Path) -> tuple[Row, list[Row]]:
    """What a file was measured on, and its rows."""
    data = json.loads(path.read_text())
    return data["about"], data["rows"]


def device(about: Row) -> str:
    """A device's short name: "H100", "2 CPU cores"."""
    found = re.search(r"\b[HAB]\d{2,3}\b", about["device"])
    threads = re.search(r"\((\d+) threads\)", about["device"])
    return found[0] if found else f"{threads[1]} CPU cores" if threads else about["device"]


def crossover(about: Row) -> int:
    """Key length in tokens from which S2O runs on a GPU by default."""
    entry = tuned.BUILT_IN.get(f"NVIDIA {device(about)}")
    return (entry and entry.crossover) or tuned.UNKNOWN_CROSSOVER


def tokens(count: int) -> str:
    """As people say it: "128K" for 131072."""
    return f"{count // 1024}K" if count < 2**20 else f"{count // 2**20}M"


def seconds(value: float) -> str:
    """A time with three digits, in milliseconds below one second; no line breaks ahead of the unit."""
    unit, shown = ("s", value) if value >= 1 else ("ms", 1e3 * value)
    return f"{shown:.0f}\u00a0{unit}" if shown >= 100 else f"{shown:.3g}\u00a0{unit}"


def times(dense: float, ours: float) -> str:
    """How many times as fast, "2.6x"; slower is below 1."""
    ratio = dense / ours
    return f"**{ratio:.1f}x**" if ratio >= 1.05 else f"{ratio:.2f}x"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    return [f"| {' | '.join(row)} |" for row in (heads, ["---"] * len(heads), *rows)]


def paragraph(text: str) -> list[str]:
    """Lines of a text, as long as those of pages that are written by hand."""
    return textwrap.wrap(text, 118, break_long_words=False, break_on_hyphens=False)


def source(path: Path, about: Row, link: str) -> str:
    """The line under a table: device, versions, date, and the file."""
    versions = ", ".join(f"{name} {about[name]}" for name in ("torch", "triton") if name in about)
    return f"*{about['device']}, {versions}, {about['date']}: [{path.name}]({link}{path.name}).*"


def first_token() -> list[tuple[int, str, float, float, float]]:
    """Time to first token: (tokens, baseline, dense seconds, S2O seconds, S2O's density), longest prompt first."""
    _, rows = read(newest("end-to-end"))
    found = []
    for length in sorted({row["tokens"] for row in rows}, reverse=True):
        here = [row for row in rows if row["tokens"] == length and "seconds" in row]
        ours = next((row for row in here if "cut to density" in row["what"]), None)
        if ours:
            dense = [row for row in here if row["what"].startswith("dense")]
            found += [(length, _baseline(r["what"]), r["seconds"], ours["seconds"], ours["density"]) for r in dense]
    return found


def _baseline(what: str) -> str:
    kernel = next((name for name in ("flash", "cuDNN") if name in what), "")
    who = "`torch.compile`" if "same graph" in what or "compile" in what else "plain PyTorch"
    return f"{who}, {kernel} kernel" if kernel else who


def one_call() -> list[tuple[int, str, Row, Row]]:
    """One call on a GPU: (tokens, fastest kernel of SDPA, its row, S2O's row on topical input), longest first."""
    _, rows = read(newest("attention"))
    found = []
    for length in sorted({row["length"] for row in rows}, reverse=True):
        here = {row["what"]: row for row in rows if row["length"] == length}
        name = min((name for name in DENSE if name in here), key=lambda name: here[name]["ms"])
        found.append((length, DENSE[name], here[name], ours_on(here, "topical")))
    return found


def ours_on(here: dict[str, Row], kind: str) -> Row:
    """S2O's row with per-query rankings on a kind of input."""
    return next(row for what, row in here.items() if what.startswith(f"S2O whole op, {kind}") and "per_query" in what)


def on_cpu() -> list[Row]:
    """Calls on a CPU by the default, longest first, of the larger heads first."""
    _, rows = read(RESULTS / "cpu.json")
    rows = [row for row in rows if "whole_s" in row and row["density_held"] == "default"]
    return sorted(rows, key=lambda row: (row["dtype"] != "float32", row["heads"], -row["N"]))
