"""The layout of FlexAttention by kernels: number by number that of ``flex_layout.py``."""

import pytest
import torch

pytest.importorskip("triton")

from s2o_compile.kernels.impl.flex import forward as flex_forward
from s2o_compile.kernels.impl.flex import layout as flex_layout
from s2o_compile.kernels.impl.flex import triton_layout
from tests.conftest import CUDA, INTERPRETED, Case, on

RANKING_PER = (
    (Case(queries=1000, batch=2, heads=4, kv_heads=2, head_dim=16), 128, 1),
    (Case(queries=1000, heads=3, kv_heads=1, head_dim=16, padding="left"), 256, 4),
    (Case(queries=700, heads=2, kv_heads=2, head_dim=16, causal=False), 128, 1),
    (Case(queries=200, keys=700, head_dim=16), 128, 4),
    (Case(queries=700, offset=45, head_dim=16), 128, 1),
    (Case(queries=700, keys=300, head_dim=16), 256, 4),
    (Case(queries=100, head_dim=16), 128, 0),
)


@pytest.mark.parametrize(
    ("device", "case", "segment_len", "pool"), on(INTERPRETED, *RANKING_PER) + on(CUDA, *RANKING_PER)
)
def test_the_same_layout(device, case, segment_len, pool, build_plan, poison_empty):
    pool *= -(-case.n_keys // flex_layout.BLOCK_LEN)
    inputs = case.inputs(device)
    plan = build_plan(inputs, segment_len=segment_len)
    blocks = plan.key_index.shape[3] // flex_layout.BLOCK_LEN
    shape = case.batch, case.heads, case.kv_heads, case.queries, case.n_keys
    generator = torch.Generator().manual_seed(0)
    visits = torch.randint(0, blocks + 2, (case.batch, case.heads, plan.n_segments), generator=generator)
    for visited in (visits, visits // 4, torch.full_like(visits, torch.iinfo(torch.int32).max // 128)):
        visited = visited.to(device, torch.int32)
        expected = flex_layout.lay_out(
            inputs.mask, shape=shape, device=inputs.query.device, plan=plan, visits=visited, pool=pool
        )
        layout = triton_layout.lay_out(inputs.mask, inputs.query, case.n_keys, plan, visited, pool)
        for name, ours, theirs in zip(layout._fields, layout, expected, strict=True):
            assert torch.equal(ours, theirs), name
            assert ours.dtype == theirs.dtype, name
            assert ours.is_contiguous(), name


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
