"""Keys ordered in C++ are those of ``plan.order_keys``, entry by entry."""

import pytest
import torch

from s2o_compile.kernels.core import plan
from s2o_compile.kernels.impl.cpp import order
from s2o_compile.kernels.support import cpp_library
from tests.conftest import Case

pytestmark = pytest.mark.skipif(bool(cpp_library.why_not()), reason="needs a C++ compiler")

CASES = [
    Case(queries=700, heads=4, kv_heads=2, batch=2),
    Case(queries=300, keys=901),
    Case(queries=900, keys=300),
    Case(queries=500, offset=77),
    Case(queries=601, causal=False),
    Case(queries=300, keys=500, causal=False, heads=4, kv_heads=2),
    Case(queries=600, batch=2, padding="left", heads=4, kv_heads=2),
    Case(queries=600, batch=2, padding="all"),
    Case(queries=1, keys=400),
    Case(queries=100),
]
SPECIAL = [0.0, -0.0, float("nan"), float("inf"), -float("inf"), 3.4e38, -3.4e38, 1e-40, -1e-40]


@pytest.mark.parametrize("kind", ["random", "equal", "special", "float16"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_order_is_that_of_torch(case, kind):
    call, segment_len = case.inputs().call, 256
    generator = torch.Generator().manual_seed(5)
    segments = plan.n_segments(call.n_queries, segment_len)
    scores = torch.randn(call.key.shape[0], call.key.shape[1], segments, call.n_keys, generator=generator)
    if kind == "equal":
        scores = scores.round()
    elif kind == "special":
        chosen = torch.randint(len(SPECIAL), scores[..., ::3].shape, generator=generator)
        scores[..., ::3] = torch.tensor(SPECIAL)[chosen]
    elif kind == "float16":
        scores = scores.half()
    non_finite = torch.rand(*call.key.shape[:3], generator=generator) < 0.02
    sizes = {"n_queries": call.n_queries, "segment_len": segment_len}
    expected, counts = plan.order_keys(scores.float(), non_finite, call.mask, **sizes)
    actual, found = order.order_keys(scores.clone(), non_finite, call.mask, **sizes)
    assert torch.equal(found, counts)
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    there = torch.arange(expected.shape[3]) < counts[:, None, :, None]
    assert torch.equal(actual.masked_fill(~there, -1), expected.masked_fill(~there, -1))


def test_flags_of_another_layout_are_followed():
    call = CASES[6].inputs().call
    scores = torch.randn(2, 2, 3, 600)
    wide = torch.rand(2, 600, 2, 3).transpose(1, 2)[..., 0] < 0.1
    sizes = {"n_queries": 600, "segment_len": 256}
    actual, counts = order.order_keys(scores.clone(), wide, call.mask, **sizes)
    expected, _ = plan.order_keys(scores.clone(), wide.contiguous(), call.mask, **sizes)
    for b, s in ((0, 2), (1, 1)):
        count = counts[b, s]
        assert torch.equal(actual[b, :, s, :count], expected[b, :, s, :count])
