"""Arguments that people try: refused where they are given, with what to write instead."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import s2o_compile
from s2o_compile import InputError, OptionError, S2OConfig

X = torch.randn(1, 2, 140, 16, generator=torch.Generator().manual_seed(0))
ARRAYS = {
    "query": lambda array: s2o_compile.attention(array, X, X),
    "key": lambda array: s2o_compile.attention(X, array, X),
    "value": lambda array: s2o_compile.attention(X, X, array),
    "key_mask": lambda array: s2o_compile.attention(X, X, X, key_mask=array),
    "attn_mask": lambda array: s2o_compile.attention(X, X, X, attn_mask=array),
    "sinks": lambda array: s2o_compile.attention(X, X, X, sinks=array),
}


@pytest.mark.parametrize("array", [X.numpy(), [1.0], 3], ids=["numpy", "list", "number"])
@pytest.mark.parametrize("name", ARRAYS)
def test_what_is_no_tensor(name, array):
    with pytest.raises(InputError, match=f"attention: {name}: expected a torch.Tensor, got .* torch.as_tensor"):
        ARRAYS[name](array)


def test_tensors_that_are_no_option_are_no_none():
    pages, table = (torch.zeros(1, 140, 2, 16), None), torch.zeros(1, 1, dtype=torch.int32)
    packed = X[0].transpose(0, 1)
    calls = {
        "query": [lambda: s2o_compile.attention(None, X, X), lambda: s2o_compile.plan(None, X)],
        "key": [lambda: s2o_compile.attention_varlen(packed, None, packed, [0, 140], [0, 140])],
        "value_cache": [lambda: s2o_compile.attention_paged(packed, pages, table, [0, 140], [140])],
    }
    for name, those in calls.items():
        for call in those:
            with pytest.raises(InputError, match=f"{name}: expected a torch.Tensor, got builtins.NoneType"):
                call()


def test_a_plan_is_made_of_tensors_and_is_a_plan():
    with pytest.raises(InputError, match=r"query: expected a torch\.Tensor, got numpy\.ndarray"):
        s2o_compile.plan(X.numpy(), X)
    with pytest.raises(InputError, match=r"plan: expected an S2OPlan, got 3\. Make one with s2o_compile\.plan"):
        s2o_compile.attention(X, X, X, plan=3)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided], ids=str)
def test_nested_tensors(layout):
    nested = torch.nested.nested_tensor([torch.randn(n, 2, 8) for n in (15, 20)], layout=layout).transpose(1, 2)
    with pytest.raises(InputError, match=r"got a nested tensor\. Pad it .* key_mask"):
        s2o_compile.attention(nested, nested, nested)


@pytest.mark.parametrize("learned", [False, True], ids=["inference", "gradients"])
@pytest.mark.usefixtures("fresh_dynamo")
def test_flags_are_looked_at_while_dynamo_traces(learned):
    compiled = torch.compile(lambda x: s2o_compile.attention(x, x, x, causal="yes"), backend="eager")
    with pytest.raises(InputError, match="causal: expected True or False, got 'yes'"):
        compiled(X.clone().requires_grad_(learned))


@pytest.mark.parametrize(
    ("keyword", "remedy"),
    [
        ("is_causal", r"Write causal=True, causal_offset=0\."),
        ("enable_gqa", r"Leave it out"),
        ("tau", r"Pass config=S2OConfig\(tau=\.\.\.\)"),
        ("min_seq_len", r"Pass config=S2OConfig\(min_seq_len=\.\.\.\)"),
        ("colour", r"Leave it out"),
    ],
)
def test_keywords_of_others_are_answered(keyword, remedy):
    with pytest.raises(TypeError, match=rf"attention\(\) got an unexpected keyword argument '{keyword}'. {remedy}"):
        s2o_compile.attention(X, X, X, **{keyword: 1})


def test_a_configuration_is_one():
    with pytest.raises(OptionError, match=r"attention: config: expected an S2OConfig, got dict\. Write S2OConfig"):
        s2o_compile.attention(X, X, X, config={"tau": 0.5})


class TestOptimize:
    def test_fields_belong_into_the_configuration(self):
        with pytest.raises(TypeError, match=r"optimize\(\) got .* 'tau'\. Pass config=S2OConfig\(tau=\.\.\.\)"):
            s2o_compile.optimize(torch.nn.Linear(2, 2), tau=0.5)

    @pytest.mark.parametrize("mode", ["fastest", 3, True])
    def test_a_mode_that_does_not_exist(self, mode):
        with pytest.raises(OptionError, match=r"unknown mode .*: expected one of default, .* max-autotune"):
            s2o_compile.optimize(torch.nn.Linear(2, 2), mode=mode)

    def test_a_mode_of_another_inner_backend(self):
        with pytest.raises(OptionError, match=r"inner_backend='eager': expected no mode .* got mode='max-autotune'"):
            s2o_compile.optimize(torch.nn.Linear(2, 2), S2OConfig(inner_backend="eager"), mode="max-autotune")

    @pytest.mark.parametrize("mode", [None, "default", "reduce-overhead"])
    def test_modes_that_exist(self, mode):
        s2o_compile.optimize(torch.nn.Linear(2, 2), mode=mode)


@pytest.mark.parametrize("given", ["inference", "gradient", "mask", "long"])
def test_a_scale_of_zero_is_the_mean_of_what_is_seen(given):
    """SDPA's is NaN under ``is_causal`` on a CPU, where -inf is added before the product with the scale."""
    mean = X.cumsum(2) / torch.arange(1, 141)[:, None]
    query, causal = X.clone().requires_grad_(given == "gradient"), torch.ones(140, 140).tril().bool()
    mask = {"attn_mask": causal} if given == "mask" else {"causal": True}
    config = S2OConfig(min_seq_len=0 if given == "long" else 1000)
    torch.testing.assert_close(s2o_compile.attention(query, X, X, **mask, scale=0.0, config=config), mean)
    torch.testing.assert_close(scaled_dot_product_attention(X, X, X, attn_mask=causal, scale=0.0), mean)
