"""Scores by slot, in float32 and in bfloat16 with shifted products, against their definition in float64."""

import math

import pytest
import torch

from s2o_compile.kernels.ranking import slots
from s2o_compile.kernels.ranking.slots import SHIFT, SLOTS, memory_for, pack_keys, pack_rows, score_slots

DTYPES = torch.float32, torch.bfloat16
KEYS = slots.KEY_STEP + 100


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(5)


def scores_of(few, normaliser, keys, dtype):
    rows, scores = pack_rows(few, normaliser, dtype), torch.full((len(keys),), float("nan"))
    score_slots(rows, pack_keys(keys, dtype), scores, memory_for(rows))
    return scores


def exact(few, normaliser, keys, dtype):
    products = (few.double() @ keys.double().T - normaliser.double()[:, None]).clamp(min=-2000)
    missing = torch.full((-len(few) % SLOTS, len(keys)), -2000.0, dtype=torch.float64)
    largest = torch.cat([products, missing]).view(-1, SLOTS, len(keys)).amax(0)
    if dtype == torch.bfloat16:
        largest = largest.clamp(min=-SHIFT)
    return (largest * math.log(2)).logsumexp(0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [SLOTS, 3 * SLOTS, 200])
def test_scores_are_those_of_the_definition(generator, rows, dtype):
    few, keys = torch.randn(rows, 30, generator=generator), torch.randn(KEYS, 30, generator=generator)
    normaliser = 8 + torch.randn(rows, generator=generator)
    actual, expected = scores_of(few, normaliser, keys, dtype), exact(few, normaliser, keys, dtype)
    # Factors are rounded, their errors add up at worst; then the shifted product is.
    rounding = torch.finfo(dtype).eps * (few.norm(dim=1).max() * keys.norm(dim=1).max() + 2 * SHIFT)
    assert (actual - expected).abs().max() < rounding


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_large_normaliser_is_not_rounded_to_eight_bits(generator, dtype):
    """Of 300 one in bfloat16 is right to 1: a key would seem twice, or half, as important to one row as to another."""
    few, keys = torch.zeros(SLOTS, 30), torch.zeros(KEYS, 30)
    few[:, 0], keys[:, 0] = 16.0, 18.75  # all products are 300
    normaliser = 303 + torch.rand(SLOTS, generator=generator)
    actual, expected = scores_of(few, normaliser, keys, dtype), exact(few, normaliser, keys, dtype)
    assert (actual - expected).abs().max() < 0.1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_do_not_count_change_nothing(generator, dtype):
    few, keys = torch.randn(2 * SLOTS, 30, generator=generator), torch.randn(KEYS, 30, generator=generator)
    normaliser = torch.full((2 * SLOTS,), 6.0)
    normaliser[SLOTS:] = float("inf")
    assert torch.equal(scores_of(few, normaliser, keys, dtype), scores_of(few[:SLOTS], normaliser[:SLOTS], keys, dtype))


def test_keys_that_nobody_wants_share_the_least_score(generator):
    few, keys = torch.zeros(SLOTS, 30), torch.zeros(KEYS, 30)
    few[:, 0], keys[:, 0] = 1.0, torch.linspace(-50, 50, KEYS)
    scores = scores_of(few, torch.zeros(SLOTS), keys, torch.bfloat16)
    unwanted = keys[:, 0] < -SHIFT - 1
    least = scores[unwanted].unique()
    assert len(least) == 1
    assert (scores[keys[:, 0] > 1 - SHIFT] > least).all()
    assert (scores.diff() >= 0).all()


@pytest.mark.parametrize(("amx", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_bfloat16_is_for_tiles(monkeypatch, amx, dtype):
    monkeypatch.setattr(slots, "has_amx", lambda: amx)
    assert slots.products_dtype(torch.device("cpu")) == dtype
    assert slots.products_dtype(torch.device("cuda")) == torch.float32
