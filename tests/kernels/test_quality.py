"""Early stopping saves what it should and loses what it may; both limits follow from how the inputs are made."""

import functools
import math

import pytest
import torch

from s2o_compile.kernels.core.mask import AttentionMask
from s2o_compile.kernels.core.options import RANKINGS
from s2o_compile.kernels.core.plan import TILE_LEN
from s2o_compile.kernels.statistics import record_calls
from tests.conftest import Inputs, bounds, dense_area, exact_attention

LENGTH, SEGMENT, CHUNK, HEAVY, DIM, TAU = 4096, 512, 256, 64, 64, 0.6


@functools.cache
def two_weights(heavy_weight, heavy=HEAVY):
    """Softmax weight ``heavy_weight`` for ``heavy`` random keys of the first segment and 1 for every other key."""
    generator = torch.Generator().manual_seed(0)
    key = torch.zeros(1, 1, LENGTH, DIM)
    key[0, 0, torch.randperm(SEGMENT, generator=generator)[:heavy], 0] = math.log(heavy_weight)
    query = torch.zeros(1, 2, LENGTH, DIM)
    query[..., 0] = 1.0
    value = torch.randn(1, 1, LENGTH, DIM, generator=torch.Generator().manual_seed(1))
    return Inputs(query, key, value, AttentionMask(causal=True), 1.0)


@functools.cache
def exact(heavy_weight):
    """Exact attention and the error bounds."""
    inputs = two_weights(heavy_weight)
    return *exact_attention(inputs), *bounds(inputs)


def run(inputs, **options):
    given = {"causal": True, "scale": inputs.scale, "return_lse": True, "min_seq_len": 0, "segment_len": SEGMENT}
    with record_calls() as calls:
        output, lse = torch.ops.s2o.attention(*inputs.tensors, **given, **options)
    assert calls[0].path == "s2o"
    return output, lse, calls[0].density


class TestFewKeysCarryTheMass:
    weight = 1000.0
    """64 keys of weight 1000 against at most 4032 of weight 1."""

    @property
    def lost_share(self):
        """Share of the mass, by row, that two visited chunks leave out; those keys weigh 1 each."""
        row = torch.arange(LENGTH)
        left_out = (row // SEGMENT * SEGMENT - 2 * CHUNK).clamp(min=0)
        return left_out / (HEAVY * self.weight + row + 1 - HEAVY)

    @property
    def spread(self):
        """A weighted mean that loses a share of its mass moves by at most this times the share."""
        value = two_weights(self.weight).value
        return value.max() - value.min()

    @pytest.mark.parametrize("ranking", RANKINGS)
    def test_two_chunks_are_enough(self, ranking):
        inputs = two_weights(self.weight)
        output, lse, density = run(inputs, tau=TAU, ranking=ranking)

        # The first chunk's gain is not used, and it holds all heavy keys. So the second brings CHUNK of weight 1: there
        # the rule stops everywhere.
        assert math.log(2) > TAU
        assert CHUNK / (HEAVY * self.weight + CHUNK) * (LENGTH - SEGMENT - 2 * CHUNK) / CHUNK < TAU
        pairs = 0
        for first in range(0, LENGTH, TILE_LEN):
            start = first // SEGMENT * SEGMENT
            own = first + TILE_LEN - start
            pairs += TILE_LEN * (own + min(start, 2 * CHUNK))
        assert density == pytest.approx(pairs * 2 / dense_area(inputs))
        assert density < 0.6

        expected, expected_lse, limit, lse_limit = exact(self.weight)
        error = (output - expected).abs().amax(-1)
        assert (error <= self.lost_share * self.spread + limit).all()
        # The tail counts some of what is left out, and no more than that.
        assert (lse - expected_lse - torch.log1p(-self.lost_share) >= -lse_limit).all()
        assert (lse - expected_lse <= lse_limit).all()
        stopped = self.lost_share > 0
        assert (lse - expected_lse - torch.log1p(-self.lost_share))[..., stopped].min() > 0

    def test_missing_half_of_the_heavy_keys_would_show(self):
        expected, _, limit, _ = exact(self.weight)
        output, _, _ = run(two_weights(self.weight, HEAVY // 2), tau=TAU)
        error = (output - expected).abs().amax(-1)
        assert (error > self.lost_share * self.spread + limit)[:, :, SEGMENT : 4 * SEGMENT].all()


class TestFlatAttention:
    """Where all keys weigh the same, the rule's promise can be checked: less than tau of all mass is left unvisited."""

    @pytest.mark.parametrize("tau", [0.1, 0.5, 2.0])
    def test_unvisited_mass_stays_below_tau(self, tau):
        inputs = two_weights(1.0)
        _, lse, _ = run(inputs, tau=tau)
        left = 1 - (lse - exact(1.0)[1]).exp()
        assert exact(1.0)[3] < left.max() < tau

    def test_smaller_tau_costs_more(self):
        inputs = two_weights(1.0)
        densities = [run(inputs, tau=tau)[2] for tau in (0.0, 0.1, 0.5, 2.0)]
        assert densities == sorted(set(densities), reverse=True)
        assert densities[0] > 1 > densities[-1]
