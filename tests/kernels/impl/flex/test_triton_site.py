"""Tables of blocks for calls with functions of their own, by a kernel: those of ``flex_site.py``."""

import pytest
import torch

pytest.importorskip("triton")

from s2o_compile.kernels.impl.flex import triton_site
from s2o_compile.kernels.impl.flex import user_mods as flex_site
from tests.conftest import CUDA, INTERPRETED


@pytest.mark.parametrize("device", [INTERPRETED, CUDA])
@pytest.mark.parametrize("blocks", [1, 7, 2100])
def test_the_same_table(device, blocks, poison_empty):
    chosen = torch.rand(2, 3, 4, blocks, generator=torch.Generator().manual_seed(0)) < 0.3
    chosen[0, 0, 0], chosen[0, 0, 1] = False, True
    (count, order), (expected, expected_order) = (by.block_table(chosen.to(device)) for by in (triton_site, flex_site))
    assert torch.equal(count, expected)
    counts = torch.arange(blocks, device=count.device) < count[..., None]
    assert torch.equal(order.masked_fill(~counts, -1), expected_order.masked_fill(~counts, -1))
    assert order.dtype == count.dtype == torch.int32
    assert ((order >= 0) & (order < blocks)).all()
