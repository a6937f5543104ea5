"""Random attentions over packed documents: none computes something else once it is compiled."""

import random

import pytest
import torch

from tests.helpers import fuzz_packed
from tests.helpers.capture import Capture

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def search(seeds):
    """Random modules that compute something else compiled; how many attentions were packed, and how many not."""
    wrong, found, left = [], 0, 0
    for seed in seeds:
        rng = random.Random(seed)
        batch = rng.choice((1, 2))
        function = fuzz_packed.random_attention(rng)
        torch._dynamo.reset()
        capture = Capture({"tau": 0.0, "min_seq_len": rng.choice((0, 40, 10**6))})
        compiled = torch.compile(function, backend=capture)
        with torch.no_grad():
            for _ in range(3):
                given = fuzz_packed.inputs(rng, batch)
                try:
                    expected = function(*(x.clone() for x in given))
                except RuntimeError:  # shapes that do not fit
                    break
                output = compiled(*(x.clone() for x in given))
                seen = ~expected.isnan()  # softmax of nothing but -inf
                if not torch.allclose(output[seen], expected[seen], atol=1e-5, rtol=1e-5):
                    wrong.append((seed, [record.mask for record in capture.records]))
        found += any(record.mask.startswith("packed") for record in capture.records)
        left += any(not record.rewritten for record in capture.records)
    return wrong, found, left


def test_a_few_random_modules():
    wrong, found, left = search(range(1000, 1012))
    assert not wrong
    assert found >= 2
    assert left >= 2


@pytest.mark.slow
def test_no_wrong_document_mask_is_ever_proven():
    wrong, found, left = search(range(400))
    assert not wrong
    assert found >= 60
    assert left >= 100
