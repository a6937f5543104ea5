"""Under set_attn_implementation("s2o") an attention has the name that explain gives it, from its first call on."""

import copy

import pytest
import torch

import s2o_compile
from s2o_compile import S2OConfig

pytest.importorskip("transformers")

from s2o_compile.transformers import configure, s2o_attention_forward
from tests.helpers.tiny_transformers import LENGTH, inputs, tiny

NAMES = ["model.layers.0.self_attn", "model.layers.1.self_attn"]


@torch.no_grad()
def names(call):
    with s2o_compile.record() as recording:
        call()
    return [call.site for call in recording.calls]


def generate(model):
    model.generate(**inputs(), max_new_tokens=1, do_sample=False)


CALLS = {
    "call": lambda model: model(**inputs()),
    "generate": generate,
    "wrapped": lambda model: torch.nn.DataParallel(model)(**inputs()),
    "copy": lambda model: copy.deepcopy(model)(**inputs()),
}


@pytest.mark.parametrize("call", CALLS)
def test_it_is_named_by_its_path(call):
    model = tiny("llama", "s2o")
    for _ in range(2):
        assert names(lambda: CALLS[call](model)) == NAMES
    assert names(lambda: model.model(**inputs())) == NAMES if call != "copy" else True


@pytest.mark.usefixtures("fresh_dynamo")
def test_explain_and_configure_say_the_same():
    model = tiny("llama", "s2o")
    first = names(lambda: model(**inputs()))
    report = s2o_compile.explain(model, **inputs(), config=S2OConfig(min_seq_len=0))
    assert [site.name for site in report.sites] == first == NAMES
    configure(model, S2OConfig(min_seq_len=0, dense_heads={NAMES[1]: (0, 1)}))
    with s2o_compile.record() as recording, torch.no_grad():
        model(**inputs())
    assert {call.site: call.path for call in recording.calls} == {NAMES[0]: "s2o", NAMES[1]: "dense"}


def test_a_part_of_a_model_by_itself():
    """Nobody knows what it is a part of; outside of every call there is but its class."""
    model = tiny("llama", "s2o")
    assert names(lambda: model.model(**inputs())) == ["layers.0.self_attn", "layers.1.self_attn"]
    tensors = [torch.randn(1, 4, LENGTH, 8)] * 3
    attention = tiny("llama", "s2o").model.layers[1].self_attn
    assert names(lambda: s2o_attention_forward(attention, *tensors, None)) == ["LlamaAttention.1"]
