"""Write the tables of benchmarks/notes from the JSON files in benchmarks/results, whose names stand beside them.

python -m benchmarks.table
"""

from __future__ import annotations

import json
import re
from pathlib import Path

NOTES, RESULTS = (Path(__file__).parent / name for name in ("notes", "results"))
TABLE = re.compile(r"<!-- table: (\S+) -->\n.*?\n<!-- end: \1 -->", re.DOTALL)


def table(data: dict) -> str:
    """Markdown of a result file, with what it was measured on."""
    about, rows = data["about"], data["rows"]
    lines = next(write(rows) for name, write in _WRITERS.items() if name in rows[0])
    versions = ", ".join(f"{name} {about[name]}" for name in ("torch", "triton", "transformers") if name in about)
    note = f" ({about['note']})" if "note" in about else ""
    return "\n".join([*lines, "", f"{about['device']}, {versions}, {about['date']}: `{about['command']}`{note}"])


def _model_lines(rows: list[dict]) -> list[str]:
    """One row per length and setting of a whole model's prefill."""
    lines = [
        "| tokens | tau | ranking | density | seconds | top-1 = dense | loss - dense |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        quality = ["", ""]
        if "top1_agreement" in row:
            quality = [f"{row['top1_agreement']:.4f}", f"{row['loss_difference']:+.4f}"]
        cells = [f"{row['tokens'] // 1024}K", row["tau"], row.get("ranking", "-"), f"{row['density']:.3f}"]
        lines.append("| " + " | ".join(map(str, [*cells, f"{row['seconds']:.3f}", *quality])) + " |")
    return lines


def _compile_lines(rows: list[dict]) -> list[str]:
    """One row per model and state of the caches."""
    lines = ["| model | caches | sites | torch.compile's own | passes | share |", "|---|---|---|---|---|---|"]
    for row in rows:
        cells = [row["model"], row["cache"], row["sites"], f"{row['torch_compile_seconds']:.1f} s"]
        cells += [f"{1e3 * row['pass_seconds']:.0f} ms", f"{row['share']:.2%}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def _attention_lines(rows: list[dict]) -> list[str]:
    """One row per thing timed, one column per length; milliseconds (TFLOP/s of computed area, density)."""
    lengths = sorted({row["length"] for row in rows})
    names = list(dict.fromkeys(row["what"] for row in rows))
    lines = [
        "| ms (TFLOP/s; density) | " + " | ".join(f"{n // 1024}K" for n in lengths) + " |",
        "|---|" + "---|" * len(lengths),
    ]
    for name in names:
        cells = []
        for length in lengths:
            found = [row for row in rows if row["what"] == name and row["length"] == length]
            cells.append(_cell(found[0]) if found else "")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def _cell(row: dict) -> str:
    digits = 1 if row["ms"] >= 10 else 2
    if row["density"] == 0:  # index work computes no attention
        return f"{row['ms']:.{digits}f}"
    density = "" if row["density"] == 1 else f"; {row['density']:.2f}"
    error = f"; err {row['relative_error']:.2f}" if "relative_error" in row else ""
    return f"{row['ms']:.{digits}f} ({row['tflops']:.0f}{density}{error})"


def _section_lines(rows: list[dict]) -> list[str]:
    """A table a section, its columns the names in its rows; in order of appearance."""
    lines = []
    for section in dict.fromkeys(row["section"] for row in rows):
        members = [row for row in rows if row["section"] == section]
        names = list(dict.fromkeys(name for row in members for name in row if name != "section"))
        lines += ["", f"**{section}**", "", f"| {' | '.join(map(_heading, names))} |", "|---" * len(names) + "|"]
        lines += ["| " + " | ".join(_text(row.get(name, "")) for name in names) + " |" for row in members]
    return lines[1:]


def _heading(name: str) -> str:
    """A row's name as a heading, units behind a comma."""
    head, _, unit = name.rpartition("_")
    units = {"ms": "ms", "s": "s", "GiB": "GiB", "tflops": "TFLOP/s"}
    return f"{head.replace('_', ' ')}, {units[unit]}" if head and unit in units else name.replace("_", " ")


def _text(value: object) -> str:
    """A cell; a failure keeps its first words."""
    if isinstance(value, bool):
        return "yes" if value else "NO"
    return f"{value:g}" if isinstance(value, float) else str(value).replace("|", "/")[:120]


_WRITERS = {"section": _section_lines, "what": _attention_lines, "pass_seconds": _compile_lines, "tau": _model_lines}


def with_tables(text: str) -> str:
    """A page's text with every table as its file has it."""

    def written(found: re.Match[str]) -> str:
        name = found[1]
        return f"<!-- table: {name} -->\n{table(json.loads((RESULTS / name).read_text()))}\n<!-- end: {name} -->"

    return TABLE.sub(written, text)


def write_all() -> None:
    """Write every table of every page."""
    for page in sorted(NOTES.glob("*.md")):
        page.write_text(with_tables(page.read_text()))


if __name__ == "__main__":
    write_all()
