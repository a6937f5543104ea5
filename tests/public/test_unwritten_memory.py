"""Whatever fresh memory holds, results have the same bits: nothing that a user gets was left unwritten."""

import contextlib
from dataclasses import replace

import pytest
import torch

import s2o_compile
from s2o_compile import S2OConfig
from tests.conftest import INTERPRETED

LENGTH = 700
MASK = torch.ones(2, LENGTH, dtype=torch.bool)
MASK[0, :90] = False
IMPLEMENTATIONS = ["torch", "cpp", pytest.param("triton", marks=[*INTERPRETED.marks, pytest.mark.slow])]
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero", "ignore:All-NaN slice", "ignore:invalid value")


@contextlib.contextmanager
def full_of_nan():
    """Fresh floating-point memory holds NaN, integers their greatest number."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(9).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def plans(q, k, v, config):
    plan = s2o_compile.plan(q, k, v, causal=True, key_mask=MASK, config=config)
    unreal = torch.arange(plan.key_index.shape[3]) >= plan.prefix_count[:, None, :, None]
    assert (plan.key_index == -1).equal(unreal.expand_as(plan.key_index))
    assert unreal.any()
    again = s2o_compile.attention(q, k, v, causal=True, key_mask=MASK, plan=plan, config=config)
    return plan.key_index, plan.prefix_count, plan.unvisited, plan.block_counts(), again


def packed(q, k, v, config):
    starts = torch.tensor([0, 300, 300, LENGTH])
    given = [x[0].transpose(0, 1) for x in (q, k, v)]
    return s2o_compile.attention_varlen(*given, starts, starts, return_lse=True, config=config)


def paged(q, k, v, config):
    pages = [x[0].transpose(0, 1).reshape(7, 100, *x.shape[1::2]) for x in (k, v)]
    cache, query, chunks = tuple(pages), q[0].transpose(0, 1), s2o_compile.PrefillCache()
    table = torch.arange(7, dtype=torch.int32)[None]
    options = {"chunks": chunks, "config": config, "return_lse": True}
    ends = [(0, 256), (256, LENGTH)]
    found = [s2o_compile.attention_paged(query[a:b], cache, table, [0, b - a], [b], **options) for a, b in ends]
    return [x for pair in found for x in pair]


ENTRIES = {
    "causal": lambda *x, config: s2o_compile.attention(*x, causal=True, return_lse=True, config=config),
    "padding": lambda *x, config: s2o_compile.attention(*x, key_mask=MASK, return_lse=True, config=config),
    "error": lambda *x, config: [s2o_compile.attention(*x, causal=True, config=replace(config, tau=None, error=0.05))],
    "plan": plans,
    "packed": packed,
    "paged": paged,
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES)
def test_it_has_the_same_bits(entry, implementation):
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(2, heads, LENGTH, 16, generator=generator) for heads in (4, 2, 2)]
    config = S2OConfig(tau=1.0, min_seq_len=0, segment_len=128, implementation=implementation)
    with torch.no_grad():
        found = entry(*given, config=config)
        with full_of_nan():
            again = entry(*given, config=config)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
