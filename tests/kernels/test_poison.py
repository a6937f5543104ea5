"""NaN, inf and rows that see no key, through ``s2o::attention``."""

import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from s2o_compile.kernels.core.plan import TILE_LEN
from s2o_compile.kernels.statistics import record_calls
from tests.conftest import Case, exact_attention
from tests.helpers.operator_calls import DEVICES, call

LENGTH, UNIMPORTANT, IMPORTANT = 3072, 700, 701


@pytest.fixture(scope="module")
def peaked():
    """Attention that stops early; every query dislikes key UNIMPORTANT and likes key IMPORTANT."""
    inputs = Case(queries=LENGTH, heads=2).inputs(heavy=64)
    direction = torch.nn.functional.normalize(inputs.query.mean((0, 1, 2)), dim=0)
    inputs.key[0, 0, UNIMPORTANT] = -2 * direction
    inputs.key[0, 0, IMPORTANT] = 8 * direction
    return inputs


class TestPoison:
    """NaN and inf travel as they do through SDPA, also where the tile would have stopped before meeting them."""

    def run(self, inputs, **options):
        with record_calls() as calls:
            output, lse = call(inputs, tau=1.0, return_lse=True, **options)
        return output, lse, calls[0]

    def non_finite(self, inputs, name, position, dim, number):
        changed = {"query": inputs.query.clone(), "key": inputs.key.clone(), "value": inputs.value.clone()}
        changed[name][0, :, position, dim] = number
        return type(inputs)(*changed.values(), inputs.mask, inputs.scale)

    def test_the_example_stops_early(self, peaked):
        output, _, statistics = self.run(peaked)
        assert statistics.path == "s2o"
        assert statistics.density < 0.6
        assert output.isfinite().all()
        probability = (peaked.query[0] @ peaked.key[0, 0].T * peaked.scale).softmax(-1)
        assert probability[..., UNIMPORTANT].max() < 1 / LENGTH < probability[..., IMPORTANT].min()

    @pytest.mark.parametrize("ranking", ["per_query", "mean_query"])
    @pytest.mark.parametrize(
        ("name", "position", "number"),
        [
            ("key", UNIMPORTANT, math.nan),
            ("key", UNIMPORTANT, math.inf),
            ("key", UNIMPORTANT, -math.inf),
            ("key", IMPORTANT, math.nan),
            ("value", UNIMPORTANT, math.nan),
            ("value", IMPORTANT, math.nan),
            ("value", IMPORTANT, math.inf),
            ("value", IMPORTANT, -math.inf),
        ],
    )
    def test_rows_that_see_a_non_finite_key(self, peaked, name, position, number, ranking):
        inputs = self.non_finite(peaked, name, position, 3, number)
        output, _, statistics = self.run(inputs, ranking=ranking)
        group = inputs.query.shape[1]
        key, value = (x.repeat_interleave(group, dim=1) for x in (inputs.key, inputs.value))
        expected = scaled_dot_product_attention(inputs.query, key, value, is_causal=True)
        seeing = slice(position, None)
        assert not expected[:, :, seeing].isfinite().all()
        assert torch.equal(output[:, :, seeing].isnan(), expected[:, :, seeing].isnan())
        assert torch.equal(output[:, :, seeing].isinf(), expected[:, :, seeing].isinf())
        assert statistics.path == "s2o"

    @pytest.mark.parametrize("name", ["key", "value"])
    def test_segments_before_the_non_finite_key_stay_finite(self, peaked, name):
        """Inside its own segment weight zero times NaN is NaN, as in SDPA's own blocks."""
        output, lse, _ = self.run(self.non_finite(peaked, name, 1500, 3, math.nan), segment_len=128)
        before = 1500 // 128 * 128
        assert output[:, :, :before].isfinite().all()
        assert lse[:, :, :before].isfinite().all()

    @pytest.mark.parametrize("number", [math.nan, math.inf])
    def test_a_non_finite_query_spoils_its_own_row_only(self, peaked, number):
        inputs = self.non_finite(peaked, "query", 2000, 3, number)
        output, lse, statistics = self.run(inputs)
        rows = output.isnan().any(-1)
        assert rows[:, :, 2000].all()
        assert rows.sum().item() == rows[:, :, 2000].numel()
        assert (~lse.isfinite()).sum().item() == rows.sum().item()
        assert statistics.density < 0.6 + 2 * TILE_LEN / LENGTH * 2  # its tile may walk to the end, no other

    @pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
    @pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning")
    @pytest.mark.filterwarnings("ignore:divide by zero encountered:RuntimeWarning")
    @pytest.mark.parametrize("device", DEVICES)
    @pytest.mark.parametrize(("name", "position"), [("key", 40), ("value", 41), ("query", 200)])
    def test_triton_agrees_with_torch(self, name, position, device):
        if device == "cpu" and torch.cuda.is_available():
            pytest.skip("kernels are compiled where there is a GPU")
        inputs = self.non_finite(Case(queries=300, dtype="fp16").inputs(device), name, position, 3, math.nan)
        ours = call(inputs, tau=1.0, implementation="triton", segment_len=128)[0].isnan()
        theirs = call(inputs, tau=1.0, implementation="torch", segment_len=128)[0].isnan()
        seeing = slice(128, None)
        assert theirs[:, :, seeing].any()
        assert torch.equal(ours[:, :, seeing], theirs[:, :, seeing])


class TestHiddenKeys:
    """What hidden keys and values hold changes no bit, also where the rest is ranked and left out."""

    @pytest.mark.parametrize("implementation", ["auto", "torch"])
    @pytest.mark.parametrize("number", [3.0, 1e4, math.nan])
    @pytest.mark.parametrize(
        "case",
        [
            Case(queries=700, batch=2, padding="left"),
            Case(queries=700, batch=2, padding="left", window=200),
            Case(queries=700, batch=2, padding="right", causal=False),
            Case(queries=500, keys=1400, offset=0),
            Case(queries=500, keys=1400, offset=200, batch=2, padding="left"),
        ],
        ids=str,
    )
    def test_they_change_no_bit(self, case, number, implementation):
        inputs = case.inputs(heavy=64)
        last = case.queries - 1 + case.causal_offset if case.causal else case.n_keys - 1
        hidden = (torch.arange(case.n_keys) > last).expand(case.batch, -1)
        if inputs.mask.key_mask is not None:
            hidden = hidden | ~inputs.mask.key_mask
        noise = torch.randn(2, *inputs.key.shape, generator=torch.Generator().manual_seed(0)) * number
        changed = [
            torch.where(hidden[:, None, :, None], new, x) for new, x in zip(noise, inputs.tensors[1:], strict=True)
        ]
        options = {"tau": 0.5, "segment_len": 128, "return_lse": True, "implementation": implementation}
        expected = call(inputs, **options)
        found = call(type(inputs)(inputs.query, *changed, inputs.mask, inputs.scale), **options)
        assert hidden.any()
        assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


class TestBlindRows:
    @pytest.mark.parametrize("options", [{}, {"tau": 1.0}, {"min_seq_len": 10**6}], ids=["exact", "s2o", "dense"])
    @pytest.mark.parametrize(
        "case",
        [
            Case(queries=400, keys=150),
            Case(queries=300, batch=2, padding="all"),
            Case(queries=300, batch=2, padding="left"),
            Case(queries=300, batch=2, padding="left", window=20),
        ],
        ids=str,
    )
    def test_a_query_that_sees_no_key_gives_zeros(self, case, options):
        inputs = case.inputs()
        output, lse = call(inputs, return_lse=True, **options)
        fully_masked = exact_attention(inputs)[1] == float("-inf")
        assert fully_masked.any()
        for result in (output, call(inputs, **options)[0]):
            assert (result[fully_masked] == 0).all()
            assert result.isfinite().all()
        assert (lse[fully_masked] == float("-inf")).all()
        assert lse[~fully_masked].isfinite().all()
