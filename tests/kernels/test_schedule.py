"""A call cut into slices of heads and queries: the same attention, in bounded memory."""

import pytest
import torch

from s2o_compile.kernels import dispatch as operator
from s2o_compile.kernels import planner as rank
from s2o_compile.kernels import schedule as slices
from s2o_compile.kernels.core import plan
from s2o_compile.kernels.core.call import AttentionCall
from s2o_compile.kernels.core.mask import AttentionMask
from s2o_compile.kernels.core.options import RANKINGS, OperatorOptions
from s2o_compile.kernels.statistics import record_calls
from tests.conftest import CUDA, INTERPRETED, Case, assert_close, computed_pairs, dense_area, exact_attention


@pytest.mark.parametrize(
    ("kv_heads", "rankings", "length", "heads", "queries"),
    [
        (8, 1, 131072, 1, 43 * 1024),
        (8, 1, 32768, 3, 32768),
        (8, 1, 16384, 8, 16384),
        (1, 1, 131072, 1, 43 * 1024),
        (8, 4, 131072, 1, 13 * 1024),
        (8, 4, 16384, 3, 16384),
    ],
)
def test_heads_and_queries_are_ranked_a_few_at_a_time(kv_heads, rankings, length, heads, queries):
    key = torch.empty(1, kv_heads, length, 128, dtype=torch.bfloat16, device="meta")
    segment_len = plan.default_segment_len(length)
    call = AttentionCall(query=key, key=key, value=key, mask=AttentionMask(causal=True), scale=1.0)
    found = list(slices.slices(call, segment_len, rankings, range(kv_heads)))
    assert found[0] == (slice(0, heads), slice(0, queries))
    covered = sum((some.stop - some.start) * (rows.stop - rows.start) for some, rows in found)
    assert covered == kv_heads * length


@pytest.mark.parametrize("ranking_per", ["group", "head"])
@pytest.mark.parametrize(
    "case",
    [
        Case(queries=700, heads=4, kv_heads=2),
        Case(queries=700, heads=4, kv_heads=2, batch=2, padding="left"),
        Case(queries=300, keys=900),
        Case(queries=700, keys=300, offset=-100),
        Case(queries=400, keys=500, offset=900),
        Case(queries=700, causal=False, batch=2, padding="right"),
    ],
    ids=str,
)
def test_many_slices_together_are_dense_attention(case, ranking_per, monkeypatch, poison_empty):
    monkeypatch.setattr(slices, "SCRATCH_BYTES", 1)
    monkeypatch.setattr(slices, "SCRATCH_SHARE", 2**40)
    inputs = case.inputs()
    found = list(slices.slices(inputs.call, 128, 1, range(inputs.key.shape[1])))
    assert len(found) == inputs.key.shape[1] * (-(-case.queries // 128) if case.causal else 1)
    options = OperatorOptions(tau=0.0, min_seq_len=0, segment_len=128, ranking_per=ranking_per)
    result = operator.run(inputs.call.but(return_lse=True), options)
    assert_close(result, exact_attention(inputs), inputs)


PADDED = Case(queries=700, keys=900, heads=4, kv_heads=2, batch=2, padding="left")
PLAIN = Case(queries=512, keys=1200, heads=4, kv_heads=2, head_dim=32)
SHORT_PADDED = Case(queries=300, keys=700, heads=4, kv_heads=2, batch=2, padding="left")
SHORT_PLAIN = Case(queries=300, keys=900, heads=4, kv_heads=2, head_dim=32)
"""For the interpreter, which takes seconds."""


@pytest.mark.filterwarnings("ignore:divide by zero encountered:RuntimeWarning")  # as in impl/triton/test_forward.py
@pytest.mark.parametrize(
    ("device", "implementation", "ranking", "case"),
    [
        *(("cpu", "torch", ranking, case) for ranking in RANKINGS for case in (PADDED, PLAIN)),
        *(
            pytest.param(*device.values, "triton", *rest, marks=device.marks)
            for device, padded, plain in ((INTERPRETED, SHORT_PADDED, SHORT_PLAIN), (CUDA, PADDED, PLAIN))
            for rest in (("per_query", padded), ("mean_query", plain))
        ),
    ],
    ids=str,
)
def test_no_bit_depends_on_how_a_call_is_cut(case, ranking, device, implementation, monkeypatch, poison_empty):
    if implementation == "triton":
        pytest.importorskip("triton")
    monkeypatch.setattr(rank, "default_chunk_len", lambda _: 128)
    inputs = case.inputs(device)
    inputs.query.mul_(4.0)  # few keys matter, so tiles stop
    options = OperatorOptions(
        tau=1.0,
        min_seq_len=0,
        segment_len=128,
        ranking=ranking,
        ranking_per="group" if case.padding else "head",
        implementation=implementation,
    )

    def run():
        with record_calls() as calls:
            found = operator.run(inputs.call.but(return_lse=True), options)
        return *found, calls[0].computed

    whole = run()
    assert computed_pairs(whole[2], case.queries) < 0.9 * dense_area(inputs)  # some tiles stop
    monkeypatch.setattr(slices, "SCRATCH_BYTES", 1)
    monkeypatch.setattr(slices, "SCRATCH_SHARE", 2**40)
    for one, other in zip(whole, run(), strict=True):
        assert torch.equal(one, other)


def test_a_key_that_holds_nan_is_visited_in_the_slice_of_its_head(monkeypatch):
    monkeypatch.setattr(rank, "default_chunk_len", lambda _: 128)
    monkeypatch.setattr(slices, "SCRATCH_BYTES", 1)
    monkeypatch.setattr(slices, "SCRATCH_SHARE", 2**40)
    inputs = PLAIN.inputs()
    inputs.key[0, 1, 70] = torch.nan
    options = OperatorOptions(tau=1000.0, min_seq_len=0, segment_len=128)  # every tile stops as soon as it may
    output, _ = operator.run(inputs.call, options)
    assert output[:, 2:].isnan().all()
    assert not output[:, :2].isnan().any()


@pytest.mark.parametrize("ranking", RANKINGS)
def test_equal_keys_stand_in_the_same_order_in_a_slice(ranking, monkeypatch):
    """Repeated keys have equal scores."""
    monkeypatch.setattr(rank, "default_chunk_len", lambda _: 128)
    monkeypatch.setattr(slices, "SCRATCH_SHARE", 2**40)
    inputs = Case(queries=700, heads=4, kv_heads=2).inputs()
    inputs.key.copy_(inputs.key[:, :, torch.arange(700) % 12])
    options = OperatorOptions(tau=4.0, min_seq_len=0, segment_len=128, ranking=ranking)
    results = []
    for scratch in (2**27, 1):
        monkeypatch.setattr(slices, "SCRATCH_BYTES", scratch)
        with record_calls() as calls:
            output, _ = operator.run(inputs.call.but(scale=0.2), options)
        results.append((output, calls[0].computed))
    assert torch.equal(results[0][1], results[1][1])
    torch.testing.assert_close(results[0][0], results[1][0], rtol=0, atol=1e-5)
