"""The basis of a ranking: a least-squares factorisation that a rotation of q and k does not change."""

import pytest
import torch

from s2o_compile.cli.tune import add_topics
from s2o_compile.kernels.core.call import AttentionCall
from s2o_compile.kernels.core.options import OperatorOptions
from s2o_compile.kernels.impl.torch import forward as torch_forward
from s2o_compile.kernels.planner import build_plan
from s2o_compile.kernels.ranking.basis import choose_basis, half_steps, project

try:
    from s2o_compile.kernels.impl.triton import forward as triton_forward
except ImportError:
    triton_forward = None

EXECUTORS = {"torch": torch_forward, "triton": triton_forward}
HEADS, KV_HEADS, LENGTH, HEAD_DIM = 4, 2, 2048, 64


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(3)


def topical(generator, head_dim=HEAD_DIM):
    query, key, value = (torch.randn(1, h, LENGTH, head_dim, generator=generator) for h in (HEADS, KV_HEADS, KV_HEADS))
    add_topics(query, key, generator)
    return query, key, value


def rotation(generator, size=HEAD_DIM):
    return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0].float()


def logits_by(query, key, count):
    """The logits by ``count`` directions, without what is the same for all keys of a row."""
    basis = choose_basis(query, key, count)
    group = query.shape[1] // key.shape[1]
    logits = project(query, basis.query) @ project(key, basis.key).repeat_interleave(group, 1).transpose(-1, -2)
    return logits - logits.mean(-1, keepdim=True)


def test_logits_of_few_directions_are_found_in_any_basis(generator):
    """12 directions hold nearly all that q and k have in common; 15 numbers a row give their logits, rotated or not."""
    shared = torch.randn(12, HEAD_DIM, generator=generator)
    query, key = (
        torch.randn(1, h, LENGTH, 12, generator=generator) @ shared
        + 0.1 * torch.randn(1, h, LENGTH, HEAD_DIM, generator=generator)
        for h in (HEADS, KV_HEADS)
    )
    turn = rotation(generator)
    exact = query @ key.repeat_interleave(HEADS // KV_HEADS, 1).transpose(-1, -2)
    exact = exact - exact.mean(-1, keepdim=True)
    for actual in (logits_by(query, key, 15), logits_by(query @ turn, key @ turn, 15)):
        assert (actual - exact).norm() <= 0.02 * exact.norm()


@pytest.mark.parametrize(
    ("head_dim", "device", "dtype"),
    [
        (64, "cpu", torch.float32),
        (128, "cpu", torch.float32),
        (256, "cpu", torch.float32),
        *(pytest.param(dim, "cuda", torch.bfloat16, marks=pytest.mark.gpu) for dim in (64, 128, 256)),
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_a_rotation_costs_no_density(seed, head_dim, device, dtype):
    """Coordinates alone cost 1.2 times the density, or the error that the larger density should have saved."""
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (x.to(device) for x in topical(generator, head_dim))
    turn = rotation(generator, head_dim).to(device)
    exact = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

    implementation = "torch" if device == "cpu" else "triton"

    def run(*tensors):
        call = AttentionCall.of(*(x.to(dtype) for x in tensors), causal=True).for_kernels()
        result = EXECUTORS[implementation].attend(call, build_plan(call, OperatorOptions(), implementation), 0.5)
        return result.computed.sum().item(), ((result.output.float() - exact).norm() / exact.norm()).item()

    (density, error), (turned_density, turned_error) = run(query, key, value), run(query @ turn, key @ turn, value)
    assert turned_density <= 1.03 * density
    assert turned_error <= 1.1 * max(error, 0.005)  # heads of 256 find their topics so well that little is left


def test_the_whole_head_needs_no_step_and_changes_nothing(generator):
    query, key, _ = topical(generator)
    assert half_steps(HEAD_DIM, HEAD_DIM) == 0
    basis = choose_basis(query, key, HEAD_DIM)
    group = HEADS // KV_HEADS
    actual = project(query, basis.query) @ project(key, basis.key).repeat_interleave(group, 1).transpose(-1, -2)
    torch.testing.assert_close(actual, query @ key.repeat_interleave(group, 1).transpose(-1, -2), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("count", [1, 15, 31, 62])
@pytest.mark.parametrize("kind", ["identical keys", "zeros", "one sample", "huge", "not finite"])
def test_degenerate_inputs_give_finite_factors(kind, count, generator):
    query, key, _ = topical(generator)
    if kind == "identical keys":
        key = key[:, :, :1].expand_as(key)
    elif kind == "zeros":
        query, key = torch.zeros_like(query), torch.zeros_like(key)
    elif kind == "one sample":
        query, key = query[:, :, :8], key[:, :, :8]
    elif kind == "huge":
        query, key = query * 1e15, key * 1e15
        key[..., 5] *= 1e10  # its power overflows
    else:
        query[0, 0, ::8, 3], key[0, 0, 8] = torch.nan, torch.inf
    assert all(x.isfinite().all() for x in choose_basis(query, key, count))
