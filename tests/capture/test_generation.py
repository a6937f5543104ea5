"""generate() with every cache: prefill through S2O, decode dense; tokens and compilations as with torch.compile."""

import itertools

import pytest
import torch

import s2o_compile
from s2o_compile import S2OConfig

transformers = pytest.importorskip("transformers")

from tests.helpers.cache_argument import CACHE  # noqa: E402

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


def gemma3(implementation):
    """Sliding and full attention by turns: generate makes a dict of masks."""
    torch.manual_seed(0)
    sizes = SIZES | {"num_hidden_layers": 2, "sliding_window": 40, "head_dim": 8}
    layers = ["sliding_attention", "full_attention"]
    config = transformers.Gemma3TextConfig(**sizes, layer_types=layers, attn_implementation=implementation)
    return transformers.Gemma3ForCausalLM(config).eval()


def prompts(padded, length=PROMPT):
    ids = torch.randint(1, 97, (2, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :30], ids[0, :30] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def generated(model, cache, inputs, **options):
    options |= {"cache_implementation": "static"} if cache == "static" else {}
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch.no_grad():
        tokens = model.generate(**inputs, max_new_tokens=NEW, do_sample=False, disable_compile=True, **options)
    return tokens, torch._dynamo.utils.counters["stats"]["unique_graphs"]


KINDS = list(itertools.product(["sdpa", "eager"], ["dynamic", "static"], ["plain", "padded"]))
QUICK = [("sdpa", "dynamic", "padded"), ("sdpa", "static", "plain"), ("eager", "dynamic", "plain")]
QUICK += [("eager", "static", "padded")]
"""Every pair of values."""


@pytest.mark.parametrize(
    ("implementation", "cache", "padded"),
    [pytest.param(*k, marks=[] if k in QUICK else pytest.mark.slow, id="-".join(k)) for k in KINDS],
)
@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.filterwarnings("ignore::s2o_compile.NothingRewrittenWarning")
def test_tokens_and_compilations_are_those_of_torch_compile(implementation, cache, padded):
    model, inputs = llama(implementation), prompts(padded == "padded")
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
    assert prefill == ["s2o"]


@pytest.mark.parametrize("implementation", ["sdpa", pytest.param("eager", marks=pytest.mark.slow)])
@pytest.mark.usefixtures("fresh_dynamo")
def test_layers_of_two_kinds_in_a_static_cache(implementation):
    model, inputs = gemma3(implementation), prompts(padded=True)
    expected, _ = generated(model, "static", inputs)
    plain = gemma3(implementation)
    plain.compile(backend="eager")
    _, compilations = generated(plain, "static", inputs)
    with s2o_compile.record() as recording:
        tokens, ours = generated(s2o_compile.optimize(model, EXACT), "static", inputs)
    assert torch.equal(tokens, expected)
    assert ours == compilations
    masks = [site.mask for site in recording.report.sites if site.rewritten]
    assert sorted(masks) == ["causal, offset 0, key padding", "causal, window 40, key padding"]


@pytest.mark.parametrize("cache", [pytest.param("dynamic", marks=pytest.mark.slow), "static"])
@pytest.mark.usefixtures("fresh_dynamo")
def test_chunked_prefill(cache):
    model, inputs, chunk = llama("sdpa"), prompts(padded=True, length=3 * PROMPT), {"prefill_chunk_size": PROMPT}
    expected, _ = generated(model, cache, inputs)
    plain = llama("sdpa")
    plain.compile(backend="eager")
    _, compilations = generated(plain, cache, inputs, **chunk)
    with s2o_compile.record() as recording:
        tokens, ours = generated(s2o_compile.optimize(model, EXACT), cache, inputs, **chunk)
    assert torch.equal(tokens, expected)
    assert ours == compilations
    chunks = [call.path for call in recording.calls if call.n_queries == PROMPT]
    assert chunks == ["s2o"] * 3


class Overlaid(transformers.LlamaForCausalLM):
    """A model with a hook of its own, which sees the arguments that generate passes."""

    @staticmethod
    def create_masks_for_generate(config, inputs_embeds, attention_mask, token_type_ids=None, **kwargs):
        visible = attention_mask if token_type_ids is None else attention_mask * token_type_ids
        return transformers.masking_utils.create_causal_mask(config, inputs_embeds, visible, kwargs[CACHE])

    def forward(self, input_ids, token_type_ids=None, **kwargs):
        return super().forward(input_ids, **kwargs)


@pytest.mark.usefixtures("fresh_dynamo")
def test_a_models_own_masks_are_built_by_its_own_function():
    model = llama("sdpa")
    model.__class__ = Overlaid
    inputs = prompts(padded=True)
    ordinary, _ = generated(model, "static", inputs)
    inputs["token_type_ids"] = (inputs["input_ids"] % 8 == 1).long()
    expected, _ = generated(model, "static", inputs)
    assert not torch.equal(expected, ordinary), "its masks must matter"
    with s2o_compile.record() as recording:
        tokens, _ = generated(s2o_compile.optimize(model, EXACT), "static", inputs)
    assert torch.equal(tokens, expected)
    assert [call.path for call in recording.calls if call.n_queries == PROMPT] == ["s2o"]


@pytest.mark.usefixtures("fresh_dynamo")
def test_a_model_that_generates_by_itself_keeps_its_masks():
    class Own(transformers.LlamaForCausalLM):
        def generate(self, *args, **kwargs):
            return super().generate(*args, **kwargs)

    model = llama("sdpa")
    model.__class__ = Own
    assert "create_masks_for_generate" not in vars(s2o_compile.optimize(model, EXACT))


@pytest.mark.parametrize("held", [pytest.param(0, marks=pytest.mark.slow), 140])
@torch.no_grad()
@pytest.mark.usefixtures("fresh_dynamo")
def test_postponed_masks_are_those_of_the_call(held):
    """Whoever writes into the padding between the call and the forward changes no mask."""
    results, ids = [], prompts(padded=False)["input_ids"]
    for change in (False, True):
        model = s2o_compile.optimize(llama("sdpa"), EXACT)
        cache = transformers.StaticCache(config=model.config, max_cache_len=300)
        if held:
            model(ids[:, :held], **{CACHE: cache})
        padding = (torch.arange(held + PROMPT) > 30).repeat(2, 1)
        masks = model.create_masks_for_generate(
            config=model.config,
            inputs_embeds=torch.empty(2, PROMPT, 0),
            attention_mask=padding,
            **{CACHE: cache},
            is_first_iteration=True,
        )
        if change:
            padding.fill_(True)
        positions = torch.arange(held, held + PROMPT)[None]
        results.append(model(ids, attention_mask=masks, **{CACHE: cache}, position_ids=positions).logits)
    torch.testing.assert_close(results[1][:, 31:], results[0][:, 31:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("implementation", [pytest.param("sdpa", marks=pytest.mark.slow), "eager"])
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
            run(first, **{CACHE: cache})
            results.append(run(second, **{CACHE: cache}).logits)
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
    ours, theirs = fast.get_encoder(), model.get_encoder()
    assert ours is not theirs
    assert all(x is y for x, y in zip(ours.parameters(), theirs.parameters(), strict=True)), "weights are shared"


@pytest.mark.slow
@torch.no_grad()
def test_outputs_that_are_asked_for_have_one_entry_a_layer():
    """transformers registers hooks for them at the first call that asks, also on modules without submodules."""
    torch.manual_seed(0)
    config = transformers.MixtralConfig(**SIZES | {"num_hidden_layers": 2, "num_local_experts": 2})
    model, inputs = transformers.MixtralForCausalLM(config).eval(), prompts(padded=False)
    fast = s2o_compile.optimize(model, EXACT)
    fast(**inputs)
    results = [each(**inputs, output_hidden_states=True, output_router_logits=True) for each in (fast, model) * 2]
    assert [len(result.hidden_states) for result in results] == [3] * 4
    assert [len(result.router_logits) for result in results] == [2] * 4
    torch.testing.assert_close(results[2].hidden_states, results[3].hidden_states)
    torch.testing.assert_close(results[2].router_logits, results[3].router_logits)
