"""docs/zoo.md: what the rows of the zoo say, counted."""

from __future__ import annotations

import datetime
import importlib.metadata
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from benchmarks import zoo_public
from benchmarks.zoo_measure import TOLERANCE, Row

_INTRO = """# The zoo

Tiny random models (two layers, 160 tokens, batches of two) of every architecture that the installed transformers can
build from a shrunk configuration, and models from elsewhere, each run as it is and through the pass at `tau=0` with
`min_seq_len=0`, so that the sparse operator really runs. Written by `make zoo`; every line is in [zoo.csv](zoo.csv).

- **ran** counts attention calls of an uncompiled run (`capture.audit`). **not found** are those of them that no
  record of the pass covers. **found** counts sites in captured graphs; these are **rewritten** or **left** dense.
- **expressible** counts the calls of that run with more than one query whose mask, by the values it had, hides what a
  causal, sliding, padded, bidirectional or cross mask hides (`benchmarks/zoo_masks.py`). In doubt a call counts: an
  operator whose mask is not read, a mask that is causal by accident. Not counted: numbers added to the scores (position
  bias, ALiBi), chunks, packed sequences, prefixes, choices of keys by data; decode; probabilities that somebody reads.
- Parameters that are one number everywhere get some noise first: a learned bias of zeros could be lost without a trace.
- **differs**: the output is further than {tolerance} (relative L2, float32, kept positions) from the original's; for
  `generate`, other tokens. **error**: it raised. Neither is left out below.
- Numbers are of attention at tiny sizes: they say what the pass understands, nothing about speed.

{versions}
"""


def write_page(path: Path, rows: Sequence[Row], not_started: int = 0) -> None:
    """The page with totals and tables; ``not_started`` counts jobs that a time limit cut off."""
    names = ("torch", "transformers", "diffusers", "timm", "torchvision")
    versions = ", ".join(f"{name} {version}" for name in names if (version := _version(name)))
    today = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    ran = [row for row in rows if row.case]
    parts = [
        _INTRO.format(tolerance=f"{TOLERANCE:g}", versions=f"CPU, {versions}, {today}."),
        _totals(rows),
        "## Expressible calls that are not rewritten\n",
        _ranking("reason", (row.missed_reasons for row in ran)),
        "## Masks of all calls that ran, by value\n",
        _ranking("mask", (row.seen_masks for row in ran)),
        "## By kind and implementation\n",
        _table(ran, "kind, implementation", lambda row: f"{row.kind}, {row.implementation or 'its own'}"),
        "## By case\n",
        _table(ran, "case", lambda row: row.case),
        "## Why sites are left dense\n",
        _ranking("reason", (row.left_reasons for row in ran)),
        "## What is not found\n",
        _ranking("what ran", (row.not_found_kinds for row in ran)),
        "## Outputs that differ, and errors\n",
        _problems(ran + [row for row in rows if not row.case and row.status == "error"]),
        "## Not run\n",
        f"{not_started} jobs (an architecture with an implementation) were cut off by the run's time limit.\n"
        if not_started
        else "",
        _unbuilt(rows),
        _parts(rows),
    ]
    path.write_text(zoo_public.written("\n".join(parts)))


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _totals(rows: Sequence[Row]) -> str:
    ran = [row for row in rows if row.case]
    built = {(row.kind == "elsewhere", row.architecture) for row in ran}
    elsewhere = sum(outside for outside, _ in built)
    status = Counter(row.status for row in ran)
    differing = [row for row in ran if row.status == "differs" and row.error is not None]
    compiled = sum(row.error == row.control for row in differing)
    rounded = sum(row.error != row.control and (row.rounding or 0) >= 0.5 * row.error for row in differing)
    equal = [row.error for row in ran if row.status == "ok" and row.error is not None]
    return "\n".join(
        [
            f"**{len(built) - elsewhere} architectures of transformers and {elsewhere} models from elsewhere, "
            f"{len(ran)} runs**: {status['ok']} equal the original, {status['differs']} differ "
            f"({compiled} of them exactly as under plain torch.compile, {rounded} as far as rounding alone decides), "
            f"{status['error']} raise an error. {_sum(ran, 'ran')} attention calls ran, "
            f"{_sum(ran, 'not_found')} of them were not found; {_sum(ran, 'found')} sites were found, "
            f"{_sum(ran, 'rewritten')} of them rewritten, {_sum(ran, 'read')} of these with a mask that is read at run "
            f"time. Largest error of an output that counts as equal: "
            f"{max(equal, default=0):.1e}.",
            "",
            _share(ran),
            "",
        ]
    )


def _share(rows: Sequence[Row]) -> str:
    expressible, rewritten = _sum(rows, "expressible"), _sum(rows, "expressible_rewritten")
    return (
        f"**{rewritten} of {expressible} expressible calls are rewritten: {rewritten / max(expressible, 1):.1%}.** "
        f"{_sum(rows, 'contradictions')} calls were rewritten whose mask, by value, is another."
    )


def _sum(rows: Iterable[Row], name: str) -> int:
    return sum(getattr(row, name) for row in rows)


_COLUMNS = ("ran", "found", "rewritten", "left", "not_found", "expressible", "expressible_rewritten")


def _table(rows: Sequence[Row], title: str, group: Callable[[Row], str]) -> str:
    lines = [
        f"| {title} | architectures | runs | ran | found | rewritten | left | not found | expressible "
        "| of these rewritten | differs | errors |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name in sorted({group(row) for row in rows}):
        own = [row for row in rows if group(row) == name]
        cells = [name, len({row.architecture for row in own}), len(own)]
        cells += [_sum(own, column) for column in _COLUMNS]
        cells += [sum(row.status == status for row in own) for status in ("differs", "error")]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join([*lines, ""])


_NUMBER = re.compile(r"(?<=[a-z_])_\d+\b")


def _ranking(title: str, texts: Iterable[str]) -> str:
    """Counts of "3 x reason; 1 x other" summed up; nodes that differ by their number alone are one reason."""
    sites, runs = Counter[str](), Counter[str]()
    for text in filter(None, texts):
        own = Counter[str]()
        for part in text.split("; "):
            count, _, reason = part.partition(" x ")
            if count.isdigit():
                own[_NUMBER.sub("", reason)] += int(count)
        sites += own
        runs += Counter(own.keys())
    if not sites:
        return "None.\n"
    lines = [f"| {title} | sites | runs |", "|---|---|---|"]
    lines += [f"| {_cell(reason)} | {count} | {runs[reason]} |" for reason, count in sites.most_common(40)]
    return "\n".join([*lines, ""])


def _problems(rows: Sequence[Row]) -> str:
    rows = [row for row in rows if row.status in ("differs", "error")]
    if not rows:
        return "None.\n"
    lines = [
        "Notes of errors say whether the original, or plain `torch.compile` without the pass, raises them as well. The",
        "control is the same comparison for plain `torch.compile`. *Rounding* is how far the",
        "original in float32 is from itself in float64: where it is of the error's size, a choice between nearly equal",
        "numbers (the best proposals of a detector, say) falls the other way under any rounding.",
        "",
        "| architecture | implementation | case | status | error | control | rounding | note |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        numbers = ["" if value is None else f"{value:.1e}" for value in (row.error, row.control, row.rounding)]
        cells = [row.architecture, row.implementation, row.case, row.status, *numbers, _cell(row.note)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def _unbuilt(rows: Sequence[Row]) -> str:
    """Architectures that no implementation could build, with the first reason."""
    built = {row.architecture for row in rows if row.case}
    reasons: dict[str, str] = {}
    for row in rows:
        if row.architecture not in built and row.status == "cannot build":
            reasons.setdefault(row.architecture, row.note)
    lines = [f"{len(reasons)} architectures.", "", "| architecture | reason |", "|---|---|"]
    lines += [f"| {name} | {_cell(reason)} |" for name, reason in sorted(reasons.items())]
    return "\n".join([*lines, ""])


def _parts(rows: Sequence[Row]) -> str:
    names = sorted(row.architecture for row in rows if row.status == "part")
    if not names:
        return ""
    listed = ", ".join(names)
    return (
        f"{len(names)} configurations are parts of models and none of their own (no Auto class knows them): {listed}.\n"
    )


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")
