"""S2O as diffusers' native attention backend."""

import warnings

import pytest
import torch

import s2o_compile
from s2o_compile import ImplementationUnavailableError, S2OConfig

pytest.importorskip("diffusers")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from diffusers import FluxTransformer2DModel
    from diffusers.models import attention_dispatch

import s2o_compile.diffusers
from s2o_compile.kernels.support.torch_compat import torch_release

EXACT = S2OConfig(tau=0.0, min_seq_len=0)
TEXT, IMAGE = 40, 160


@pytest.fixture
def calls():
    with torch.no_grad(), s2o_compile.record() as recording:
        yield lambda: [(call.path, call.mask) for call in recording.calls]


def flux():
    """One block on text and image apart, one on both."""
    torch.manual_seed(0)
    sizes = {"patch_size": 1, "in_channels": 4, "num_layers": 1, "num_single_layers": 1, "axes_dims_rope": [4, 4, 8]}
    heads = {"attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 32, "pooled_projection_dim": 32}
    return FluxTransformer2DModel(**sizes, **heads).eval()


def inputs():
    generator = torch.Generator().manual_seed(1)
    shapes = {"hidden_states": (2, IMAGE, 4), "encoder_hidden_states": (2, TEXT, 32), "pooled_projections": (2, 32)}
    given = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    places = {"img_ids": torch.rand(IMAGE, 3, generator=generator) * 9, "txt_ids": torch.zeros(TEXT, 3)}
    return given | places | {"timestep": torch.tensor([0.5, 0.5])}


def test_a_transformer_is_what_it_was_and_sparse_inside_the_block(calls):
    model, given = flux(), inputs()
    expected = model(**given).sample
    with s2o_compile.diffusers.native_attention(EXACT):
        torch.testing.assert_close(model(**given).sample, expected, atol=1e-5, rtol=1e-5)
    assert calls() == [("s2o", "bidirectional")] * 2
    assert torch.equal(model(**given).sample, expected)
    assert len(calls()) == 2, "behind the block it is SDPA again"


def test_set_attention_backend_chooses_it_or_another(calls):
    model, given = flux(), inputs()
    expected = model(**given).sample
    with s2o_compile.diffusers.native_attention(EXACT):
        model.set_attention_backend("native")
        torch.testing.assert_close(model(**given).sample, expected, atol=1e-5, rtol=1e-5)
        assert len(calls()) == 2
        model.set_attention_backend("_native_math")
        torch.testing.assert_close(model(**given).sample, expected, atol=1e-5, rtol=1e-5)
        assert len(calls()) == 2
    model.set_attention_backend("native")


def test_a_finite_tau_leaves_keys_out(calls):
    given = tuple(torch.randn(1, 2000, 2, 16, generator=torch.Generator().manual_seed(seed)) for seed in range(3))
    expected = attention_dispatch.dispatch_attention_fn(*given)
    with s2o_compile.diffusers.native_attention(S2OConfig(tau=1e6, min_seq_len=0)):
        output = attention_dispatch.dispatch_attention_fn(*given)
    reference = s2o_compile.attention(*(x.transpose(1, 2) for x in given), config=S2OConfig(tau=1e6, min_seq_len=0))
    assert torch.equal(output, reference.transpose(1, 2))
    assert (output - expected).abs().max() > 1e-3


PADDING = torch.arange(200).expand(2, -1) < torch.tensor([[200], [150]])


@pytest.mark.parametrize(
    ("arguments", "ran"),
    [
        pytest.param({"is_causal": True}, ("s2o", "causal"), id="causal"),
        pytest.param({"attn_mask": PADDING}, ("s2o", "bidirectional, key padding"), id="padding"),
        pytest.param(
            {"attn_mask": torch.where(PADDING, 0.0, -torch.inf)}, ("s2o", "bidirectional, key padding"), id="additive"
        ),
        pytest.param({"attn_mask": PADDING[:, None, None]}, ("s2o", "bidirectional, key padding"), id="rank4"),
        pytest.param({"attn_mask": torch.randn(200, 200)}, ("masked", ""), id="bias"),
        pytest.param({"scale": 0.3, "enable_gqa": True}, ("s2o", "bidirectional"), id="grouped"),
        pytest.param({"dropout_p": 0.0, "scale": -1.0}, ("dense", "bidirectional"), id="negative-scale"),
    ],
)
def test_calls_give_what_native_gives(arguments, ran, calls):
    heads = (4, 2, 2) if "enable_gqa" in arguments else (2, 2, 2)
    given = tuple(torch.randn(2, 200, n, 16, generator=torch.Generator().manual_seed(n)) for n in heads)
    expected = attention_dispatch.dispatch_attention_fn(*given, **arguments)
    with s2o_compile.diffusers.native_attention(EXACT):
        output = attention_dispatch.dispatch_attention_fn(*given, **arguments)
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)
    assert calls() == [ran]


def test_what_only_native_has_is_left_to_it(calls):
    given = tuple(torch.randn(2, 200, 2, 16, generator=torch.Generator().manual_seed(n)) for n in range(3))
    both = {"attn_mask": PADDING[:, None, None], "is_causal": True}  # versions of SDPA differ in what they make of it

    def by_both():
        try:
            return attention_dispatch.dispatch_attention_fn(*given, **both)
        except RuntimeError as refused:
            assert torch_release() >= (2, 14)  # which refuses a mask beside is_causal
            return torch.tensor([*str(refused).encode()])

    expected = by_both()
    with s2o_compile.diffusers.native_attention(EXACT):
        first, second = (attention_dispatch.dispatch_attention_fn(*given, dropout_p=0.5) for _ in range(2))
        assert torch.equal(by_both(), expected)
        with pytest.raises(ValueError, match="return_lse"):
            attention_dispatch.dispatch_attention_fn(*given, attention_kwargs={"return_lse": True})
    assert not torch.equal(first, second)
    assert calls() == []


@pytest.mark.filterwarnings("ignore::s2o_compile.DenseGradientWarning")
def test_training_keeps_its_gradients():
    model, given, gradients = flux(), inputs(), []
    for config in (None, EXACT):
        model.zero_grad()
        if config is None:
            model(**given).sample.square().sum().backward()
        else:
            with s2o_compile.diffusers.native_attention(config):
                model(**given).sample.square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.usefixtures("fresh_dynamo")
def test_a_compiled_model_is_rewritten_inside_the_block_as_outside(calls):
    model, given = flux(), inputs()
    expected = model(**given).sample
    config = S2OConfig(tau=0.0, min_seq_len=0, inner_backend="eager")
    with s2o_compile.diffusers.native_attention(EXACT):
        fast = s2o_compile.optimize(model, config)
        torch.testing.assert_close(fast(**given).sample, expected, atol=1e-5, rtol=1e-5)
    assert calls() == [("s2o", "bidirectional")] * 2


def test_another_dispatcher_is_refused(monkeypatch):
    def other(query, key, value):
        return query

    backends = attention_dispatch._AttentionBackendRegistry._backends
    monkeypatch.setitem(backends, attention_dispatch.AttentionBackendName.NATIVE, other)
    with (
        pytest.raises(ImplementationUnavailableError, match="got its arguments query, key, value"),
        s2o_compile.diffusers.native_attention(),
    ):
        pass
