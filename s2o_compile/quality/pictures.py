"""Pictures of an evaluation and of one head's attention. Needs the extra ``s2o-compile[plot]``.

Colours are told apart by all eyes: viridis for one quantity, blue against orange for two.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from s2o_compile.errors import OptionError
from s2o_compile.kernels.core.plan import TILE_LEN
from s2o_compile.quality.evaluation import Evaluation
from s2o_compile.quality.visit_map import VisitMap

BLUE, ORANGE, GREY, BLACK = "#0b559f", "#d95f02", "#8a8a8a", "#222222"
VISITED, MISSED = "#d7e6f5", "#f6f4f0"
"""Grounds of visited and of unvisited pairs."""

WEAKEST, STRONGEST = 1e-5, 1e-1
"""Attention weights at the two ends of a colour."""

SIDES = (
    ((7, 4), "left"),
    ((-7, -5), "right"),
    ((7, -6), "left"),
    ((-7, 6), "right"),
    ((0, 12), "center"),
    ((0, -12), "center"),
)
"""Where a name may stand beside its point, in points, the best first."""

CELLS = 512
"""Cells of an attention heat map along either side, at most."""


def draw_density(evaluation: Evaluation, picture: Path) -> None:
    """Density and error of every head of every layer, as heat maps."""
    figure, axes = _figure(2, (7.2, 0.8 + max(2.2, 0.15 * len(evaluation.sites))), sharey=True)
    heads = max(len(site.head_density) for site in evaluation.sites)
    rows = {
        "density": [site.head_density for site in evaluation.sites],
        "relative L2 error, %": [[100 * error for error in site.head_error] for site in evaluation.sites],
    }
    for one, (name, values) in zip(axes, rows.items(), strict=True):
        padded = [[*row, *[float("nan")] * (heads - len(row))] for row in values]
        image = one.imshow(padded, cmap="viridis", aspect="auto", vmin=0, interpolation="nearest")
        figure.colorbar(image, ax=one, pad=0.02)
        one.set_title(name, fontsize=9)
        one.set_xlabel("query head")
        one.set_xticks(range(0, heads, -(-heads // 16)))
    labels, axis = _layers([site.name for site in evaluation.sites])
    shown = range(0, len(labels), -(-len(labels) // 16))
    axes[0].set_yticks(shown, [labels[place] for place in shown])
    axes[0].set_ylabel(axis)
    _title(figure, evaluation)
    _save(figure, picture)


def draw_error(evaluation: Evaluation, picture: Path) -> None:
    """Error against density: the mean of all sites over the taus, and every head as the configuration has it."""
    sites = evaluation.sites
    heads = [pair for site in sites for pair in zip(site.head_density, site.head_error, strict=True) if pair[1] > 0]
    means = {
        f"tau {points[0].tau:g}": (_mean([p.density for p in points]), _mean([p.error for p in points]))
        for points in zip(*(site.curve for site in sites), strict=True)
    }
    own = evaluation.config.quality
    means[own] = evaluation.density, evaluation.error
    curve = sorted(((*point, name) for name, point in means.items() if point[1] > 0), reverse=True)  # as tau grows
    if not heads:
        raise OptionError("plot error: expected errors above zero, got an exact evaluation. Evaluate with a tau > 0.")
    figure, axes = _figure(1, (5.2, 3.9))
    axes.scatter(*zip(*heads, strict=True), s=9, color=BLUE, alpha=0.25, linewidths=0, label="one head")
    line = [point for *point, name in curve if name.startswith("tau")]
    if line:
        axes.plot(*zip(*line, strict=True), "o-", color=ORANGE, markersize=4, label="mean of layers, one tau for all")
    if not own.startswith("tau"):
        axes.plot(evaluation.density, evaluation.error, "*", color=BLUE, markersize=11, label="mean of layers")
    axes.set_xscale("log")
    axes.set_yscale("log")
    _plain_ticks(axes.xaxis, lambda x: f"{x:g}")
    _plain_ticks(axes.yaxis, lambda y: f"{100 * y:g} %")
    axes.set_xlabel("density: computed / visible query-key pairs")
    axes.set_ylabel("relative L2 error of the attention output")
    axes.grid(visible=True, which="major", alpha=0.3)
    axes.legend(fontsize=8, frameon=False)
    _title(figure, evaluation)
    _label_points(axes, curve, own)
    _save(figure, picture)


def draw_depth(evaluation: Evaluation, picture: Path) -> None:
    """Keys that the queries of a tile computed before it stopped, over the sequence: a line a layer."""
    figure, axes = _figure(1, (5.6, 3.9))
    sites = evaluation.sites
    from matplotlib import cm, colormaps, colors

    labels, axis = _layers([site.name for site in sites])
    colours = colormaps["viridis"].resampled(len(sites))
    for place, site in enumerate(sites):
        axes.plot(_tile_ends(site.tile_keys), site.tile_keys, color=colours(place), linewidth=0.8, alpha=0.8)
    longest = max(sites, key=lambda site: len(site.tile_visible))
    everything = [sum(keys) / len(keys) for keys in zip(*(site.tile_keys for site in sites), strict=False)]
    axes.plot(_tile_ends(everything), everything, color=BLACK, linewidth=2, label="mean of the layers")
    visible = longest.tile_visible
    axes.plot(_tile_ends(visible), visible, "--", color=GREY, linewidth=1.5, label="dense")
    axes.set_ylim(0, min(max(visible), 1.4 * max(max(site.tile_keys) for site in sites)))
    axes.set_xlim(0, TILE_LEN * len(visible))
    for one in (axes.xaxis, axes.yaxis):
        _plain_ticks(one, _tokens)
    axes.set_xlabel("position of the query, tokens")
    axes.set_ylabel("keys computed per query, mean over heads")
    axes.grid(visible=True, alpha=0.3)
    axes.legend(fontsize=8, frameon=False, loc="upper left")
    edges = [place - 0.5 for place in range(len(sites) + 1)]
    scale = cm.ScalarMappable(colors.BoundaryNorm(edges, len(sites)), colours)
    shown = range(0, len(labels), -(-len(labels) // 8))
    bar = figure.colorbar(scale, ax=axes, label=axis, pad=0.02, ticks=list(shown))
    bar.minorticks_off()
    bar.ax.set_yticklabels([labels[place] for place in shown])
    _title(figure, evaluation)
    _save(figure, picture)


def draw_attention(visits: VisitMap, picture: Path, *, title: str) -> None:
    """One head's attention with the visited pairs drawn over it, in original and in ranked order."""
    figure, (original, ranked) = _figure(2, (9.2, 4.9), sharey=True)
    n_queries, n_keys = visits.visible.shape
    extent = (0, n_keys, n_queries, 0)
    options = {"extent": extent, "aspect": "auto", "interpolation": "nearest"}
    original.imshow(_shades(visits.weights, visits.visible, visits.visited).numpy(), **options)
    original.set_title("original order", fontsize=9)
    original.set_xlabel("key, tokens")
    original.set_ylabel("query, tokens")
    order = visits.key_order.repeat_interleave(visits.segment_len, 0)[:n_queries]
    real = torch.arange(n_keys) < visits.key_count.repeat_interleave(visits.segment_len)[:n_queries, None]
    weights, visible, visited = (x.gather(1, order) for x in (visits.weights, visits.visible, visits.visited))
    ranked.imshow(_shades(weights, visible & real, visited & real).numpy(), **options)
    ranked.axvline(visits.segment_len, color=BLACK, linewidth=0.8, linestyle=":")
    ranked.set_title("ranked order", fontsize=9)
    ranked.set_xlabel("key, own segment first, then by rank")
    for axes in (original, ranked):
        for one in (axes.xaxis, axes.yaxis):
            _plain_ticks(one, _tokens)
    _weight_bars(figure, (original, ranked))
    figure.get_layout_engine().set(wspace=0.05)
    area = visits.visited.sum().item() / max(visits.visible.sum().item(), 1)
    where = f"{visits.site}, head {visits.head}"
    figure.suptitle(
        f"{title}\n{where}: {area:.0%} of the pairs visited, {1 - visits.missed_mass:.1%} of the attention", fontsize=9
    )
    _save(figure, picture)


PICTURES: dict[str, Callable[[Evaluation, Path], None]] = {
    "density": draw_density,
    "error": draw_error,
    "depth": draw_depth,
}


def _shades(weights: Tensor, visible: Tensor, visited: Tensor) -> Tensor:
    """RGB [cells, cells, 3] of [Nq, Nk]: the ground shows visited pairs, the shade the largest attention weight."""
    from matplotlib.colors import to_rgb

    def shade(where: Tensor) -> Tensor:
        heaviest = _pooled(weights.masked_fill(~where, 0.0), torch.amax).clamp(min=WEAKEST)[..., None]
        return (heaviest / WEAKEST).log() / torch.tensor(STRONGEST / WEAKEST).log()

    colours = {name: torch.tensor(to_rgb(name)) for name in (VISITED, MISSED, BLUE, ORANGE)}
    seen = _pooled(visible.float(), torch.mean)[..., None]
    share = _pooled(visited.float(), torch.mean)[..., None] / seen.clamp(min=1e-9)
    ground = share * colours[VISITED] + (1 - share) * colours[MISSED]
    for colour, where in ((BLUE, visited), (ORANGE, visible & ~visited)):
        ground = torch.lerp(ground, colours[colour], shade(where).clamp(max=1.0))
    return torch.where(seen > 0, ground, 1.0)


def _pooled(pairs: Tensor, reduce: Callable[..., Tensor]) -> Tensor:
    """[Nq, Nk] in at most CELLS x CELLS cells; rows and columns left over at the end are dropped."""
    rows, columns = (-(-size // CELLS) for size in pairs.shape)
    kept = pairs[: pairs.shape[0] // rows * rows, : pairs.shape[1] // columns * columns]
    return reduce(kept.unflatten(1, (-1, columns)).unflatten(0, (-1, rows)), dim=(1, 3))


def _weight_bars(figure: Any, axes: Sequence[Any]) -> None:  # noqa: ANN401 (matplotlib's)
    from matplotlib import cm, colors

    for name, ground, colour in (("visited", VISITED, BLUE), ("not visited", MISSED, ORANGE)):
        colours = colors.LinearSegmentedColormap.from_list(name, [ground, colour])
        scale = cm.ScalarMappable(colors.LogNorm(WEAKEST, STRONGEST), colours)
        bar = figure.colorbar(scale, ax=axes, fraction=0.03, pad=0.015, aspect=35)
        bar.set_label(f"attention weight, {name}", fontsize=8)
        bar.ax.tick_params(labelsize=7)


def _figure(columns: int, size: tuple[float, float], **options: Any) -> tuple[Any, Any]:  # noqa: ANN401 (matplotlib's)
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise OptionError("plot: expected matplotlib, got none. Run `pip install 's2o-compile[plot]'`.") from error
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    return plt.subplots(1, columns, figsize=size, dpi=200, layout="constrained", **options)


def _symbols(quality: str) -> str:
    return quality.replace("tau ", "τ = ")


def _label_points(axes: Any, points: Sequence[tuple[float, float, str]], bold: str) -> None:  # noqa: ANN401 (matplotlib's)
    """Names beside their points, each on the first side where it covers no name, no point, and no edge."""
    figure = axes.figure
    figure.canvas.draw()  # the layout is known from here on
    taken = [axes.transData.transform(point) for *point, _ in points]
    names: list[Any] = []
    for *point, name in points:
        style = {"fontsize": 7, "fontweight": "bold" if name == bold else "normal", "textcoords": "offset points"}
        for place, side in SIDES:
            note = axes.annotate(_symbols(name), point, place, ha=side, va="center", **style)
            box = note.get_window_extent()
            inside = axes.bbox.contains(box.x0, box.y0) and axes.bbox.contains(box.x1, box.y1)
            if inside and not (any(box.overlaps(other) for other in names) or any(box.contains(*at) for at in taken)):
                names.append(box)
                break
            note.remove()


def _title(figure: Any, evaluation: Evaluation) -> None:  # noqa: ANN401 (matplotlib's)
    lengths = sorted(set(evaluation.lengths))
    tokens = _tokens(lengths[0]) if len(lengths) == 1 else f"{_tokens(lengths[0])} to {_tokens(lengths[-1])}"
    figure.suptitle(f"{evaluation.model}, {tokens} tokens, {_symbols(evaluation.config.quality)}", fontsize=10)


def _save(figure: Any, picture: Path) -> None:  # noqa: ANN401 (matplotlib's)
    """Write a picture and forget its figure, which pyplot would keep for good."""
    import matplotlib.pyplot as plt

    figure.savefig(picture)
    plt.close(figure)


def _layers(names: Sequence[str]) -> tuple[list[str], str]:
    """Short labels of sites and their kind: numbers of layers if these tell the sites apart, else names."""
    numbers = [re.findall(r"\d+", name) for name in names]
    for place in range(min(map(len, numbers))):
        labels = [found[place] for found in numbers]
        if len(set(labels)) == len(names) and len({re.sub(r"\d+", "", name) for name in names}) == 1:
            return labels, "layer"
    return list(names), "attention"


def _tile_ends(values: Sequence[float]) -> list[int]:
    return [TILE_LEN * (place + 1) for place in range(len(values))]


def _tokens(count: float) -> str:
    return f"{count / 1024:g}K" if count >= 1024 and count % 512 == 0 else f"{count:g}"


def _plain_ticks(axis: Any, text: Callable[[float], str]) -> None:  # noqa: ANN401 (matplotlib's)
    """Few ticks at round places, written out."""
    from matplotlib import ticker

    if axis.get_scale() == "log":
        axis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.set_minor_locator(ticker.NullLocator())
    else:
        low, high = sorted(axis.get_view_interval())
        step = 2 ** max(int(torch.tensor(max(high - low, 1.0) / 4).log2().floor()), 0)
        axis.set_major_locator(ticker.MultipleLocator(step))
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: text(value)))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
