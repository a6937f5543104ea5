"""The order of scores on a CPU: one list of integers by radix, or list by list, with the same result."""

import pytest
import torch

from s2o_compile.kernels.core import plan


@pytest.fixture(params=["radix", "list by list"])
def way(request, monkeypatch):
    monkeypatch.setattr(plan, "RADIX_FROM", 0 if request.param == "radix" else 1 << 60)


@pytest.mark.parametrize("shape", [(300,), (2, 3, 700), (1, 2, 1, 1), (1, 1500, 40), (2, 0)], ids=str)
def test_scores_fall_and_equal_ones_keep_their_places(way, shape):
    scores = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 10
    scores[..., 1::7] = float("-inf")
    scores[..., 5::11] = float("inf")
    scores[..., 3::5] = 2.5
    order = plan.descending_order(scores)
    assert order.dtype == torch.int32
    assert torch.equal(order.long().sort(-1).values, torch.arange(shape[-1]).expand(shape))
    found = scores.clamp(-1e30, 1e30).gather(-1, order.long())
    before, behind = found[..., :-1], found[..., 1:]
    assert (behind <= before + 2**-11 * before.abs()).all()
    same = before == behind
    assert (order.diff(dim=-1)[same] > 0).all()


def test_both_ways_agree_on_more_lists_than_one_sort_takes(monkeypatch):
    scores = torch.randn(5000, 20, generator=torch.Generator().manual_seed(1))
    orders = []
    for least in (0, 1 << 60):
        monkeypatch.setattr(plan, "RADIX_FROM", least)
        orders.append(plan.descending_order(scores))
    assert torch.equal(*orders)


@pytest.mark.parametrize("spoiled", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_keys_are_flagged_where_a_number_is_not_finite_and_nowhere_else(dtype, spoiled):
    """A sum of large numbers of float16 is beyond float16, and finite."""
    key, value = (torch.full((2, 3, 40, 64), 6e4, dtype=dtype) for _ in range(2))
    key[0, 1, 7, 63] = value[1, 2, 39, 0] = spoiled
    expected = torch.zeros(2, 3, 40, dtype=torch.bool)
    expected[0, 1, 7] = expected[1, 2, 39] = True
    assert torch.equal(plan.non_finite_keys(key, value), expected)
