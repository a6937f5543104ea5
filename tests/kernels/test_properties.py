"""What holds for every shape, mask and layout: exact at tau = 0; above it bounded work, bounded error, no surprises."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from s2o_compile.kernels import planner as rank
from s2o_compile.kernels.core import plan as plan_module
from s2o_compile.kernels.core.options import RANKING_PER, RANKINGS, OperatorOptions
from s2o_compile.kernels.core.plan import TILE_LEN
from s2o_compile.kernels.impl.torch import forward as torch_forward
from s2o_compile.kernels.planner import build_plan
from tests.conftest import Case, assert_close, bounds, distance, exact_attention

SEGMENT = 128
QUICK = settings(max_examples=40, deadline=None, derandomize=True)


variants = st.fixed_dictionaries(
    {},
    optional={
        "value_dim": st.sampled_from([8, 24, 72]),
        "softcap": st.sampled_from([1.0, 5.0, 30.0]),
        "sinks": st.booleans(),
        "fully_masked": st.sampled_from(["zeros", "mean"]),
    },
)


@st.composite
def cases(draw, masks=("causal", "top_left", "offset", "window", "full", "cross"), layouts=("plain",), longest=400):
    """Any call the operator accepts, small."""
    kind = draw(st.sampled_from(masks))
    queries = draw(st.integers(1, longest))
    keys = None if kind in ("full", "offset") else draw(st.none() | st.integers(1, longest))
    kv_heads, group = draw(st.sampled_from([(1, 1), (1, 3), (2, 1), (2, 2)]))
    return Case(
        batch=draw(st.integers(1, 2)),
        heads=kv_heads * group,
        kv_heads=kv_heads,
        queries=queries,
        keys=keys,
        head_dim=draw(st.sampled_from([8, 16, 40, 64])),
        dtype=draw(st.sampled_from(["fp32", "fp32", "bf16", "fp16"])),
        causal=kind not in ("full", "cross"),
        offset={"top_left": 0, "offset": draw(st.integers(-longest, longest))}.get(kind),
        window=draw(st.integers(1, longest)) if kind == "window" else None,
        padding=draw(st.sampled_from(["", "left", "right", "all"])),
        layout=draw(st.sampled_from(layouts)),
        **(draw(variants) if draw(st.booleans()) else {}),
    )


@pytest.fixture(scope="module", autouse=True)
def small_chunks():
    """Chunks so short that small inputs walk and stop."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (plan_module, rank):
            patch.setattr(module, "default_chunk_len", lambda _: 64)
        yield


choices = {
    "ranking": st.sampled_from(list(RANKINGS)),
    "ranking_per": st.sampled_from(RANKING_PER),
}


@QUICK
@given(case=cases(layouts=("plain", "transposed", "packed", "strided")), seed=st.integers(0, 99), **choices)
def test_tau_zero_is_dense_attention(case, seed, ranking, ranking_per):
    inputs = case.inputs(seed=seed)
    mask = inputs.mask
    result = torch.ops.s2o.attention(
        *inputs.tensors,
        mask.key_mask,
        inputs.sinks,
        causal=mask.causal,
        causal_offset=mask.offset if mask.causal else None,
        window=mask.window,
        scale=inputs.scale,
        softcap=inputs.softcap,
        fully_masked=inputs.fully_masked,
        return_lse=True,
        tau=0.0,
        min_seq_len=0,
        segment_len=SEGMENT,
        ranking=ranking,
        ranking_per=ranking_per,
    )
    assert_close(result, exact_attention(inputs), inputs)


def bare(case, seed):
    """What an executor is given: sinks and fully masked rows come after it."""
    return dataclasses.replace(case.inputs(seed=seed), sinks=None, fully_masked="zeros")


def attend(inputs, tau, **options):
    plan = build_plan(inputs.call, OperatorOptions(segment_len=SEGMENT, **options))
    return plan, torch_forward.attend(inputs.call, plan, tau)


ranked_cases = cases(masks=("causal", "top_left", "offset", "full", "cross"), longest=700)


@QUICK
@given(case=ranked_cases, tau=st.sampled_from([0.01, 0.1, 0.5, 1.5, 10.0]), seed=st.integers(0, 99), **choices)
def test_early_stop_bounds_work_and_error(case, tau, seed, ranking, ranking_per):
    inputs = bare(case, seed)
    options = {"ranking": ranking, "ranking_per": ranking_per}
    _, whole = attend(inputs, tau, **options)
    with pytest.MonkeyPatch.context() as patch:  # what was visited alone
        patch.setattr(torch_forward, "tail_share", lambda gain, _: torch.zeros_like(gain))
        _, result = attend(inputs, tau, **options)
    output, lse = exact_attention(inputs)
    assert whole.output.isfinite().all()
    assert torch.equal(whole.computed, result.computed)

    # Work: a tile never computes more than its dense range; a permuted one spans its whole segment.
    last = torch.arange(TILE_LEN, case.queries + TILE_LEN, TILE_LEN).clamp(max=case.queries)
    dense = (last + case.causal_offset).clamp(0, case.n_keys) if case.causal else torch.tensor(case.n_keys)
    assert (result.computed <= dense).all()

    # Error: leaving out a share of the mass moves a weighted mean by at most that share of the values' range.
    limit, lse_limit = bounds(inputs)
    fully_masked = lse == float("-inf")
    assert torch.equal(result.lse == float("-inf"), fully_masked)
    missing = (lse - result.lse).masked_fill(fully_masked, 0.0)
    assert missing.min().item() >= -lse_limit
    share = 1 - (-missing.clamp(min=0)).exp()
    tail = 1 - (result.lse - whole.lse).masked_fill(fully_masked, 0.0).exp()
    assert tail.min().item() >= -lse_limit
    assert tail.max().item() <= 0.2 / 1.2 + lse_limit
    value = inputs.value.double()
    spread = (value.amax((1, 2)) - value.amin((1, 2))).amax(-1)[:, None, None, None]
    for found, moved in ((result, share), (whole, torch.maximum(share, tail))):
        excess = (found.output.double() - output).abs() - moved[..., None] * spread
        assert excess.max().item() <= limit + lse_limit * spread.max().item() * (found is whole)


@QUICK
@given(case=ranked_cases, seed=st.integers(0, 99), **choices)
def test_error_vanishes_with_tau(case, seed, ranking, ranking_per):
    """A smaller tau stops later on the same list, so it has seen at least as much; near zero it has seen everything."""
    inputs = bare(case, seed)
    _, lse = exact_attention(inputs)
    _, lse_limit = bounds(inputs)
    seen = None
    for tau in (10.0, 1.0, 0.1, 1e-12):
        with pytest.MonkeyPatch.context() as patch:  # what was visited alone
            patch.setattr(torch_forward, "tail_share", lambda gain, _: torch.zeros_like(gain))
            _, result = attend(inputs, tau, ranking=ranking, ranking_per=ranking_per)
        if seen is not None:
            shrunk = (seen - result.lse).masked_fill(seen == float("-inf"), 0.0)
            assert shrunk.max().item() <= lse_limit
        seen = result.lse
    assert distance(result.lse, lse) <= lse_limit
    assert_close(result, exact_attention(inputs), inputs)
