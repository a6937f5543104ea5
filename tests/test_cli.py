"""The command line, as a user types it."""

import json
import subprocess
import sys

import pytest

pytest.importorskip("typer")


def s2o(*args):
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "s2o_compile.cli", *args], capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
    )
    path = tmp_path_factory.mktemp("model")
    config.save_pretrained(path)
    return path


def test_explain_prints_a_table(model_dir):
    done = s2o("explain", str(model_dir), "--random-weights", "--tokens", "200")
    assert done.returncode == 0, done.stderr
    assert "2 attention sites found, 2 rewritten, 0 left dense" in done.stdout


def test_explain_json(model_dir):
    done = s2o("explain", str(model_dir), "--random-weights", "--tokens", "200", "--json")
    sites = json.loads(done.stdout)["sites"]
    assert [site["name"] for site in sites] == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    assert all(site["rewritten"] for site in sites)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("explain", "no/such-model-here"), 'expected "smollm2", a model directory or a hub name'),
        (("demo", "--device", "tpu"), 'expected "cpu" or "cuda", got \'tpu\''),
        (("demo", "--tau", "-1"), "tau: expected a finite number >= 0, got -1.0"),
        (("demo", "--tokens", "9999999"), "Choose another --tokens"),
        (("demo", "--inner-backend", "inductr"), "Did you mean 'inductor'"),
    ],
    ids=["unknown-model", "unknown-device", "bad-tau", "too-many-tokens", "unknown-inner-backend"],
)
def test_wrong_arguments_end_with_a_message(args, message):
    done = s2o(*args)
    assert done.returncode != 0
    assert message in done.stderr.replace("\n", " ")
    assert "Traceback" not in done.stderr
