"""Tables of blocks and gathered rows by kernels: those of torch."""

import pytest
import torch

pytest.importorskip("triton")

from s2o_compile.kernels.impl.flex import forward as flex_forward
from s2o_compile.kernels.impl.flex import layout as flex_layout
from s2o_compile.kernels.impl.flex import triton_layout
from tests.conftest import CUDA, INTERPRETED, Case


@pytest.mark.parametrize("device", [INTERPRETED, CUDA])
@pytest.mark.parametrize("blocks", [1, 7, 2100])
def test_the_same_table(device, blocks, poison_empty):
    chosen = torch.rand(2, 3, 4, blocks, generator=torch.Generator().manual_seed(0)) < 0.3
    chosen[0, 0, 0], chosen[0, 0, 1] = False, True
    (count, order), (expected, expected_order) = (
        by.block_table(chosen.to(device)) for by in (triton_layout, flex_layout)
    )
    assert torch.equal(count, expected)
    counts = torch.arange(blocks, device=count.device) < count[..., None]
    assert torch.equal(order.masked_fill(~counts, -1), expected_order.masked_fill(~counts, -1))
    assert order.dtype == count.dtype == torch.int32
    assert ((order >= 0) & (order < blocks)).all()


@pytest.mark.parametrize("device", [INTERPRETED, CUDA])
@pytest.mark.parametrize("head_dim", [24, 64])
def test_the_same_rows(device, head_dim, poison_empty):
    key = Case(queries=300, batch=2, kv_heads=2, head_dim=head_dim, dtype="fp16", layout="packed").inputs(device).key
    index = torch.randint(0, 300, (4, 640), generator=torch.Generator().manual_seed(0)).to(device)
    stop = torch.tensor([640, 384, 128, 256], dtype=torch.int32, device=index.device)
    taken, expected = triton_layout.take(key, index, stop), flex_forward.take(key, index)
    for row, end in enumerate(stop.tolist()):
        assert torch.equal(taken[row, :, :end], expected[row, :, :end])
        assert taken[row, :, end:].isnan().all(), "what no tile visits is copied"
