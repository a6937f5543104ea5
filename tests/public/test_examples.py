"""Examples run as they are, on small sizes."""

import importlib.util
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from tests.conftest import quick_rows

FOLDER = Path(__file__).parents[2] / "examples"
EAGER = ["--inner-backend", "eager"]
EXAMPLES = {
    "attn_implementation": (["--tokens", "700"], r"model\.layers\.1\.self_attn: s2o, causal, density"),
    "backend_one_liner": (["--tokens", "700", *EAGER], r"S2O: .* s\n"),
    "calibrated_config": (["--tokens", "2048"], r"error budget 20\.00%: kept at (\d) of \1 sites"),
    "flex_score_mod": (["--tokens", "512"], r"1 attention sites found, 1 rewritten, 0 left dense"),
    "several_gpus": (["--tokens", "1024", *EAGER], r"2 rewritten, 0 left dense(.|\n)*max over mean 1\.000"),
    "transformers_generate": (["--tokens", "700", *EAGER], r"6 attention sites found, 2 rewritten(.|\n)*S2O: .* s, \["),
    "vision_transformer": (["--image", "208", *EAGER], r"2 attention sites found, 2 rewritten, 0 left dense"),
    "wrap_a_model": (["--tokens", "700", *EAGER], r"2 attention sites found, 2 rewritten, 0 left dense"),
}


def example(name):
    """The module; Dynamo looks it up by its name."""
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_example_is_run():
    assert {path.stem for path in FOLDER.glob("*.py")} == EXAMPLES.keys()


@pytest.mark.parametrize("name", quick_rows(EXAMPLES, EXAMPLES.keys() - {"flex_score_mod"}))
@pytest.mark.usefixtures("fresh_dynamo")
def test_example(name, capsys, tmp_path):
    arguments, said = EXAMPLES[name]
    if name == "calibrated_config":
        arguments = [*arguments, "--out", str(tmp_path / "s2o.json")]
    if name in ("attn_implementation", "calibrated_config", "transformers_generate", "vision_transformer"):
        pytest.importorskip("transformers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        example(name).main(arguments)
    out = capsys.readouterr().out
    assert re.search(said, out), out
    assert re.search(r"^[^\n]*: shows [^\n]*\.\n", out), "the first line says what it shows"
    assert "new tokens are the same" not in out  # of random weights that says nothing
    for difference in re.findall(r"relative difference to dense: (.*)", out):
        assert float(difference) < 0.1


@pytest.mark.slow
def test_an_example_is_a_program():
    command = [sys.executable, "-W", "ignore", str(FOLDER / "wrap_a_model.py"), "--tokens", "128"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={"PYTHONPATH": str(FOLDER.parent)})
    assert done.returncode == 0, done.stderr
    assert "relative difference to dense" in done.stdout


@pytest.mark.slow
def test_the_example_of_several_ranks_under_torchrun():
    started = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*started, str(FOLDER / "several_gpus.py"), "--tokens", "1100", *EAGER]
    variables = {"PYTHONPATH": str(FOLDER.parent), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=variables)
    assert done.returncode == 0, done.stderr
    assert "2 rewritten, 0 left dense" in done.stdout
    (difference,) = re.findall(r"2 ranks, relative difference to dense: (.*)", done.stdout)
    assert float(difference) < 1e-5
