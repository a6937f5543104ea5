"""What stands for the keys a tile leaves out: the mean value of exactly those keys that all its queries may see."""

import pytest
import torch

from s2o_compile.kernels.core.call import AttentionCall
from s2o_compile.kernels.core.mask import AttentionMask
from s2o_compile.kernels.core.options import OperatorOptions
from s2o_compile.kernels.core.plan import prefix_mask
from s2o_compile.kernels.dispatch import run
from s2o_compile.kernels.ranking import tail
from tests.conftest import CUDA, INTERPRETED, Case, exact_attention

SEGMENT = 128
CASES = [
    Case(queries=700, heads=4, kv_heads=2),
    Case(queries=300, keys=900),
    Case(queries=700, keys=300, offset=-100),
    Case(queries=400, keys=500, offset=900),
    Case(queries=300, keys=900, batch=2, padding="left"),
    Case(queries=700, causal=False, batch=2, padding="right"),
    Case(queries=700, causal=False),
    Case(queries=300, keys=500, causal=False),
    Case(queries=300, keys=500, causal=False, batch=2, padding="left"),
]


@pytest.mark.parametrize(
    ("device", "implementation"),
    [
        ("cpu", "torch"),
        *(pytest.param(*device.values, "triton", marks=device.marks) for device in (INTERPRETED, CUDA)),
    ],
)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_is_the_mean_of_the_prefix(case, device, implementation, poison_empty):
    by = tail
    if implementation == "triton":
        by = pytest.importorskip("s2o_compile.kernels.impl.triton.tail")
    inputs = case.inputs(device)
    mask, value = inputs.mask, inputs.value
    if mask.key_mask is not None:  # what is padding does not count, whatever it holds
        value = value.masked_fill(~mask.key_mask[:, None, :, None], torch.nan)
    found = by.tail_values(inputs.call.but(value=value), SEGMENT)
    prefix = prefix_mask(mask, case.queries, case.n_keys, SEGMENT, value.device).double().expand(case.batch, -1, -1)
    expected = prefix[:, None] @ inputs.value.double() / prefix.sum(-1).clamp(min=1)[:, None, :, None]
    torch.testing.assert_close(found, expected.float())


def test_own_values_do_not_enter():
    """However large, of bidirectional attention, too: what is added and taken away would leave its rounding."""
    value = torch.ones(1, 1, 512, 4)
    value[:, :, 200] = 1e12
    call = AttentionCall(query=value, key=value, value=value, mask=AttentionMask(), scale=1.0)
    found = tail.tail_values(call, SEGMENT)
    torch.testing.assert_close(found[:, :, 1], torch.ones(1, 1, 4))


def test_it_brings_the_output_closer():
    """Two thousand keys that matter little, and a tau that leaves some of them out."""
    inputs = Case(queries=2048, heads=2, kv_heads=1, head_dim=32).inputs()
    options = OperatorOptions(tau=0.3, min_seq_len=0, segment_len=SEGMENT)
    exact, _ = exact_attention(inputs)

    def error(share):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("s2o_compile.kernels.core.stop_rule.TAIL_SHARE", share)
            output, _ = run(inputs.call, options)
        return ((output - exact).norm() / exact.norm()).item()

    assert error(0.2) < 0.9 * error(0.0)


@pytest.mark.parametrize("device", [CUDA])  # on a CPU nothing refuses
def test_it_runs_under_deterministic_algorithms(device):
    inputs = Case(queries=700, heads=4, kv_heads=2).inputs(device)
    options = OperatorOptions(tau=1.0, min_seq_len=0, segment_len=SEGMENT)
    torch.use_deterministic_algorithms(True)
    try:
        output, _ = run(inputs.call, options)
    finally:
        torch.use_deterministic_algorithms(False)
    assert output.isfinite().all()
