"""The normaliser of scored rows against its definition: in-segment keys, first keys, and samples of the rest."""

import math

import pytest
import torch

from s2o_compile.kernels.core.mask import AttentionMask
from s2o_compile.kernels.ranking.per_query import FIRST_KEYS, row_normaliser

BATCH, KV_HEADS, GROUP, ROWS, DIMS, KEYS, FIRST, SEGMENT, STRIDE = 2, 2, 4, 100, 7, 1500, 1024, 400, 64


@pytest.mark.parametrize(
    ("causal", "offset", "padded", "heads"),
    [(True, 0, False, 1), (True, 37, True, 1), (False, 0, True, 2), (True, -900, False, 2), (True, 0, True, 4)],
)
def test_normaliser_is_that_of_the_definition(causal, offset, padded, heads):
    generator = torch.Generator().manual_seed(2)
    query = torch.randn(BATCH, KV_HEADS, GROUP, ROWS, DIMS, generator=generator)
    key = torch.randn(BATCH, KV_HEADS, KEYS, DIMS, generator=generator)
    key_mask = torch.rand(BATCH, KEYS, generator=generator) < 0.6 if padded else None
    mask = AttentionMask(causal=causal, offset=offset, key_mask=key_mask)
    chosen = [torch.randperm(SEGMENT, generator=generator)[:ROWS].sort().values for _ in range(heads)]
    positions = FIRST + torch.stack(chosen)
    start = min(max(FIRST + offset, 0), KEYS)
    own = start, min(start + SEGMENT, KEYS)
    actual = row_normaliser(query, key, mask, positions=positions, own=own, stride=STRIDE)

    end = start if causal else KEYS
    sampled = [j for j in range(STRIDE // 2, end, STRIDE) if j >= FIRST_KEYS and not own[0] <= j < own[1]]
    first = [j for j in range(min(FIRST_KEYS, end)) if not own[0] <= j < own[1]]
    keys = torch.tensor([*sampled, *first, *range(*own)])
    logits = query @ key[:, :, None, keys].mT
    logits[..., : len(sampled)] += math.log2(STRIDE)
    visible = torch.stack([mask.visible(positions[g % heads], keys) for g in range(GROUP)])
    seen = visible if key_mask is None else visible & key_mask[:, None, None, None, keys]
    expected = (logits * math.log(2)).masked_fill(~seen, -math.inf).logsumexp(-1) / math.log(2)
    expected = expected.masked_fill(expected == -math.inf, math.inf)
    assert torch.equal(actual.isinf(), expected.isinf())
    torch.testing.assert_close(actual, expected)
