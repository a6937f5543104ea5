"""Scores by slot against their definition in float64."""

import math

import pytest
import torch

from s2o_compile.kernels.ranking import slots
from s2o_compile.kernels.ranking.slots import SLOTS, memory_for, pack_keys, pack_rows, score_slots

KEYS = slots.KEY_STEP + 100


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(5)


def scores_of(few, normaliser, keys):
    rows, scores = pack_rows(few, normaliser), torch.full((len(keys),), float("nan"))
    score_slots(rows, pack_keys(keys), scores, memory_for(rows))
    return scores


def exact(few, normaliser, keys):
    products = (few.double() @ keys.double().T - normaliser.double()[:, None]).clamp(min=-2000)
    missing = torch.full((-len(few) % SLOTS, len(keys)), -2000.0, dtype=torch.float64)
    largest = torch.cat([products, missing]).view(-1, SLOTS, len(keys)).amax(0)
    return (largest * math.log(2)).logsumexp(0)


@pytest.mark.parametrize("rows", [SLOTS, 3 * SLOTS, 200])
def test_scores_are_those_of_the_definition(generator, rows):
    few, keys = torch.randn(rows, 30, generator=generator), torch.randn(KEYS, 30, generator=generator)
    normaliser = 8 + torch.randn(rows, generator=generator)
    actual, expected = scores_of(few, normaliser, keys), exact(few, normaliser, keys)
    # Factors are exact, products and their sums are not.
    rounding = torch.finfo(torch.float32).eps * (few.norm(dim=1).max() * keys.norm(dim=1).max() + 48)
    assert (actual - expected).abs().max() < rounding


def test_rows_that_do_not_count_change_nothing(generator):
    few, keys = torch.randn(2 * SLOTS, 30, generator=generator), torch.randn(KEYS, 30, generator=generator)
    normaliser = torch.full((2 * SLOTS,), 6.0)
    normaliser[SLOTS:] = float("inf")
    assert torch.equal(scores_of(few, normaliser, keys), scores_of(few[:SLOTS], normaliser[:SLOTS], keys))
