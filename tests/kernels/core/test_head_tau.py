"""A tau for each query head: every head stops by its own, in every implementation, however a call is cut."""

import pytest
import torch

from s2o_compile import S2OConfig, attention
from s2o_compile.kernels import planner as rank
from s2o_compile.kernels import reference as definition
from s2o_compile.kernels import schedule as slices
from s2o_compile.kernels.impl.torch import forward as torch_forward
from s2o_compile.kernels.statistics import record_calls
from s2o_compile.kernels.support.errors import InputError
from tests.conftest import CUDA, INTERPRETED, Case, assert_close, move_plan

pytestmark = pytest.mark.filterwarnings("ignore:divide by zero encountered:RuntimeWarning")  # interpreted, as elsewhere

CASE = Case(
    queries=900, heads=4, kv_heads=2, batch=2, padding="left", dtype="fp16"
)  # fp32 kernels take long to compile
TAUS = (0.0, 1.5, 0.2, 0.4)
DEVICES = [("cpu", "torch"), *(pytest.param(*p.values, "triton", marks=p.marks) for p in (INTERPRETED, CUDA))]


@pytest.fixture
def inputs_of(monkeypatch):
    """Inputs on a device, flat enough for tiles to stop here and there, in chunks of 128 keys."""
    monkeypatch.setattr(rank, "default_chunk_len", lambda _: 128)

    def make(device):
        inputs = CASE.inputs(device)
        inputs.query.mul_(0.2)
        return inputs

    return make


def run(inputs, tau, implementation):
    """Output, log-sum-exp and keys computed by tile."""
    config = S2OConfig(tau=tau, min_seq_len=0, segment_len=128, implementation=implementation)
    with record_calls() as calls:
        found = attention(
            *inputs.tensors,
            causal=True,
            key_mask=inputs.mask.key_mask,
            scale=inputs.scale,
            return_lse=True,
            config=config,
        )
    return *found, calls[0].computed


@pytest.mark.parametrize(("device", "implementation"), DEVICES)
def test_executors_equal_the_definition(device, implementation, inputs_of, build_plan):
    inputs = inputs_of(device)
    plan = build_plan(inputs, segment_len=128, chunk_len=128)
    if implementation == "triton":
        executor = pytest.importorskip("s2o_compile.kernels.impl.triton.forward")
    else:
        executor = torch_forward
    tau = torch.tensor(TAUS, device=device)
    actual = executor.attend(inputs.call, plan, tau)
    wide = inputs.to("cpu").to(torch.float64)
    expected = definition.attend(wide.call, move_plan(plan, "cpu"), torch.tensor(TAUS))
    assert actual.computed.tolist() == expected.computed.tolist()
    assert_close(actual, expected, inputs)
    assert len({tuple(head) for head in actual.computed[0].tolist()}) == len(TAUS)  # they do stop apart


@pytest.mark.parametrize(("device", "implementation"), [DEVICES[0], DEVICES[-1]])  # interpreted, it takes minutes
@pytest.mark.parametrize("scratch", [slices.SCRATCH_BYTES, 1])
def test_a_head_runs_as_if_all_had_its_tau(device, implementation, scratch, inputs_of, monkeypatch):
    if implementation == "triton":
        pytest.importorskip("triton")
    monkeypatch.setattr(slices, "SCRATCH_BYTES", scratch)
    monkeypatch.setattr(slices, "SCRATCH_SHARE", 2**40)
    inputs = inputs_of(device)
    together = run(inputs, TAUS, implementation)
    for head, tau in enumerate(TAUS):
        alone = run(inputs, tau, implementation)
        assert torch.equal(together[2][:, head], alone[2][:, head]), head
        for ours, theirs in zip(together[:2], alone[:2], strict=True):
            if implementation == "triton":
                assert torch.equal(ours[:, head], theirs[:, head]), head
            else:  # a CPU multiplies the tiles of all heads that go on at once, and sums as their number has it
                rounding = 4 * torch.finfo(ours.dtype).eps
                torch.testing.assert_close(ours[:, head], theirs[:, head], rtol=rounding, atol=rounding)


@pytest.mark.parametrize("taus", [TAUS[:3], (*TAUS, 1.0)])
def test_another_number_of_heads_is_refused(taus, inputs_of):
    with pytest.raises(InputError, match=f"tau.*one number, or 4, one for each query head.*got {len(taus)} numbers"):
        run(inputs_of("cpu"), taus, "torch")


@pytest.mark.parametrize("taus", [(), (0.5, -1.0), (0.5, float("nan")), (0.5, True), (0.5, "1")])
def test_what_is_no_tau_is_refused(taus):
    with pytest.raises(ValueError, match=r"tau.*finite numbers >= 0, one for each query head"):
        S2OConfig(tau=taus)
