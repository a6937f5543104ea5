"""s2o_compile.plan: made once, inspected, attended over again; refused where it does not fit."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch

import s2o_compile
from s2o_compile import InputError, OptionError, S2OConfig
from tests.conftest import distance

LENGTH, SEGMENT = 700, 128


@pytest.fixture(autouse=True)
def inference():
    with torch.no_grad():
        yield


def tensors(seed=0, batch=2, heads=4, kv_heads=2, length=LENGTH, dim=16, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(batch, count, length, dim, generator=generator).to(dtype) for count in (heads, kv_heads, kv_heads)
    ]


def config(**fields):
    return S2OConfig(**{"segment_len": SEGMENT, "min_seq_len": 0, "implementation": "torch", **fields})


def padding():
    mask = torch.ones(2, LENGTH, dtype=torch.bool)
    mask[0, :90] = False
    return mask


MASKS = {
    "causal": {"causal": True},
    "offset": {"causal": True, "causal_offset": 20},
    "padding": {"causal": True, "key_mask": padding()},
    "bidirectional": {},
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("tau", [0.0, 2.0])
def test_it_gives_what_a_call_without_it_gives(mask, tau):
    given = tensors()
    chosen = config(tau=tau)
    plan = s2o_compile.plan(*given, **mask, config=chosen)
    assert torch.equal(
        s2o_compile.attention(*given, **mask, config=chosen, plan=plan),
        s2o_compile.attention(*given, **mask, config=chosen),
    )


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_an_old_plan_is_never_wrong(mask):
    plan = s2o_compile.plan(*tensors(), **mask, config=config())
    later = tensors(seed=1)
    exact = s2o_compile.attention(*later, **mask, config=config(tau=0.0))
    assert distance(s2o_compile.attention(*later, **mask, config=config(tau=0.0), plan=plan), exact) < 1e-5
    assert distance(s2o_compile.attention(*later, **mask, config=config(tau=1e-4), plan=plan), exact) < 1e-3


def test_sinks_fully_masked_rows_and_log_sum_exp():
    given, sinks = tensors(), torch.tensor([0.0, 1.0, 2.0, 3.0])
    mask = {"causal": True, "causal_offset": -30}
    plan = s2o_compile.plan(*given, **mask, config=config())
    for options in ({"sinks": sinks, "return_lse": True}, {"fully_masked": "mean"}, {"softcap": 2.0}):
        options = {**mask, "config": config(tau=0.0), **options}
        with_plan, without = (s2o_compile.attention(*given, **options, plan=p) for p in (plan, None))
        torch.testing.assert_close(with_plan, without, rtol=0, atol=0)


STALE = {
    "length": (tensors(length=690), {"causal": True}, "shape of query"),
    "heads": (tensors(heads=2), {"causal": True}, "shape of query"),
    "kv-heads": (tensors(kv_heads=4), {"causal": True}, "shape of key"),
    "batch": (tensors(batch=1), {"causal": True}, "shape of query"),
    "dtype": (tensors(dtype=torch.bfloat16), {"causal": True}, "dtype"),
    "bidirectional": (tensors(), {}, "mask: expected causal"),
    "offset": (tensors(), {"causal": True, "causal_offset": 3}, "mask: expected causal"),
    "window": (tensors(), {"causal": True, "window": 300}, "got causal, window 300"),
    "padding": (tensors(), {"causal": True, "key_mask": padding()}, "got causal, key padding"),
}


@pytest.mark.parametrize(("given", "mask", "said"), STALE.values(), ids=STALE)
def test_a_plan_that_does_not_fit_is_refused(given, mask, said):
    plan = s2o_compile.plan(*tensors(), causal=True, config=config())
    with pytest.raises(InputError, match=rf"plan, .*{said}.*Make a new plan|plan, {said}"):
        s2o_compile.attention(*given, **mask, plan=plan)


def test_other_padding_is_refused():
    given, mask = tensors(), padding()
    plan = s2o_compile.plan(*given, causal=True, key_mask=mask, config=config())
    mask[1, 5] = False  # the plan has a copy
    with pytest.raises(InputError, match=r"plan, key_mask: expected the padding that the plan was made for"):
        s2o_compile.attention(*given, causal=True, key_mask=mask, plan=plan)


def test_what_cannot_be_beside_a_plan():
    given = tensors()
    plan = s2o_compile.plan(*given, causal=True, config=config())
    with pytest.raises(InputError, match="dense_heads"):
        s2o_compile.attention(*given, causal=True, plan=plan, dense_heads=[0])
    with pytest.raises(InputError, match="attn_mask"):
        s2o_compile.attention(*given, attn_mask=torch.ones(LENGTH, LENGTH, dtype=torch.bool), plan=plan)
    with pytest.raises(InputError, match="either a configuration or its fields"):
        s2o_compile.plan(*given, config=config(), tau=0.1)
    with pytest.raises(OptionError, match="Did you mean 'segment_len'"):
        s2o_compile.plan(*given, segment_length=128)
    with pytest.raises(InputError, match="scale: expected a positive number"):
        s2o_compile.plan(*given, scale=-1.0)
    with pytest.raises(InputError, match="expected one number, or 4"):
        s2o_compile.plan(*given, tau=(0.1, 0.2))


def test_it_can_be_looked_at():
    query, key, value = tensors()
    key[:, :, 30:60] *= 6.0
    plan = s2o_compile.plan(query, key, value, causal=True, tau=2.0, segment_len=SEGMENT)
    assert plan.key_index.shape == (2, 2, 6, 640)
    assert plan.prefix_count.tolist() == [[0, 128, 256, 384, 512, 640]] * 2
    assert plan.key_index[0, 0, 5].sort().values.tolist() == list(range(640)), "a list lacks keys"
    counts = plan.block_counts()
    assert counts.shape == (2, 4, 6)
    assert (counts <= plan.block_counts(0.0)).all()
    assert plan.block_counts(0.0)[0, 0].tolist() == [0, 1, 2, 3, 4, 5]
    assert plan.density(9.0) < plan.density(2.0) <= plan.density(0.0)
    layout = plan.layout(9.0)
    tile = layout.full_index[0, 0, 5, : layout.full_count[0, 0, 5]]
    visited = layout.index[0].view(-1, 128)[tile.long()].flatten()
    assert visited.tolist() == plan.key_index[0, 0, 5, : len(visited)].tolist()
    assert "queries=700, keys=700, mask='causal'" in repr(plan)
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.causal = False


def test_the_value_may_come_later():
    query, key, value = tensors()
    plan = s2o_compile.plan(query, key, causal=True, config=config())
    wide = torch.cat([value, value], dim=-1)
    exact = s2o_compile.attention(query, key, wide, causal=True, config=config(tau=0.0))
    assert distance(s2o_compile.attention(query, key, wide, causal=True, config=config(tau=0.0), plan=plan), exact) == 0


@pytest.mark.filterwarnings("ignore::s2o_compile.DenseGradientWarning")
def test_gradients_leave_it_aside():
    query, key, value = tensors()
    plan = s2o_compile.plan(query, key, value, causal=True, config=config())
    with torch.enable_grad():
        output = s2o_compile.attention(query.requires_grad_(), key, value, causal=True, plan=plan)
        assert torch.autograd.grad(output.sum(), query)[0].isfinite().all()


def test_the_page_runs():
    page = Path(__file__).parents[2] / "docs" / "flex.md"
    (snippet,) = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    exec(snippet, {})


def test_a_tau_for_other_heads_is_refused():
    plan = s2o_compile.plan(*tensors(), causal=True, segment_len=SEGMENT)
    calls = (
        lambda: s2o_compile.attention(*tensors(), causal=True, plan=plan, config=config(tau=(1.0, 2.0))),
        lambda: plan.block_counts((1.0, 2.0)),
    )
    for call in calls:
        with pytest.raises(InputError, match="one number, or 4, one for each query head"):
            call()
