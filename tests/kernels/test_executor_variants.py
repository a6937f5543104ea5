"""Kinds of attention beyond the plain one, executor by executor: value head dims of their own, capped logits.

The oracle is the reference over the same plan, and the reference's oracle is dense attention in float64.
"""

import dataclasses
import importlib.util
import itertools

import pytest
import torch

from s2o_compile.kernels.impl.torch import blocks as block_attention
from s2o_compile.kernels.impl.torch import exact as torch_exact
from s2o_compile.kernels.impl.torch import forward as torch_forward
from tests.conftest import (
    CUDA,
    INTERPRETED,
    Case,
    assert_close,
    exact_attention,
    on,
)
from tests.helpers.operator_calls import assert_like_definition, define

if importlib.util.find_spec("triton"):
    from s2o_compile.kernels.impl.triton import exact as triton_exact
    from s2o_compile.kernels.impl.triton import forward as triton_forward

needs_triton = [
    pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="needs triton"),
    # Interpreted, log2(0) warns through numpy where a row sees no key; a GPU gives -inf silently.
    pytest.mark.filterwarnings("ignore:divide by zero encountered:RuntimeWarning"),
]
CHUNK_LEN = 128
"""The shortest chunk every launch configuration can visit: a whole number of key blocks."""

RANKED = [
    Case(queries=500, batch=2, heads=4, kv_heads=2, value_dim=40),
    Case(queries=500, head_dim=40, value_dim=64, dtype="fp16"),
    Case(queries=390, head_dim=192, value_dim=128, heads=1, dtype="fp16"),
    Case(queries=500, batch=2, value_dim=16, padding="left", dtype="fp16", layout="transposed"),
    Case(queries=400, keys=300, value_dim=80, causal=False),
    Case(queries=500, batch=2, heads=4, kv_heads=2, softcap=5.0),
    Case(queries=500, softcap=50.0, dtype="fp16"),
    Case(queries=500, batch=2, padding="left", softcap=2.0, dtype="fp16", value_dim=80),
    Case(queries=300, keys=500, causal=False, softcap=5.0, dtype="fp16"),
    Case(queries=390, head_dim=64, value_dim=300, heads=1, dtype="fp16"),
    Case(queries=260, head_dim=512, heads=1, dtype="fp16"),
]
NATURAL = [
    Case(queries=1, value_dim=16),
    Case(queries=300, batch=2, heads=4, kv_heads=2, window=100, value_dim=40, dtype="fp16"),
    Case(queries=200, keys=500, causal=False, head_dim=40, value_dim=128, dtype="fp16"),
    Case(queries=300, batch=2, padding="all", value_dim=16),
    Case(queries=300, batch=2, heads=4, kv_heads=2, window=100, softcap=5.0),
    Case(queries=300, keys=200, padding="left", batch=2, softcap=20.0, dtype="fp16"),
    Case(queries=300, window=100, heads=1, head_dim=40, value_dim=300, dtype="fp16"),
]
RANKED_ON_CUDA = [
    Case(queries=1000, heads=4, kv_heads=4, head_dim=192, value_dim=128, dtype="bf16"),
    Case(queries=1000, heads=4, head_dim=64, value_dim=256, dtype="fp16"),
    Case(queries=1000, heads=4, head_dim=128, softcap=50.0, dtype="bf16"),
    Case(queries=1000, batch=2, padding="left", head_dim=256, softcap=5.0, dtype="bf16"),
    Case(queries=500, softcap=5.0),
    Case(queries=1000, heads=4, head_dim=512, dtype="bf16"),
    Case(queries=1000, batch=2, heads=2, padding="left", head_dim=400, softcap=5.0, dtype="fp16"),
    Case(queries=500, head_dim=64, value_dim=512),
]
NATURAL_ON_CUDA = [
    Case(queries=1000, heads=4, kv_heads=4, head_dim=192, value_dim=128, dtype="bf16", window=300),
    Case(queries=1000, heads=4, head_dim=128, softcap=50.0, dtype="bf16", window=300),
    Case(queries=500, softcap=5.0),
    Case(queries=1000, heads=4, head_dim=512, dtype="bf16"),
    Case(queries=1000, batch=2, heads=2, padding="left", head_dim=400, softcap=5.0, dtype="fp16"),
    Case(queries=500, head_dim=64, value_dim=512),
]


def attend_exact(module, inputs):
    return module.attend_exact(inputs.call)


@pytest.mark.parametrize("case", RANKED, ids=str)
def test_the_definition_is_dense_attention_at_tau_zero(case, build_plan):
    inputs = case.inputs()
    result = define(inputs, build_plan(inputs), 0.0)
    assert_close(result, exact_attention(inputs), inputs, torch.float64)


@pytest.mark.parametrize("path", ["fused", "plain"])
class TestTorch:
    @pytest.fixture(autouse=True)
    def choose(self, path, monkeypatch):
        if path == "plain":
            monkeypatch.setattr(block_attention, "_fused_cpu", None)

    @pytest.mark.parametrize("tau", [0.0, 1.0])
    @pytest.mark.parametrize("case", RANKED, ids=str)
    def test_ranked(self, case, tau, build_plan, poison_empty):
        inputs = case.inputs()
        assert_like_definition(torch_forward, inputs, build_plan(inputs), tau)

    @pytest.mark.parametrize("case", NATURAL, ids=str)
    def test_natural(self, case, poison_empty):
        inputs = case.inputs()
        assert_close(attend_exact(torch_exact, inputs), exact_attention(inputs), inputs)


class TestTriton:
    pytestmark = needs_triton

    @pytest.mark.parametrize(
        ("device", "case", "tau"),
        [
            *on(INTERPRETED, *zip(RANKED, itertools.cycle((0.0, 1.0)))),  # both take seconds
            *on(CUDA, *itertools.product(RANKED_ON_CUDA, (0.0, 1.0))),
        ],
    )
    def test_ranked(self, device, case, tau, build_plan, poison_empty):
        inputs = case.inputs(device)
        assert_like_definition(triton_forward, inputs, build_plan(inputs, chunk_len=CHUNK_LEN), tau)

    @pytest.mark.parametrize(("device", "case"), [*on(INTERPRETED, *NATURAL), *on(CUDA, *NATURAL_ON_CUDA)])
    def test_natural(self, device, case, poison_empty):
        inputs = case.inputs(device)
        assert_close(attend_exact(triton_exact, inputs), exact_attention(inputs), inputs)

    @pytest.mark.parametrize("softcap", [None, 5.0])
    @pytest.mark.parametrize("scale", [0.0, -0.2])
    @pytest.mark.parametrize("device", [INTERPRETED, CUDA])
    def test_natural_with_a_scale_that_is_not_positive(self, device, scale, softcap):
        inputs = Case(queries=200, batch=2, padding="left", dtype="fp16", softcap=softcap).inputs(device)
        inputs = dataclasses.replace(inputs, scale=scale)
        assert_close(attend_exact(triton_exact, inputs), exact_attention(inputs), inputs)

    @pytest.mark.parametrize("softcap", [300.0, 1e6, torch.finfo(torch.float32).max])
    @pytest.mark.parametrize("device", [INTERPRETED, CUDA])
    def test_natural_with_a_large_softcap(self, device, softcap):
        inputs = Case(queries=130, softcap=softcap).inputs(device)
        for large in (1.0, 1e6):  # of queries that a small scale makes small again
            scaled = dataclasses.replace(inputs, query=inputs.query * large, scale=inputs.scale / large)
            assert_close(attend_exact(triton_exact, scaled), exact_attention(scaled), scaled)
