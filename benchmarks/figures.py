"""Everything that is written from benchmarks/results: pages, tables and pictures. `make figures` runs it.

    python -m benchmarks.figures             # after a benchmark wrote a file in benchmarks/results
    python -m benchmarks.figures --no-pictures

Of several devices the newest that was measured stands on the pages (``measured.DEVICES``).
"""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks import measured, models_page, plot, plot_front, speed_page, table

RESULTS = measured.RESULTS
DOCS = Path(__file__).parents[1] / "docs"


def write_pages() -> None:
    """README's table, docs/speed.md, docs/models.md, and the tables of benchmarks/notes."""
    speed_page.main()
    models_page.write()
    table.write_all()


def draw_pictures() -> None:
    """Every picture that is drawn from results."""
    plot_front.plot_speed(DOCS / "speed.png")
    plot_front.plot_quality(RESULTS / "quality-h200.json", DOCS / "quality.png")
    plot_front.plot_method(DOCS / "method.png")
    plot.plot_attention(measured.newest("attention"), DOCS / "attention.png")
    plot.plot_budget(RESULTS / "budget-h100.json", DOCS / "budget-h100.png")
    plot.plot_enforced(RESULTS / "enforced-h200.json", DOCS / "enforced-h200.png")


if __name__ == "__main__":
    write_pages()
    if "--no-pictures" not in sys.argv:
        draw_pictures()
