"""Write the tables of benchmarks/README.md from the JSON files in benchmarks/results.

python benchmarks/table.py benchmarks/results/attention-h100.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

README = Path(__file__).parent / "README.md"
BEGIN, END = "<!-- table: {} -->", "<!-- end: {} -->"


def table(data: dict) -> str:
    """Markdown: one row per thing timed, one column per length; milliseconds (TFLOP/s of computed area, density)."""
    rows = data["rows"]
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
    about = data["about"]
    lines += [
        "",
        f"{about['device']}, torch {about['torch']}, triton {about['triton']}, {about['date']}: `{about['command']}`",
    ]
    return "\n".join(lines)


def _cell(row: dict) -> str:
    digits = 1 if row["ms"] >= 10 else 2
    if row["density"] == 0:  # index work computes no attention
        return f"{row['ms']:.{digits}f}"
    density = "" if row["density"] == 1 else f"; {row['density']:.2f}"
    error = f"; err {row['relative_error']:.2f}" if "relative_error" in row else ""
    return f"{row['ms']:.{digits}f} ({row['tflops']:.0f}{density}{error})"


def main() -> None:
    """Replace the table of every file named on the command line."""
    text = README.read_text()
    for name in sys.argv[1:]:
        path = Path(name)
        begin, end = BEGIN.format(path.name), END.format(path.name)
        head, _, rest = text.partition(begin)
        _, _, tail = rest.partition(end)
        if not tail:
            sys.exit(
                f"benchmarks/README.md: expected the lines {begin} and {end}, got none. Add them where it belongs."
            )
        text = f"{head}{begin}\n{table(json.loads(path.read_text()))}\n{end}{tail}"
    README.write_text(text)


if __name__ == "__main__":
    main()
