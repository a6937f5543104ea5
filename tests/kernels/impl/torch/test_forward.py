"""The torch executors: output, log-sum-exp and computed counts of the reference over the same plan."""

import pytest
import torch

from s2o_compile.kernels.core.mask import AttentionMask
from s2o_compile.kernels.core.plan import TILE_LEN
from s2o_compile.kernels.impl.torch import blocks as block_attention
from s2o_compile.kernels.impl.torch import exact as torch_exact
from s2o_compile.kernels.impl.torch import forward as torch_forward
from tests.conftest import (
    CUDA,
    Case,
    Inputs,
    assert_close,
    bounds,
    distance,
    exact_attention,
    softmax_attention,
    visible_pairs,
)
from tests.helpers.operator_calls import assert_like_definition

CASES = [
    Case(queries=1),
    Case(queries=127, heads=3),
    Case(queries=1000, batch=2, heads=4, kv_heads=2),
    Case(queries=1000, heads=4, kv_heads=4, head_dim=80, dtype="bf16"),
    Case(queries=700, heads=4, head_dim=96, dtype="fp16"),
    Case(queries=700, head_dim=128, dtype="bf16"),
    Case(queries=520, head_dim=256),
    Case(queries=300, keys=1000),
    Case(queries=1000, keys=300),
    Case(queries=500, keys=900, offset=0),
    Case(queries=500, offset=77),
    Case(queries=700, causal=False),
    Case(queries=300, keys=1000, causal=False, heads=4, kv_heads=2),
    Case(queries=700, batch=2, padding="left"),
    Case(queries=700, batch=2, padding="right", dtype="bf16"),
    Case(queries=700, batch=2, padding="all", causal=False),
    Case(queries=600, heads=4, kv_heads=2, layout="transposed"),
    Case(queries=600, heads=4, kv_heads=2, layout="packed", dtype="fp16"),
]
LONG = Case(queries=4097, dtype="bf16", heads=1)

WINDOWED = [
    Case(queries=1, window=1),
    Case(queries=127, window=50),
    Case(queries=1000, batch=2, heads=4, kv_heads=2, window=100),
    Case(queries=1000, window=1),
    Case(queries=1000, window=129, dtype="bf16", head_dim=80),
    Case(queries=300, keys=1000, window=256, dtype="fp16"),
    Case(queries=1000, keys=300, window=200),
    Case(queries=700, batch=2, window=200, padding="left"),
    Case(queries=700, batch=2, window=200, padding="all"),
    Case(queries=600, heads=4, kv_heads=2, window=200, layout="packed"),
]
UNWINDOWED = [
    Case(queries=300, keys=700),
    Case(queries=700, keys=300),
    Case(queries=500, causal=False, heads=4, kv_heads=2),
    Case(queries=200, keys=500, causal=False, batch=2, padding="right"),
]


def position_counts(inputs):
    """Keys between the first and the last that some query of each tile sees, padding aside."""
    seen = visible_pairs(Inputs(*inputs.tensors, AttentionMask(**{**vars(inputs.mask), "key_mask": None}), 1.0))[0, 0]
    return [int(tile.any(0).sum()) for tile in seen.split(TILE_LEN)]


class TestRanked:
    @pytest.mark.parametrize("tau", [0.0, 0.5, 1.5])
    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_equals_definition(self, case, tau, build_plan, poison_empty):
        inputs = case.inputs()
        assert_like_definition(torch_forward, inputs, build_plan(inputs), tau)

    @pytest.mark.parametrize("tau", [0.0, 1.0])
    def test_equals_definition_at_length_4097(self, tau, build_plan):
        inputs = LONG.inputs()
        assert_like_definition(torch_forward, inputs, build_plan(inputs, segment_len=512, chunk_len=256), tau)

    @pytest.mark.parametrize("tau", [0.0, 1.0])
    @pytest.mark.parametrize("case", [CASES[2], CASES[7], CASES[8], CASES[11], CASES[13]], ids=str)
    def test_equals_definition_with_permuted_queries_and_a_list_per_head(self, case, tau, build_plan):
        inputs = case.inputs()
        assert_like_definition(torch_forward, inputs, build_plan(inputs, ranking_per="head"), tau)

    @pytest.mark.parametrize("tau", [2.1, 1.0, 0.5, 0.02])
    def test_stops_where_the_arithmetic_says(self, tau, weighed):
        example = weighed((64, 8, 1, 0.125, 0.125, 0.125, 0.125, 0.125))
        actual = assert_like_definition(torch_forward, example.inputs, example.plan, tau)
        assert actual.computed.item() == TILE_LEN + 64 * example.stop(tau)

    def test_a_list_of_less_than_two_chunks_is_walked_to_its_end(self, weighed):
        example = weighed((64, 8)).shortened(96)
        assert assert_like_definition(torch_forward, example.inputs, example.plan, 0.6).computed.item() == TILE_LEN + 96

    def test_inputs_are_left_alone(self, build_plan):
        inputs = CASES[2].inputs()
        before = [x.clone() for x in inputs.tensors]
        plan = build_plan(inputs)
        torch_forward.attend(inputs.call, plan, 1.0)
        assert all(torch.equal(x, y) for x, y in zip(inputs.tensors, before, strict=True))

    @pytest.mark.parametrize("device", [CUDA])
    @pytest.mark.parametrize("case", [CASES[2], CASES[5], CASES[14]], ids=str)
    def test_equals_definition_on_cuda(self, case, device, build_plan):
        inputs = case.inputs(device)
        assert_like_definition(torch_forward, inputs, build_plan(inputs), 1.0)


class TestNatural:
    @pytest.mark.parametrize("case", [*WINDOWED, *UNWINDOWED], ids=str)
    def test_equals_dense_attention(self, case, poison_empty):
        inputs = case.inputs()
        actual = torch_exact.attend_exact(inputs.call)
        assert actual.output.dtype == inputs.query.dtype
        assert_close(actual, exact_attention(inputs), inputs)
        assert (actual.computed == torch.tensor(position_counts(inputs))).all()

    def test_long_ranges_are_merged_from_steps(self, monkeypatch):
        inputs = Case(queries=700, batch=2, window=500, padding="left").inputs()
        monkeypatch.setattr(torch_exact, "KEY_STEP", 96)
        actual = torch_exact.attend_exact(inputs.call)
        assert_close(actual, exact_attention(inputs), inputs)

    def test_equals_dense_attention_at_length_4097(self):
        inputs = Case(queries=4097, heads=1, window=1000, dtype="bf16").inputs()
        actual = torch_exact.attend_exact(inputs.call)
        assert_close(actual, exact_attention(inputs), inputs)


class TestWithoutTheFusedOp:
    """The fused CPU op is private to torch: where it is gone, the plain path must serve."""

    @pytest.fixture(autouse=True)
    def plain_only(self, monkeypatch):
        monkeypatch.setattr(block_attention, "_fused_cpu", None)

    @pytest.mark.parametrize("tau", [0.0, 1.0])
    @pytest.mark.parametrize("case", [*CASES[:4], CASES[8], CASES[11], CASES[13], CASES[15]], ids=str)
    def test_ranked(self, case, tau, build_plan):
        inputs = case.inputs()
        assert_like_definition(torch_forward, inputs, build_plan(inputs), tau)

    @pytest.mark.parametrize("case", [WINDOWED[2], WINDOWED[6], WINDOWED[8]], ids=str)
    def test_natural(self, case):
        inputs = case.inputs()
        actual = torch_exact.attend_exact(inputs.call)
        assert_close(actual, exact_attention(inputs), inputs)


def block(rows, keys, dim, seed=0):
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (torch.randn(n, dim, generator=generator) for n in (rows, keys, keys))
    return query * dim**-0.5, key, value


def as_inputs(query, key, value, hidden=None):
    """One block as a call of attention: ``hidden`` [C] becomes its key mask."""
    mask = AttentionMask(key_mask=None if hidden is None else ~hidden[None])
    return Inputs(query[None, None], key[None, None], value[None, None], mask, 1.0)


@pytest.fixture(params=["fused", "plain"])
def path(request, monkeypatch):
    if request.param == "plain":
        monkeypatch.setattr(block_attention, "_fused_cpu", None)
    elif block_attention._fused_cpu is None:
        pytest.skip("this torch has no fused CPU attention that returns the log-sum-exp")


class TestBlockAttention:
    @pytest.mark.parametrize(("rows", "keys", "dim"), [(1, 1, 16), (128, 64, 64), (130, 77, 80), (3, 512, 256)])
    @pytest.mark.parametrize("hidden", ["none", "some keys", "all keys"])
    def test_equals_softmax(self, path, rows, keys, dim, hidden):
        tensors = block(rows, keys, dim)
        mask = {"none": None, "some keys": torch.arange(keys) % 3 == 1, "all keys": torch.ones(keys, dtype=torch.bool)}[
            hidden
        ]
        inputs = as_inputs(*tensors, mask)
        output, lse = block_attention.block_attention(*tensors, mask, scale=1.0)
        assert_close((output[None, None], lse[None, None]), exact_attention(inputs), inputs)

    def test_rows_may_hide_different_keys(self, path):
        query, key, value = block(64, 96, 32)
        hidden = torch.rand(64, 96, generator=torch.Generator().manual_seed(1)) < 0.5
        hidden[7] = True
        output, lse = block_attention.block_attention(query, key, value, hidden, scale=1.0)
        for row in (0, 7, 63):
            inputs = as_inputs(query[row : row + 1], key, value, hidden[row])
            assert_close(
                (output[None, None, row : row + 1], lse[None, None, row : row + 1]), exact_attention(inputs), inputs
            )

    def test_weights_sum_to_one_at_any_magnitude(self, path):
        """In float32 the log-sum-exp of equal logits of 1e10 is 1e10, however many they are."""
        key, value = torch.ones(96, 32), block(1, 96, 32)[2]
        output, _ = block_attention.block_attention(key[:5] * 1e10 / 32, key, value, scale=1.0)
        torch.testing.assert_close(output, value.mean(0).expand(5, -1))

    @pytest.mark.parametrize(("group", "rows", "keys"), [(1, 128, 128), (3, 256, 200), (2, 384, 300)])
    def test_causal_block(self, path, group, rows, keys):
        _, key, value = block(1, keys, 64)
        query = torch.randn(group, rows, 64, generator=torch.Generator().manual_seed(1))
        output, lse = block_attention.causal_block(query, key, value, scale=1.0)
        inputs = Inputs(query[None], key[None, None], value[None, None], AttentionMask(causal=True), 1.0)
        assert_close((output[None], lse[None]), exact_attention(inputs), inputs)

    def test_nan_reaches_every_row_that_sees_it(self, path):
        query, key, value = block(32, 48, 16)
        key[5, 2] = float("nan")
        output, lse = block_attention.block_attention(query, key, value, scale=1.0)
        assert output.isnan().all()
        assert lse.isnan().all()


class TestMerge:
    def test_two_halves_make_the_whole(self):
        query, key, value = block(64, 200, 32)
        halves = [
            block_attention.plain_block(query, key[part], value[part], None, scale=1.0)
            for part in (slice(70), slice(70, None))
        ]
        inputs = as_inputs(query, key, value)
        output, lse, _ = block_attention.merge(*halves[0], *halves[1])
        assert_close((output[None, None], lse[None, None]), exact_attention(inputs), inputs)

    def test_a_part_that_saw_nothing_changes_nothing(self):
        output, lse = softmax_attention(as_inputs(*block(8, 20, 16)), torch.float32)
        output, lse = output[0, 0], lse[0, 0]
        nothing = torch.zeros_like(output), torch.full_like(lse, float("-inf"))
        for first, second in (((output, lse), nothing), (nothing, (output, lse))):
            merged, joint, _ = block_attention.merge(first[0].clone(), first[1], second[0].clone(), second[1])
            assert torch.equal(merged, output)
            assert torch.equal(joint, lse)

    def test_two_empty_parts_stay_empty(self):
        empty = torch.zeros(4, 8), torch.full((4,), float("-inf"))
        output, lse, _ = block_attention.merge(empty[0].clone(), empty[1], empty[0].clone(), empty[1])
        assert (output == 0).all()
        assert (lse == float("-inf")).all()


def test_the_bounds_are_tight():
    """A result with one key too many or too few is outside them: the tests above can fail."""
    inputs = Case(queries=300, keys=301, offset=0, dtype="bf16").inputs()
    shifted = Inputs(*inputs.tensors, AttentionMask(causal=True, offset=1), inputs.scale)
    limit, lse_limit = bounds(inputs)
    output, lse = exact_attention(inputs)
    wrong, wrong_lse = exact_attention(shifted)
    assert distance(wrong, output) > 10 * limit
    assert distance(wrong_lse, lse) > 10 * lse_limit
