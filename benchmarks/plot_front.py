"""Pictures of the front pages: README's, quality against density, and the method as a drawing."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from benchmarks.measured import crossover, device, first_token, newest, one_call, read, seconds, tokens
from benchmarks.plot import GREEN, MODELS, RED, Row, finish, line, pyplot, token_axis

BLUE, PALE, ORANGE, GREY = "#0b559f", "#d7e6f5", "#e6a15c", "#9a9a9a"
FOUND, SEGMENTS = 0.16, 5
"""Share of important keys in the drawing, and its segments."""


def plot_speed(picture: Path) -> None:
    """README's picture: seconds to the first token of the longest prompt, and one attention over the length."""
    figure, (bars, lines) = pyplot().subplots(1, 2, figsize=(10.0, 3.7), dpi=150, width_ratios=(1, 1.15))
    about, _ = read(newest("end-to-end"))
    _draw_bars(bars, f"{device(about)}, Llama-3.1-8B's shape")
    about, rows = read(newest("attention"))
    fa3 = [(row["length"], row["ms"]) for row in rows if row["what"] == "FlashAttention-3"]
    calls, begins = one_call(), crossover(about)
    line(lines, [(n, dense["ms"]) for n, _, dense, _ in calls], "dense, PyTorch's fastest kernel", "#6b6b6b", "s")
    if fa3:
        line(lines, fa3, "dense, FlashAttention-3", "#2b2b2b", "^")
    line(lines, [(n, ours["ms"]) for n, _, _, ours in calls], "S2O, tau 0.5", RED, "D")
    lines.axvspan(0, begins, color=GREY, alpha=0.15, linewidth=0)
    lines.text(
        begins / 1.1,
        max(dense["ms"] for _, _, dense, _ in calls) / 10,
        "dense runs\nhere by default",
        fontsize=8,
        ha="right",
    )
    lines.set(yscale="log", ylabel="milliseconds")
    lines.set_title(f"One attention, {device(about)}", fontsize=10)
    lines.yaxis.set_major_formatter("{x:g}")
    token_axis(lines, rows, "tokens of the prompt")
    lines.set_xlim(min(begins / 2.2, min(n for n, *_ in calls) / 1.2), max(n for n, *_ in calls) * 1.2)
    finish(figure, "", picture, legends=(lines,))


def _draw_bars(axes: Any, where: str) -> None:  # noqa: ANN401 (matplotlib's axes)
    """Seconds to the first token of the longest prompt, one bar a baseline."""
    found = first_token()
    longest = max(length for length, *_ in found)
    here = [row for row in found if row[0] == longest]
    ours, density = here[0][3], here[0][4]
    bars = [(name.replace("`", "").replace(", ", "\n"), dense, GREY) for _, name, dense, _, _ in here]
    bars = [*sorted(bars, key=lambda bar: -bar[1]), (f"S2O\n{density:.0%} of the pairs", ours, RED)]
    for place, (_, value, colour) in enumerate(bars):
        axes.barh(-place, value, color=colour, height=0.62)
        more = "" if colour == RED else f"   ({value / ours:.1f}x)"
        axes.text(value, -place, f" {seconds(value)}{more}", va="center", fontsize=9)
    axes.set_yticks([-place for place in range(len(bars))], [label for label, _, _ in bars], fontsize=8)
    axes.set(xlabel="seconds to the first token", xlim=(0, 1.38 * max(value for _, value, _ in bars)))
    axes.set_title(f"A prompt of {tokens(longest)} tokens, {where}", fontsize=10)


MARKERS = {
    "default": {"marker": "*", "s": 110, "zorder": 3},
    "tau": {"marker": "o", "s": 26},
    "error": {"marker": "s", "s": 26},
}


def plot_quality(results: Path, picture: Path) -> None:
    """Error and loss against density of both models, a line a length.

    Args:
        results: JSON of ``benchmarks/enforced.py --only quality``.
        picture: PNG to write.
    """
    about, rows = read(results)
    figure, (errors, losses) = pyplot().subplots(1, 2, figsize=(10.0, 4.0), dpi=150)
    groups = sorted({(row["model"], row["tokens"]) for row in rows})
    for (model, length), colour in zip(groups, (RED, ORANGE, GREEN, BLUE), strict=False):
        of_group = (row for row in rows if (row["model"], row["tokens"], row["text"]) == (model, length, "prose"))
        here = sorted((row for row in of_group if row["config"] != "tau-0.5"), key=_density)
        label = f"{MODELS.get(model, model)}, {tokens(length)} tokens"
        for axes, name, factor in ((errors, "error", 100), (losses, "loss", 1)):
            axes.plot(
                [row["density"] for row in here], [factor * row[name] for row in here], "-", color=colour, alpha=0.4
            )
            for row in here:
                style = MARKERS[row["config"].partition("-")[0]]
                axes.scatter(row["density"], factor * row[name], color=colour, **style)
        errors.plot([], [], "-", color=colour, label=label)
    for marker, label in (("*", "the default"), ("o", "tau 0.25"), ("s", "an error budget: 5, 3, 2 %")):
        losses.plot([], [], marker, color="#6b6b6b", label=label, linestyle="", markersize=9 if marker == "*" else 5)
    errors.set(ylabel="error of an attention, %, mean of the layers", ylim=(0, None))
    losses.set(ylabel="loss more than dense, nats a token", ylim=(0, None))
    for axes in (errors, losses):
        axes.set(xlabel="density: share of the query-key pairs computed", xlim=(0, None))
    finish(figure, f"What is lost, and for how much less work: {about['device']}, {about['dtype']}", picture)


def _density(row: Row) -> float:
    return row["density"]


def plot_method(picture: Path) -> None:
    """The method as a drawing: own segments, important keys, their ranked order, and where tiles stop."""
    random.seed(0)
    figure, (text, ranked) = pyplot().subplots(1, 2, figsize=(10.0, 4.4), dpi=150, sharey=True)
    width = 1 / SEGMENTS
    for segment in range(SEGMENTS):
        top = segment * width
        corner = [(top, top), (top, top + width), (top + width, top + width)]
        text.fill(*zip(*corner, strict=True), color=BLUE, linewidth=0)
        ranked.fill(*zip(*[(x - top, y) for x, y in corner], strict=True), color=BLUE, linewidth=0)
        text.fill_between([0, top], top, top + width, color=PALE, linewidth=0)
        kept = FOUND * (1 - (1 - width) ** (segment * 2)) + 0.07 * bool(segment)
        keys = sorted(random.random() * top for _ in range(26 if segment else 0))
        for key in keys:
            text.fill_between([key, min(key + kept / 26, top)], top, top + width, color=BLUE, linewidth=0)
        for tile in range(4):
            low = top + tile * width / 4
            stop = min(kept * (0.75 + 0.5 * random.random()), top)
            ranked.fill_between([width, width + top], low, low + width / 4, color=PALE, linewidth=0)
            ranked.fill_between([width, width + stop], low, low + width / 4, color=BLUE, alpha=0.75, linewidth=0)
        for axes in (text, ranked):
            axes.axhline(top, color="white", linewidth=1.2)
    ranked.axvline(width, color="#222222", linewidth=0.8, linestyle=":")
    note = {"fontsize": 9, "arrowprops": {"arrowstyle": "->", "color": "#222222"}}
    text.annotate("own segment:\nall computed", (0.36, 0.33), (0.52, 0.12), **note)
    text.annotate("important keys\nof a segment", (0.24, 0.68), (0.62, 0.34), **note)
    ranked.annotate("a tile of 128 queries\nstops here", (width + kept * 0.95, 0.82), (0.62, 0.45), **note)
    ranked.annotate("left out", (0.72, 0.93), (0.84, 0.7), **note)
    ranked.annotate("ranked keys, most important first", (width + 0.03, 0.26), (0.36, 0.12), **note)
    for axes, title, label in (
        (text, "in the order of the text", "key"),
        (ranked, "as S2O visits them", "key: own segment, then by rank"),
    ):
        axes.set(xlim=(0, 1), ylim=(1, 0), xticks=[], yticks=[], title=title, xlabel=label)
    text.set_ylabel("query: one segment after the other")
    finish(figure, "Dark is computed, pale is left out", picture, legends=(), grid=False)
