"""The picture of benchmark results."""

from pathlib import Path

import pytest

from s2o_compile.plot import plot_attention

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results" / "attention-h100.json"


def test_the_measured_results_make_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "attention.png"
    plot_attention(RESULTS, picture)
    assert picture.read_bytes().startswith(b"\x89PNG")
