"""Long attention that is dense because derivatives are wanted says so; short attention is dense anyway."""

import warnings

import pytest
import torch

import s2o_compile
from s2o_compile import DenseGradientWarning, S2OConfig

LONG = S2OConfig(min_seq_len=128)


def tensors(length, **options):
    return tuple(torch.randn(1, 1, length, 8, **options) for _ in range(3))


@pytest.mark.parametrize("masked", [False, True], ids=["terms", "mask"])
def test_a_long_call_says_why_it_is_dense(masked):
    q, k, v = tensors(256, requires_grad=True)
    seen = {"attn_mask": torch.ones(256, 256, dtype=torch.bool).tril()} if masked else {"causal": True}
    said = "attention over 256 keys is dense: derivatives of it are wanted.*Call it under torch.no_grad"
    with pytest.warns(DenseGradientWarning, match=said) as caught:
        output = s2o_compile.attention(q, k, v, config=LONG, **seen)
    assert [warning.filename for warning in caught] == [__file__]
    output.sum().backward()
    assert q.grad is not None
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        s2o_compile.attention(q, k, v, config=LONG, **seen)


def test_at_the_default_length_too():
    with pytest.warns(DenseGradientWarning, match="over 4096 keys"):
        s2o_compile.attention(*tensors(4096, requires_grad=True), causal=True)


@pytest.mark.parametrize("queries", [100, 256], ids=["few queries", "few keys"])
def test_a_short_call_says_nothing(queries):
    q, k, v = tensors(256, requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        s2o_compile.attention(q[:, :, :queries], k, v, causal=True, config=LONG if queries == 100 else None)


def test_under_the_attention_interface_of_transformers():
    transformers = pytest.importorskip("transformers")
    import s2o_compile.transformers

    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_attention_heads=4)).eval()
    model.set_attn_implementation("s2o")
    s2o_compile.transformers.configure(model, LONG)
    ids = torch.randint(97, (1, 256))
    with pytest.warns(DenseGradientWarning, match="over 256 keys"):
        model(ids)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        model(ids)
