"""Which positions are whose: every one is somebody's, pieces begin where segments do, and the work is even."""

import pytest
import torch

from s2o_compile import InputError
from s2o_compile.kernels.sequence.layout import Layout


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


def test_head_tail_as_torch_cuts_its_buffers():
    layout = Layout.zigzag(64, 2, units=(1,), turns=1)
    assert layout.pieces == ((slice(0, 16), slice(48, 64)), (slice(16, 32), slice(32, 48)))


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
