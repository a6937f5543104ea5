"""How many queries rank the keys of a segment: fewer of small heads in bfloat16 on a CPU, where attention is cheap."""

import pytest
import torch

from s2o_compile.kernels.core.call import AttentionCall
from s2o_compile.kernels.impl.aot import cpu_forward
from s2o_compile.kernels.ranking.per_query import scored_positions, scored_rows


@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "shared", "rows"),
    [
        ("cpu", torch.float32, 64, 3, 256),
        ("cpu", torch.bfloat16, 64, 3, 128),
        ("cpu", torch.bfloat16, 128, 4, 256),
        ("cpu", torch.bfloat16, 256, 4, 256),
        ("cpu", torch.bfloat16, 16, 8, 128),  # a whole tile at least
        ("cpu", torch.bfloat16, 64, 1, 512),  # all
        ("cuda", torch.bfloat16, 64, 4, 512),
        ("cuda", torch.bfloat16, 64, 8, 256),
    ],
)
def test_rows_of_each_head(device, dtype, head_dim, shared, rows):
    assert scored_rows(torch.empty(1, head_dim, dtype=dtype), 512, shared, torch.device(device)) == rows


def test_heads_rank_by_queries_of_their_own():
    positions = scored_positions(torch.empty(1, 64, dtype=torch.bfloat16), 512, 3)
    assert positions.shape == (3, 128)
    assert (positions[:, 1:] > positions[:, :-1]).all()
    assert positions.unique().numel() == positions.numel()
    assert positions.min() == 0
    assert 504 < positions.max() < 512


def test_packages_rank_by_as_many(monkeypatch):
    """They compute in float32 throughout."""
    query, key, value = (torch.randn(1, 2, 2048, 32, dtype=torch.bfloat16) for _ in range(3))
    call = AttentionCall.of(query, key, value, None, causal=True, causal_offset=None, scale=0.2, softcap=None)
    spread, rows = cpu_forward.scored_positions, set()

    def counted(*given):
        positions = spread(*given)
        rows.add(positions.shape[1])
        return positions

    monkeypatch.setattr(cpu_forward, "scored_positions", counted)
    cpu_forward.attend(call, [0.1, 0.1], 1024)
    assert rows == {spread(query, 1024, 1).shape[1]} == {256}
