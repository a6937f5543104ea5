"""Files that commands write, and options that they would ignore: refused before the work, not after it."""

import json
from pathlib import Path

import pytest

pytest.importorskip("typer")

from s2o_compile.cli import bench as cli_bench
from s2o_compile.cli import calibrate as cli_calibrate
from s2o_compile.cli import evaluate as cli_evaluate
from s2o_compile.cli import explain as cli_explain
from s2o_compile.cli import main as cli_main
from s2o_compile.cli import tasks as cli_tasks
from s2o_compile.cli import tune as tuning


@pytest.fixture
def no_work(monkeypatch):
    """Models are not loaded, nothing is timed."""

    def work(*_, **__):
        raise AssertionError("the work began")

    for module in (cli_calibrate, cli_evaluate, cli_tasks):
        monkeypatch.setattr(module, "load", work)
    for module in (cli_bench, cli_explain):
        monkeypatch.setattr(module, "load_any", work)
    monkeypatch.setattr(cli_main, "run_demo", work)
    monkeypatch.setattr(tuning, "compare", work)
    monkeypatch.setattr(tuning, "sweep", work)


def refusal(done):
    assert done.returncode == 2, done.stdout
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("s2o: ")]
    assert "Traceback" not in done.stderr
    return line


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs a directory that not even root may write to")
@pytest.mark.parametrize(
    ("command", "option", "name"),
    [
        (("evaluate",), "--json", "out.json"),
        (("bench",), "--json", "out.json"),
        (("explain", "smollm2"), "--json", "out.json"),
        (("doctor",), "--json", "out.json"),
        (("demo",), "--json", "out.json"),
        (("calibrate",), "--json", "out.json"),
        (("tune",), "--json", "out.json"),
        (("evaluate", "--tasks"), "--json", "out.json"),
        (("calibrate",), "--out", "out.json"),
        (("plot", "depth"), "--out", "out.png"),
        (("plot", "attention"), "--out", "out.png"),
        (("tune",), "--output", "out.json"),
        (("tune",), "--output", "folder/out.json"),
    ],
    ids=[
        *("evaluate", "bench", "explain", "doctor", "demo", "calibrate-json", "tune-json", "tasks"),
        *("calibrate", "plot", "plot-attention", "tune", "tune-in-a-new-folder"),
    ],
)
@pytest.mark.usefixtures("no_work")
def test_a_target_that_cannot_be_written_is_refused_before_the_work(s2o, command, option, name):
    line = refusal(s2o(*command, option, f"/proc/{name}"))
    assert f"/proc/{name.partition('/')[0]}" in line
    assert option in line


@pytest.mark.usefixtures("no_work")
def test_tune_refuses_a_file_that_is_none_of_its_own(s2o, tmp_path):
    path = tmp_path / "tuned.json"
    path.write_text("mine")
    assert "expected a file of `s2o tune`" in refusal(s2o("tune", "--output", str(path)))
    assert path.read_text() == "mine"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (("plot", "error", "FILE", "--tau", "0.3"), "evaluation: expected it alone, got --tau, which would change"),
        (("plot", "depth", "FILE", "--tokens", "9", "--model", "gemma3"), "got --model and --tokens, which would"),
        (("plot", "depth", "--head", "3"), "plot depth: expected it alone, got --head, which would change nothing"),
        (("evaluate", "--tasks", "--no-needles"), "--tasks: expected it alone, got --needles, which would change"),
        (("evaluate", "--tasks", "--lengths", "500", "--tokens", "9"), "got --tokens, which would change nothing"),
        (("explain", "smollm2", "--random-weights"), "--random-weights: expected a directory or a hub name beside it"),
    ],
    ids=["tau-beside-a-file", "model-beside-a-file", "head-of-no-attention", "needles", "tokens", "random-weights"],
)
@pytest.mark.usefixtures("no_work")
def test_options_that_would_be_ignored_are_refused(s2o, tmp_path, command, message):
    file = tmp_path / "evaluation.json"
    file.write_text(json.dumps({"format": 1}))
    assert message in refusal(s2o(*(str(file) if word == "FILE" else word for word in command)))
