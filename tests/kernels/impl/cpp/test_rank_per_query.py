"""Scores in C++ are those of the torch ranking, to the rounding of their sums."""

import pytest
import torch

from s2o_compile.kernels.core.plan import prefix_mask
from s2o_compile.kernels.impl.cpp import rank_per_query
from s2o_compile.kernels.ranking import per_query
from s2o_compile.kernels.support import cpp_library
from tests.conftest import Case

pytestmark = pytest.mark.skipif(bool(cpp_library.why_not()), reason="needs a C++ compiler")

CASES = [
    Case(queries=600, heads=4, kv_heads=2, batch=2),
    Case(queries=700, heads=6, kv_heads=2, dtype="fp16"),
    Case(queries=300, keys=900),
    Case(queries=900, keys=300),
    Case(queries=500, offset=77),
    Case(queries=600, causal=False),
    Case(queries=300, keys=500, causal=False, heads=4, kv_heads=2),
    Case(queries=600, batch=2, padding="left", heads=4, kv_heads=2),
    Case(queries=600, batch=2, padding="all"),
    Case(queries=600, head_dim=8),
    Case(queries=600, head_dim=256, heads=4, kv_heads=1, dtype="bf16", layout="packed"),
    Case(queries=1, keys=400),
]


@pytest.mark.parametrize("halves", [False, True], ids=["floats", "halves"])
@pytest.mark.parametrize("shared", ["group", "head"])
@pytest.mark.parametrize("rows", [1024, 128])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_scores_are_those_of_the_torch_ranking(case, rows, shared, halves, monkeypatch):
    if halves and not cpp_library.has_halves():
        pytest.skip("needs AMX")
    monkeypatch.setattr(cpp_library, "has_halves", lambda: halves)
    monkeypatch.setattr(per_query, "CPU_ROWS", rows)
    call, segment_len = case.inputs().call, 256
    shared = call.group if shared == "group" else 1
    expected = per_query.prepare(call, segment_len, shared)(call, slice(None))
    actual = per_query.prepare(call, segment_len, shared, score=rank_per_query.score_keys)(call, slice(None))
    prefix = prefix_mask(call.mask, call.n_queries, call.n_keys, segment_len, torch.device("cpu"))
    there = prefix[:, None].expand_as(expected) & expected.isfinite()
    assert torch.equal(actual.isfinite() & prefix[:, None], there)
    basis = per_query.basis_of_samples(call)
    few = per_query.few_keys_of(call, basis).norm(dim=-1).max() * call.query.float().norm(dim=-1).max()
    # In bfloat16 both factors are rounded; the longest sums of float32 have the dims of a head.
    rounding = 3 * torch.finfo(torch.bfloat16).eps if halves else 64 * torch.finfo(torch.float32).eps
    limit = rounding * (few * basis.query.norm() * call.scale + 16)
    if there.any():
        assert (actual - expected)[there].abs().max() <= limit


def test_numbers_that_are_not_finite_count_as_none():
    inputs = Case(queries=600).inputs()
    inputs.query[0, 0, 300] = float("nan")
    inputs.key[0, 0, 7] = float("inf")
    for score in (None, rank_per_query.score_keys):
        scores = per_query.prepare(inputs.call, 256, 1, score=score)(inputs.call, slice(None))
        assert scores[0, 0, 2, :512].isfinite().all()
