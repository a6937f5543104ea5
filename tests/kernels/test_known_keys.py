"""What shards of the keys find out by themselves gives the plans of the whole call, bit for bit."""

from dataclasses import replace

import pytest
import torch

from s2o_compile.kernels import planner as plans
from s2o_compile.kernels.core.options import OperatorOptions
from s2o_compile.kernels.ranking.basis import FewKeys, dim_stride
from s2o_compile.kernels.schedule import cut
from s2o_compile.kernels.sequence.layout import Layout
from tests.conftest import CUDA, INTERPRETED, Case

SEGMENT, RANKS = 128, 2


def together(layout, shards):
    """The whole tensor [.., N, ..] in dimension 2 from those of all ranks."""
    whole = shards[0].new_empty(*shards[0].shape[:2], layout.length, *shards[0].shape[3:])
    for rank, shard in enumerate(shards):
        layout.put(shard, rank, whole, 2)
    return whole


def known_keys(call, options, implementation):
    """As ``calls/gathered.py`` makes it, without processes."""
    layout = Layout.zigzag(call.n_keys, RANKS, units=(SEGMENT,))
    made = plans.KeyShard(options, implementation)
    shards = []
    for rank in range(RANKS):
        key_mask = call.mask.key_mask
        key_mask = None if key_mask is None else layout.take(key_mask, rank, 1)
        tensors = (layout.take(x, rank, 2) for x in call.tensors)
        shards.append(call.over(*tensors, replace(call.mask, key_mask=key_mask)))
    few = None
    if made.compares_few:
        step = dim_stride(call.n_keys)
        query, key = (
            together(layout.every(step), [layout.samples(x, rank, step) for rank, x in enumerate(parts)])
            for parts in ([shard.query for shard in shards], [shard.key for shard in shards])
        )
        sampled = None if call.mask.key_mask is None else call.mask.key_mask[:, ::step].contiguous()
        basis = made.basis(call.over(query, key, call.value, replace(call.mask, key_mask=sampled)))
        few = FewKeys(basis, together(layout, [made.few_keys(shard, basis) for shard in shards]))
    blocks = [made.value_sums(shard, SEGMENT) for shard in shards]
    sums = tuple(together(layout.every(SEGMENT), list(column)) for column in zip(*blocks, strict=True))
    non_finite = together(layout, [made.non_finite(shard) for shard in shards])
    return plans.KnownKeys(few, non_finite, made.tail_values(call, SEGMENT, sums))


@pytest.mark.filterwarnings("ignore:divide by zero encountered:RuntimeWarning")  # as in impl/triton/test_forward.py
@pytest.mark.parametrize(
    ("device", "implementation", "ranking", "padding"),
    [
        ("cpu", "torch", "per_query", None),
        ("cpu", "torch", "per_query", "left"),
        ("cpu", "torch", "mean_query", "left"),
        pytest.param(*INTERPRETED.values, "triton", "per_query", "left", marks=[*INTERPRETED.marks, pytest.mark.slow]),
        pytest.param(*CUDA.values, "triton", "per_query", None, marks=CUDA.marks),
        pytest.param(*CUDA.values, "triton", "per_query", "left", marks=CUDA.marks),
    ],
    ids=str,
)
def test_plans_are_those_of_the_whole_call(device, implementation, ranking, padding):
    if implementation == "triton":
        pytest.importorskip("triton")
    inputs = Case(queries=600, keys=600, heads=4, kv_heads=2, batch=2, padding=padding).inputs(device)
    inputs.value[0, 1, 70, 3] = torch.nan
    options = OperatorOptions(min_seq_len=0, segment_len=SEGMENT, ranking=ranking)
    known = known_keys(inputs.call, options, implementation)
    whole = plans.Planner(inputs.call, options, implementation)
    shared = plans.Planner(inputs.call, options, implementation, known)
    for heads, rows in ((slice(0, 2), slice(0, 600)), (slice(1, 2), slice(256, 512))):
        part = cut(inputs.call, heads, rows)
        expected, found = (x.plan(part, heads, rows.start) for x in (whole, shared))
        assert torch.equal(found.prefix_count, expected.prefix_count)
        for b, s in torch.cartesian_prod(*map(torch.arange, expected.prefix_count.shape)).tolist():
            count = int(expected.prefix_count[b, s])
            assert torch.equal(found.key_index[b, :, s, :count], expected.key_index[b, :, s, :count])
        torch.testing.assert_close(found.tail_value, expected.tail_value, rtol=0, atol=0, equal_nan=True)
