"""Exact attention in C++: every visible key under every mask, and the rows that measure an error."""

import dataclasses

import pytest
import torch

from s2o_compile.kernels.exact import sampled
from s2o_compile.kernels.impl.cpp import exact
from s2o_compile.kernels.support import cpp_library
from tests.conftest import Case, assert_close, exact_attention
from tests.kernels.exact.test_sampled import CASES, make_call
from tests.kernels.impl.torch.test_forward import UNWINDOWED, WINDOWED, position_counts
from tests.kernels.test_executor_variants import NATURAL

pytestmark = pytest.mark.skipif(bool(cpp_library.why_not()), reason="needs a C++ compiler")


@pytest.mark.parametrize("case", [*WINDOWED, *UNWINDOWED, *NATURAL], ids=str)
def test_equals_dense_attention(case, poison_empty):
    inputs = case.inputs()
    actual = exact.attend_exact(inputs.call)
    assert actual.output.dtype == inputs.query.dtype
    assert_close(actual, exact_attention(inputs), inputs)
    assert (actual.computed == torch.tensor(position_counts(inputs))).all()


def test_equals_dense_attention_in_chunks():
    padded = Case(queries=500, batch=2, heads=4, kv_heads=2, padding="left").inputs()
    mask = dataclasses.replace(padded.mask, attention_chunk=150)
    inputs = dataclasses.replace(padded, mask=mask)
    assert_close(exact.attend_exact(inputs.call), exact_attention(inputs), inputs)


@pytest.mark.parametrize("scale", [0.0, -0.1])
def test_a_scale_may_be_anything(scale):
    inputs = dataclasses.replace(Case(queries=300, heads=4, kv_heads=2).inputs(), scale=scale)
    assert_close(exact.attend_exact(inputs.call), exact_attention(inputs), inputs)


@pytest.mark.parametrize("softcap", [1e6, torch.finfo(torch.float32).max])
def test_a_softcap_may_be_large(softcap):
    inputs = Case(queries=130, softcap=softcap).inputs()
    for large in (1.0, 1e6):  # of queries that a small scale makes small again
        scaled = dataclasses.replace(inputs, query=inputs.query * large, scale=inputs.scale / large)
        assert_close(exact.attend_exact(scaled.call), exact_attention(scaled), scaled)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("count", [50, 200])
def test_sampled_rows(name, count):
    call = make_call(**CASES[name])
    expected, found = sampled.attend_rows(call, count), exact.attend_rows(call, count)
    assert torch.equal(found.rows, expected.rows)
    torch.testing.assert_close(found.output, expected.output, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.lse, expected.lse, rtol=1e-5, atol=1e-5)


def test_sampled_rows_in_bfloat16_are_float32():
    call = make_call(causal=True, dtype=torch.bfloat16)
    expected, found = sampled.attend_rows(call, 90), exact.attend_rows(call, 90)
    assert found.output.dtype == torch.float32
    # Weights are rounded where products are those of bfloat16.
    assert (found.output - expected.output).norm() <= 2 * torch.finfo(torch.bfloat16).eps * expected.output.norm()
    torch.testing.assert_close(found.lse, expected.lse, rtol=1e-5, atol=1e-5)


def test_a_value_that_is_not_finite_reaches_those_who_see_it():
    inputs = Case(queries=300, heads=2, kv_heads=1, window=50).inputs()
    inputs.value[0, 0, 132, 3] = float("inf")
    output = exact.attend_exact(inputs.call).output
    seen = ~output[..., 3].isfinite()
    assert seen[..., 132:182].all()
    assert not seen[..., :132].any()
    assert not seen[..., 182:].any()
    assert output[..., :3].isfinite().all()
