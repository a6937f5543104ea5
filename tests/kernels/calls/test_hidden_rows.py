"""Rows that a mask which is read hides: their output is made behind the operator, so their error counts nowhere."""

import pytest
import torch

import s2o_compile
from s2o_compile.kernels.exact.sampled import sample_rows
from tests.conftest import CUDA

LENGTH = 1500


def run(mask, device, **options):
    """Output, its recorded error, and the exact output."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, LENGTH, 16, generator=generator).to(device).unbind(0)
    mask = mask.to(device)
    with s2o_compile.record() as recording:
        output, _ = torch.ops.s2o.masked_attention(q, k, v, mask, min_seq_len=0, segment_len=128, **options)
    (call,) = recording.calls
    assert call.path == "s2o"
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return output, call.error, exact


def hiding(batch):
    """A causal mask without the rows of the second half, but for a few."""
    rows = torch.arange(LENGTH)
    shown = (rows < LENGTH // 2) | (rows % 16 == 0)
    shown = torch.stack((shown, shown.roll(7)))[:batch]
    shown[:, :8] = shown[:, -1] = True  # the last row shows the keys in use
    return torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril() & shown[:, None, :, None]


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("batch", [1, 2], ids=["shared", "own"])
@torch.no_grad()
def test_the_recorded_error_is_that_of_the_rows_that_are_seen(batch, device):
    output, error, exact = run(hiding(batch), device, tau=2.0)
    rows = sample_rows(LENGTH, output.device)
    difference, power = ((x[:, :, rows] ** 2).sum() for x in (output - exact, exact))  # hidden rows are zeros in both
    assert error > 0.01
    torch.testing.assert_close(error, (difference / power).sqrt().item(), atol=1e-4, rtol=1e-4)
