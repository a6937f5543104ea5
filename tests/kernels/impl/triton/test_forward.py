"""The Triton kernels, interpreted on the CPU, compiled under ``-m gpu``: the reference's results over the same plan.

The interpreter cannot multiply bfloat16 (it keeps the bits as integers): that dtype is tested on the GPU only.
"""

import dataclasses
import itertools

import pytest
import torch

pytest.importorskip("triton")

from s2o_compile.kernels import planner
from s2o_compile.kernels.core.options import RANKING_PER
from s2o_compile.kernels.core.plan import TILE_LEN, prefix_mask
from s2o_compile.kernels.impl.triton import basis as triton_basis
from s2o_compile.kernels.impl.triton import exact as triton_exact
from s2o_compile.kernels.impl.triton import forward as triton_forward
from s2o_compile.kernels.impl.triton import rank_per_query as triton_ranking
from s2o_compile.kernels.ranking import basis as ranking_basis
from s2o_compile.kernels.ranking import mean_query as ranking_mean_query
from s2o_compile.kernels.ranking import per_query as ranking_per_query
from tests.conftest import (
    CUDA,
    INTERPRETED,
    Case,
    Inputs,
    assert_close,
    exact_attention,
    on,
    score_all,
    visible_pairs,
)
from tests.helpers.operator_calls import assert_like_definition

# Interpreted, log2(0) warns through numpy where a row sees no key; a GPU gives -inf silently.
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero encountered:RuntimeWarning")

CHUNK_LEN = 128
"""The shortest chunk every launch configuration can visit: a whole number of key blocks."""


RANKED = [
    *on(
        INTERPRETED,
        (Case(queries=1), 0.0),
        (Case(queries=127, dtype="fp16"), 0.0),
        (Case(queries=390, batch=2, heads=4, kv_heads=2), 0.0),
        (Case(queries=500, batch=2, heads=4, kv_heads=2), 1.5),
        (Case(queries=700, dtype="fp16"), 0.5),
        (Case(queries=700, head_dim=80, dtype="fp16"), 0.5),
        (Case(queries=520, head_dim=96, heads=1, dtype="fp16"), 0.0),
        (Case(queries=520, head_dim=128, heads=1, dtype="fp16"), 1.5),
        (Case(queries=390, head_dim=256, heads=1, dtype="fp16"), 0.5),
        (Case(queries=200, keys=700, dtype="fp16"), 1.5),
        (Case(queries=700, keys=300, dtype="fp16"), 0.0),
        (Case(queries=300, keys=600, offset=0, dtype="fp16"), 0.0),
        (Case(queries=300, offset=77, dtype="fp16"), 0.0),
        (Case(queries=500, causal=False, dtype="fp16"), 0.5),
        (Case(queries=200, keys=500, causal=False, dtype="fp16"), 0.0),
        (Case(queries=200, keys=500, causal=False), 1.5),
        (Case(queries=500, batch=2, padding="left", dtype="fp16"), 1.5),
        (Case(queries=500, batch=2, padding="right", dtype="fp16"), 0.0),
        (Case(queries=400, batch=2, padding="all", causal=False, dtype="fp16"), 0.5),
        (Case(queries=400, heads=4, kv_heads=2, layout="transposed", dtype="fp16"), 1.5),
        (Case(queries=400, heads=4, kv_heads=2, layout="packed", dtype="fp16"), 1.5),
    ),
    *on(
        CUDA,
        (Case(queries=1, batch=2, dtype="bf16"), 0.0),
        (Case(queries=127, batch=2), 0.0),
        (Case(queries=1000, batch=2, heads=4, kv_heads=2, head_dim=128, dtype="bf16"), 1.0),
        (Case(queries=1000, batch=2, heads=4, kv_heads=4, head_dim=80, dtype="fp16"), 0.5),
        (Case(queries=1000, heads=4, head_dim=96, dtype="bf16"), 0.5),
        (Case(queries=1000, head_dim=256, dtype="bf16"), 0.5),
        (Case(queries=4097, batch=2, head_dim=64, dtype="bf16"), 1.0),
        (Case(queries=4097, head_dim=128, dtype="fp16", layout="packed"), 0.0),
        (Case(queries=1000, keys=4097, head_dim=128, dtype="bf16"), 1.0),
        (Case(queries=1000, causal=False, batch=2, padding="left", head_dim=64, dtype="bf16"), 0.5),
        (Case(queries=1000, batch=2, padding="all", head_dim=64, dtype="fp16", layout="transposed"), 0.5),
    ),
]
PERMUTED = [
    *on(
        INTERPRETED,
        (Case(queries=390, heads=4, kv_heads=2), 0.0),
        (Case(queries=500, causal=False, dtype="fp16"), 0.5),
        (Case(queries=400, batch=2, padding="left", dtype="fp16"), 1.5),
        (Case(queries=500, keys=300, dtype="fp16"), 0.0),
    ),
    *on(CUDA, (Case(queries=1000, batch=2, heads=4, kv_heads=2, dtype="bf16"), 1.0)),
]
NATURAL = [
    *on(
        INTERPRETED,
        Case(queries=1, window=1),
        Case(queries=127, window=50, dtype="fp16"),
        Case(queries=260, batch=2, heads=4, kv_heads=2, window=100, dtype="fp16"),
        Case(queries=400, window=1),
        Case(queries=600, window=129, head_dim=80, dtype="fp16"),
        Case(queries=600, window=257, head_dim=128, heads=1, dtype="fp16"),
        Case(queries=200, keys=600, window=200, dtype="fp16"),
        Case(queries=600, keys=200, window=150, dtype="fp16"),
        Case(queries=500, batch=2, window=200, padding="left", dtype="fp16"),
        Case(queries=300, batch=2, window=100, padding="all", dtype="fp16"),
        Case(queries=400, heads=4, kv_heads=2, window=200, layout="packed", dtype="fp16"),
        Case(queries=400, dtype="fp16"),
        Case(queries=200, keys=500, causal=False, dtype="fp16"),
        Case(queries=300, keys=100, dtype="fp16"),
    ),
    *on(
        CUDA,
        Case(queries=127, batch=2, window=50),
        Case(queries=4097, batch=2, heads=4, kv_heads=2, head_dim=128, window=1000, dtype="bf16"),
        Case(queries=1000, head_dim=80, window=129, dtype="fp16", padding="left", batch=2),
        Case(queries=1000, keys=4097, head_dim=256, dtype="bf16"),
        Case(queries=1000, keys=300, head_dim=96, causal=False, dtype="bf16"),
    ),
]
ROWS = (ranking_per_query.ROWS, 256)
SCORED_INTERPRETED = [
    Case(queries=390, batch=2, heads=4, kv_heads=2, dtype="fp16"),
    Case(queries=300, keys=700, head_dim=128),
    Case(queries=500, keys=300, head_dim=80, dtype="fp16"),
    Case(queries=600, causal=False, dtype="fp16"),
    Case(queries=200, keys=600, causal=False, dtype="fp16"),
    Case(queries=600, batch=2, padding="left", dtype="fp16"),
]
SCORED_ON_CUDA = [
    Case(queries=4097, batch=2, heads=4, kv_heads=2, head_dim=128, dtype="bf16"),
    Case(queries=1000, causal=False, padding="right", dtype="fp16"),
    Case(queries=1000, keys=4097, head_dim=256),
]
SCORED = [*on(INTERPRETED, *SCORED_INTERPRETED), *on(CUDA, *SCORED_ON_CUDA)]


class TestRanked:
    @pytest.mark.parametrize(("device", "case", "tau"), RANKED)
    def test_equals_definition(self, device, case, tau, build_plan, poison_empty):
        inputs = case.inputs(device)
        assert_like_definition(triton_forward, inputs, build_plan(inputs, chunk_len=CHUNK_LEN), tau)

    @pytest.mark.parametrize(("device", "case", "tau"), PERMUTED)
    def test_equals_definition_with_permuted_queries_and_a_list_per_head(
        self, device, case, tau, build_plan, poison_empty
    ):
        inputs = case.inputs(device)
        plan = build_plan(inputs, ranking_per="head", chunk_len=CHUNK_LEN)
        assert_like_definition(triton_forward, inputs, plan, tau)

    @pytest.mark.parametrize("tau", [2.1, 1.0, 0.5, 0.02])
    @pytest.mark.parametrize("device", [INTERPRETED, CUDA])
    def test_stops_where_the_arithmetic_says(self, device, tau, weighed):
        example = weighed((64, 8, 1, 0.125, 0.125, 0.125, 0.125, 0.125), device=device)
        actual = assert_like_definition(triton_forward, example.inputs, example.plan, tau)
        assert actual.computed.item() == TILE_LEN + 64 * example.stop(tau)

    @pytest.mark.parametrize("device", [INTERPRETED, CUDA])
    def test_a_list_of_less_than_two_chunks_is_walked_to_its_end(self, device, weighed):
        example = weighed((64, 8), device=device).shortened(96)
        actual = assert_like_definition(triton_forward, example.inputs, example.plan, 0.6)
        assert actual.computed.item() == TILE_LEN + 96


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered|All-NaN:RuntimeWarning")
class TestOverflow:
    """A key far above all that a tile met before: its weight, or weight times value, leaves float32."""

    @pytest.fixture(params=["weight", "product"])
    def towering(self, request):
        logit, size = {"weight": (300.0, 1.0), "product": (70.0, 1e18)}[request.param]

        def build(device, window=None):
            inputs = Case(queries=600, heads=1, window=window).inputs(device)
            query, key, value = (x.clone() for x in inputs.tensors)
            query[..., 0], key[..., 0] = 1.0, 0.0
            key[:, :, 200] = 0.0
            key[:, :, 200, 0] = logit / inputs.scale
            value[:, :, 200] *= size
            return Inputs(query, key, value, inputs.mask, inputs.scale)

        return build

    @pytest.mark.parametrize("device", [INTERPRETED, CUDA])
    def test_of_a_list_restarts(self, device, towering, build_plan):
        inputs = towering(device)
        plan = build_plan(inputs, segment_len=256, chunk_len=CHUNK_LEN)
        actual = triton_forward.attend(inputs.call, plan, 0.0)
        assert_close(actual, exact_attention(inputs), inputs)
        seen = [128, 256, 384, 512, 600]
        assert actual.computed.flatten().tolist() == seen[:2] + [2 * keys for keys in seen[2:]]

    @pytest.mark.parametrize("window", [None, 450])
    @pytest.mark.parametrize("device", [INTERPRETED, CUDA])
    def test_in_position_order(self, device, window, towering):
        inputs = towering(device, window)
        actual = triton_exact.attend_exact(inputs.call)
        assert_close(actual, exact_attention(inputs), inputs)


class TestNatural:
    @pytest.mark.parametrize(("device", "case"), NATURAL)
    def test_equals_dense_attention(self, device, case, poison_empty):
        inputs = case.inputs(device)
        actual = triton_exact.attend_exact(inputs.call)
        assert actual.output.dtype == inputs.query.dtype
        assert_close(actual, exact_attention(inputs), inputs)
        unpadded = Inputs(*inputs.tensors, dataclasses.replace(inputs.mask, key_mask=None), 1.0)
        counts = [int(tile.any(0).sum()) for tile in visible_pairs(unpadded)[0, 0].split(TILE_LEN)]
        assert (actual.computed.cpu() == torch.tensor(counts)).all()


class TestWideOffsets:
    """Matrices of 2^31 elements do not fit here; their 64-bit offsets must give the same numbers on small ones."""

    @pytest.fixture(autouse=True)
    def wide(self, monkeypatch):
        for module in (triton_forward, triton_exact):
            monkeypatch.setattr(module, "needs_wide", lambda *_: True)

    @pytest.mark.parametrize(
        ("device", "case", "tau"),
        [
            *on(INTERPRETED, (Case(queries=400, head_dim=80, dtype="fp16"), 0.5)),
            *on(CUDA, (Case(queries=1000, heads=4, kv_heads=2, head_dim=128, dtype="bf16"), 0.5)),
        ],
    )
    def test_ranked(self, device, case, tau, build_plan):
        inputs = case.inputs(device)
        assert_like_definition(triton_forward, inputs, build_plan(inputs, chunk_len=CHUNK_LEN), tau)

    @pytest.mark.parametrize(
        ("device", "case"),
        [*on(INTERPRETED, Case(queries=300, window=100)), *on(CUDA, Case(queries=1000, window=100, dtype="bf16"))],
    )
    def test_natural(self, device, case):
        inputs = case.inputs(device)
        actual = triton_exact.attend_exact(inputs.call)
        assert_close(actual, exact_attention(inputs), inputs)


def test_wide_offsets_are_chosen_by_the_size_of_one_head():
    class Stub:
        def __init__(self, length, stride):
            self.shape, self._stride = (1, 64, length, 128), stride

        def stride(self, _):
            return self._stride

    wide = triton_forward.needs_wide
    assert not wide(Stub(131072, 128 * 64))
    assert wide(Stub(262144, 128 * 64))
    assert wide(Stub(1024, 128), Stub(1024, 128), Stub(2**24, 128))


class TestRanking:
    @pytest.fixture(autouse=True)
    def as_many_dims(self, monkeypatch):
        """A packed row holds more dimensions than the torch ranking takes of a small head."""
        monkeypatch.setattr(ranking_per_query, "few_dims", lambda head_dim: triton_ranking.packed_width(head_dim) - 2)

    @pytest.mark.parametrize(
        ("device", "case", "rows"),
        [
            *on(INTERPRETED, *zip(SCORED_INTERPRETED, itertools.cycle(ROWS))),  # both take seconds
            *on(CUDA, *itertools.product(SCORED_ON_CUDA, ROWS)),
        ],
    )
    def test_scores_equal_the_torch_ranking(self, device, case, rows, poison_empty, monkeypatch):
        """The bound is what rounding both factors to the packed dtype, and their sums to float16, can make."""
        for name in ("ROWS", "CPU_ROWS"):
            monkeypatch.setattr(ranking_per_query, name, rows)
        inputs, segment_len = case.inputs(device), 256
        shared = case.heads // case.kv_heads
        actual = score_all(triton_ranking.prepare, inputs, segment_len, shared)
        expected = score_all(ranking_per_query.prepare, inputs, segment_len, shared)
        prefix = prefix_mask(inputs.mask, case.queries, case.n_keys, segment_len, inputs.query.device)
        prefix = prefix[:, None].expand(expected.shape)
        assert prefix.any()
        count = ranking_per_query.few_dims(case.head_dim)
        basis = ranking_basis.choose_basis(inputs.query, inputs.key, count, inputs.mask.key_mask)
        query = ranking_basis.project(inputs.query, basis.query) * inputs.scale
        key = ranking_basis.project(inputs.key, basis.key)
        largest = query.abs().sum(-1).max() * key.abs().max() + expected[prefix & expected.isfinite()].abs().max()
        packed, summed = torch.finfo(triton_ranking.packed_dtype(query.device)).eps, torch.finfo(torch.float16).eps
        bound = largest.item() * (1.1 * packed + summed * (1 + query.shape[-1] / 2))
        fully_masked = expected == float("-inf")  # no row of the segment has a say: any order will do
        assert (actual[prefix].float() - expected[prefix])[~fully_masked[prefix]].abs().max().item() <= bound

    @pytest.mark.parametrize(("device", "case"), [*SCORED, *on(INTERPRETED, Case(queries=600, heads=6, kv_heads=2))])
    def test_mean_query_scores_equal_the_torch_ranking(self, device, case, poison_empty):
        inputs, segment_len = case.inputs(device), 256
        shared = case.heads // case.kv_heads
        actual = score_all(planner.PREPARE_BY_TRITON["mean_query"], inputs, segment_len, shared)
        expected = score_all(planner.PREPARE["mean_query"], inputs, segment_len, shared)
        prefix = prefix_mask(inputs.mask, case.queries, case.n_keys, segment_len, inputs.query.device)
        prefix = prefix[:, None].expand(expected.shape)
        assert prefix.any()
        means = ranking_mean_query.segment_means(inputs.query, segment_len) * inputs.scale
        largest = means.abs().sum(-1).max() * inputs.key.float().abs().max()
        eps = max(torch.finfo(inputs.query.dtype).eps, torch.finfo(torch.float16).eps)
        assert (actual[prefix].float() - expected[prefix].float()).abs().max().item() <= 2 * eps * largest.item()

    @pytest.mark.parametrize(("device", "case"), SCORED)
    def test_basis_equals_the_torch_basis_and_is_balanced(self, device, case, poison_empty):
        inputs = case.inputs(device)
        inputs.key[0, 0, ::8, 3] = torch.nan
        hidden = torch.zeros(inputs.key.shape[::2], dtype=torch.bool, device=inputs.key.device)
        if inputs.mask.key_mask is not None:
            hidden = ~inputs.mask.key_mask
            inputs.key[:, :, :, 5].masked_fill_(hidden[:, None], 1e4)  # padding decides nothing
        count, rank = min(case.head_dim, 7), 32
        actual = triton_basis.choose_basis(inputs.call, count, rank)
        expected = ranking_basis.choose_basis(inputs.query, inputs.key, count, inputs.mask.key_mask)
        assert all(x.dtype == inputs.query.dtype and not x[..., count:].any() for x in actual)
        products = (x.query.float() @ x.key.float().transpose(-1, -2) for x in (actual, expected))
        eps = max(torch.finfo(inputs.query.dtype).eps, 2**-10 if device == "cuda" else 0.0)  # of tf32
        theirs = expected.query.norm(dim=(-2, -1)) * expected.key.norm(dim=(-2, -1)) * inputs.scale
        ours, wanted = next(products), next(products) * inputs.scale
        assert ((ours - wanted).norm(dim=(-2, -1)) <= max(4 * eps, 2e-4) * theirs).all()
        every = ranking_basis.dim_stride(case.queries), ranking_basis.dim_stride(case.n_keys)
        query, key = (
            ranking_basis.project(x[:, :, ::step].nan_to_num(0.0), factor[..., :count].float())
            for x, step, factor in zip((inputs.query, inputs.key), every, actual, strict=True)
        )
        batch, kv_heads = key.shape[:2]
        hidden = hidden[:, :: every[1]]
        key *= (hidden[0].numel() / (~hidden).sum(1).float().clamp(min=1)).sqrt()[:, None, None, None]
        key.masked_fill_(hidden[:, None, :, None], 0.0)
        sizes = (x.reshape(batch, kv_heads, -1, count).square().mean(2).sqrt() for x in (query, key))
        torch.testing.assert_close(next(sizes), next(sizes), rtol=2e-2, atol=1e-4)

    @pytest.mark.parametrize(
        ("device", "case", "ranking_per"),
        [
            *on(INTERPRETED, *zip(SCORED_INTERPRETED, itertools.cycle(RANKING_PER))),  # both take seconds
            *on(CUDA, *itertools.product(SCORED_ON_CUDA, RANKING_PER)),
        ],
    )
    def test_lists_are_those_of_the_torch_ranking(self, device, case, ranking_per, build_plan):
        """fp16 may swap neighbours; the best eighth must be the same keys but for a few at its edge."""
        inputs = case.inputs(device)
        ours, theirs = (build_plan(inputs, by=by, ranking_per=ranking_per) for by in ("triton", "torch"))
        assert torch.equal(ours.prefix_count, theirs.prefix_count)
        torch.testing.assert_close(ours.tail_value, theirs.tail_value)
        for b, h, segment in itertools.product(*map(range, theirs.key_index.shape[:3])):
            eighth = theirs.prefix_count[b, segment].item() // 8
            best, slack = theirs.key_index[b, h, segment, :eighth], ours.key_index[b, h, segment, : 2 * eighth]
            assert set(best.tolist()) <= set(slack.tolist())


class TestWithoutOwnKeys:
    """Causal segments whose own positions lie behind the last key: their ranked keys give the fixed reference."""

    @pytest.mark.parametrize("device", [INTERPRETED, CUDA])
    @pytest.mark.parametrize("case", [Case(queries=640, keys=300, offset=0), Case(queries=256, keys=512, offset=512)])
    def test_nothing_overflows(self, device, case, build_plan):
        inputs = case.inputs(device)
        plan = build_plan(inputs, segment_len=128, chunk_len=CHUNK_LEN)
        actual = triton_forward.attend(inputs.call, plan, 0.0)
        assert_close(actual, exact_attention(inputs), inputs)
        assert (actual.computed <= case.n_keys).all()
