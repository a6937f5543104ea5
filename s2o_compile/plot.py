"""Pictures of benchmark results. Needs the extra ``s2o-compile[plot]``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

STYLES = {
    "SDPA flash": ("dense, SDPA flash", "#9a9a9a", "o"),
    "SDPA cuDNN": ("dense, SDPA cuDNN", "#6b6b6b", "s"),
    "FlashAttention-3": ("dense, FlashAttention-3", "#2b2b2b", "^"),
    "S2O forward, density 0.1": ("S2O kernel alone, density 0.1", "#1f9e89", "v"),
}
WHOLE = "S2O whole op, topical"


def plot_attention(results: Path, picture: Path) -> None:
    """Draw the time of one attention call against its length.

    Args:
        results: JSON of ``benchmarks/attention.py``.
        picture: PNG to write.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    data = json.loads(results.read_text())
    about, rows = data["about"], data["rows"]
    whole = next(row["what"] for row in rows if row["what"].startswith(WHOLE) and row["what"].endswith("per_query"))
    figure, axes = plt.subplots(figsize=(7.5, 4.6), dpi=150)
    styles = {**STYLES, whole: (f"S2O, ranking included ({whole.split(', ')[2]})", "#d1495b", "D")}
    for name, (label, colour, marker) in styles.items():
        points = [(row["length"], row["ms"]) for row in rows if row["what"] == name]
        if points:
            axes.plot(*zip(*points, strict=True), marker=marker, color=colour, label=label, linewidth=1.8, markersize=5)
    lengths = sorted({row["length"] for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(lengths, [f"{n // 1024}K" for n in lengths])
    axes.set_xlabel("tokens")
    axes.set_ylabel("milliseconds, one attention call")
    shape = about["shape"]
    heads = f"Hq={shape['heads']} Hkv={shape['kv_heads']} D={shape['head_dim']}"
    axes.set_title(f"{about['device']}, {about['dtype']}, causal, {heads}", fontsize=10)
    axes.grid(visible=True, which="major", alpha=0.3)
    axes.legend(fontsize=8, frameon=False)
    figure.tight_layout()
    figure.savefig(picture)


if __name__ == "__main__":
    plot_attention(Path(sys.argv[1]), Path(sys.argv[2]))
