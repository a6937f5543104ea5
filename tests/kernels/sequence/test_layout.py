"""Which positions are whose: every one is somebody's, pieces begin where segments do, and the work is even."""

import pytest
import torch
import torch.distributed as dist

from s2o_compile import InputError
from s2o_compile.kernels.sequence.layout import Layout
from tests.helpers.ranks import check_ranks


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("length", [64, 1000, 4096, 5000, 131072, 1048576 + 77])
def test_every_position_is_somebodys(length, ranks):
    layout = Layout.zigzag(length, ranks, units=(1024, 128, 1))
    positions = torch.cat([layout.positions(rank) for rank in range(ranks)])
    assert torch.equal(positions.sort().values, torch.arange(length))
    assert all(piece.start < piece.stop for pieces in layout.pieces for piece in pieces)
    assert all(pieces == tuple(sorted(pieces, key=lambda piece: piece.start)) for pieces in layout.pieces)
    assert layout.starts_segments(1024) or length < 2 * ranks * 1024
    assert layout.causal_imbalance < (1.001 if length == 131072 and ranks != 3 else 1.5)


def test_shards_and_back():
    layout = Layout.zigzag(37, 2, units=(4, 1))
    x, whole = torch.randn(2, 37, 3), torch.zeros(2, 37, 3)
    for rank in range(2):
        shard = layout.take(x, rank, 1)
        assert torch.equal(shard, x[:, layout.positions(rank)])
        layout.put(shard, rank, whole, 1)
    assert torch.equal(whole, x)


def of_torch(rank):
    """Torch's shard and ours, of positions [N] and of keys [B, H, N, D], and torch's own way back."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.experimental import _attention as torch_cp

    from s2o_compile.distributed import shard_sequence

    size = dist.get_world_size()
    mesh, length = init_device_mesh("cpu", (size,)), 24 * size
    buffers, dims = (
        [torch.arange(length), torch.randn(2, 3, length, 4, generator=torch.Generator().manual_seed(1))],
        [0, 2],
    )
    balancer = torch_cp._HeadTailLoadBalancer(length, size, torch.device("cpu"))
    shards = torch_cp._context_parallel_shard(mesh, buffers, dims, balancer)
    sequence = shard_sequence(mesh, length, order="head_tail")
    ours = [sequence.shard(x, dim) for x, dim in zip(buffers, dims, strict=True)]
    whole = [sequence.gather(x, dim) for x, dim in zip(shards, dims, strict=True)]
    return [
        all(map(torch.equal, shards, ours)),
        torch.equal(sequence.positions(), shards[0]),
        all(map(torch.equal, whole, buffers)),
    ]


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
@pytest.mark.parametrize("ranks", [2, 4])
def test_head_tail_as_torch_cuts_its_buffers(ranks):
    torch_cp = pytest.importorskip("torch.distributed.tensor.experimental._attention")
    missing = [name for name in ("_context_parallel_shard", "_HeadTailLoadBalancer") if not hasattr(torch_cp, name)]
    if missing:
        pytest.skip(f"this torch has no {' and no '.join(missing)}")
    assert check_ranks(of_torch, ranks) == [[True] * 3] * ranks


def test_many_ranks_get_eight_pieces_each():
    assert [len(pieces) for pieces in Layout.zigzag(131072, 8, units=(1024, 128, 1)).pieces] == [8] * 8
    assert [len(pieces) for pieces in Layout.zigzag(131072, 4, units=(1024, 128, 1)).pieces] == [4] * 4
    assert [len(pieces) for pieces in Layout.zigzag(16 * 1024, 8, units=(1024, 128, 1)).pieces] == [2] * 8


@pytest.mark.parametrize(("length", "step"), [(64, 4), (70, 3), (37, 16)])
def test_samples_of_all_ranks_are_those_of_the_sequence(length, step):
    layout = Layout.zigzag(length, 2, units=(4, 1))
    x = torch.arange(float(length)).view(1, 1, length, 1)
    every = layout.every(step)
    found = torch.zeros(1, 1, every.length, 1)
    for rank in range(2):
        every.put(layout.samples(layout.take(x, rank, 2), rank, step), rank, found, 2)
    assert torch.equal(found, x[:, :, ::step])


def test_a_sequence_that_is_too_short():
    with pytest.raises(InputError, match=r"expected at least 8 tokens for 4 ranks, got 7"):
        Layout.zigzag(7, 4, units=(128, 1))
