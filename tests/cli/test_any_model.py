"""`s2o explain` and `s2o bench` on models of every kind, with inputs made from their configuration."""

import io
import json

import pytest
import torch

pytest.importorskip("typer")
transformers = pytest.importorskip("transformers")

from rich.console import Console  # noqa: E402

from s2o_compile import S2OConfig  # noqa: E402
from s2o_compile.cli.bench import print_benchmark  # noqa: E402
from s2o_compile.cli.explain import print_report  # noqa: E402
from s2o_compile.report import Report, Site  # noqa: E402
from s2o_compile.speed import bench as bench_module  # noqa: E402
from s2o_compile.speed import measure  # noqa: E402
from s2o_compile.speed.benchmark import Benchmark, Row  # noqa: E402
from s2o_compile.speed.measure import Timing  # noqa: E402

TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 97}
IMAGE = {key: TEXT[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
SPEECH = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
SPEECH |= {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 97, "max_source_positions": 150}


def configs():
    vit = {"image_size": 208, "patch_size": 16}
    convolutions = {"conv_dim": (16, 16), "conv_stride": (5, 4), "conv_kernel": (10, 4)}
    convolutions |= {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}
    t5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4, "vocab_size": 97}
    return {
        "LlamaForCausalLM": transformers.LlamaConfig(**TEXT),
        "Gemma3ForCausalLM": transformers.Gemma3TextConfig(
            **TEXT, num_key_value_heads=2, head_dim=8, sliding_window=40
        ),
        "BertForMaskedLM": transformers.BertConfig(**TEXT),
        "ViTForImageClassification": transformers.ViTConfig(**IMAGE, **vit),
        "WhisperForConditionalGeneration": transformers.WhisperConfig(**SPEECH, **SPECIAL, suppress_tokens=None),
        "T5ForConditionalGeneration": transformers.T5Config(**t5, **SPECIAL),
        "Wav2Vec2Model": transformers.Wav2Vec2Config(**IMAGE, **convolutions),
        "CLIPModel": transformers.CLIPConfig(text_config=TEXT | SPECIAL, vision_config=IMAGE | vit),
    }


INPUTS = {
    "LlamaForCausalLM": {"input_ids": [1, 200]},
    "Gemma3ForCausalLM": {"input_ids": [1, 200]},
    "BertForMaskedLM": {"input_ids": [1, 200]},
    "ViTForImageClassification": {"pixel_values": [1, 3, 208, 208]},
    "WhisperForConditionalGeneration": {"input_features": [1, 80, 300], "decoder_input_ids": [1, 150]},
    "T5ForConditionalGeneration": {"input_ids": [1, 200], "decoder_input_ids": [1, 200]},
    "Wav2Vec2Model": {"input_values": [1, 4000]},
    "CLIPModel": {"input_ids": [1, 77], "pixel_values": [1, 3, 208, 208]},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for name, config in configs().items():
        config.architectures = [name]
        config.save_pretrained(root / name)
    return root


def explained(s2o, folder, *options):
    done = s2o("explain", folder, "--random-weights", "--device", "cpu", "--json", "-", *options)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.usefixtures("fresh_dynamo")
def test_explain_makes_inputs(s2o, folders, name):
    """As the default would run them: dense, for they are short."""
    tokens = () if name == "CLIPModel" else ("--tokens", 200)
    found = explained(s2o, folders / name, *tokens)
    assert found["inputs"] == INPUTS[name]
    assert found["sites"]
    assert not found["not_found"]
    rewritten = [site for site in found["sites"] if site["rewritten"]]
    paths = {site["path"] for site in rewritten}
    assert paths <= {"dense", "window"}
    if name == "T5ForConditionalGeneration":
        left = [site for site in found["sites"] if not site["rewritten"]]
        assert len(left) == 2
        assert all("position biases" in site["reason"] for site in left)
    if "dense" in paths:
        assert "rewritten attentions ran dense" in found["remark"]
        assert "S2O begins at 4096" in found["remark"]
        assert "--min-seq-len 0" in found["remark"]


@pytest.mark.usefixtures("fresh_dynamo")
def test_explain_can_be_sparse_at_any_length(s2o, folders):
    found = explained(s2o, folders / "LlamaForCausalLM", "--tokens", 300, "--min-seq-len", 0)
    assert {site["path"] for site in found["sites"]} == {"s2o"}
    assert found["remark"] == ""


@pytest.mark.usefixtures("fresh_dynamo")
def test_explain_prints_what_the_default_does(s2o, folders, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    done = s2o("explain", folders / "LlamaForCausalLM", "--random-weights", "--tokens", 300, "--device", "cpu")
    assert "LlamaForCausalLM, made inputs: input_ids 1x300" in done.stdout
    assert "(short)" in done.stdout
    assert "S2O begins at 4096 (min_seq_len of this device)" in " ".join(done.stdout.split())
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_a_kind_without_a_rule_is_refused_in_one_line(s2o, tmp_path):
    sizes = {"num_input_channels": 2, "context_length": 32, "d_model": 16, "num_hidden_layers": 1}
    config = transformers.PatchTSTConfig(**sizes)
    config.architectures = ["PatchTSTModel"]
    config.save_pretrained(tmp_path)
    done = s2o("explain", tmp_path, "--random-weights", "--device", "cpu")
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("s2o: ")]
    assert "expected a model of text, images or sound, got a PatchTSTModel" in line
    assert "past_values" in line
    assert len(line) < 500


@pytest.mark.parametrize("command", ["evaluate", "calibrate"])
def test_quality_needs_a_causal_model_and_says_so_in_one_line(s2o, folders, tmp_path, command):
    done = s2o(command, "--model", folders / "ViTForImageClassification", "--device", "cpu")
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("s2o: ")]
    assert "expected a causal language model, got a ViTConfig" in line
    assert "`s2o explain` and `s2o bench` take any model" in line


@pytest.fixture
def quick_bench(monkeypatch, fresh_dynamo):
    monkeypatch.setitem(bench_module.WAYS, "compiled", lambda model, _: torch.compile(model, backend="eager"))
    monkeypatch.setattr(measure, "CALLS", 1)


@pytest.fixture
def eager(tmp_path):
    file = tmp_path / "eager.json"
    file.write_text('{"inner_backend": "eager", "min_seq_len": 128}')
    return file


@pytest.mark.usefixtures("quick_bench")
def test_bench_without_a_tokenizer(s2o, tmp_path, eager):
    transformers.LlamaForCausalLM(configs()["LlamaForCausalLM"]).save_pretrained(tmp_path / "model")
    read = ["--model", tmp_path / "model", "--tokens", 300, 200, "--device", "cpu", "--config", eager]
    done = s2o("bench", *read, "--json", tmp_path / "bench.json")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "bench.json").read_text())
    assert [row["tokens"] for row in found["rows"]] == [200, 300]
    assert all(row["sparse"] == 1 and row["loss_dense"] for row in found["rows"])
    printed = " ".join(done.stdout.split())
    assert "Token ids are random" in printed
    assert found["verdict"] in printed
    done = s2o("bench", *read, "--text", eager)
    assert "--text: expected a model that reads text, got model" in done.stderr
    assert "which has no tokenizer. Leave it out." in done.stderr


@pytest.mark.usefixtures("quick_bench")
def test_bench_of_images(s2o, tmp_path, eager):
    transformers.ViTForImageClassification(configs()["ViTForImageClassification"]).save_pretrained(tmp_path / "model")
    read = ["--model", tmp_path / "model", "--tokens", 300, 200, "--device", "cpu", "--config", eager]
    done = s2o("bench", *read, "--json", "-")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [row["tokens"] for row in found["rows"]] == [170]  # an image has one size
    assert found["rows"][0]["loss_dense"] is None
    assert "made inputs: pixel_values 1x3x208x208" in found["notes"]


@pytest.mark.usefixtures("fresh_dynamo")
def test_explain_gives_no_advice_that_fails(s2o, folders):
    """--tokens sets no size of an image, and below one tile --min-seq-len 0 changes nothing."""
    images = explained(s2o, folders / "ViTForImageClassification", "--tokens", 200)["remark"]
    assert "--tokens" not in images
    assert "--min-seq-len 0 makes them sparse at this length." in images
    short = explained(s2o, folders / "LlamaForCausalLM", "--tokens", 100, "--min-seq-len", 0)["remark"]
    assert "S2O needs at least 128 queries. --tokens 128 shows them sparse." in short
    assert "--min-seq-len" not in short


def row(name, **fields):
    shapes = {"query_shape": ("1", "9", "8192", "64"), "key_shape": ("1", "3", "8192", "64")}
    alike = {"rewritten": True, "reason": "", "mask": "causal", "dtype": "float32", "path": "s2o", "density": 0.2}
    return Site(**{"name": name, **shapes, **alike, "error": 0.02, **fields})


@pytest.mark.parametrize("width", [80, 100, 140])
def test_a_narrow_table_cuts_names_alone(width):
    layers = [row(f"model.layers.{x}.self_attn", density=0.1 + x / 40, error=0.1 + x / 300) for x in range(30)]
    odd = [
        row("base_model.model.model.decoder.layers.31.encoder_attn", path="dense", mask="causal, window 4096"),
        row("visual.blocks.3.attn", unheld_error=0.1),
    ]
    text = io.StringIO()
    print_report(Console(file=text, width=width), Report(sites=(*layers, *odd), graphs=1))
    lines = text.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    for word in ("rewritten", "(FlexAttention)", "causal", "window", "0.100", "0.825", "10.0%", "19.7%", "error"):
        assert word in text.getvalue()
    assert ("model.layers.0…29.self_attn" in text.getvalue()) == (width > 80)


def test_the_bench_table_fits_80_columns():
    def way(seconds):
        return Timing(seconds=seconds, first_seconds=123.4, calls=1, peak_bytes=17 << 30)

    ways = {"plain": way(123.4), "compiled": way(100.2), "s2o": way(99.9)}
    figures = {"density": 0.123, "error": 0.021, "loss_dense": 12.3456, "loss_s2o": 12.3467}
    made = Row(tokens=131072, **ways, sparse=30, sites=30, **figures)
    found = Benchmark(model="smollm2", device="cpu (2 threads)", dtype="float32", config=S2OConfig(), rows=(made,))
    text = io.StringIO()
    print_benchmark(Console(file=text, width=80), found)
    assert "…" not in text.getvalue()
    for word in ("seconds", "123.400", "12.3456", "+0.0011"):
        assert word in text.getvalue()
