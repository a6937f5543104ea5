"""Files of evaluations that cannot be drawn: one line that names the field, status 2."""

import json

import pytest

pytest.importorskip("typer")

from s2o_compile.cli import main as cli
from s2o_compile.quality.evaluation import Evaluation
from tests.helpers.refusals import complaint

EVALUATION = {
    "format": 1,
    "model": "m",
    "device": "cpu",
    "config": {},
    "lengths": [600],
    "tokens": 599,
    "loss_dense": 1.0,
    "loss_s2o": 1.0,
    "top1_agreement": 1.0,
    "kl": 0.0,
    "sites": [
        {
            "name": "layers.0",
            "head_density": [0.5],
            "error": 0.1,
            "head_error": [0.1],
            "worst_tile": 0.1,
            "worst_row": 0.1,
            "tile_keys": [1.0],
            "tile_visible": [2.0],
            "curve": [],
        }
    ],
    "exact_sites": {},
    "needles": None,
}
WRONG = ["null", "true", "3", '"text"', "[]", "{}", "[null]", "[[]]", '{"a": 3}', "9" * 5000]


def test_an_evaluation_can_be_drawn(s2o, tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "evaluation.json").write_text(json.dumps(EVALUATION))
    for kind in ("density", "error", "depth"):
        assert s2o("plot", kind, tmp_path / "evaluation.json", "--out", tmp_path / f"{kind}.png")[0] == 0


@pytest.mark.parametrize("place", [*EVALUATION, *(f"sites.{name}" for name in EVALUATION["sites"][0])])
def test_a_wrong_field_of_an_evaluation_is_named(s2o, tmp_path, place):
    pytest.importorskip("matplotlib")
    file, refused = tmp_path / "evaluation.json", 0
    for value in WRONG:
        content = json.loads(json.dumps(EVALUATION))
        holder = content["sites"][0] if place.startswith("sites.") else content
        holder[place.removeprefix("sites.")] = "VALUE"
        file.write_text(json.dumps(content).replace('"VALUE"', value))
        result = s2o("plot", "depth", file, "--out", tmp_path / "depth.png")
        if result[0]:
            line = complaint(result)
            assert "evaluation: expected the JSON of `s2o evaluate --json`" in line
            assert place.rpartition(".")[2] in line
            refused += 1
    assert refused >= len(WRONG) - 4


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -1.0], ids=str)
def test_counts_are_finite_and_losses_need_not_be(number):
    content = json.loads(json.dumps(EVALUATION))
    content["loss_s2o"] = number
    assert "loss" in str(Evaluation.from_json(json.dumps(content)))
    for name in ("head_density", "tile_keys", "tile_visible"):
        wrong = json.loads(json.dumps(EVALUATION))
        wrong["sites"][0][name] = [number]
        with pytest.raises(cli.S2OError, match=f"as {name} of the site 'layers.0'"):
            Evaluation.from_json(json.dumps(wrong))


@pytest.mark.parametrize("field", ["lengths", "sites"])
def test_an_evaluation_of_nothing(field):
    with pytest.raises(cli.S2OError, match=r"got [01] sites and [01] lengths"):
        Evaluation.from_json(json.dumps(EVALUATION | {field: []}))


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, "", "3", '{"format": true}', '{"format": 1, "format": 1}', "\ud800"],
    ids=["deep", "empty", "number", "flag", "twice", "surrogate"],
)
def test_text_that_is_no_evaluation(text):
    with pytest.raises(cli.S2OError, match="expected the JSON of `s2o evaluate --json` in format 1, got") as caught:
        Evaluation.from_json(text)
    assert len(str(caught.value)) < 500


def test_a_picture_that_cannot_be_written(s2o, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    (tmp_path / "evaluation.json").write_text(json.dumps(EVALUATION))
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    line = complaint(s2o("plot", "depth", tmp_path / "evaluation.json", "--out", tmp_path / "depth.png"))
    assert "--out: expected a file that may be written" in line
    assert "No space left" in line
