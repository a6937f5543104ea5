"""Folders and files that the command line cannot use: one line that names them, status 2, and no measurement."""

import json
import pickle
import re
import shutil

import pytest
import torch

pytest.importorskip("typer")
transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
safetensors = pytest.importorskip("safetensors.torch")

from s2o_compile.cli import models  # noqa: E402
from s2o_compile.cli.loading import UnusedWeightsWarning  # noqa: E402
from tests.helpers.refusals import complaint  # noqa: E402

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A tiny model with weights and a tokenizer: a word is a number below 60."""
    words = {str(number): number for number in range(60)} | {"?": 60}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=61
    )
    path = tmp_path_factory.mktemp("good") / "model"
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(path)
    (path / "text.txt").write_text(" ".join(str(number * number % 59) for number in range(700)))
    return path


@pytest.fixture
def folder(good, tmp_path):
    return shutil.copytree(good, tmp_path / "model")


def change_config(folder, **fields):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def change_weights(folder, change):
    weights = safetensors.load_file(folder / WEIGHTS)
    change(weights)
    safetensors.save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


def truncate(folder, name, length):
    (folder / name).write_bytes((folder / name).read_bytes()[:length])


def pickled(folder):
    (folder / WEIGHTS).unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"a": print}))


def saved_list(folder):
    (folder / WEIGHTS).unlink()
    torch.save([1, 2], folder / "pytorch_model.bin")


def missing_shard(folder):
    names = safetensors.load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))


def index_that_is_none(folder):
    (folder / WEIGHTS).unlink()
    (folder / f"{WEIGHTS}.index.json").write_text("[" * 100_000)


BROKEN = {
    "truncated-weights": lambda folder: truncate(folder, WEIGHTS, 5000),
    "truncated-header": lambda folder: truncate(folder, WEIGHTS, 5),
    "empty-weights": lambda folder: truncate(folder, WEIGHTS, 0),
    "no-weights": lambda folder: (folder / WEIGHTS).unlink(),
    "weights-folder": lambda folder: ((folder / WEIGHTS).unlink(), (folder / WEIGHTS).mkdir()),
    "pickled": pickled,
    "saved-list": saved_list,
    "missing-shard": missing_shard,
    "deep-index": index_that_is_none,
    "missing-layer": lambda folder: change_config(folder, num_hidden_layers=3),
    "missing-weight": lambda folder: change_weights(folder, lambda found: found.pop("model.norm.weight")),
    "other-names": lambda folder: change_weights(
        folder, lambda found: [found.update({f"my.{name}": found.pop(name)}) for name in list(found)]
    ),
    "other-shapes": lambda folder: change_config(folder, intermediate_size=128),
    "other-vocabulary": lambda folder: change_config(folder, vocab_size=99),
    "no-config": lambda folder: (folder / "config.json").unlink(),
    "empty-config": lambda folder: (folder / "config.json").write_text(""),
    "config-without-fields": lambda folder: (folder / "config.json").write_text("{}"),
    "config-list": lambda folder: (folder / "config.json").write_text("[]"),
    "config-deep": lambda folder: (folder / "config.json").write_text("[" * 100_000),
    "config-long-number": lambda folder: (folder / "config.json").write_text(f'{{"vocab_size": {"9" * 5000}}}'),
    "config-bytes": lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe\0\1"),
    "config-folder": lambda folder: ((folder / "config.json").unlink(), (folder / "config.json").mkdir()),
    "unknown-type": lambda folder: change_config(folder, model_type="no-such-type", architectures=None),
    "type-of-a-number": lambda folder: change_config(folder, model_type=3),
    "sizes-of-text": lambda folder: change_config(folder, hidden_size="wide"),
    "heads-that-do-not-divide": lambda folder: change_config(folder, num_attention_heads=0),
    "nothing": lambda folder: [file.unlink() for file in folder.iterdir()],
}
NAMED = {
    "missing-layer": r"none for model\.layers\.2\.\S+, model\.layers\.2\.\S+, model\.layers\.2\.\S+ and 6 more",
    "missing-weight": r"none for model\.norm\.weight",
    "other-names": r"none for lm_head\.weight, model\..* more",
    "other-shapes": r"model\.layers\.0\.mlp\.down_proj\.weight \[32, 64\] for \[32, 128\].* and 3 more",
    "other-vocabulary": r"lm_head\.weight \[61, 32\] for \[99, 32\], model\.embed_tokens\.weight \[61, 32\]",
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_folder_that_holds_no_whole_model(s2o, folder, kind):
    BROKEN[kind](folder)
    line = complaint(s2o("explain", folder, "--tokens", 200, "--device", "cpu"))
    assert str(folder)[:20] in line
    assert "expected" in line
    assert "got" in line
    if kind in NAMED:
        assert re.search(NAMED[kind], line), line


@pytest.mark.parametrize("command", ["evaluate", "calibrate", "plot"])
def test_every_command_refuses_missing_weights(s2o, folder, tmp_path, command):
    pytest.importorskip("matplotlib")
    BROKEN["missing-weight"](folder)
    kind = ["depth"] if command == "plot" else []
    out = [] if command == "evaluate" else ["--out", tmp_path / "out.png"]
    read = ["--model", folder, "--text", folder / "text.txt", "--tokens", 600, "--device", "cpu"]
    assert "none for model.norm.weight" in complaint(s2o(command, *kind, *read, *out))
    assert not (tmp_path / "out.png").exists()


def test_weights_of_more_layers_are_a_warning(s2o, folder):
    change_config(folder, num_hidden_layers=1)
    with pytest.raises(UnusedWeightsWarning, match=r"has no model\.layers\.1\.\S+, .* and 6 more\. They are left out"):
        s2o("explain", folder, "--tokens", 200, "--device", "cpu")


def test_tied_weights_are_not_missing(s2o, folder):
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=61
    )
    config.tie_word_embeddings = True
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    assert "lm_head.weight" not in safetensors.load_file(folder / WEIGHTS)
    assert s2o("explain", folder, "--tokens", 200, "--device", "cpu")[0] == 0


@pytest.mark.parametrize("options", [[], ["--random-weights"]], ids=["weights", "random"])
@pytest.mark.parametrize("kind", ["config-deep", "unknown-type", "sizes-of-text", "nothing"])
def test_random_weights_want_a_configuration_too(s2o, folder, kind, options):
    BROKEN[kind](folder)
    complaint(s2o("explain", folder, "--tokens", 200, "--device", "cpu", *options))


HUB_ERRORS = [ConnectionError("no network"), TimeoutError("too slow")]


@pytest.mark.parametrize("error", HUB_ERRORS, ids=str)
@pytest.mark.parametrize("command", ["explain", "evaluate"])
def test_without_the_hub(s2o, monkeypatch, command, error):
    """The hub is asked once; a model that its cache holds is read from there, and transformers asks nobody."""
    huggingface_hub = pytest.importorskip("huggingface_hub")
    asked = []

    def no_answer(url, *, timeout):
        asked.append((url, timeout))
        raise error

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", no_answer)
    words = [command, *(() if command == "explain" else ("--model",)), "someone/model", "--device", "cpu"]
    said = complaint(s2o(*words))
    assert "'someone/model': expected a model that can be loaded, got no such folder, no such name in the hub's" in said
    assert f"no answer of the hub ({error})" in said
    assert [timeout for _, timeout in asked] == [5]

    found = []
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: "/cache/config.json")
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", lambda **where: found.append(where) or 1 / 0)
    complaint(s2o(*words))
    assert found == [{"pretrained_model_name_or_path": "someone/model", "local_files_only": True}]


def test_a_hub_that_answers(s2o, monkeypatch):
    """Whatever it says, transformers loads the model, or says what is wrong."""
    huggingface_hub = pytest.importorskip("huggingface_hub")
    found = []
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda *_, **__: None)
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", lambda **where: found.append(where) or 1 / 0)
    complaint(s2o("explain", "someone/model", "--device", "cpu"))
    assert found == [{"pretrained_model_name_or_path": "someone/model"}]


def test_a_file_where_a_folder_is_expected(s2o, folder):
    assert "text.txt" in complaint(s2o("explain", folder / "text.txt", "--device", "cpu"))


def test_no_permission(s2o, folder, monkeypatch):
    """The tests may run as root, so it is pretended."""

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(transformers.LlamaForCausalLM, "from_pretrained", refuse)
    assert "Permission denied" in complaint(s2o("explain", folder, "--device", "cpu"))


def read(folder, tokens=600):
    return ["--model", folder, "--text", folder / "text.txt", "--tokens", tokens, "--device", "cpu"]


@pytest.mark.parametrize(
    "content",
    [b"", b"{}", b"[" * 100_000, b"\xff\0", b'{"version": 3}'],
    ids=["empty", "object", "deep", "bytes", "three"],
)
def test_a_tokenizer_that_is_none(s2o, folder, content):
    (folder / "tokenizer.json").write_bytes(content)
    assert "tokenizer" in complaint(s2o("evaluate", *read(folder)))


def test_a_tokenizer_of_another_model(s2o, folder):
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["vocab"]["3"] = 61
    file.write_text(json.dumps(content))
    assert "expected a tokenizer whose ids lie below 61" in complaint(s2o("evaluate", *read(folder)))


TEXTS = {"bytes": b"\xff\xfe\0\1", "latin": "né ".encode("latin-1") * 700}


@pytest.mark.parametrize("kind", [*TEXTS, "folder", "none", "no-such"])
@pytest.mark.parametrize("option", ["--text", "--config"])
def test_a_text_that_is_none(s2o, folder, tmp_path, option, kind):
    file = tmp_path / "file"
    if kind in TEXTS:
        file.write_bytes(TEXTS[kind])
    elif kind == "folder":
        file.mkdir()
    elif kind == "none":
        file = file / "below" / "nothing"
    line = complaint(s2o("evaluate", "--model", folder, "--tokens", 600, "--device", "cpu", option, file))
    assert f"{option}: expected a text file in UTF-8" in line


@pytest.mark.parametrize(
    "text", ["[" * 100_000, f'{{"segment_len": {"9" * 5000}}}', '{"tau": NaN}', "[]", '{"tua": 1}']
)
def test_a_configuration_names_its_file(s2o, tmp_path, text):
    file = tmp_path / "s2o.json"
    file.write_text(text)
    assert str(file)[:30] in complaint(s2o("evaluate", "--config", file))


def test_a_byte_order_mark_is_dropped(s2o, folder):
    text, config = folder / "text.txt", folder / "s2o.json"
    text.write_bytes(b"\xef\xbb\xbf" + text.read_bytes())
    config.write_bytes(b'\xef\xbb\xbf{"tau": 0.25, "min_seq_len": 256, "segment_len": 256}')
    assert s2o("evaluate", *read(folder), "--no-needles", "--config", config)[0] == 0


@pytest.mark.parametrize("length", [0, 3, 100, 5000])
def test_a_truncated_gguf_file(s2o, tmp_path, monkeypatch, length):
    gguf, _ = pytest.importorskip("gguf"), pytest.importorskip("accelerate")
    file = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_uint32("llama.block_count", 1)
    writer.add_tensor("token_embd.weight", torch.zeros(61, 32).numpy())
    for write in (
        writer.write_header_to_file,
        writer.write_kv_data_to_file,
        writer.write_tensors_to_file,
        writer.close,
    ):
        write()
    file.write_bytes(file.read_bytes()[:length])
    monkeypatch.setattr(models, "weights_file", lambda _: file)
    assert "model.gguf: expected a model that can be loaded" in complaint(s2o("demo", "--device", "cpu"))


def test_tune_refuses_a_file_before_it_measures(s2o, tmp_path, monkeypatch):
    monkeypatch.setattr("s2o_compile.cli.tune.compare", lambda *_: pytest.fail("measured"))
    (tmp_path / "tuned.json").write_text("[" * 100_000)
    line = complaint(s2o("tune", "--output", tmp_path / "tuned.json"))
    assert "tuned.json: expected a file of `s2o tune`" in line


def test_tune_without_a_home(s2o, monkeypatch):
    def nobody():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr("s2o_compile.kernels.core.tuned.user_file", nobody)
    assert "--output: expected a file to write, got none" in complaint(s2o("tune"))


def test_faults_of_our_own_stay_visible(s2o, folder, monkeypatch):
    def broken(*_, **__):
        raise KeyError("ours")

    monkeypatch.setattr("s2o_compile.cli.explain.explain_model", broken)
    with pytest.raises(KeyError, match="ours"):
        s2o("explain", folder, "--tokens", 200, "--device", "cpu")


def test_an_interrupt_leaves_no_traceback(s2o, folder, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("s2o_compile.cli.explain.explain_model", interrupted)
    status, printed, _ = s2o("explain", folder, "--tokens", 200, "--device", "cpu")
    assert status == 130
    assert "Traceback" not in printed
