"""S2OConfig(training="sparse") in graphs: attentions whose mask is proven, with the gradient of their sparse forward.

A CPU has no kernel for the backward: there AOTAutograd's graph runs as it is, by flex_attention's own plain formula.
"""

import dataclasses
import re

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager
from torch.nn.functional import scaled_dot_product_attention

import s2o_compile
from s2o_compile import S2OConfig
from s2o_compile.backend import s2o
from s2o_compile.kernels.autograd import plain_attention
from s2o_compile.kernels.impl.flex import training as flex_trained
from s2o_compile.kernels.impl.flex.forward import visible
from s2o_compile.kernels.impl.flex.layout import FlexLayout
from s2o_compile.passes.frontends import training as trained
from s2o_compile.rewriting import rewrite
from tests.conftest import CUDA

BATCH, HEADS, KV_HEADS, LENGTH, DIM, SEGMENT = 2, 4, 2, 700, 16, 128
KEEP = torch.arange(LENGTH) % torch.tensor([[5], [7]]) != 3
CONFIG = S2OConfig(training="sparse", tau=1.0, min_seq_len=0, segment_len=SEGMENT)


def tensors(device="cpu", length=LENGTH, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(BATCH, heads, length, DIM, generator=generator) for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    key[:, :, ::23] *= 4  # few keys matter, so that lists are left early
    return tuple(x.to(device, dtype).requires_grad_() for x in (query, key, value))


def causal(query, key, value):
    return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


def padded(query, key, value):
    i = torch.arange(query.shape[2])
    seen = (i[None] <= i[:, None])[None, None] & KEEP[:, None, None]
    return scaled_dot_product_attention(query, key, value, attn_mask=seen, enable_gqa=True)


def window(query, key, value):
    i = torch.arange(query.shape[2])
    seen = (i[None] <= i[:, None]) & (i[None] > i[:, None] - 100)
    return scaled_dot_product_attention(query, key, value, attn_mask=seen, enable_gqa=True)


def capped(query, key, value):
    """Written by hand, with a softcap."""
    key, value = (x.repeat_interleave(HEADS // KV_HEADS, dim=1) for x in (key, value))
    scores = 20.0 * torch.tanh(query @ key.transpose(-1, -2) * DIM**-0.5 / 20.0)
    hidden = torch.ones(query.shape[2], query.shape[2], dtype=torch.bool).triu(1)
    return scores.masked_fill(hidden, float("-inf")).softmax(-1) @ value


FUNCTIONS = {"causal": causal, "padded": padded, "window": window, "capped": capped}


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


@pytest.fixture
def backward_on_cpu(monkeypatch):
    monkeypatch.setattr(trained, "WITHOUT_BACKWARD", ())


def train(function, config, inputs):
    """Output, gradients and records of a function compiled for training."""
    records = []

    def backend(gm, example_inputs):
        records.extend(rewrite(gm, config))
        return aot_eager(gm, example_inputs)

    output = torch.compile(function, backend=backend, dynamic=False)(*inputs)
    return output, gradients(output, inputs), records


def gradients(output, inputs):
    generator = torch.Generator().manual_seed(2)
    return torch.autograd.grad(output, inputs, torch.randn(output.shape, generator=generator).to(output))


def visited(layout):
    """Bool [B, Hq, Nq, Nk], the keys that each query visits, every one of them once."""
    rows, places = layout.index.shape
    b, h, i, j = (
        torch.arange(size).view([-1 if axis == place else 1 for place in range(4)])
        for axis, size in enumerate((rows, HEADS // KV_HEADS, LENGTH, places))
    )
    seen = visible(b, h, i, j, *layout[1:8])
    count = torch.zeros(rows, HEADS // KV_HEADS, LENGTH, LENGTH, dtype=torch.int32)
    count.scatter_add_(3, layout.index[:, None, None].expand(seen.shape), seen.int())
    assert count.max() == 1
    return count.bool().unflatten(0, (BATCH, KV_HEADS)).flatten(1, 2)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_gradient_is_that_of_the_sparse_forward(name, backward_on_cpu, monkeypatch):
    layouts = []
    place = flex_trained.flex_forward.place
    monkeypatch.setattr(
        flex_trained.flex_forward, "place", lambda *given, **more: layouts.append(place(*given, **more)) or layouts[-1]
    )
    inputs = tensors()
    output, found, records = train(FUNCTIONS[name], CONFIG, inputs)
    assert [(record.rewritten, record.reason) for record in records] == [(True, "")]
    seen = visited(FlexLayout(*layouts[-1]))
    expected = plain_attention(
        *inputs, seen, scale=DIM**-0.5, softcap=20.0 if name == "capped" else None, sinks=None
    )  # fmt: skip
    torch.testing.assert_close(output, expected, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(found, gradients(expected, inputs), atol=2e-5, rtol=1e-4)
    exact = FUNCTIONS[name](*inputs)
    assert output.stride() == exact.stride()
    left_out = (output - exact).norm() / exact.norm()
    assert left_out < 1e-5 if name == "window" else 1e-3 < left_out < 0.1


def test_tau_zero_is_dense_training(backward_on_cpu):
    inputs = tensors()
    output, found, _ = train(causal, dataclasses.replace(CONFIG, tau=0.0), inputs)
    exact = causal(*inputs)
    torch.testing.assert_close(output, exact, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(found, gradients(exact, inputs), atol=2e-5, rtol=1e-4)


def test_dense_heads_and_a_tau_for_each_head_are_kept(backward_on_cpu):
    inputs = tensors()
    site = "scaled_dot_product_attention"
    exact = causal(*inputs)
    for options in ({"dense_heads": {site: (1,)}}, {"site_tau": {site: (1.0, 1.0, 0.0, 0.0)}}):
        output, _, (record,) = train(causal, dataclasses.replace(CONFIG, **options), inputs)
        assert record.rewritten
        difference = (output - exact).abs().amax((0, 2, 3))
        assert difference[2:].max() < 1e-5 < difference[:2].min()


REASONS = {
    "dense": ({"training": "dense"}, r'S2OConfig\(training="sparse"\)'),
    "short": ({"min_seq_len": 1000}, "700 queries and 700 keys are short"),
    "lists": ({"list_per": "head"}, "knows no list_per=head"),
    "order": ({"query_order": "mean_query"}, "knows no query_order=mean_query"),
    "torch": ({"implementation": "torch"}, "knows no implementation=torch"),
}


@pytest.mark.parametrize("name", REASONS)
@pytest.mark.filterwarnings("ignore::s2o_compile.NothingRewrittenWarning")
def test_what_stays_dense_in_training_says_why(name, backward_on_cpu):
    options, reason = REASONS[name]
    inputs = tensors()
    output, found, (record,) = train(causal, dataclasses.replace(CONFIG, **options), inputs)
    assert not record.rewritten
    assert re.search(reason, record.reason)
    exact = causal(*inputs)
    torch.testing.assert_close(output, exact)
    torch.testing.assert_close(found, gradients(exact, inputs))


@pytest.mark.filterwarnings("ignore::s2o_compile.NothingRewrittenWarning")
def test_a_cpu_and_symbolic_lengths_stay_dense(monkeypatch):
    _, _, (record,) = train(causal, CONFIG, tensors())
    assert "no backward on a CPU" in record.reason
    monkeypatch.setattr(trained, "WITHOUT_BACKWARD", ())
    records = []

    def backend(gm, example_inputs):
        records.extend(rewrite(gm, CONFIG))
        return aot_eager(gm, example_inputs)

    torch._dynamo.reset()
    inputs = tensors()
    for x in inputs:
        torch._dynamo.mark_dynamic(x, 2)
    torch.compile(causal, backend=backend)(*inputs)
    assert "its sizes are symbolic" in records[0].reason


@pytest.mark.parametrize("inner_backend", ["inductor", "eager"])
@pytest.mark.parametrize("device", [CUDA])
def test_a_gpu_trains_by_flex_attention(device, inner_backend):
    inputs = tensors(device, length=2048, dtype=torch.bfloat16)
    config = dataclasses.replace(CONFIG, inner_backend=inner_backend)
    options = {f"s2o.{field.name}": getattr(config, field.name) for field in dataclasses.fields(config)}
    with s2o_compile.record() as recording:
        output = torch.compile(causal, backend=s2o, options=options, dynamic=False)(*inputs)
    assert recording.report.sites[0].rewritten
    ours = s2o_compile.attention(*inputs, causal=True, config=CONFIG)
    torch.testing.assert_close(output, ours, atol=1e-2, rtol=2e-2)
    for found, expected in zip(gradients(output, inputs), gradients(ours, inputs), strict=True):
        assert (found - expected).norm() < 1e-2 * expected.norm()
    exact = causal(*inputs)
    assert 1e-3 < (output - exact).norm() / exact.norm() < 0.3
