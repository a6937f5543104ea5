"""The pictures of benchmark results."""

from pathlib import Path

import pytest

from benchmarks.plot import plot_attention, plot_budget

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


@pytest.mark.parametrize("draw", [plot_attention, plot_budget], ids=["attention", "budget"])
def test_the_measured_results_make_a_picture(draw, tmp_path, request):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "picture.png"
    draw(RESULTS / f"{request.node.callspec.id}-h100.json", picture)
    assert picture.read_bytes().startswith(b"\x89PNG")
