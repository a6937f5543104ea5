"""docs/models.md: docs/zoo.csv as one line a model, to be searched and sorted.

python -m benchmarks.models_page     # `make zoo` and `make figures` write it, too
"""

from __future__ import annotations

import csv
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"
CSV, PAGE = DOCS / "zoo.csv", DOCS / "models.md"
PREFERRED = ("sdpa", "eager", "flex_attention", "")
"""Of several attention implementations of a model the first that ran stands on the page."""

LONGEST_NOTE = 110

Row = dict[str, str]

_INTRO = """# Which models

<!-- Written by `make figures` (benchmarks/models_page.py) from docs/zoo.csv. Change these, not this page. -->

**{all} of {with_attention} architectures with attention have all of it replaced, {some} some of it, {none} none.**
Tiny random models of each architecture were run as they are and through S2O at `tau=0`, and their outputs compared
([how, and every line](zoo.md); [zoo.csv](zoo.csv)). So the table says what S2O understands, and nothing about speed.

Find yours by its `model_type` in `config.json`, such as `llama` or `qwen3`, or by its class. Other sizes of a model,
and fine-tuned ones, have the same architecture. A model that is not here, or your own: `s2o explain DIR`, or
[explain](reports.md). *Replaced* counts the attentions of one prefill with two layers. *Left dense* says why.

"""


def write() -> None:
    """Write the page."""
    PAGE.write_text(page())


def page() -> str:
    """The page's text."""
    with CSV.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["kind"] != "part"]
    models = defaultdict(list)
    for row in rows:
        models[row["kind"], row["architecture"]].append(row)
    lines, counts = [], Counter[str]()
    for (kind, architecture), own in sorted(models.items(), key=lambda item: (item[0][1].lower(), item[0][0])):
        counts[_verdict(own)] += 1
        lines.append(_line(kind, architecture, own))
    total = sum(counts[name] for name in ("all", "some", "none"))
    heads = ["architecture", "class", "kind", "replaced", "masks", "left dense, or not tried"]
    table = [f"| {' | '.join(row)} |" for row in (heads, ["---"] * len(heads), *lines)]
    intro = _INTRO.format(all=counts["all"], some=counts["some"], none=counts["none"], with_attention=total)
    return "\n".join([intro + '<div class="searchable" markdown>', "", *table, "", "</div>"]) + "\n"


def _shown(own: Sequence[Row]) -> Row:
    """The row of a model that the page shows: a prefill without padding, by the preferred implementation that ran."""
    ran = [row for row in own if row["case"] == "no mask" and row["status"] in ("ok", "differs")]
    places = {name: place for place, name in enumerate(PREFERRED)}
    return min(ran or own, key=lambda row: places.get(row["implementation"], len(places)))


def _verdict(own: Sequence[Row]) -> str:
    row = _shown(own)
    if not row["ran"].isdigit() or row["status"] not in ("ok", "differs"):
        return "not tried"
    ran, rewritten = int(row["ran"]), int(row["rewritten"])
    return "no attention" if ran == 0 else "all" if rewritten >= ran else "some" if rewritten else "none"


def _line(kind: str, architecture: str, own: Sequence[Row]) -> list[str]:
    row, verdict = _shown(own), _verdict(own)
    replaced = verdict
    if verdict in ("all", "some", "none"):
        replaced = f"{verdict}: {row['rewritten']} of {row['ran']}"
    masks = "; ".join(dict.fromkeys(part.partition(" x ")[2] for part in row["masks"].split("; ") if part))
    notes = [] if verdict != "not tried" else [row["note"]]
    notes += [part.partition(" x ")[2] or part for part in row["left_reasons"].split("; ") if " x " in part]
    if row["not_found"].isdigit() and int(row["not_found"]):
        notes.append(f"{row['not_found']} not found: {row['not_found_kinds'].partition(' x ')[2] or 'see zoo.csv'}")
    if row["status"] == "differs":
        notes.append("the output differs by more than rounding: see zoo.md")
    reasons = "; ".join(dict.fromkeys(map(_short, notes)))
    return [_cell(text) for text in (f"`{architecture}`", row["model"], kind, replaced, masks, reasons)]


def _short(reason: str) -> str:
    """A reason without the names of single nodes, cut."""
    if "position biases" in reason:
        return "adds position biases to the scores"
    if "one query token" in reason:
        return "one query token: decode stays dense"
    reason = re.sub(r"\s+", " ", re.sub(r"(?<=[a-z_])_\d+\b", "", reason))
    return reason if len(reason) <= LONGEST_NOTE else f"{reason[: LONGEST_NOTE - 1]}…"


def _cell(text: str) -> str:
    return re.sub(r"https?://\S+", "the hub", text).replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


if __name__ == "__main__":
    write()
