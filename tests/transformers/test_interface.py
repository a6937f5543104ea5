"""model.set_attn_implementation("s2o"): what transformers models compute through it, without compiling."""

import warnings

import pytest
import torch

import s2o_compile
from s2o_compile import AttentionImplementationWarning, InputError, S2OConfig, UnknownSiteWarning
from s2o_compile.kernels.observe import observe_attention

transformers = pytest.importorskip("transformers")

from transformers.integrations.sdpa_attention import sdpa_attention_forward  # noqa: E402

from s2o_compile.transformers import configure, s2o_attention_forward  # noqa: E402
from tests.helpers.cache_argument import CACHE  # noqa: E402
from tests.helpers.tiny_transformers import (  # noqa: E402
    EXACT,
    LENGTH,
    MASKS,
    MODELS,
    described,
    inputs,
    output,
    sparse,
    tiny,
)


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("name", MODELS)
def test_exact_equals_the_models_own_attention(name, padding, prefill):
    model, given = tiny(name), inputs(padding)
    seen = given["attention_mask"].bool()
    expected = output(model, **given)[seen]
    torch.testing.assert_close(output(sparse(model), **given)[seen], expected, atol=2e-5, rtol=2e-5)
    masks = MASKS[name] if padding == "none" else [f"{mask}, key padding" for mask in MASKS[name]]
    if (name, padding) == ("llama4", "left"):  # its chunks begin behind the padding: SDPA, under the mask itself
        assert [path for path, _ in prefill()] == ["masked", "s2o"]
        return
    assert [mask for _, mask in prefill()] == masks
    assert {path for path, _ in prefill()} <= {"s2o", "window", *(["dense"] if name == "llama4" else [])}


@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
@pytest.mark.usefixtures("fresh_dynamo")
def test_a_finite_tau_gives_what_optimize_gives(name, prefill):
    config = S2OConfig(tau=1e6, min_seq_len=0, inner_backend="eager")
    given = inputs("left", length=1500)
    seen = given["attention_mask"].bool()
    results = [output(model, **given)[seen] for model in (s2o_compile.optimize(tiny(name), config), tiny(name))]
    result = output(sparse(tiny(name), config), **given)[seen]
    assert torch.equal(result, results[0])
    assert (result - results[1]).abs().max() > 1e-3, "some keys must have been left out"


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_generate(name, cache, prefill):
    model, given = tiny(name), inputs("left")
    options = {"max_new_tokens": 5, "do_sample": False, "disable_compile": True, "prefill_chunk_size": 150}
    options |= {"cache_implementation": "static"} if cache == "static" else {}
    expected = model.generate(**given, **options)
    assert torch.equal(sparse(model).generate(**given, **options), expected)
    paths = [path for path, _ in prefill()][:4]
    assert paths == ["s2o" if name == "llama" else "window", "s2o", "dense", "dense"]  # 150 tokens, and the rest of 50


def test_a_second_turn_on_top_of_a_cache(prefill):
    model, first = tiny("llama"), inputs()["input_ids"]
    second = first.flip(1)[:, :140]
    results = []
    for implementation in (model, sparse(tiny("llama"))):
        cache = transformers.DynamicCache(config=model.config)
        implementation(first, **{CACHE: cache})
        results.append(implementation(second, **{CACHE: cache}).logits)
    torch.testing.assert_close(results[1], results[0], atol=2e-5, rtol=2e-5)
    assert prefill() == [("s2o", "causal")] * 4


def test_short_prompts_run_as_under_sdpa(prefill):
    model, given = tiny("llama", "sdpa"), inputs("left")
    expected = output(model, **given)
    assert torch.equal(output(sparse(model, None), **given), expected)
    assert [path for path, _ in prefill()] == ["dense"] * 2


@pytest.mark.parametrize("shortest", [0, 1000])
def test_a_causal_mask_is_one_whatever_the_module_says(shortest, prefill):
    """PaliGemma's attentions say is_causal=False and go by their masks, which "sdpa" leaves out for a causal one."""
    model, given = tiny("llama"), inputs()
    expected = output(model, **given)
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    sparse(model, S2OConfig(tau=0.0, min_seq_len=shortest))
    torch.testing.assert_close(output(model, **given), expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.filterwarnings("ignore::s2o_compile.DenseGradientWarning")
def test_gradients_are_those_of_dense_attention(name, padding):
    given = inputs(padding)
    gradients = []
    for model in (tiny(name), sparse(tiny(name))):
        output(model, **given)[given["attention_mask"].bool()].square().sum().backward()
        gradients.append({path: p.grad for path, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for path, gradient in gradients[0].items():
        assert (gradients[1][path] - gradient).norm() <= 1e-5 * gradient.norm(), path


@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_dropout_drops(name):
    model = sparse(tiny(name)).train()
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    with torch.no_grad(), s2o_compile.record() as recording:
        first, second = (output(model, **inputs()) for _ in range(2))
    assert not torch.equal(first, second)
    assert not recording.calls


def test_autocast(prefill):
    model, given = tiny("llama", "sdpa"), inputs()
    exact = output(model, **given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        dense, ours = output(model, **given), output(sparse(model), **given)
    assert prefill() == [("s2o", "causal")] * 2
    assert (ours - exact).abs().max() <= 2 * (dense - exact).abs().max()


@pytest.mark.parametrize("read_masks", [True, False])
def test_a_mask_of_the_users_own_is_read_or_left_to_sdpa(read_masks, prefill):
    given = inputs()
    causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril().expand(2, 1, -1, -1)
    prefix = causal | (torch.arange(LENGTH) < 50)
    model = sparse(tiny("llama"), S2OConfig(tau=0.0, min_seq_len=0, read_masks=read_masks))
    for mask in (causal, prefix):
        given["attention_mask"] = mask
        expected = output(tiny("llama", "sdpa"), **given)
        torch.testing.assert_close(output(model, **given), expected, atol=2e-5, rtol=2e-5)
    read = [("s2o", "causal")] * 2 + [("masked", "")] * 2
    assert prefill() == (read if read_masks else [])


@pytest.mark.parametrize("bounds", [False, True], ids=["positions", "bounds-too"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
def test_packed_sequences_are_attended_one_by_one(name, bounds, prefill):
    """Bounds of varlen kernels change nothing beside positions, as for "sdpa"."""
    given = {"input_ids": inputs()["input_ids"], "use_cache": False}
    given["position_ids"] = torch.cat([torch.arange(130), torch.arange(70)]).expand(2, -1)
    expected = output(tiny(name), **given)
    if bounds:
        given |= dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), torch.tensor([0, 130, 200, 330, 400]).int())
        given |= {"max_length_q": 130, "max_length_k": 130}
    torch.testing.assert_close(output(sparse(tiny(name)), **given), expected, atol=2e-5, rtol=2e-5)
    sliding = {"mistral": ["window"] * 2, "gemma2": ["window", "s2o"]}.get(name, ["s2o"] * 2)
    assert [path for path, _ in prefill()] == [path for first in sliding for path in (first, "dense")]


@pytest.mark.parametrize("keys", [LENGTH, 260])
@pytest.mark.parametrize(("asked", "of_module"), [(True, False), (False, True), (None, True), (None, False)])
def test_no_mask_means_what_it_means_to_sdpa(asked, of_module, keys, prefill):
    module = tiny("llama").model.layers[0].self_attn
    module.is_causal = of_module
    configure(module, EXACT)
    shapes = (2, 4, LENGTH, 8), (2, 2, keys, 8), (2, 2, keys, 8)
    tensors = [torch.randn(shape, generator=torch.Generator().manual_seed(0)) for shape in shapes]
    expected, _ = sdpa_attention_forward(module, *tensors, None, is_causal=asked)
    result, _ = s2o_attention_forward(module, *tensors, None, is_causal=asked)
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)
    assert [path for path, _ in prefill()] == ["s2o"]


def test_weights_that_are_not_made_are_not_missed_silently(monkeypatch, prefill):
    said = []
    monkeypatch.setattr(s2o_compile.transformers.interface.logger, "warning_once", said.append)
    attention, tensors = tiny("llama").model.layers[0].self_attn, [torch.randn(1, h, LENGTH, 8) for h in (4, 2, 2)]
    configure(attention, EXACT)
    s2o_attention_forward(attention, *tensors, None, output_attentions=True)
    assert "makes no attention weights" in said[0]


@pytest.mark.parametrize("name", ["llama", pytest.param("gemma2", marks=pytest.mark.slow), "gpt_oss"])
@pytest.mark.usefixtures("fresh_dynamo")
def test_what_is_compiled_is_proven_and_rewritten_as_ever(name, prefill):
    model, given = tiny(name), inputs("left")
    seen = given["attention_mask"].bool()
    expected = output(model, **given)[seen]
    model.set_attn_implementation("s2o")
    config = S2OConfig(tau=0.0, min_seq_len=0, inner_backend="eager", read_masks=False)
    compiled = s2o_compile.optimize(model, config, fullgraph=True)
    torch.testing.assert_close(output(compiled, **given)[seen], expected, atol=2e-5, rtol=2e-5)
    assert [mask for _, mask in prefill()] == [f"{mask}, key padding" for mask in MASKS[name]]


@pytest.mark.usefixtures("fresh_dynamo")
def test_a_lazy_mask_may_enter_a_graph(prefill):
    """generate() makes the masks of a static cache ahead of a forward that may be compiled."""
    model, given = tiny("llama"), inputs("left")
    expected = output(model, **given)
    mask = described(attention_mask=given.pop("attention_mask").bool())
    model.set_attn_implementation("s2o")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = output(torch.compile(model, backend="eager"), **given, attention_mask=mask)
    torch.testing.assert_close(result[:, 30:], expected[:, 30:], atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("name", ["llama", *(pytest.param(x, marks=pytest.mark.slow) for x in ("gemma3", "gpt_oss"))])
@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
def test_layers_compiled_one_by_one_whole(name, prefill):
    """The mask that they share is made inside the first graph, or enters the later ones: it is never an older one."""
    model = tiny(name)
    given = [inputs(padding, length) for padding, length in (("left", LENGTH), ("right", 230))]
    expected = [output(model, **each) for each in given]
    options = {"s2o.min_seq_len": 0, "s2o.tau": 0.0, "s2o.inner_backend": "eager"}
    for layer in model.model.layers:
        layer.compile(backend="s2o", options=options, fullgraph=True)
    sparse(model)
    for each, wanted in zip(given, expected, strict=True):
        seen = each["attention_mask"].bool()
        torch.testing.assert_close(output(model, **each)[seen], wanted[seen], atol=2e-5, rtol=2e-5)
    assert {path for path, _ in prefill()} <= {"s2o", "window"}
    assert len(prefill()) == 4


def test_arguments_of_other_attentions_are_refused():
    attention = tiny("llama").model.layers[0].self_attn
    tensors = [torch.randn(1, 4, LENGTH, 8)] * 3
    with pytest.raises(InputError, match=r"LlamaAttention: expected an attention that SDPA computes.* got indices"):
        s2o_attention_forward(attention, *tensors, None, indices=torch.zeros(1))


@pytest.mark.parametrize("wrap", [lambda model: model, torch.nn.DataParallel], ids=["bare", "wrapped"])
def test_a_model_that_does_not_use_it_is_named(wrap):
    model = tiny("llama", "sdpa")
    with pytest.warns(AttentionImplementationWarning, match=r"configure: expected .* \"s2o\", got 'sdpa', so nothing"):
        configure(wrap(model))
    model.set_attn_implementation("s2o")
    configure(wrap(model))


def test_a_module_that_attends_several_times_keeps_to_the_strictest_of_its_sites(prefill):
    """``optimize`` tells its calls apart, and this does not: nothing becomes looser, and no name is unknown."""
    sizes = {"vocab_size": 97, "hidden_size": 32, "embedding_size": 16, "intermediate_size": 48}
    layers = {"num_hidden_layers": 3, "num_attention_heads": 4}
    config = transformers.AlbertConfig(**sizes, **layers, max_position_embeddings=512)
    model = transformers.AlbertModel(config, add_pooling_layer=False).eval()
    model.set_attn_implementation("s2o")
    name = "encoder.albert_layer_groups.0.albert_layers.0.attention"
    own = {"site_tau": {name: (0.5,) * 4, f"{name}#3": (9.0, 0.0, 9.0, 9.0)}, "dense_heads": {f"{name}#2": (3,)}}
    seen = []
    with observe_attention(lambda call: seen.append((call.site, tuple(call.dense_heads), call.options.tau))):
        configure(model, S2OConfig(min_seq_len=0, **own))
        model(**inputs())
    assert seen == [(name, (3,), (0.5, 0.0, 0.5, 0.5))] * 3


def test_a_configuration_names_sites_and_heads(prefill):
    model = tiny("llama")
    model.set_attn_implementation("s2o")
    with pytest.warns(UnknownSiteWarning, match=r"Did you mean 'model.layers.1.self_attn'"):
        configure(model, S2OConfig(dense_heads={"model.layer.1.self_attn": (0,)}))
    config = S2OConfig(min_seq_len=0, tau=1e6, dense_heads={"model.layers.1.self_attn": (0, 1)})
    configure(model, config)
    with s2o_compile.record() as recording:
        model(**inputs(length=1500))
    assert [(call.site, call.path) for call in recording.calls] == [
        ("model.layers.0.self_attn", "s2o"),
        ("model.layers.1.self_attn", "dense"),
    ]
    assert recording.calls[0].density < 0.9
