"""The pictures of benchmark results."""

from pathlib import Path

import pytest

from benchmarks.plot import plot_attention, plot_budget, plot_enforced
from benchmarks.plot_front import plot_method, plot_quality, plot_speed

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


@pytest.mark.parametrize(
    ("draw", "results"),
    [
        (plot_attention, "attention-h100"),
        (plot_budget, "budget-h100"),
        (plot_enforced, "enforced-h200"),
        (plot_quality, "quality-h200"),
    ],
)
def test_the_measured_results_make_a_picture(draw, results, tmp_path):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    picture, before = tmp_path / "picture.png", pyplot.get_fignums()
    draw(RESULTS / f"{results}.json", picture)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert pyplot.get_fignums() == before, "a figure that stays open takes memory for good"


@pytest.mark.parametrize("draw", [plot_speed, plot_method])
def test_the_pictures_of_the_front_pages_are_drawn(draw, tmp_path):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    picture, before = tmp_path / "picture.png", pyplot.get_fignums()
    draw(picture)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert pyplot.get_fignums() == before
