"""generate() with every cache: prefill through S2O, decode dense; tokens and compilations as with torch.compile."""

import re

import pytest
import torch

import s2o_compile
from s2o_compile import S2OConfig

transformers = pytest.importorskip("transformers")

PROMPT, NEW = 150, 6
EXACT = S2OConfig(tau=0.0, min_seq_len=0, inner_backend="eager")
SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "eos_token_id": None,
    "pad_token_id": 0,
}


def llama(implementation):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, attn_implementation=implementation)
    return transformers.LlamaForCausalLM(config).eval()


def prompts(padded):
    ids = torch.randint(1, 97, (2, PROMPT), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :30], ids[0, :30] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def generated(model, cache, inputs):
    options = {"cache_implementation": "static"} if cache == "static" else {}
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch.no_grad():
        tokens = model.generate(**inputs, max_new_tokens=NEW, do_sample=False, disable_compile=True, **options)
    return tokens, torch._dynamo.utils.counters["stats"]["unique_graphs"]


# For a static cache transformers builds the mask outside the model: it arrives as an input, whose values prove nothing.
MASK_IS_AN_INPUT = [("sdpa", "static", True), ("eager", "static", False), ("eager", "static", True)]


@pytest.mark.parametrize("padded", [False, True], ids=["plain", "padded"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.filterwarnings("ignore::s2o_compile.NothingRewrittenWarning")
def test_tokens_and_compilations_are_those_of_torch_compile(implementation, cache, padded):
    model, inputs = llama(implementation), prompts(padded)
    expected, _ = generated(model, cache, inputs)
    plain = llama(implementation)
    plain.compile(backend="eager")
    _, compilations = generated(plain, cache, inputs)
    fast = s2o_compile.optimize(model, EXACT)
    with s2o_compile.record() as recording:
        tokens, ours = generated(fast, cache, inputs)
    assert torch.equal(tokens, expected)
    assert ours == compilations
    prefill = [call.path for call in recording.calls if call.n_queries == PROMPT]
    if (implementation, cache, padded) in MASK_IS_AN_INPUT:
        assert not prefill
        assert re.search("graph input|placeholder", recording.report.sites[0].reason)
    else:
        assert prefill == ["s2o"]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@torch.no_grad()
@pytest.mark.usefixtures("fresh_dynamo")
def test_a_second_turn_on_top_of_a_cache(implementation):
    model = llama(implementation)
    first = prompts(padded=False)["input_ids"]
    second = first.flip(1)[:, :140]
    results = []
    for run in (model, s2o_compile.optimize(model, EXACT)):
        cache = transformers.DynamicCache(config=model.config)
        with s2o_compile.record() as recording:
            run(first, past_key_values=cache)
            results.append(run(second, past_key_values=cache).logits)
    assert (results[1] - results[0]).abs().max() <= 1e-4
    assert {(call.n_queries, call.n_keys) for call in recording.calls} >= {(150, 150), (140, 290)}
    assert {call.path for call in recording.calls} == {"s2o"}


@pytest.mark.usefixtures("fresh_dynamo")
@torch.no_grad()
def test_the_encoder_of_an_encoder_decoder_is_rewritten_too():
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 97,
        "d_model": 32,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
        "max_position_embeddings": 256,
    }
    layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    config = transformers.BartConfig(**sizes, **layers, decoder_start_token_id=2, forced_eos_token_id=None)
    model = transformers.BartForConditionalGeneration(config).eval()
    inputs = {"input_ids": prompts(padded=False)["input_ids"], "max_new_tokens": 4, "do_sample": False}
    expected = model.generate(**inputs)
    fast = s2o_compile.optimize(model, EXACT)
    with s2o_compile.record() as recording:
        tokens = fast.generate(**inputs)
    assert torch.equal(tokens, expected)
    encoder = [call for call in recording.calls if call.n_queries == PROMPT]
    assert [call.path for call in encoder] == ["s2o"]
    assert model.get_encoder() is not fast.get_encoder()
    assert model.get_encoder().layers is fast.get_encoder().layers, "weights are shared"
