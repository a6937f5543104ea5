"""The command line, as a user types it."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("typer")


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


@pytest.fixture(scope="module")
def reader_dir(tmp_path_factory):
    """A tiny model with weights and a tokenizer: a word is a number below 60."""
    transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    words = {str(number): number for number in range(60)} | {"?": 60}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=61
    )
    path = tmp_path_factory.mktemp("reader")
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(path)
    (path / "text.txt").write_text(" ".join(str(number * number % 59) for number in range(2000)))
    (path / "config.s2o").write_text('{"tau": 0.25, "min_seq_len": 256, "segment_len": 256}')
    return path


def test_evaluate_writes_what_plot_draws(s2o, reader_dir, tmp_path):
    text, out = str(reader_dir / "text.txt"), tmp_path / "evaluation.json"
    read = ["--model", str(reader_dir), "--text", text]
    done = s2o("evaluate", *read, "--tokens", "1920", "--config", str(reader_dir / "config.s2o"), "--json", str(out))
    assert done.returncode == 0, done.stderr
    assert "2 of 2 attention sites ran sparse" in done.stdout
    assert "24 needles of 40 tokens" in done.stdout
    found = json.loads(out.read_text())
    assert (found["config"]["tau"], found["config"]["segment_len"], found["lengths"]) == (0.25, 256, [1920])
    assert found["model"] == str(reader_dir)
    pytest.importorskip("matplotlib")
    for kind, name, start in (("depth", "depth.png", b"\x89PNG"), ("density", "density.pdf", b"%PDF")):
        done = s2o("plot", kind, str(out), "--out", str(tmp_path / name))
        assert done.returncode == 0, done.stderr
        assert (tmp_path / name).read_bytes().startswith(start)


def test_evaluate_under_a_budget(s2o, reader_dir):
    read = ["--model", str(reader_dir), "--text", str(reader_dir / "text.txt"), "--tokens", "600", "--no-needles"]
    done = s2o("evaluate", *read, "--error", "0.3")
    assert done.returncode == 0, done.stderr
    assert "error budget 30.00%: kept at 2 of 2 sites" in done.stdout
    done = s2o("evaluate", *read, "--error", "0.3", "--tau", "0.5")
    assert "error budget 30.00%: kept at 2 of 2 sites" in done.stdout


def test_evaluate_by_tasks(s2o, reader_dir, tmp_path):
    out, config = tmp_path / "tasks.json", str(reader_dir / "config.s2o")
    asked = ["--model", str(reader_dir), "--tasks", "--lengths", "600", "--lengths", "500", "--config", config]
    done = s2o("evaluate", *asked, "--json", str(out))
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    names = "needle", "needles", "variables", "words"
    assert [(score["task"], score["length"]) for score in found["scores"]] == [
        (n, x) for n in names for x in (500, 600)
    ]
    assert (found["model"], found["config"]["tau"], found["seed"]) == (str(reader_dir), 0.25, 0)
    for word in ("task", "tokens", "answers", "loss", "density", *names, "mean", "600"):
        assert word in done.stdout
    done = s2o("plot", "depth", str(out), "--out", str(tmp_path / "depth.png"))
    assert "expected the JSON of `s2o evaluate --json` in format 1" in done.stderr.replace("\n", " ")


def test_tasks_take_a_quarter_and_a_half_of_the_tokens():
    from s2o_compile.cli.tasks import choose_lengths

    assert choose_lengths(None, 8192, tasks=True, curve=False) == [2048, 4096, 8192]
    assert choose_lengths([7, 5], 8192, tasks=True, curve=False) == [5, 7]


def test_plot_attention_runs_the_model(s2o, reader_dir, tmp_path):
    pytest.importorskip("matplotlib")
    read = ["--model", str(reader_dir), "--text", str(reader_dir / "text.txt"), "--tokens", "600", "--tau", "0.25"]
    picture = tmp_path / "attention.png"
    done = s2o("plot", "attention", *read, "--site", "model.layers.1.self_attn", "--head", "3", "--out", str(picture))
    assert done.returncode == 0, done.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_plot_attention_refuses_a_place_before_the_model_runs(s2o, reader_dir, monkeypatch):
    from s2o_compile.cli import evaluate as cli_evaluate

    def run(*_):
        raise AssertionError("the model ran")

    monkeypatch.setattr(cli_evaluate, "optimize", run)
    read = ["--model", str(reader_dir), "--text", str(reader_dir / "text.txt"), "--tokens", "600"]
    done = s2o("plot", "attention", *read, "--site", "model.layers.2.self_attn")
    assert done.returncode == 2
    assert "Did you mean 'model.layers.1.self_attn'?" in done.stderr
    done = s2o("plot", "attention", *read, "--head", "77")
    assert done.returncode == 2
    assert "--head: expected one of 0 to 3, got 77" in done.stderr


def test_a_text_shorter_than_a_tile(s2o, reader_dir):
    """The remedy was the least length, beside the very length that it had refused."""
    done = s2o("evaluate", "--model", str(reader_dir), "--text", str(reader_dir / "text.txt"), "--tokens", "100")
    assert done.returncode == 2
    assert "expected batches of at least 128 tokens, the queries of one tile, got 100" in done.stderr
    assert "min_seq_len" not in done.stderr


def test_a_text_shorter_than_asked(s2o, reader_dir):
    done = s2o("evaluate", "--model", str(reader_dir), "--text", str(reader_dir / "text.txt"), "--tokens", "2001")
    assert done.returncode != 0
    assert "--tokens: expected at most the 2000 of the text, got 2001. Give a longer --text." in done.stderr


def test_explain_prints_a_table(s2o, model_dir):
    done = s2o("explain", str(model_dir), "--random-weights", "--tokens", "200")
    assert done.returncode == 0, done.stderr
    assert "2 attention sites found, 2 rewritten, 0 left dense" in done.stdout


def test_a_range_is_one_text_where_both_ends_look_alike():
    from s2o_compile.cli.explain import _range

    assert _range([0.012, None, 0.034], "{:.1%}") == "1.2% … 3.4%"
    assert _range([0.0121, 0.0119], "{:.1%}") == "1.2%"
    assert _range([None], "{:.3f}") == _range([], "{:.3f}") == "-"


@pytest.mark.slow
def test_explain_json_in_a_process_of_its_own(model_dir):
    command = [sys.executable, "-W", "ignore", "-m", "s2o_compile", "explain", str(model_dir)]
    command += ["--random-weights", "--tokens", "200", "--json", "-"]
    offline = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=offline)
    assert done.returncode == 0, done.stderr
    sites = json.loads(done.stdout)["sites"]
    assert [site["name"] for site in sites] == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    assert all(site["rewritten"] for site in sites)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("explain", "no/such-model-here"), "'no/such-model-here': expected a model that can be loaded"),
        (("demo", "--device", "tpu"), 'expected "cpu" or "cuda", got \'tpu\''),
        (("demo", "--tau", "-1"), "tau: expected a finite number >= 0, got -1.0"),
        pytest.param(("demo", "--tokens", "9999999"), "Choose another --tokens", marks=pytest.mark.slow),
        (("demo", "--inner-backend", "inductr"), "Did you mean 'inductor'"),
        (("evaluate", "--config", "no-such.json"), "--config: expected a text file in UTF-8, got 'no-such.json'"),
        (("evaluate", "--config", "pyproject.toml"), "S2OConfig.from_json: expected JSON"),
        (("evaluate", "--error", "-1"), "error: expected"),
        (("evaluate", "--lengths", "4096"), "--lengths: expected --tasks beside it"),
        (("evaluate", "--tasks", "--curve"), "--tasks: expected no --curve beside it"),
        (("evaluate", "--tasks", "--text", "no-such.txt"), "--text: expected a text file in UTF-8, got 'no-such.txt'"),
        (("plot", "dense"), "unknown picture 'dense': expected one of density, error, depth, attention"),
        (("plot", "depth", "pyproject.toml"), "expected the JSON of `s2o evaluate --json` in format 1"),
        (("plot", "depth", "--out", "picture.txt"), "--out: expected a name in .png, .pdf or .svg, got 'picture.txt'"),
        (("plot", "attention", "pyproject.toml"), "expected no evaluation, which holds no tensors"),
    ],
    ids=[
        "unknown-model",
        "unknown-device",
        "bad-tau",
        "too-many-tokens",
        "unknown-inner-backend",
        "no-config",
        "bad-config",
        "negative-error",
        "lengths-without-tasks",
        "tasks-with-a-curve",
        "tasks-without-their-text",
        "unknown-picture",
        "bad-evaluation",
        "bad-picture-name",
        "needless-evaluation",
    ],
)
def test_wrong_arguments_end_with_a_message(s2o, args, message):
    done = s2o(*args)
    assert done.returncode == 2
    assert message in done.stderr.replace("\n", " ")
    assert "s2o: " in done.stderr
    assert "Traceback" not in done.stderr
