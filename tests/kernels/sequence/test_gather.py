"""Shards of several dtypes and layouts come together on every rank, whatever integers carry them."""

import pytest
import torch
import torch.distributed as dist

from s2o_compile.kernels.sequence.gather import Shard, _as_integers, start_gather
from s2o_compile.kernels.sequence.layout import Layout
from s2o_compile.kernels.sequence.ranks import Ranks
from tests.helpers.ranks import check_ranks


@pytest.mark.parametrize(
    ("x", "dim", "expected"),
    [
        (torch.zeros(1, 2, 5, 64, dtype=torch.bfloat16), 2, torch.int64),
        (torch.zeros(1, 5, 2, 64, dtype=torch.bfloat16).transpose(1, 2), 2, torch.int64),
        (torch.zeros(1, 2, 5, 64, dtype=torch.bfloat16)[..., 2:], 2, torch.int32),
        (torch.zeros(1, 2, 5, 63, dtype=torch.bfloat16), 2, torch.int16),
        (torch.zeros(1, 2, 5), 2, torch.int32),
        (torch.zeros(1, 2, 64, dtype=torch.bool), 2, torch.uint8),
        (torch.zeros(1, 2, 5, 64, dtype=torch.float8_e4m3fn), 2, torch.int64),
        (torch.zeros(2, 5, dtype=torch.complex128), 1, torch.complex128),
    ],
    ids=lambda x: str(tuple(x.shape)) if isinstance(x, torch.Tensor) else str(x),
)
def test_rows_as_integers(x, dim, expected):
    found = _as_integers(x, dim)
    assert found.dtype == expected
    assert found.shape[dim] == x.shape[dim]


def gathered(rank):
    generator = torch.Generator().manual_seed(0)
    layout = Layout.zigzag(37, 2, units=(4, 1))
    wholes = [
        torch.randn(1, 37, 2, 64, generator=generator).bfloat16().transpose(1, 2),
        torch.randn(2, 3, 37, generator=generator),
        torch.rand(1, 2, 37, generator=generator) > 0.5,
        torch.randn(2, 37, 3, generator=generator).double(),
        torch.randn(1, 2, 37, 8, generator=generator).to(torch.float8_e4m3fn).view(torch.uint8),
    ]
    dims = (2, 2, 2, 1, 2)
    shards = [Shard(layout.take(x, rank, dim), dim, layout) for x, dim in zip(wholes, dims, strict=True)]
    found, wait = start_gather(Ranks(dist.group.WORLD, "a test"), shards)
    wait()
    wait()  # once more does nothing
    return [torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(found, wholes, strict=True)]


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
def test_shards_of_several_tensors_in_one_exchange():
    assert check_ranks(gathered, 2) == [[True] * 5] * 2
