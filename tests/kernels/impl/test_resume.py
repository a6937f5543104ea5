"""Tiles that go on with a lower tau: where they would have come in one go, but for the rounding of the output."""

import dataclasses
import itertools

import pytest
import torch

from s2o_compile.kernels.core.options import OperatorOptions
from s2o_compile.kernels.core.plan import TILE_LEN
from s2o_compile.kernels.core.result import empty_progress
from s2o_compile.kernels.impl.cpp import forward as cpp_forward
from s2o_compile.kernels.impl.torch import forward as torch_forward
from s2o_compile.kernels.planner import build_plan
from tests.conftest import CUDA, INTERPRETED, Case, on

try:
    from s2o_compile.kernels.impl.triton import forward as triton_forward
except ImportError:
    triton_forward = None

pytestmark = pytest.mark.filterwarnings("ignore:divide by zero encountered:RuntimeWarning")

EXECUTORS = {"torch": torch_forward, "cpp": cpp_forward} | ({"triton": triton_forward} if triton_forward else {})
SMALL = (
    Case(queries=420, heads=2, head_dim=32, dtype="fp16"),
    Case(queries=200, keys=520, heads=2, head_dim=32, softcap=5.0, padding="left"),
    Case(queries=400, heads=1, head_dim=32, value_dim=320),
)
LARGE = (
    Case(queries=4000, batch=2, heads=4, kv_heads=2, head_dim=128, dtype="bf16"),
    Case(queries=4000, heads=2, head_dim=64, dtype="fp16"),
    Case(queries=3000, heads=4, kv_heads=1, head_dim=256, dtype="bf16", softcap=20.0),
)
CPU = pytest.param("cpu", marks=[])
GROUPED = (Case(queries=900, batch=2, heads=4, kv_heads=2), Case(queries=700, keys=900, heads=4, kv_heads=1))
CASES = [
    *on(CPU, *itertools.product(("torch", "cpp"), (*SMALL, *GROUPED))),
    *(on(INTERPRETED, *(("triton", case) for case in SMALL)) if triton_forward else ()),
    *(on(CUDA, *(("triton", case) for case in LARGE)) if triton_forward else ()),
]


def begun(executor, case, device, segment_len=TILE_LEN):
    """The executor, a call, its plan, and the results and state of a first visit with a large tau."""
    forward = EXECUTORS[executor]
    call = case.inputs(device).call.for_kernels()
    plan = build_plan(call, OperatorOptions(segment_len=segment_len, min_seq_len=0), executor.replace("cpp", "torch"))
    plan = dataclasses.replace(plan, chunk_len=128)
    progress = empty_progress(call.query)
    first = forward.attend(call, plan, taus(call, 2.0), None, progress)
    return forward, call, plan, first, progress


def taus(call, *by_head):
    batch, heads = call.query.shape[:2]
    by_head = by_head * heads if len(by_head) == 1 else by_head
    return torch.tensor(by_head, device=call.query.device).expand(batch, -1).contiguous()


def go_on(forward, call, plan, tau, into, progress):
    forward.going_on(call, plan, tau, into, progress)()
    return into


def assert_same(found, expected, dtype):
    assert torch.equal(found.computed, expected.computed)
    tolerance = {"fp32": 1e-5, "fp16": 2e-3, "bf16": 1e-2}[dtype]
    torch.testing.assert_close(found.output.float(), expected.output.float(), rtol=0, atol=3 * tolerance)
    torch.testing.assert_close(found.lse, expected.lse, rtol=1e-5, atol=tolerance)


@pytest.mark.parametrize(("device", "executor", "case"), CASES)
def test_goes_on_to_a_lower_tau(device, executor, case):
    forward, call, plan, first, progress = begun(executor, case, device)
    before = first.computed.clone()
    direct = forward.attend(call, plan, 0.4)
    found = go_on(forward, call, plan, taus(call, 0.4), first, progress)
    assert (found.computed > before).any(), "some tile goes on"
    assert_same(found, direct, case.dtype)


@pytest.mark.parametrize(("device", "executor", "case"), CASES)
def test_goes_on_to_all_keys(device, executor, case):
    forward, call, plan, first, progress = begun(executor, case, device)
    found = go_on(forward, call, plan, taus(call, 0.4), first, progress)
    found = go_on(forward, call, plan, taus(call, 0.0), found, progress)
    assert (progress.unvisited == -1).all()
    assert_same(found, forward.attend(call, plan, 0.0), case.dtype)


@pytest.mark.parametrize(("device", "executor", "case"), CASES)
def test_a_round_reads_tau_anew(device, executor, case):
    """Later rounds repeat the launches of the first."""
    forward, call, plan, first, progress = begun(executor, case, device)
    tau = taus(call, torch.inf)
    again = forward.going_on(call, plan, tau, first, progress)
    before = first.computed.clone()
    again()
    assert torch.equal(first.computed, before)
    for limit in (0.4, 0.0):
        tau.fill_(limit)
        again()
        assert_same(first, forward.attend(call, plan, limit), case.dtype)


@pytest.mark.parametrize(("device", "executor", "case"), [row for row in CASES if "H1-" not in row.id])
def test_an_infinite_tau_leaves_a_head_as_it_is(device, executor, case):
    forward, call, plan, first, progress = begun(executor, case, device)
    before = [x.clone() for x in first]
    heads = call.query.shape[1]
    found = go_on(forward, call, plan, taus(call, 0.0, *[torch.inf] * (heads - 1)), first, progress)
    for x, old in zip(found, before, strict=True):
        assert torch.equal(x[:, 1:], old[:, 1:])
    assert (found.computed[:, 0] > before[2][:, 0]).any()


@pytest.mark.gpu  # interpreted, numpy warns of the overflow
def test_a_tile_that_overflowed_has_no_key_left():
    """Logits that grow along the ranking leave weights that no fixed reference holds: such a tile is exact at once."""
    forward, call, plan, _, _ = begun("triton", Case(queries=900, heads=1), "cuda")
    query, key = call.query.clone(), call.key.clone()
    query[:, :, 800:] = 30.0
    key[:, :, :400] = 30.0
    call = call.but(query=query, key=key)
    progress = empty_progress(call.query)
    found = forward.attend(call, plan, taus(call, 2.0), None, progress)
    exact = forward.attend(call, plan, 0.0)
    torch.testing.assert_close(found.output[:, :, 800:], exact.output[:, :, 800:], rtol=1e-4, atol=1e-4)
    again = [x.clone() for x in found]
    go_on(forward, call, plan, taus(call, 0.0), found, progress)
    assert torch.equal(found.output[:, :, 896:], again[0][:, :, 896:])


def test_tiles_of_a_segment_stop_and_go_on_apart():
    """A segment of several tiles: some go on, from different chunks, while others stay."""
    case = Case(queries=2048, heads=2, kv_heads=1)
    forward, call, plan, first, progress = begun("torch", case, "cpu", segment_len=512)
    before = first.computed.clone()
    for limit in (1.0, 0.5, 0.25, 0.0):
        go_on(forward, call, plan, taus(call, limit), first, progress)
        assert_same(first, forward.attend(call, plan, limit), case.dtype)
    assert len((first.computed - before)[0].unique()) > 2
