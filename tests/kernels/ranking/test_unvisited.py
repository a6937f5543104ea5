"""The estimate of what is left unvisited, by kernels: that of ``unvisited.py``, over the same rankings."""

import pytest
import torch

pytest.importorskip("triton")

from s2o_compile.kernels.impl.triton import unvisited as triton_unvisited
from s2o_compile.kernels.ranking import unvisited
from tests.conftest import CUDA, INTERPRETED, Case, on

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of what a GPU gives silently

CASES = [
    *on(
        INTERPRETED,
        (Case(queries=700, batch=2, heads=6, kv_heads=2), "group"),
        (Case(queries=700, heads=4, kv_heads=2, dtype="fp16"), "head"),
        (Case(queries=300, heads=3, head_dim=80, softcap=1.5), "group"),
        (Case(queries=300, heads=20, head_dim=16, dtype="fp16"), "group"),
        (Case(queries=300, head_dim=256), "group"),
        (Case(queries=200, keys=700), "group"),
        (Case(queries=500, keys=300), "group"),
        (Case(queries=300, offset=77), "group"),
        (Case(queries=500, causal=False), "group"),
        (Case(queries=200, keys=500, causal=False), "group"),
        (Case(queries=500, batch=2, padding="left", layout="transposed"), "group"),
        (Case(queries=400, batch=2, padding="all", causal=False), "group"),
        (Case(queries=100), "group"),
    ),
    *on(
        CUDA,
        (Case(queries=5000, batch=2, heads=8, kv_heads=2, head_dim=128, dtype="bf16"), "group"),
        (Case(queries=5000, heads=4, kv_heads=2, dtype="bf16", softcap=2.0), "head"),
        (Case(queries=1000, head_dim=256), "group"),
        (Case(queries=1000, keys=4097, causal=False, batch=2, padding="left", dtype="fp16"), "group"),
    ),
]


def both(inputs, plan):
    return [by.estimate_unvisited(inputs.call, plan) for by in (triton_unvisited, unvisited)]


@pytest.mark.parametrize(("device", "case", "ranking_per"), CASES)
def test_the_same_is_left(device, case, ranking_per, build_plan, poison_empty):
    inputs = case.inputs(device)
    plan = build_plan(inputs, ranking_per=ranking_per, by="torch")
    ours, theirs = both(inputs, plan)
    # Products of float16 and bfloat16 are rounded where torch has them, and not in the kernel.
    accuracy = {"fp32": 1e-5, "fp16": 4e-3, "bf16": 3e-2}[case.dtype]
    torch.testing.assert_close(ours, theirs, atol=accuracy, rtol=accuracy)


@pytest.mark.parametrize("device", [INTERPRETED, CUDA])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
def test_what_is_no_number_is_visited(device, causal, build_plan, poison_empty):
    """NaN in a query, a key, a value; a ranking is visited up to such a value, or whole."""
    inputs = Case(queries=700, batch=2, heads=4, kv_heads=2, causal=causal).inputs(device)
    inputs.query[0, 1, 255] = torch.nan
    inputs.key[0, 1, 70, 3] = torch.inf
    plan = build_plan(inputs)
    inputs.value[1, 0, 40, 5] = torch.nan  # unknown to the plan, so that it stands anywhere
    ours, theirs = both(inputs, plan)
    assert theirs.isinf().any(), "no ranking holds such a value"
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
