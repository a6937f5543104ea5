"""Ranking through unknown functions, by kernels: the weights of ``sample.py``, over rankings of their own."""

import pytest
import torch

pytest.importorskip("triton")

from s2o_compile.kernels.impl.flex import sample as flex_sample
from s2o_compile.kernels.impl.flex import triton_sample
from s2o_compile.kernels.impl.flex.sample import HALF
from tests.conftest import CUDA, INTERPRETED

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of what a GPU gives silently
INF = float("inf")
SHAPES = [(1, 2, 1, 2, 700), (2, 6, 2, 1, 2500), (1, 1, 1, 3, 100)]
IDS = [f"B{b}-H{h}-G{h // kv}-P{p}-N{n}" for b, h, kv, p, n in SHAPES]


def rows(batch, heads, kv_heads, segments, n_keys, device, dtype):
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(batch, heads, segments * 2 * HALF, n_keys, generator=generator)
    logits.masked_fill_(torch.rand(logits.shape, generator=generator) < 0.3, -INF)
    logits[:, :, 3] = -INF  # a row that sees nothing
    candidate = torch.rand(batch, kv_heads, segments, n_keys, generator=generator) < 0.6
    non_finite = torch.zeros(batch, kv_heads, n_keys, dtype=torch.bool)
    return [x.to(device) for x in (logits.to(dtype), candidate, non_finite)]


def check(logits, candidate, non_finite):
    """A ranking holds its candidates first, in the order of their weights; masses are those of its blocks."""
    (kv_heads, segments, n_keys), heads = candidate.shape[1:], logits.shape[1]
    ranked, mass = triton_sample.rank_samples(logits, candidate, non_finite)
    ordered, expected = flex_sample._rank_by_torch(logits.float(), candidate, non_finite)
    assert torch.equal(ranked.sort(-1).values, ordered.sort(-1).values), "a key is lost"
    real = torch.arange(n_keys, device=ranked.device) < candidate.sum(-1, keepdim=True)
    assert torch.equal(candidate.gather(-1, ranked.long()), real), "others stand before candidates"

    hidden = logits == -INF
    weight = logits.double().softmax(-1).nan_to_num(nan=INF)
    weight = weight.masked_fill(non_finite.repeat_interleave(heads // kv_heads, 1)[:, :, None], INF)
    weight = weight.masked_fill(hidden, 0.0).unflatten(2, (segments, HALF, 2)).unflatten(1, (kv_heads, -1))
    score = weight[..., 0, :].sum((2, 4)).gather(-1, ranked.long()).masked_fill(~real, 0.0)
    assert (score[..., 1:] <= score[..., :-1] * 1.01 + 1e-12).all()
    estimating = weight[..., 1, :].gather(-1, ranked.long()[:, :, None, :, None].expand(weight[..., 1, :].shape))
    estimating = torch.nn.functional.pad(estimating.masked_fill(~real[:, :, None, :, None], 0.0), (0, -n_keys % 128))
    estimating = estimating.unflatten(-1, (-1, 128)).sum(-1).flatten(1, 2)
    torch.testing.assert_close(mass.double(), estimating, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mass.sum(-1), expected.sum(-1), atol=1e-4, rtol=1e-4)
    return ranked, mass


@pytest.mark.parametrize("device", [INTERPRETED, CUDA])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["fp16", "fp32"])
@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
def test_the_same_weights(device, dtype, shape, poison_empty):
    _, mass = check(*rows(*shape, device, dtype))
    assert mass.isfinite().all()


@pytest.mark.parametrize("device", [INTERPRETED, CUDA])
def test_tracing_runs_no_kernel(device):
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        torch.ops.s2o.rank_samples.default, rows(*SHAPES[0], device, torch.float32), test_utils=checks
    )


@pytest.mark.parametrize("device", [INTERPRETED, CUDA])
def test_what_is_no_number_ranks_first(device, poison_empty):
    """A key that holds NaN, where it is seen; a row that holds NaN leaves infinitely much."""
    logits, candidate, non_finite = rows(1, 2, 1, 2, 700, device, torch.float32)
    candidate[..., 37:39] = True
    non_finite[..., 37:39] = True
    logits[..., 38] = -INF
    logits[0, 0, 2 * HALF + 1, 50] = torch.nan  # an estimating query of the second segment
    ranked, mass = check(logits, candidate, non_finite)
    assert (ranked[..., 0] == 37).all()
    assert mass[0, 0, 1, 0].isinf().any()
    assert mass[0, 1, 0, :, 1:].isfinite().all()
