"""A user's mistakes: one line that says expected, got and remedy, status 2, and no traceback. And how commands end."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

pytest.importorskip("typer")

from s2o_compile.cli import doctor as cli_doctor
from s2o_compile.cli import options

ROOT = Path(__file__).parents[2]
MISTAKES = {
    "missing-folder": (
        ("explain", "no/such/folder"),
        "'no/such/folder': expected a model that can be loaded, got no such folder. Give",
    ),
    "bench-missing-folder": (
        ("bench", "--model", "no/such"),
        "'no/such': expected a model that can be loaded, got no such folder, no",
    ),
    "no-model": (("bench", "--model", "FOLDER"), "expected a model that can be loaded, got"),
    "no-tokenizer": (
        ("evaluate", "--model", "MODEL", "--tokens", 200),
        "expected a tokenizer beside the model, got none",
    ),
    "no-cuda": (("bench", "--device", "cuda"), "got 'cuda' on a machine without a CUDA device. Leave it out"),
    "negative-error": (("explain", "smollm2", "--error", "-1"), "error: expected a relative error between 0 and 1"),
    "bad-config": (("bench", "--config", "FOLDER"), "--config: expected a text file in UTF-8, got"),
    "a-folder-for-json": (("doctor", "--json", "FOLDER"), "--json: expected a file in a directory that exists, got"),
    "too-long": (("explain", "GPT2", "--random-weights", "--tokens", 300), "--tokens: expected at most 200, the n_pos"),
}
WRONG_USAGE = {
    "bad-number": (("bench", "--tokens", "many"), "Invalid value for '--tokens'"),
    "too-small": (("explain", "smollm2", "--tokens", "1"), "Invalid value for '--tokens'"),
    "unknown-option": (("bench", "--tokns", "9"), "No such option: --tokns"),
    "no-argument": (("explain",), "Missing argument '"),
    "unknown-command": (("bnech",), "No such command 'bnech'"),
    "json-without-a-file": (("doctor", "--json"), "requires an argument"),
}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A folder without a model, one with a model without a tokenizer, and one of a model that reads 200 tokens."""
    transformers = pytest.importorskip("transformers")
    root = tmp_path_factory.mktemp("places")
    (root / "empty").mkdir()
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, vocab_size=97)).save_pretrained(root / "llama")
    gpt2 = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=97, n_positions=200)
    gpt2.save_pretrained(root / "gpt2")
    return {"FOLDER": root / "empty", "MODEL": root / "llama", "GPT2": root / "gpt2"}


@pytest.mark.parametrize("kind", MISTAKES)
def test_one_line(s2o, places, kind, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    words, said = MISTAKES[kind]
    done = s2o(*(places.get(word, word) for word in words))
    assert done.returncode == 2, done.stdout
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("s2o: ")]
    assert said in line
    assert line.rstrip().endswith(".")
    assert "Traceback" not in done.stderr
    assert len(line) < 700


@pytest.mark.parametrize("kind", WRONG_USAGE)
def test_wrong_usage(s2o, kind, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    words, said = WRONG_USAGE[kind]
    done = s2o(*words)
    assert done.returncode == 2
    assert said in done.stderr
    assert "got ``" not in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("words", ["demo --tau high", "demo --tokens=10", "bench --tokens 9000 1", "tune --heads [/x]"])
def test_a_wrong_value_is_shown_with_what_it_means(s2o, monkeypatch, words):
    monkeypatch.setenv("COLUMNS", "400")
    command, _, given = words.partition(" ")
    done = s2o(command, *given.split())
    meaning = {"--tau": "Quality against speed; 0 is", "--tokens": "the prompt", "--heads": "Query heads."}
    option = re.split("[ =]", given)[0]
    assert done.returncode == 2
    assert f"Invalid value for '{option}'" in done.stderr
    assert re.search(rf"got `{re.escape(given)}`. Give another: .*{meaning[option]}", done.stderr)


def test_a_full_disk_at_the_end(s2o, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(options, "check_out", lambda *_: None)
    monkeypatch.setattr(Path, "write_text", full)
    done = s2o("doctor", "--json", tmp_path / "doctor.json")
    assert done.returncode == 2
    assert "--json: expected a file that may be written" in done.stderr
    assert "(No space left on device). Give another path." in done.stderr


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), MemoryError("9 GiB")], ids=repr)
def test_no_memory(s2o, monkeypatch, error):
    def full(*_, **__):
        raise error

    monkeypatch.setattr("s2o_compile.cli.explain.load_any", full)
    done = s2o("explain", "smollm2", "--device", "cpu")
    assert done.returncode == 2
    assert "s2o: expected enough memory, got out of memory (" in done.stderr
    assert "Choose fewer --tokens" in done.stderr


@pytest.mark.parametrize("word", ["--help", "-h"])
@pytest.mark.parametrize("command", [(), ("bench",), ("doctor",), ("evaluate",), ("tune",)], ids=" ".join)
def test_help(s2o, command, word):
    done = s2o(*command, word)
    assert done.returncode == 0
    assert " ".join(["Usage:", *command]).split()[-1] in done.stdout
    assert "-h" in done.stdout


def test_version(s2o):
    import s2o_compile

    done = s2o("--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"s2o-compile {s2o_compile.__version__}, torch {version('torch')}")


def test_json_means_a_file_in_every_command():
    from typer.main import get_command

    from s2o_compile.cli.main import app

    commands = get_command(app).commands
    assert len(commands) == 8
    for name, command in commands.items():
        found = [option for option in command.params if "--json" in option.opts]
        assert bool(found) == (name != "plot"), name  # which writes a picture
        assert all(option.metavar == "FILE" and not option.is_flag for option in found)


class TestDoctor:
    def test_all_is_well(self, s2o, monkeypatch):
        monkeypatch.setattr(cli_doctor, "_compiler", lambda: cli_doctor.Check(name="C++", state="ok", found="g++"))
        done = s2o("doctor", "--json", "-")
        assert done.returncode == 0, done.stdout
        found = json.loads(done.stdout)
        assert found["ok"]
        assert found["versions"]["torch"]
        states = {check["name"]: check["state"] for check in found["checks"]}
        assert (states["torch"], states["CPU"], states["attention"]) == ("ok", "ok", "ok")

    def test_without_a_compiler(self, s2o, monkeypatch):
        monkeypatch.setattr(cli_doctor.shutil, "which", lambda _: None)
        done = s2o("doctor")
        assert done.returncode == 1
        assert "compiler: apt install g" in done.stdout
        assert "S2OConfig(inner_backend='eager')" in done.stdout
        assert "Wrong: C" in done.stdout

    def test_without_an_extra(self, s2o, monkeypatch):
        known = cli_doctor.versions()
        monkeypatch.setattr(cli_doctor, "versions", lambda: {k: v for k, v in known.items() if k != "matplotlib"})
        done = s2o("doctor")
        assert "missing: needed by s2o plot" in done.stdout
        assert "matplotlib: pip install 's2o-compile[plot]'" in done.stdout

    @pytest.mark.parametrize("broken", ["wrong", "failing"])
    def test_an_operator_that_does_not_work(self, s2o, monkeypatch, broken):
        def attention(query, *_, **__):
            if broken == "failing":
                raise RuntimeError("no kernel image is available")
            return query

        monkeypatch.setattr(cli_doctor, "attention", attention)
        done = s2o("doctor", "--json", "-")
        (check,) = [check for check in json.loads(done.stdout)["checks"] if check["name"] == "attention"]
        assert (done.returncode, check["state"]) == (1, "wrong")
        assert ("no kernel image" if broken == "failing" else "differs from dense attention by") in check["found"]

    def test_another_torch(self, s2o, monkeypatch):
        monkeypatch.setattr(cli_doctor, "torch_release", lambda: (2, 9))
        done = s2o("doctor")
        assert done.returncode == 1
        assert "torch: pip install 'torch>=2.11,<2.16'" in done.stdout

    @pytest.mark.parametrize("version", [None, "3.5.1"], ids=["none", "old"])
    def test_a_gpu_without_its_triton(self, monkeypatch, version):
        monkeypatch.setattr(cli_doctor, "versions", lambda: {"triton": version} if version else {})
        check = cli_doctor._triton()
        assert (check.state, check.remedy) == ("wrong", "pip install 'triton>=3.6'")


class TestProgress:
    def test_the_time_left(self, monkeypatch):
        now = [0.0]
        monkeypatch.setattr(options.time, "perf_counter", lambda: now[0])
        steps = options.Steps(options.Progress())
        assert steps.seconds_left is None
        steps.expect(3, 10.0)
        with steps("first"):
            now[0] = 4.0
            assert steps.seconds_left == 26.0
            now[0] = 20.0
        with steps("second"):
            now[0] = 25.0
            assert steps.seconds_left == 35.0
            now[0] = 40.0
        with steps("third"):
            now[0] = 99.0
            assert steps.seconds_left == 0.0
        assert steps.seconds_left is None

    def test_the_display_shows_it(self, capsys):
        with options.show_steps(options.Console(force_terminal=True, width=80)) as steps:
            steps.expect(2, 100.0)
            with steps("reading"):
                pass
        assert "reading" in capsys.readouterr().out


@pytest.mark.slow
def test_an_interrupt_of_a_process(tmp_path):
    """While it works, not only where a test raises it."""
    pytest.importorskip("transformers")
    command = [sys.executable, "-W", "ignore", "-m", "s2o_compile", "tune", "--output", str(tmp_path / "tuned.json")]
    command += ["--lengths", "65536"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes, env=environment) as process:
        assert "Kernel configurations" in process.stdout.readline()
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        _, printed = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "Traceback" not in printed
