"""Calls at a held density: a kernel cuts lists as `cut_to_density` does, and no cut launches are left behind."""

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import cut
from s2o_compile.cli.tune import cut_to_density
from s2o_compile.kernels import prepared
from s2o_compile.kernels.core.options import OperatorOptions
from s2o_compile.kernels.planner import build_plan
from tests.conftest import CUDA, INTERPRETED, Case


@pytest.mark.parametrize("device", [INTERPRETED, CUDA])
@pytest.mark.parametrize(("density", "causal"), [(0.3, True), (0.6, True), (0.3, False)])
def test_a_kernel_cuts_lists_as_torch_does(density, causal, device):
    length = 3000
    inputs = Case(queries=length, batch=2, heads=4, kv_heads=2, causal=causal).inputs().to(device)
    plan = build_plan(inputs.call, OperatorOptions(segment_len=256), "torch")
    found, expected = (by(plan, density, length, causal=causal) for by in (cut.by_kernel, cut_to_density))
    assert torch.equal(found.prefix_count, expected.prefix_count)
    assert 0 < expected.prefix_count.sum() < plan.prefix_count.sum()


def test_no_launches_of_cut_lists_are_left_behind(monkeypatch):
    """A benchmark goes on behind a row that failed."""
    monkeypatch.setattr(sys, "path", [str(Path(cut.__file__).parent), *sys.path])  # as its scripts run
    calls = pytest.importorskip("calls")
    forgotten = []
    monkeypatch.setattr(prepared, "forget", lambda: forgotten.append(1))
    with pytest.raises(RuntimeError, match="a row"), calls.held_density(0.1, 300):
        raise RuntimeError(f"a row, behind {len(forgotten)}")
    assert len(forgotten) == 2
