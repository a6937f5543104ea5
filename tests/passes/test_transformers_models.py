"""Real models of the installed transformers: every mask is proven, and the rewritten model computes what eager does."""

import pytest
import torch

from s2o_compile.passes import pipeline
from s2o_compile.passes.graph.nodes import value_of

transformers = pytest.importorskip("transformers")

from tests.helpers.cache_argument import CACHE  # noqa: E402

BATCH, LENGTH, TURN = 2, 21, 7
EXACT = {"tau": 0.0, "min_seq_len": 0}
SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}


def llama():
    return transformers.LlamaForCausalLM, transformers.LlamaConfig(**GROUPED)


def qwen2():
    config = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    return transformers.Qwen2ForCausalLM, transformers.Qwen2Config(**GROUPED, **config)


def gemma3():
    layers = ["sliding_attention", "full_attention"]
    config = transformers.Gemma3TextConfig(**GROUPED, head_dim=8, sliding_window=8, layer_types=layers)
    return transformers.Gemma3ForCausalLM, config


def gpt2():
    sizes = {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
    return transformers.GPT2LMHeadModel, transformers.GPT2Config(**sizes)


def falcon():
    sizes = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    return transformers.FalconForCausalLM, transformers.FalconConfig(**sizes, multi_query=True)


def bert():
    return transformers.BertModel, transformers.BertConfig(**SIZES)


def built(recipe):
    torch.manual_seed(0)
    kind, config = recipe()
    config._attn_implementation = "sdpa"
    return kind(config).eval()


def tokens(length=LENGTH):
    return torch.randint(1, 97, (BATCH, length), generator=torch.Generator().manual_seed(1))


class Capture:
    def __init__(self):
        self.records, self.graphs = [], []

    def __call__(self, gm, example_inputs):
        self.records += pipeline.run(gm, EXACT)
        self.graphs.append(gm)
        return gm.forward


def compiled(model, dynamic):
    torch._dynamo.reset()
    capture = Capture()
    return torch.compile(model, backend=capture, dynamic=dynamic), capture


def check(capture, masks, key_heads):
    assert [record.reason for record in capture.records] == [""] * len(masks)
    assert [record.mask for record in capture.records] == masks
    assert {record.key_shape[1] for record in capture.records} == {str(key_heads)}
    assert all("." in record.name for record in capture.records)
    # No tensor over queries x keys is left, whichever the two lengths are.
    squares = {(r.query_shape[2], r.key_shape[2]) for r in capture.records}
    values = [value_of(node) for gm in capture.graphs for node in gm.graph.nodes]
    left = {tuple(map(str, v.shape[-2:])) for v in values if isinstance(v, torch.Tensor)}
    assert not left & squares


MODELS = {
    "llama": (llama, ["causal", "causal"], 2),
    "qwen2": (qwen2, ["causal", "causal, window 8"], 2),
    "gemma3": (gemma3, ["causal, window 8", "causal"], 2),
    "gpt2": (gpt2, ["causal", "causal"], 4),
    "falcon": (falcon, ["causal", "causal"], 1),
    "bert": (bert, ["bidirectional", "bidirectional"], 4),
}
CASES = [(name, True) for name in MODELS] + [("llama", False)]


def cases(pairs, slow=()):
    rows = [
        pytest.param(
            name,
            dynamic,
            id=f"{name}-{'dynamic' if dynamic else 'static'}",
            marks=[pytest.mark.slow] if (name, dynamic) in slow else [],
        )
        for name, dynamic in pairs
    ]
    return pytest.mark.parametrize(("name", "dynamic"), rows)


@cases(CASES, slow=[("qwen2", True), ("falcon", True), ("bert", True)])
@torch.no_grad()
def test_without_padding(name, dynamic):
    recipe, masks, key_heads = MODELS[name]
    model = built(recipe)
    run, capture = compiled(model, dynamic)
    torch.testing.assert_close(run(tokens())[0], model(tokens())[0], atol=1e-5, rtol=1e-5)
    check(capture, masks, key_heads)
    if dynamic:  # the same graph at another length
        torch.testing.assert_close(run(tokens(34))[0], model(tokens(34))[0], atol=1e-5, rtol=1e-5)
        assert len(capture.graphs) == 1


@cases(CASES, slow=[("gpt2", True), ("falcon", True), ("llama", False)])
@torch.no_grad()
def test_left_padding(name, dynamic):
    recipe, masks, key_heads = MODELS[name]
    model = built(recipe)
    keep = torch.ones(BATCH, LENGTH, dtype=torch.long)
    keep[0, :5] = 0
    run, capture = compiled(model, dynamic)
    result, expected = run(tokens(), attention_mask=keep)[0], model(tokens(), attention_mask=keep)[0]
    torch.testing.assert_close(result[keep.bool()], expected[keep.bool()], atol=1e-5, rtol=1e-5)
    check(capture, [f"{mask}, key padding" for mask in masks], key_heads)


TURNS = [("llama", True), ("qwen2", True), ("falcon", True), ("llama", False)]


@cases(TURNS, slow=[("falcon", True), ("llama", False)])
@torch.no_grad()
def test_second_turn_on_a_cache(name, dynamic):
    recipe, masks, key_heads = MODELS[name]
    model = built(recipe)
    caches = [transformers.DynamicCache(config=model.config) for _ in range(2)]
    for cache in caches:
        model(tokens(), **{CACHE: cache}, use_cache=True)
    run, capture = compiled(model, dynamic)
    turn = tokens(TURN)
    result = run(turn, **{CACHE: caches[0]}, use_cache=True)[0]
    torch.testing.assert_close(result, model(turn, **{CACHE: caches[1]}, use_cache=True)[0], atol=1e-5, rtol=1e-5)
    # A sliding layer's cache is cut to the window: where it starts is an offset computed in the graph.
    found = [record.mask for record in capture.records]
    assert [mask.split(", offset")[0] for mask in found] == [mask if mask in found else "causal" for mask in masks]
    assert [mask.rpartition("window")[2] for mask in found] == [mask.rpartition("window")[2] for mask in masks]
    assert {record.key_shape[1] for record in capture.records} == {str(key_heads)}


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_position_ids_of_packed_sequences(name):
    recipe, masks, key_heads = MODELS[name]
    model = built(recipe)
    packed = torch.stack([torch.cat([torch.arange(n), torch.arange(LENGTH - n)]) for n in (9, 14)])
    run, capture = compiled(model, dynamic=None)
    for position_ids in (packed, packed[:1], torch.arange(LENGTH)[None], packed + 3):
        given = {"position_ids": position_ids, "use_cache": False}
        torch.testing.assert_close(run(tokens(), **given)[0], model(tokens(), **given)[0], atol=1e-5, rtol=1e-5)
    check(capture, [f"packed {mask}" for _ in capture.graphs for mask in masks], key_heads)


@torch.no_grad()
def test_a_static_cache_whose_length_is_a_tensor_stays_dense_and_right():
    model = built(llama)
    caches = [transformers.StaticCache(config=model.config, max_cache_len=64) for _ in range(2)]
    run, capture = compiled(model, dynamic=None)
    for part in (tokens(), tokens(TURN)):
        results = [call(part, **{CACHE: cache})[0] for call, cache in zip((run, model), caches, strict=True)]
        torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)
    assert all(record.rewritten or "not proven" in record.reason for record in capture.records)


@torch.no_grad()
def test_decoding_stays_dense():
    model = built(llama)
    cache = transformers.DynamicCache(config=model.config)
    model(tokens(), **{CACHE: cache}, use_cache=True)
    run, capture = compiled(model, dynamic=None)
    run(tokens(1), **{CACHE: cache}, use_cache=True)
    assert {record.reason for record in capture.records} == {"one query token: decode stays dense"}


def test_training_stays_dense():
    model = built(llama).train()
    run, capture = compiled(model, dynamic=None)
    run(tokens(), labels=tokens(), use_cache=False).loss.backward()
    assert model.model.layers[0].self_attn.q_proj.weight.grad is not None
    assert all("torch.no_grad()" in record.reason for record in capture.records)
