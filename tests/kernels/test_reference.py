"""The reference: dense attention in float64 at tau = 0; a stop rule that can be worked out by hand."""

import dataclasses
import math

import pytest
import torch

from s2o_compile.kernels import reference
from s2o_compile.kernels.core.mask import AttentionMask
from s2o_compile.kernels.core.options import RANKINGS
from s2o_compile.kernels.core.plan import TILE_LEN, prefix_mask
from s2o_compile.kernels.ranking import per_query as ranking_per_query
from s2o_compile.kernels.statistics import Call
from tests.conftest import Case, assert_close, bounds, dense_area, distance, exact_attention, score_all, visible_pairs

MASKS = [
    Case(queries=1),
    Case(queries=127, batch=2),
    Case(queries=1000),
    Case(queries=300, keys=1000),
    Case(queries=1000, keys=300),
    Case(queries=300, keys=1000, offset=0),
    Case(queries=700, offset=150),
    Case(queries=700, causal=False),
    Case(queries=300, keys=1000, causal=False),
    Case(queries=1000, keys=300, causal=False),
    Case(queries=600, batch=2, padding="left"),
    Case(queries=600, batch=2, padding="right"),
    Case(queries=600, batch=2, padding="all"),
    Case(queries=600, batch=2, causal=False, padding="right"),
    Case(queries=1, keys=700, causal=False),
    Case(queries=400, heads=4, kv_heads=2),
]


def attend(inputs, plan, tau):
    """The reference in float64."""
    wide = inputs.to(torch.float64)
    return reference.attend(wide.call, plan, tau)


class TestExact:
    @pytest.mark.parametrize("ranking", RANKINGS)
    @pytest.mark.parametrize("case", MASKS, ids=str)
    def test_never_stopping_is_dense_attention(self, case, ranking, build_plan):
        inputs = case.inputs()
        plan = build_plan(inputs, ranking=ranking)
        assert_close(attend(inputs, plan, 0.0), exact_attention(inputs), inputs, torch.float64)

    @pytest.mark.parametrize("case", [MASKS[4], MASKS[10], MASKS[12]], ids=str)
    def test_a_query_that_sees_no_key_gets_zeros(self, case, build_plan):
        inputs = case.inputs()
        result = attend(inputs, build_plan(inputs), 0.0)
        fully_masked = exact_attention(inputs)[1] == float("-inf")
        assert fully_masked.any()
        assert not fully_masked.all()
        assert (result.output[fully_masked] == 0).all()
        assert (result.lse[fully_masked] == float("-inf")).all()

    @pytest.mark.parametrize("case", [MASKS[2], MASKS[7], MASKS[8]], ids=str)
    def test_every_key_is_counted(self, case, build_plan):
        inputs = case.inputs()
        computed = attend(inputs, build_plan(inputs), 0.0).computed
        ends = torch.tensor([min(t + TILE_LEN, case.queries) for t in range(0, case.queries, TILE_LEN)])
        expected = ends + case.causal_offset if case.causal else torch.full_like(ends, case.n_keys)
        assert (computed == expected).all()


class TestStopRule:
    @pytest.mark.parametrize(
        ("masses", "tau", "expected"),
        [
            # after chunk 2: 8 / (1 + 64 + 8) * 2 log(8 / 2) = 0.304; after chunk 3: 1 / 74 * 3 log(8 / 3) = 0.040
            ((64, 8, 1, 0.125, 0.125, 0.125, 0.125, 0.125), 0.5, 2),
            ((64, 8, 1, 0.125, 0.125, 0.125, 0.125, 0.125), 0.1, 3),
            ((64, 8, 1, 0.125, 0.125, 0.125, 0.125, 0.125), 0.02, 4),
            # the first chunk brings nothing, and its gain must not be used; the second brings much
            ((0.001, 64, 64, 0.001, 0.001, 0.001, 0.001, 0.001), 0.5, 4),
            ((0.001, 64, 64, 0.001, 0.001, 0.001, 0.001, 0.001), 2.0, 3),
            # but a tau above 1 log(8 / 1) = 2.08 allows to leave all the rest out
            ((0.001, 64, 64, 0.001, 0.001, 0.001, 0.001, 0.001), 2.1, 1),
            ((64, 8, 1, 0.125, 0.125, 0.125, 0.125, 0.125), 2.1, 1),
            # flat masses: 8 / (1 + 8 n) * n log(8 / n) is 1.31 for n = 2, 0.94 for 3, 0.13 for 7
            ((8,) * 8, 1.0, 3),
            ((8,) * 8, 0.15, 7),
            ((8,) * 8, 0.1, 8),
        ],
    )
    def test_stops_where_the_arithmetic_says(self, masses, tau, expected, weighed):
        example = weighed(masses)
        assert example.stop(tau) == expected
        assert attend(example.inputs, example.plan, tau).computed.item() == TILE_LEN + 64 * expected

    def test_a_list_of_less_than_two_chunks_is_walked_to_its_end(self, weighed):
        example, tau = weighed((64, 8)).shortened(96), 0.6
        assert math.log(96 / 64) < tau  # which would stop it behind the first chunk
        assert attend(example.inputs, example.plan, tau).computed.item() == TILE_LEN + 96

    def test_the_row_that_gains_most_decides(self, weighed):
        example, tau = weighed((64,) + (4,) * 7), 0.1
        stop = example.stop(tau)
        mean = sum(example.gain(row, stop - 2) for row in range(128)) / 128 * example.to_come(stop - 1)
        assert mean < tau  # the mean would have stopped a chunk earlier
        assert attend(example.inputs, example.plan, tau).computed.item() == TILE_LEN + 64 * stop

    def test_output_is_attention_to_what_was_visited(self, weighed):
        example, tau = weighed((64, 8, 1, 0.125, 0.125, 0.125, 0.125, 0.125)), 0.5
        result = attend(example.inputs, example.plan, tau)
        visited = torch.zeros(1, example.prefix + 128, dtype=torch.bool)
        visited[0, example.plan.key_index[0, 0, 0, : 64 * example.stop(tau)].long()] = True
        visited[0, example.prefix :] = True
        mask = AttentionMask(causal=True, offset=example.prefix, key_mask=visited)
        inputs = type(example.inputs)(*example.inputs.tensors, mask, 1.0)
        # What is left out counts as 0.2 of the estimate, min(gain * to_come, 1), at the mean value of the prefix.
        stop, (output, lse) = example.stop(tau), exact_attention(inputs)
        weights = example.inputs.key[0, 0, example.plan.key_index[0, 0, 0].long(), 0].double().exp()
        gain = weights[64 * (stop - 1) : 64 * stop].sum() / (torch.arange(1, 129) + weights[: 64 * stop].sum())
        share = 0.2 * (gain * example.to_come(stop)).clamp(max=1.0)
        mean = example.plan.tail_value[0, 0, 0].double()
        output = (output + share[:, None] * mean) / (1 + share)[:, None]
        assert_close(result, (output, lse + share.log1p()), inputs, torch.float64)
        assert distance(result.output, exact_attention(example.inputs)[0]) > bounds(inputs)[0]  # it did skip keys

    @pytest.mark.parametrize("tau", [1e-9, 0.0])
    def test_tau_zero_never_stops(self, tau, weighed):
        nothing_left = weighed((64, 8) + (1e-30,) * 6)
        computed = attend(nothing_left.inputs, nothing_left.plan, tau).computed.item()
        assert computed == TILE_LEN + (nothing_left.prefix if tau == 0 else 64 * 3)

    def test_a_list_walked_to_its_end_is_exact(self, weighed):
        example = weighed((8,) * 4)
        result = attend(example.inputs, example.plan, 1e-3)
        assert result.computed.item() == TILE_LEN + example.prefix
        assert_close(result, exact_attention(example.inputs), example.inputs, torch.float64)


class TestDensity:
    def test_a_hand_made_tile(self, weighed):
        example, tau = weighed((64, 8, 1, 0.125, 0.125, 0.125, 0.125, 0.125)), 0.1
        result = attend(example.inputs, example.plan, tau)
        area = example.inputs.mask.area(1, 128, 640)
        call = Call(site="", path="s2o", n_queries=128, n_keys=640, computed=result.computed, area=area)
        triangle = 128 * 512 + 128 * 129 // 2
        assert area.item() == triangle
        assert call.density == pytest.approx(128 * (TILE_LEN + 3 * 64) / triangle)

    @pytest.mark.parametrize(
        "case",
        [*MASKS, Case(queries=700, window=100), Case(queries=300, keys=500, window=400), Case(queries=200, window=1)],
        ids=str,
    )
    def test_area_is_what_a_dense_kernel_computes(self, case):
        inputs = case.inputs()
        area = inputs.mask.area(case.batch, case.queries, case.n_keys)
        assert area.shape == (case.batch,)
        assert area.sum().item() * case.heads == dense_area(inputs)

    def test_a_short_last_tile_weighs_less(self):
        computed = torch.tensor([[[128, 138]]], dtype=torch.int32)
        area = AttentionMask(causal=True).area(1, 138, 138)
        call = Call(site="", path="s2o", n_queries=138, n_keys=138, computed=computed, area=area)
        assert call.density == pytest.approx((128 * 128 + 10 * 138) / (138 * 139 / 2))


class TestPlan:
    @pytest.mark.parametrize("ranking", RANKINGS)
    @pytest.mark.parametrize("case", MASKS, ids=str)
    def test_full_lists_hold_every_prefix_key_once(self, case, ranking, build_plan):
        inputs, segment_len = case.inputs(), 256
        plan = build_plan(inputs, ranking=ranking, segment_len=segment_len)
        allowed = torch.ones(case.batch, case.n_keys, dtype=torch.bool)
        allowed = allowed if inputs.mask.key_mask is None else inputs.mask.key_mask
        for b in range(case.batch):
            for segment in range(plan.n_segments):
                first, stop = segment * segment_len, min((segment + 1) * segment_len, case.queries)
                keys = torch.arange(case.n_keys)
                if case.causal:
                    prefix = keys < first + case.causal_offset
                elif case.n_keys == case.queries:
                    prefix = (keys < first) | (keys >= stop)
                else:
                    prefix = keys >= 0
                expected = keys[prefix & allowed[b]].tolist()
                count = plan.prefix_count[b, segment].item()
                assert sorted(plan.key_index[b, -1, segment, :count].tolist()) == expected

    @pytest.mark.parametrize("ranking", RANKINGS)
    def test_the_keys_that_carry_the_mass_come_first(self, ranking, build_plan):
        inputs = Case(queries=1024, heads=4, kv_heads=2).inputs()
        plan = build_plan(inputs, ranking=ranking)
        probabilities = (probabilities_of(inputs)[:, :, -256:, :768]).unflatten(1, (2, 2)).amax((2, 3))
        mass = probabilities.gather(-1, plan.key_index[:, :, -1, :768].long())
        quarter = mass[..., :192].sum(-1)
        best = probabilities.sort(-1, descending=True).values[..., :192].sum(-1)
        chance = probabilities.sum(-1) / 4
        assert (quarter - chance > (best - chance) / 2).all()

    def test_per_query_ranking_finds_what_a_single_query_looks_for(self, build_plan):
        inputs = Case(queries=1024).inputs(heavy=1e9)
        needle, seeker = 300, 900
        dim = inputs.query.square().mean((0, 1, 2)).argmax()
        inputs.query[..., dim] *= 3  # sure to be a direction that it looks at
        inputs.key[..., dim] *= 3
        away = -36.0 * inputs.query[..., dim].mean().sign()
        inputs.key[0, 0, needle] = 0.0
        inputs.key[0, 0, needle, dim] = away
        inputs.query[0, 1, seeker] = 0.0
        inputs.query[0, 1, seeker, dim] = away
        place = {
            ranking: build_plan(inputs, ranking=ranking).key_index[0, 0, seeker // 256].tolist().index(needle)
            for ranking in ("per_query", "mean_query")
        }
        assert place["per_query"] == 0
        assert place["mean_query"] > 384  # of 768: what the rest of the segment wants is something else

    @pytest.mark.parametrize(
        "case",
        [
            Case(queries=600, head_dim=8, heads=4, kv_heads=2),
            Case(queries=300, keys=500, head_dim=8),
            Case(queries=600, head_dim=8, causal=False),
            Case(queries=600, head_dim=8, batch=2, padding="left"),
        ],
        ids=str,
    )
    @pytest.mark.parametrize("every", [1, 2])
    def test_per_query_score_can_be_written_out(self, case, every, monkeypatch):
        """At head_dim 8 all dimensions are kept. In-segment keys and the first 4 count once, every 64th other for 64.

        Of two heads that share a ranking one ranks by even queries and one by odd ones, if half of them rank.
        """
        inputs, segment_len = case.inputs(), 256
        monkeypatch.setattr(ranking_per_query, "CPU_ROWS", segment_len * case.heads // case.kv_heads // every)
        actual = score_all(ranking_per_query.prepare, inputs, segment_len, case.heads // case.kv_heads)
        key = inputs.key.double().repeat_interleave(case.heads // case.kv_heads, dim=1)
        logits = inputs.query.double() @ key.transpose(-1, -2) * inputs.scale
        seen = logits.masked_fill(~visible_pairs(inputs), float("-inf"))
        prefix = prefix_mask(inputs.mask, case.queries, case.n_keys, segment_len, inputs.query.device)
        limit = 2 * bounds(inputs)[1]  # a logit and two log-sum-exps in float32
        keys = torch.arange(case.n_keys)
        for segment, first in enumerate(range(0, case.queries, segment_len)):
            last = min(first + segment_len, case.queries)
            start, stop = inputs.mask.in_segment_range(first, last - 1, case.queries, case.n_keys)
            own = (keys >= start) & (keys < stop)
            weight = torch.where(own | (keys < 4), 1.0, torch.where(keys % 64 == 32, 64.0, 0.0)).double()
            rows = seen[:, :, first:last]
            scores = logits[:, :, first:last] - (rows + weight.log()).logsumexp(-1, keepdim=True)
            scores = scores.masked_fill(scores == float("inf"), float("-inf"))  # a row that sees none has no say
            group = case.heads // case.kv_heads
            heads = [scores[:, g::group, g * every // group :: every] for g in range(group)]
            slots = [
                torch.stack([head[:, :, slot::64].amax(2) for head in heads if slot < head.shape[2]]).amax(0)
                for slot in range(min(64, heads[0].shape[2]))
            ]
            expected = torch.stack(slots).logsumexp(0)
            there = prefix[:, None, segment].expand_as(expected) & (expected > float("-inf"))
            assert there.any() or segment == 0
            if there.any():
                assert distance(actual[:, :, segment][there], expected[there]) <= limit

    def test_a_non_finite_key_is_visited_first(self, build_plan):
        inputs = Case(queries=600).inputs()
        inputs.key[0, 0, 70, 3] = float("nan")
        inputs.value[0, 0, 71, 3] = float("inf")
        inputs.key[0, 0, 72] = float("-inf")
        plan = build_plan(inputs)
        assert sorted(plan.key_index[0, 0, -1, :3].tolist()) == [70, 71, 72]


def probabilities_of(inputs):
    """Attention probabilities float64 [B, Hq, Nq, Nk]."""
    n_keys = inputs.key.shape[2]
    identity = torch.eye(n_keys).expand(*inputs.key.shape[:2], -1, -1)
    return exact_attention(dataclasses.replace(inputs, value=identity))[0]
