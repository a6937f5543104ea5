"""FlashPrefill's block rule as the benchmarks rebuild it."""

import math

import pytest
import torch

from benchmarks.flash_prefill import flash_prefill
from tests.conftest import Case, bounds, distance, exact_attention

BLOCK = 128
CASE = Case(batch=2, heads=4, kv_heads=2, queries=1024, head_dim=32)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_all_blocks_are_dense_attention(dtype):
    inputs = CASE.inputs()
    inputs = inputs if dtype == "fp32" else inputs.to(torch.bfloat16)
    output, density = flash_prefill(*inputs.tensors, threshold=math.inf)
    assert output.dtype == inputs.query.dtype
    assert distance(output, exact_attention(inputs)[0]) <= bounds(inputs)[0]
    assert density.tolist() == [pytest.approx(8 * 9 / 2 * BLOCK**2 / (1024 * 1025 / 2))] * CASE.heads


def one_wanted_block(logit=6.0, wanted=3):
    """Every query gives the keys of one block this logit, and all others 0; keys of a block are alike."""
    query, key = torch.zeros(1, 1, 1024, 16), torch.zeros(1, 1, 1024, 16)
    query[..., 0] = 1.0
    key[0, 0, wanted * BLOCK : (wanted + 1) * BLOCK, 0] = logit * 4.0
    return query, key, torch.randn(1, 1, 8, 16, generator=torch.Generator().manual_seed(0)).repeat_interleave(BLOCK, 2)


def test_the_threshold_selects():
    query, key, value = one_wanted_block()
    _, density = flash_prefill(query, key, value, threshold=5.9)
    # Block 0, the own one, and the wanted one; before it all blocks are equally near.
    blocks = 1 + 2 + 3 + sum(len({0, 3, i}) for i in range(3, 8))
    assert density.item() == blocks * BLOCK**2 / (1024 * 1025 / 2)
    assert flash_prefill(query, key, value, threshold=6.1)[1].item() == 36 * BLOCK**2 / (1024 * 1025 / 2)


def test_blocks_of_equal_keys_are_corrected_exactly():
    query, key, value = one_wanted_block()
    expected, _ = flash_prefill(query, key, value, threshold=math.inf)
    corrected, density = flash_prefill(query, key, value, threshold=1.0)
    plain, same = flash_prefill(query, key, value, threshold=1.0, corrected=False)
    torch.testing.assert_close(corrected, expected, rtol=1e-5, atol=1e-5)
    assert (plain - expected).abs().max() > 1e-3
    assert density == same


def test_arguments_are_checked():
    query, key, value = one_wanted_block()
    with pytest.raises(ValueError, match="expected 0 or more, got nan"):
        flash_prefill(query, key, value, threshold=math.nan)
    with pytest.raises(ValueError, match="whole blocks of 128, got 1000 queries"):
        flash_prefill(query[:, :, :1000], key[:, :, :1000], value[:, :, :1000], threshold=1.0)
