"""PBS-Attn as the benchmarks rebuild it, and what they read off two curves."""

import importlib

import pytest
import torch

from benchmarks.pbs_attention import pbs_attention
from tests.conftest import Case, Inputs, bounds, distance, exact_attention

SEGMENT, BLOCK = 256, 128
CASE = Case(batch=2, heads=4, kv_heads=2, queries=1024, head_dim=32)


@pytest.fixture
def fidelity(monkeypatch):
    """The benchmark's own module: scripts import each other from their folder."""
    monkeypatch.syspath_prepend("benchmarks")
    return importlib.import_module("fidelity")


def scattered(heavy, n=1024, dim=16, logit=20.0, seed=0):
    """Keys at the positions ``heavy`` get this logit from every query, all others 0."""
    key = torch.zeros(1, 1, n, dim)
    key[0, 0, heavy, 0] = logit * dim**0.5
    query = torch.zeros(1, 1, n, dim)
    query[..., 0] = 1.0
    return query, key, torch.randn(1, 1, n, dim, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_all_blocks_are_dense_attention(dtype):
    inputs = CASE.inputs()
    inputs = inputs if dtype == "fp32" else inputs.to(torch.bfloat16)
    output, density = pbs_attention(*inputs.tensors, threshold=1.0)
    assert output.dtype == inputs.query.dtype
    assert distance(output, exact_attention(inputs)[0]) <= bounds(inputs)[0]
    segments = CASE.queries // SEGMENT
    assert density.tolist() == [pytest.approx(segments * (segments + 1) * SEGMENT**2 / 1024 / 1025)] * CASE.heads


def test_scattered_keys_share_a_block():
    """Every second key of segments 0 and 1 is heavy, but for key 0's neighbours: a block of each segment, permuted."""
    odd = torch.arange(1, 2 * SEGMENT, 2)
    query, key, value = scattered(odd)
    output, density = pbs_attention(query, key, value, threshold=0.9)
    # Own segment; that block of each earlier segment; the block of key 0, an even one.
    blocks = [2, 2, 2 + 1 + 1, 2 + 1 + 1, *[2 + 2 + 1] * 4]
    assert density.item() == sum(blocks) * BLOCK**2 / (1024 * 1025 / 2)

    position = torch.arange(1024)
    own = position[:, None] // SEGMENT == position // SEGMENT
    seen = own | (position < SEGMENT) | torch.isin(position, odd)
    seen &= position <= position[:, None]
    logits = (query @ key.mT).double() * query.shape[3] ** -0.5
    expected = logits.masked_fill(~seen, -torch.inf).softmax(-1) @ value.double()
    limit, _ = bounds(Inputs(query, key, value, CASE.inputs().mask, query.shape[3] ** -0.5))
    assert distance(output, expected) <= limit


def test_a_higher_threshold_computes_more_and_errs_less():
    inputs = CASE.inputs()
    exact = exact_attention(inputs)[0]
    found = [pbs_attention(*inputs.tensors, threshold=threshold) for threshold in (0.1, 0.5, 0.9, 1.0)]
    densities = [density.mean().item() for _, density in found]
    errors = [(output - exact).norm().item() for output, _ in found]
    assert densities == sorted(densities)
    assert len(set(densities)) == 4
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("first", [1, 127, 300, 1023])
def test_no_query_sees_later_values(first):
    """Queries and keys of the end decide which blocks are computed; values do not."""
    query, key, value = CASE.inputs().tensors
    before, _ = pbs_attention(query, key, value, threshold=0.5)
    changed = value.clone()
    changed[:, :, first:] += 1.0
    after, _ = pbs_attention(query, key, changed, threshold=0.5)
    same = (before == after).all(-1)
    assert same[:, :, :first].all()
    assert not same[:, :, first:].any()


@pytest.mark.parametrize(
    ("tokens", "threshold", "message"), [(1000, 0.5, "1000 queries"), (1024, 0.0, "got 0"), (1024, 1.5, "got 1.5")]
)
def test_what_it_cannot_do_is_an_error(tokens, threshold, message):
    tensors = (x[:, :, :tokens] for x in CASE.inputs().tensors)
    with pytest.raises(ValueError, match=message):
        pbs_attention(*tensors, threshold=threshold)


class TestComparison:
    """Of curves on which the MSE falls with the square of the density, and all heads are alike."""

    @staticmethod
    def power_law(factor, densities):
        """Errors and densities [settings, 3 heads] with MSE = factor * density^-2."""
        densities = torch.tensor(densities, dtype=torch.float64)[:, None].expand(-1, 3)
        return (factor**0.5 / densities, densities)

    def test_ratios(self, fidelity):
        row = fidelity.compare(self.power_law(4, [0.8, 0.3, 0.06]), self.power_law(1, [0.02, 0.2, 0.9]), 0.25)
        assert row == {
            "PBS-Attn MSE": 64.0,
            "S2O MSE": 16.0,
            "MSE ratio": 4.0,
            "S2O density": 0.125,
            "density ratio": 2.0,
        }

    @pytest.mark.parametrize("densities", [[0.3, 0.8], [0.02, 0.2]])
    def test_nothing_is_read_beyond_a_curve(self, fidelity, densities):
        with pytest.raises(ValueError, match=r"got 0\.25"):
            fidelity.compare(self.power_law(4, densities), self.power_law(1, [0.02, 0.9]), 0.25)

    def test_a_sparsest_setting_that_is_better_gives_a_bound(self, fidelity):
        row = fidelity.compare(self.power_law(4, [0.1, 0.5]), self.power_law(1, [0.2, 0.9]), 0.25)
        assert row["S2O MSE"] == 16.0
        assert row["S2O density"] == 0.2
        assert row["density ratio"] == 1.25

    def test_a_setting_that_was_not_measured_is_no_bound(self, fidelity):
        """Beyond the dense end of the curve, S2O might need any density."""
        with pytest.raises(ValueError, match="Extend the settings"):
            fidelity.compare(self.power_law(0.1, [0.1, 0.5]), self.power_law(1, [0.1, 0.5]), 0.25)

    def test_mse_is_the_mean_of_squares(self, fidelity):
        """Not the square of the mean: a head that is far off counts for what it is."""
        errors = torch.tensor([[0.0, 0.1], [0.0, 0.2], [0.0, 0.4]], dtype=torch.float64)
        densities = torch.tensor([[0.7, 0.9], [0.3, 0.5], [0.1, 0.1]], dtype=torch.float64)
        row = fidelity.compare((errors, densities), (errors, densities), 0.4)
        assert row["PBS-Attn MSE"] == row["S2O MSE"] == 0.02
        assert row["S2O density"] == 0.4
