"""implementation="flex": the same plan as the reference's, visited by a compiled flex_attention.

Compiling one kernel takes seconds: all tests share one shape, and with it one kernel for each kind of scores.
"""

import dataclasses

import pytest
import torch

import s2o_compile
from s2o_compile import ImplementationUnavailableError, S2OConfig
from s2o_compile.kernels import reference
from s2o_compile.kernels.core.mask import AttentionMask
from s2o_compile.kernels.core.options import OperatorOptions
from s2o_compile.kernels.dispatch import choose_implementation
from s2o_compile.kernels.impl.flex import forward as flex_forward
from s2o_compile.kernels.impl.flex import layout as flex_layout
from s2o_compile.kernels.impl.flex.layout import BlockGrid, pool_blocks
from s2o_compile.kernels.planner import build_plan, plan_visits
from s2o_compile.kernels.ranking.unvisited import (
    BLOCK_LEN,
    STOP_RULE_TO_SAMPLE_RATIO,
    blocks_to_visit,
    estimate_unvisited,
    sampled,
)
from tests.conftest import Inputs, bounds, distance, exact_attention, query_on

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
BATCH, HEADS, KV_HEADS, LENGTH, DIM, SEGMENT = 2, 4, 2, 1000, 16, 128
SCALE = 0.25
OPTIONS = OperatorOptions(tau=2.0, segment_len=SEGMENT, min_seq_len=0)


def padding():
    mask = torch.ones(BATCH, LENGTH, dtype=torch.bool)
    mask[0, :150], mask[1, -90:] = False, False
    return mask


MASKS = {
    "causal": AttentionMask(causal=True),
    "causal-ahead": AttentionMask(causal=True, offset=37),
    "causal-behind": AttentionMask(causal=True, offset=-50),
    "padding": AttentionMask(causal=True, key_mask=padding()),
    "bidirectional": AttentionMask(),
    "bidirectional-padding": AttentionMask(key_mask=padding()),
}


@pytest.fixture(autouse=True)
def inference():
    with torch.no_grad():
        yield


class WithoutMass(Inputs):
    """Inputs whose call wants no log-sum-exp: FlexAttention has none on a CPU."""

    @property
    def call(self):
        return super().call.but(return_lse=False)


def inputs(mask, softcap=None):
    """Keys of which few matter to everybody, so that visits end early."""
    generator = torch.Generator().manual_seed(3)
    query = torch.randn(BATCH, HEADS, LENGTH, DIM, generator=generator) + 1.0
    key = torch.randn(BATCH, KV_HEADS, LENGTH, DIM, generator=generator) * 0.3
    key[:, :, torch.randperm(LENGTH, generator=generator)[:120]] += 0.5
    value = torch.randn(BATCH, KV_HEADS, LENGTH, DIM, generator=generator)
    return WithoutMass(query, key, value, mask, SCALE, softcap)


def agrees(output, exact, given):
    """An output errs no more than plain attention in its dtype may."""
    assert distance(output, exact) <= bounds(given)[0]


def planned(given, options=OPTIONS):
    plan = build_plan(given.call, options)
    unvisited = estimate_unvisited(given.call, plan)
    return plan, blocks_to_visit(unvisited, options.tau)


def attend(call, options):
    return flex_forward.attend(call, *plan_visits(call, options))


def laid_out(given, plan, visits, pool=32):
    shape, device = (BATCH, HEADS, KV_HEADS, LENGTH, LENGTH), given.query.device
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flex_forward, "pool_blocks", lambda *_, **__: pool)
        return flex_forward.place(given.mask, shape, device, 0, plan, visits)


def entries(layout, n_segments):
    """Ranked keys of each segment that a layout visits, int64 [B, Hq, P]."""
    tiles = slice(None, None, SEGMENT // 128)
    ranked = (layout.ranked_stop - layout.ranked_start[:, None])[:, :, tiles]
    whole = (layout.position_stop - layout.position_start == LENGTH)[:, :, tiles]
    return torch.where(whole, LENGTH, ranked).view(BATCH, HEADS, n_segments).long()


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_without_a_stop_it_is_dense(mask):
    given = inputs(mask)
    output = attend(given.call, dataclasses.replace(OPTIONS, tau=0.0)).output
    agrees(output, exact_attention(given)[0], given)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_it_walks_as_the_definition_does(mask):
    given = inputs(mask)
    plan, visits = planned(given)
    visited = entries(laid_out(given, plan, visits), plan.n_segments)
    assert (visited < plan.prefix_count[:, None]).float().mean() > 0.4, "too few visits end early to prove anything"
    result = flex_forward.attend(given.call, plan, visits)
    double = given.to(torch.float64)
    wanted = reference.attend(double.call, plan, 0.0, visits=visited)
    agrees(result.output, wanted.output, given)
    assert (result.computed >= wanted.computed).all(), "keys that are visited are not counted"
    assert (result.computed - wanted.computed <= 3 * BLOCK_LEN)[:, :, :-1].all()


def test_a_softcap():
    given = inputs(MASKS["causal"], softcap=1.5)
    plan, visits = planned(given)
    exact = flex_forward.attend(given.call, plan, torch.full_like(visits, 99)).output
    agrees(exact, exact_attention(given)[0], given)
    output = flex_forward.attend(given.call, plan, visits).output
    visited = entries(laid_out(given, plan, visits), plan.n_segments)
    double = given.to(torch.float64)
    wanted = reference.attend(double.call, plan, 0.0, visits=visited)
    agrees(output, wanted.output, given)


WINDOWS = {
    "window": AttentionMask(causal=True, window=200),
    "window-around": AttentionMask(causal=True, window=100, offset=40),
    "window-padding": AttentionMask(causal=True, window=200, key_mask=padding()),
    "causal": AttentionMask(causal=True),
}


@pytest.mark.parametrize("mask", WINDOWS.values(), ids=WINDOWS)
def test_position_order_is_exact(mask):
    given = inputs(mask)
    result = flex_forward.attend_exact(given.call)
    agrees(result.output, exact_attention(given)[0], given)
    if mask.window:
        assert result.computed.max() <= mask.window + 3 * BLOCK_LEN


def test_tables_and_mask_say_the_same():
    """Uncompiled, flex_attention goes by the mask_mod alone."""
    given = inputs(MASKS["padding"])
    plan, visits = planned(given)
    layout = laid_out(given, plan, visits)
    compiled = flex_forward._attend(given.call, layout).output
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flex_forward, "_compiled", lambda _: flex_forward._attend_blocks)
        output = flex_forward._attend(given.call, layout).output
    agrees(output, compiled, given)


def test_gathered_keys_have_a_limit():
    given = inputs(MASKS["causal"])
    plan, visits = planned(given)
    free = laid_out(given, plan, visits)
    gathered = (free.ranked_stop - free.ranked_start[:, None] > 0).sum()
    tight = laid_out(given, plan, visits, pool=8)
    assert tight.index.shape[1] == 2 * 1024
    assert 0 < (tight.ranked_stop - tight.ranked_start[:, None] > 0).sum() < gathered
    assert tight.ranked_stop.max() <= tight.index.shape[1]


def test_the_pool_goes_by_lengths():
    long, causal = (1, 32, 8, 32768, 32768), MASKS["causal"]

    def choose(sizes, mask=causal, on_gpu=True):
        grid = BlockGrid(*sizes, segment_len=512, partial=None, full=None)
        return pool_blocks(mask, grid, row_bytes=256, on_gpu=on_gpu)

    bytes_of_block = 8 * 128 * (2 * 256 + 8) + 8 * 32 * 256
    assert choose(long) == flex_layout.POOL_BYTES // bytes_of_block
    assert choose(long, on_gpu=False) == 4 * 256
    assert choose((16, 32, 8, 32768, 32768)) == 4 * 256
    seg_starts = [4 * 128 * segment for segment in range(4)]
    wanted = sum(int(start * 7 / 8) // 128 for start in seg_starts)
    assert choose((1, 32, 8, 2048, 2048)) == wanted, "more than all rankings can want"
    assert choose((1, 32, 8, 512, 2048), AttentionMask()) == 14
    assert choose((1, 32, 8, 1024, 2048), None) == 2 * 14


def test_heads_have_their_own_visits():
    given = inputs(MASKS["causal"])
    taus = (0.0, 3.0, 4.0, 0.0)
    options = dataclasses.replace(OPTIONS, tau=taus)
    result = attend(given.call, options)
    exact = exact_attention(given)[0]
    for head in (0, 3):
        agrees(result.output[:, head], exact[:, head], given)
    assert result.computed[:, 1].sum() < result.computed[:, 0].sum()
    dense = attend(given.call.but(dense_heads=[1]), OPTIONS).output
    agrees(dense[:, 2:], exact[:, 2:], given)
    assert (dense[:, :2] - exact[:, :2]).abs().max() > 1e-3


def test_the_operator_takes_it():
    given = inputs(MASKS["causal"])
    config = S2OConfig(implementation="flex", tau=0.0, min_seq_len=0, segment_len=SEGMENT)
    output = s2o_compile.attention(*given.tensors, causal=True, scale=SCALE, config=config)
    agrees(output, exact_attention(given)[0], given)
    with pytest.raises(ImplementationUnavailableError, match="FlexAttention returns none"):
        s2o_compile.attention(*given.tensors, causal=True, config=config, return_lse=True)


def test_it_is_chosen_where_our_kernels_are_not():
    assert choose_implementation("auto", query_on("xpu", torch.bfloat16, 64)) == "flex"
    assert choose_implementation("auto", query_on("cpu", torch.bfloat16, 64)) != "flex"
    assert choose_implementation("flex", query_on("cpu", torch.bfloat16, 64)) == "flex"


class TestEstimate:
    def test_it_is_the_mass_behind_each_block(self):
        given = inputs(AttentionMask(causal=True)).to(torch.float64)
        plan, _ = planned(inputs(MASKS["causal"]))
        left = estimate_unvisited(given.call, plan)
        b, h, segment = 1, 3, 5
        first = segment * SEGMENT
        rows = first + sampled(SEGMENT, 16, given.query.device)
        logits = given.query[b, h, rows] @ given.key[b, h // 2].T * SCALE
        weights = logits.masked_fill(~given.mask.visible(rows, torch.arange(LENGTH)), -torch.inf).softmax(-1)
        ordered = weights[:, plan.key_index[b, h // 2, segment, :first].long()]
        for n in range(segment + 1):
            assert left[b, h, segment, n].item() == pytest.approx(ordered[:, n * 128 :].sum(-1).max().item(), rel=1e-4)

    def test_a_row_of_nan_visits_everything(self):
        given = inputs(MASKS["causal"])
        given.query[0, 1, 700] = float("nan")
        plan, _ = planned(inputs(MASKS["causal"]))
        given.query[:, :, 700 // SEGMENT * SEGMENT + SEGMENT - 1] = float("nan")
        left = estimate_unvisited(given.call, plan)
        visits = blocks_to_visit(left, 2.0)
        assert (visits[:, :, 700 // SEGMENT] >= 700 // SEGMENT).all()

    def test_a_value_of_nan_is_visited(self):
        given = inputs(MASKS["causal"])
        given.key[:] = 0.0
        given.value[0, 1, 7] = float("nan")
        plan, _ = planned(given)
        assert (plan.key_index[0, 1, 1:, 0] == 7).all()
        assert blocks_to_visit(estimate_unvisited(given.call, plan), 1e6)[0].tolist() == (
            [[0] * plan.n_segments] * 2 + [[0] + [1] * (plan.n_segments - 1)] * 2
        )

    @pytest.mark.parametrize("length", [128, 512, 1024, 60])
    def test_samples_repeat_in_no_period(self, length):
        """As rows of an image do, or a mask of every 16th key."""
        rows = sampled(length, 32, torch.device("cpu"))
        assert (rows[-1], rows.min() >= 0, rows.max()) == (length - 1, True, length - 1)
        for period in (8, 16, 32):
            for half in rows[::2], rows[1::2]:
                assert len((half % period).unique()) >= period // 4

    def test_counts(self):
        left = torch.tensor([[[[0.9, 0.5, 0.1, 0.0]]]])
        assert blocks_to_visit(left, 0.3 * STOP_RULE_TO_SAMPLE_RATIO).item() == 2
        assert blocks_to_visit(left, 0.0).item() == 4
        assert blocks_to_visit(left.expand(1, 2, 1, 4), torch.tensor([0.0, 7.0])).flatten().tolist() == [4, 0]


def test_a_budget_is_refused():
    """It could not be held: how far to go is decided before the launch."""
    query = torch.randn(1, 2, 300, 32)
    config = S2OConfig(implementation="flex", error=0.05, min_seq_len=1)
    with pytest.raises(ImplementationUnavailableError, match=r"expected a tau alone, got error=0\.05, which it"):
        s2o_compile.attention(query, query, query, causal=True, config=config)
