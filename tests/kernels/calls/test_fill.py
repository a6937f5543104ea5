"""``fill`` of ``s2o::masked_attention``: a finite number in the place of hidden scores, which may hide them or not."""

import math

import pytest
import torch

import s2o_compile
from s2o_compile.kernels import ops
from s2o_compile.kernels.support.errors import S2OError
from s2o_compile.onnx import _masked_attention as outside_torch
from tests.conftest import CUDA

LENGTH = 200


def operands(dtype, factor):
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, LENGTH, 16, generator=generator).unbind(0)
    return (q * factor).to(dtype), (k * factor)[:, :2].to(dtype), v[:, :2].to(dtype)


def masks():
    seen = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    padding = torch.arange(LENGTH) < torch.tensor([[LENGTH], [LENGTH - 40]])
    yield "causal", seen[None, None]
    yield "padded", padding[:, None, None] & padding[:, None, :, None]  # padded queries see no key
    yield "empty", torch.zeros(1, 1, LENGTH, LENGTH, dtype=torch.bool)
    yield "random", torch.rand(2, 4, LENGTH, LENGTH, generator=torch.Generator().manual_seed(1)) > 0.5


MASKS = dict(masks())


def definition(q, k, v, mask, fill, sinks=None):
    q, k, v = q.double(), *(x.double().repeat_interleave(2, 1) for x in (k, v))
    scores = (q @ k.mT / 4).masked_fill(~mask, fill)
    if sinks is not None:
        scores = torch.cat((scores, sinks.double()[None, :, None, None].expand(*scores.shape[:3], 1)), -1)
    return scores.softmax(-1)[..., :LENGTH] @ v


def run(q, k, v, mask, fill, sinks=None):
    with s2o_compile.record() as recording:
        output, _ = torch.ops.s2o.masked_attention(q, k, v, mask, sinks, tau=0.0, min_seq_len=0, fill=fill)
    (call,) = recording.calls
    return output, call.path


@pytest.mark.parametrize("fill", [-1e4, -1e9], ids=["-1e4", "-1e9"])
@pytest.mark.parametrize("factor", [1, 60], ids=["small", "large"])
@pytest.mark.parametrize("name", MASKS)
@torch.no_grad()
def test_it_equals_the_definition(name, factor, fill):
    """Scores of thousands are no smaller than the fill: then the formula runs, with its number."""
    q, k, v = operands(torch.float32, factor)
    output, path = run(q, k, v, MASKS[name], fill)
    torch.testing.assert_close(output.double(), definition(q, k, v, MASKS[name], fill), atol=2e-3, rtol=2e-3)
    hides = fill == -1e9 or factor == 1
    assert path == ("s2o" if hides and name in ("causal", "padded") else "masked")


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["causal", "padded"])
@torch.no_grad()
def test_in_fewer_bits(name, dtype, device):
    q, k, v = (x.to(device) for x in operands(dtype, 1))
    mask = MASKS[name].to(device)
    output, path = run(q, k, v, mask, -1e4)
    exact = definition(q, k, v, mask, -1e4)
    bound = 4 * torch.finfo(dtype).eps * exact.abs().max()
    assert path == "s2o"
    assert (output.double() - exact).abs().max() < bound


@pytest.mark.parametrize("sink", [0.0, -1e4, -math.inf])
@torch.no_grad()
def test_sinks_beside_rows_without_keys(sink):
    """A sink takes the mass of such a row, shares it, or has none."""
    q, k, v = operands(torch.float32, 1)
    sinks = torch.full((4,), sink)
    output, path = run(q, k, v, MASKS["padded"], -1e4, sinks)
    torch.testing.assert_close(output.double(), definition(q, k, v, MASKS["padded"], -1e4, sinks), atol=1e-5, rtol=1e-5)
    assert path == ("s2o" if sink == 0.0 else "masked")


@torch.no_grad()
def test_short_calls_and_other_formats():
    q, k, v = operands(torch.float32, 60)
    exact = definition(q, k, v, MASKS["causal"], -1e4)
    for function in (ops.masked_attention, outside_torch):
        output, _ = function(q, k, v, MASKS["causal"], fill=-1e4)
        torch.testing.assert_close(output.double(), exact, atol=2e-3, rtol=2e-3)


def test_derivatives_pass_it():
    q, k, v = operands(torch.float32, 60)
    tangent = torch.ones_like(q)
    _, got = torch.func.jvp(
        lambda q: torch.ops.s2o.masked_attention(q, k, v, MASKS["causal"], fill=-1e4)[0], (q,), (tangent,)
    )
    _, wanted = torch.func.jvp(lambda q: definition(q, k, v, MASKS["causal"], -1e4), (q,), (tangent,))
    torch.testing.assert_close(got.double(), wanted, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("fill", [-math.inf, math.nan])
def test_it_is_finite(fill):
    q, k, v = operands(torch.float32, 1)
    with pytest.raises(S2OError, match="fill: expected a finite number beside a bool mask"):
        torch.ops.s2o.masked_attention(q, k, v, MASKS["causal"], fill=fill)
    with pytest.raises(S2OError, match="fill: expected a finite number beside a bool mask"):
        torch.ops.s2o.masked_attention(q, k, v, torch.zeros(LENGTH, LENGTH), fill=-1e4)
