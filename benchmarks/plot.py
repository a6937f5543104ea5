"""Pictures of benchmark results. Needs the extra ``s2o-compile[plot]``."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

Row = dict[str, Any]
DENSE = {
    "SDPA flash": ("dense, SDPA flash", "#9a9a9a", "o"),
    "SDPA cuDNN": ("dense, SDPA cuDNN", "#6b6b6b", "s"),
    "FlashAttention-3": ("dense, FlashAttention-3", "#2b2b2b", "^"),
}
KERNEL = "S2O forward, density "
WHOLE = "S2O whole op, topical"
GREEN, RED = "#1f9e89", "#d1495b"
MODELS = {"gemma3": "Gemma-3-270M", "smollm2": "SmolLM2-135M"}
SHADES = {"gemma3": ("#f2b8a2", RED, "#7a1f2f"), "smollm2": ("#93d1c6", GREEN, "#0e4a41")}
"""Colours of a model's lengths, the shortest first."""

DRAWN_DENSITY = 0.1
"""The kernel's line over the length; the benchmark measures others too."""

PEAK_TFLOPS = {"H100": 989.0, "H200": 989.0}
"""Dense bf16 tensor-core peak by a word of the device's name, TFLOP/s (data sheet of the SXM card)."""


def plot_attention(results: Path, picture: Path) -> None:
    """Draw time against length, speed-up against density, and the share of the device's peak.

    Args:
        results: JSON of ``benchmarks/attention.py``.
        picture: PNG to write.
    """
    data = json.loads(results.read_text())
    about, rows = data["about"], data["rows"]
    figure, axes = pyplot().subplot_mosaic("TT;DP", figsize=(9.0, 8.4), dpi=130, height_ratios=(1.15, 1))
    _draw_time(axes["T"], rows)
    _draw_speedup(axes["D"], rows)
    _draw_peak(axes["P"], rows, about["device"])
    shape = about["shape"]
    heads = f"{shape['heads']} query heads on {shape['kv_heads']} key/value heads of {shape['head_dim']}"
    finish(figure, f"One attention call: {about['device']}, {about['dtype']}, causal, {heads}", picture)


def plot_budget(results: Path, picture: Path) -> None:
    """Draw error against density, and measured over asked error, of a trained model's layers.

    Args:
        results: JSON of ``benchmarks/budget.py``.
        picture: PNG to write.
    """
    data = json.loads(results.read_text())
    about, rows = data["about"], data["rows"]
    figure, (curve, kept) = pyplot().subplots(1, 2, figsize=(9.0, 4.2), dpi=130)
    lengths = sorted({row["tokens"] for row in rows if row["section"] == "curve"})
    for tokens, colour in zip(lengths, (RED, GREEN, *["#6b6b6b"] * len(lengths)), strict=False):
        points = [row for row in rows if row["section"] == "curve" and row["tokens"] == tokens]
        label, density = f"{tokens // 1024}K", [row["density"] for row in points]
        line(curve, [(row["density"], row["mean"]) for row in points], f"{label}, mean of layers", colour, "o")
        curve.plot(density, [row["largest"] for row in points], ":", color=colour, label=f"{label}, largest")
    curve.set(
        xscale="log",
        yscale="log",
        xlabel="density: share of the query-key pairs computed",
        ylabel="relative L2 error of an attention's output",
    )
    _plain_percent(curve.xaxis, [0.05, 0.1, 0.2, 0.4])
    _plain_percent(curve.yaxis, [0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4])
    _draw_kept(kept, [row for row in rows if row["section"] == "budget kept"])
    finish(figure, f"{about['model']}, every layer, {about['device']}", picture)


def plot_enforced(results: Path, picture: Path) -> None:
    """Draw density against budget, and true error over budget, of both models' layers.

    Args:
        results: JSON of ``benchmarks/enforced.py``.
        picture: PNG to write.
    """
    data = json.loads(results.read_text())
    about, rows = data["about"], [row for row in data["rows"] if row["section"] == "budget"]
    figure, (cost, held) = pyplot().subplots(1, 2, figsize=(9.0, 4.2), dpi=130)
    groups = sorted({(row["model"], row["tokens"]) for row in rows})
    budgets = sorted({row["error"] for row in rows})
    for number, (model, tokens) in enumerate(groups):
        colour = SHADES[model][sum(name == model and length < tokens for name, length in groups)]
        here = {
            e: [row for row in rows if (row["model"], row["tokens"], row["error"]) == (model, tokens, e)]
            for e in budgets
        }
        cost.plot([], [], "o-", color=colour, label=f"{MODELS.get(model, model)}, {tokens // 1024}K tokens")
        for name, style in (("density", "o-"), ("least_density", "_:")):
            means = [statistics.mean(row[name] for row in some if "least_density" in row) for some in here.values()]
            cost.plot(range(len(budgets)), means, style, color=colour)
        for place, some in enumerate(here.values()):
            ratios = [row["true_over_budget"] for row in some]
            x = place + 0.16 * (number - (len(groups) - 1) / 2)
            held.plot([x] * len(ratios), ratios, ".", color=colour, alpha=0.6)
    held.axhline(1.0, color="#2b2b2b", linewidth=1, label="the budget")
    for style, label in (("o-", "computed"), ("_:", "least that the budget needs")):
        cost.plot([], [], style, color="#2b2b2b", label=label)
    cost.set(ylabel="density: share of the pairs, mean of layers", ylim=(0, 1))
    held.set(ylabel="true error of a layer / budget", ylim=(0, 1.4))
    for axes in (cost, held):
        axes.set_xticks(range(len(budgets)), [f"{error:.0%}" for error in budgets])
        axes.set(xlabel="budget: S2OConfig(error=...)", xlim=(-0.5, len(budgets) - 0.5))
    finish(figure, f"Budgets that hold while a call runs: {about['device']}, {about['dtype']}, four texts", picture)


def pyplot() -> Any:  # noqa: ANN401 (a module)
    """Matplotlib without a window."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def finish(figure: Any, title: str, picture: Path, legends: Any = None, *, grid: bool = True) -> None:  # noqa: ANN401
    """Grid, legends (of all axes for None), title and file. The ground is white, so it reads in a dark page, too."""
    for axes in figure.axes:
        if grid:
            axes.grid(visible=True, which="major", alpha=0.3)
        if legends is None or axes in legends:
            axes.legend(fontsize=8, frameon=False)
    if title:
        figure.suptitle(title, fontsize=11)
    figure.tight_layout()
    figure.savefig(picture, facecolor="white")
    pyplot().close(figure)


def _draw_kept(axes: Any, rows: list[Row]) -> None:  # noqa: ANN401 (matplotlib's axes)
    """Measured over asked error of the layers, from the least over the median to the largest, at every budget."""
    texts = sorted({(row["tokens"], row["text"]) for row in rows})
    budgets = sorted({row["error"] for row in rows})
    axes.axhspan(0.4, 1.25, color="#9a9a9a", alpha=0.2, label="0.4 to 1.25 of the budget", linewidth=0)
    for number, ((tokens, text), colour) in enumerate(zip(texts, (RED, "#e6a15c", GREEN, "#6b6b6b"), strict=False)):
        here = {row["error"]: row for row in rows if (row["tokens"], row["text"]) == (tokens, text)}
        places = [budgets.index(error) + 0.18 * (number - (len(texts) - 1) / 2) for error in here]
        axes.vlines(places, *([row[end] for row in here.values()] for end in ("least", "largest")), color=colour)
        medians = [row["median"] for row in here.values()]
        axes.plot(places, medians, "o", color=colour, label=f"{tokens // 1024}K, {text}, median and range")
    axes.set_xticks(range(len(budgets)), [f"{error:.0%}" for error in budgets])
    axes.set(xlabel="budget, on texts never calibrated on", ylabel="measured / asked error of a layer", ylim=(0, None))


def _plain_percent(axis: Any, places: list[float]) -> None:  # noqa: ANN401 (matplotlib's)
    axis.set_ticks(places, [f"{100 * place:g} %" for place in places])
    axis.set_ticks([], minor=True)


def _styles(rows: list[Row]) -> dict[str, tuple[str, str, str]]:
    """Label, colour and marker by the name of what was timed."""
    whole = next(row["what"] for row in rows if _is_drawn(row))
    return {
        **DENSE,
        f"{KERNEL}{DRAWN_DENSITY}": (f"S2O kernel alone, density {DRAWN_DENSITY}", GREEN, "v"),
        whole: (f"S2O, ranking included ({whole.split(', ')[2]})", RED, "D"),
    }


def _draw_time(axes: Any, rows: list[Row]) -> None:  # noqa: ANN401 (matplotlib's axes)
    """Milliseconds over tokens."""
    for name, (label, colour, marker) in _styles(rows).items():
        line(axes, [(row["length"], row["ms"]) for row in rows if row["what"] == name], label, colour, marker)
    axes.set_yscale("log")
    axes.set_ylabel("milliseconds")
    token_axis(axes, rows)


def _is_drawn(row: Row) -> bool:
    """Whether a row is a whole call at the tau that begins the default."""
    return row["what"].startswith(WHOLE) and row["what"].endswith("per_query")


def _draw_speedup(axes: Any, rows: list[Row]) -> None:  # noqa: ANN401 (matplotlib's axes)
    """Speed-up over the fastest dense kernel against the measured density, for the three longest lengths."""
    lengths = sorted({row["length"] for row in rows})[-3:]
    for length, colour, marker in zip(lengths, ("#9bd8c8", "#4fb7a1", GREEN), "osv", strict=False):
        here = [row for row in rows if row["length"] == length]
        dense = min(row["ms"] for row in here if row["what"] in DENSE)
        points = [(row["density"], dense / row["ms"]) for row in here if row["what"].startswith(KERNEL)]
        line(axes, sorted(points), f"S2O kernel alone, {length // 1024}K", colour, marker)
        points = [(row["density"], dense / row["ms"]) for row in here if _is_drawn(row)]
        axes.plot(*zip(*points, strict=True), marker, color=RED, markersize=5)
    axes.plot([], [], "v", color=RED, markersize=5, label="ranking included, same markers")
    ends = [edge(row["density"] for row in rows if 0 < row["density"] < 1) for edge in (min, max)]
    axes.plot(ends, [1 / density for density in ends], ":", color="#2b2b2b", linewidth=1, label="1 / density")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks([0.05, 0.1, 0.2, 0.5], ["0.05", "0.1", "0.2", "0.5"])
    axes.set_yticks([1, 2, 5, 10, 20], ["1", "2", "5", "10", "20"])
    axes.minorticks_off()
    axes.set_xlabel("density: share of the query-key pairs computed")
    axes.set_ylabel("times the fastest dense kernel")


def _draw_peak(axes: Any, rows: list[Row], device: str) -> None:  # noqa: ANN401 (matplotlib's axes)
    """TFLOP/s of the computed area over the device's peak; plain TFLOP/s where that is not known."""
    peak = next((tflops for word, tflops in PEAK_TFLOPS.items() if word in device), None)
    for name, (label, colour, marker) in _styles(rows).items():
        points = [(row["length"], row["tflops"] / (peak or 1.0)) for row in rows if row["what"] == name]
        line(axes, points, label.partition(" (")[0], colour, marker)
    axes.set_ylim(0, 1 if peak else None)
    axes.set_ylabel(f"share of {peak:.0f} TFLOP/s, computed area only" if peak else "TFLOP/s of the computed area")
    token_axis(axes, rows)


def line(axes: Any, points: list[tuple[float, float]], label: str, colour: str, marker: str) -> None:  # noqa: ANN401
    """A line with markers through points, if there are any."""
    if points:
        axes.plot(*zip(*points, strict=True), marker=marker, color=colour, label=label, linewidth=1.8, markersize=5)


def token_axis(axes: Any, rows: list[Row], label: str = "tokens") -> None:  # noqa: ANN401 (matplotlib's axes)
    """Lengths on a logarithmic axis."""
    lengths = sorted({row["length"] for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{n // 1024}K" for n in lengths])
    axes.set_xlabel(label)
