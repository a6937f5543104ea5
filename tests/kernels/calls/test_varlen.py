"""Lengths that only the device knows: packed sequences that run exactly, whatever the lengths are.

On a CPU the host is made to believe that it cannot see them; kernels are interpreted.
"""

from itertools import pairwise

import pytest
import torch

import s2o_compile
from s2o_compile.kernels.calls import varlen
from s2o_compile.kernels.statistics import record_calls
from tests.conftest import CUDA, INTERPRETED
from tests.helpers.packings import Packing, assert_exact, config, in_pages, sinks_of

pytestmark = pytest.mark.filterwarnings("ignore:divide by zero", "ignore:All-NaN slice", "ignore:invalid value")

LENGTHS = ((1, 1), (3, 40), (0, 20), (130, 180), (7, 0), (5, 5))
PACKINGS = [
    Packing(lengths=LENGTHS),
    Packing(lengths=LENGTHS, sinks=True, softcap=5.0, heads=4, kv_heads=2),
    Packing(lengths=LENGTHS, window=30),
    Packing(lengths=LENGTHS, causal=False),
]


@pytest.fixture
def unread(monkeypatch):
    """Lengths that must not be read."""

    def read(_):
        raise AssertionError("the host waited for the device")

    monkeypatch.setattr(varlen.Packed, "on_host", False)
    monkeypatch.setattr(varlen.Packed, "read", read)


def run(packing, inputs, device, **options):
    query, key, value, *starts = packing.joined(inputs, device)
    starts = [x.to(device) for x in starts]
    return s2o_compile.attention_varlen(
        query, key, value, *starts, **packing.options(), sinks=sinks_of(inputs), return_lse=True,
        config=config(**{"implementation": "triton", "min_seq_len": 1000, **options}),
    )  # fmt: skip


@pytest.mark.parametrize("device", [INTERPRETED, CUDA])
@pytest.mark.parametrize("packing", PACKINGS, ids=str)
def test_exact_without_a_look_at_the_lengths(packing, device, unread):
    inputs = packing.inputs(device)
    assert_exact(packing, inputs, *run(packing, inputs, device))


@pytest.mark.parametrize("device", [INTERPRETED, CUDA])
def test_pages_as_well(device, unread):
    packing = Packing(lengths=tuple(pair for pair in LENGTHS if pair[1]))
    inputs = packing.inputs(device)
    query, key, value, starts, key_starts = packing.joined(inputs, device)
    cache, table, lengths = in_pages(key, value, key_starts, 16, "two")
    output, lse = s2o_compile.attention_paged(
        query, cache, table.to(device), starts.to(device), lengths.to(device), return_lse=True,
        config=config(implementation="triton", min_seq_len=1000),
    )  # fmt: skip
    assert_exact(packing, inputs, output, lse)


@pytest.mark.parametrize("device", [INTERPRETED, CUDA])
@pytest.mark.parametrize("starts", [[5, 90, 20, 400], [-3, 50, 50, 10**6], [0, 60, 60, 60], [100, 80, 60, 0]])
def test_lengths_that_are_none_touch_nothing_outside(starts, device, unread):
    """Tokens that exist are all that is read and written; queries of no sequence get zeros."""
    generator = torch.Generator().manual_seed(0)
    tokens = 100
    room = [torch.full((tokens + 200, 2, 16), float("nan")) for _ in range(3)]
    for x in room:
        x[100 : 100 + tokens] = torch.randn(tokens, 2, 16, generator=generator)
    inside = [x.to(device)[100 : 100 + tokens] for x in room]
    cu = torch.tensor(starts, device=device)
    options = {"config": config(implementation="triton", min_seq_len=1000)}
    output = s2o_compile.attention_varlen(*inside, cu, cu, **options)
    assert output.isfinite().all()
    held = torch.zeros(tokens, dtype=torch.bool)
    for first, last in pairwise(starts):
        held[max(first, 0) : max(last, 0)] = True
    assert not output.cpu()[~held].any()


@pytest.mark.parametrize("device", [INTERPRETED, CUDA])
def test_pages_that_none_has_stand_for_the_nearest(device, unread):
    query = torch.randn(4, 2, 16, device=device)
    cache = torch.randn(2, 8, 20, 2, 16, device=device)
    lengths = {"cu_seqlens_q": torch.tensor([0, 4], device=device), "seq_lens": torch.tensor([60], device=device)}
    options = {"config": config(implementation="triton", min_seq_len=1000), **lengths}
    wrong = torch.tensor([[-5, 3, 2**30]], device=device, dtype=torch.int32)
    actual = s2o_compile.attention_paged(query, cache, wrong, **options)
    assert torch.equal(actual, s2o_compile.attention_paged(query, cache, wrong.clamp(0, 7), **options))


@pytest.mark.parametrize("device", [INTERPRETED])
def test_lengths_are_read_for_recordings(device, monkeypatch):
    monkeypatch.setattr(varlen.Packed, "on_host", False)
    packing = Packing(lengths=((130, 300), (3, 40)))
    inputs = packing.inputs(device)
    with record_calls() as calls:
        run(packing, inputs, device)
    assert [(call.path, call.n_queries, call.n_keys) for call in calls] == [("dense", 130, 300), ("dense", 3, 40)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestOnGPU:
    @pytest.mark.parametrize("layout", ["heads_first", "two", "pair"])
    @pytest.mark.parametrize("page_len", [1, 16, 256])
    def test_pages_change_no_bit(self, layout, page_len):
        packing = Packing(
            lengths=((5000, 9000), (1, 300), (6000, 6000)), heads=8, kv_heads=2, head_dim=128, dtype="bf16"
        )
        inputs = packing.inputs("cuda")
        query, key, value, starts, key_starts = packing.joined(inputs, "cuda")
        cache, table, lengths = in_pages(key, value, key_starts, page_len, layout)
        for options in ({"tau": 0.5}, {"error": 0.02}):
            shared = {"return_lse": True, "config": s2o_compile.S2OConfig(min_seq_len=0, **options)}
            expected = s2o_compile.attention_varlen(query, key, value, starts, key_starts, **shared)
            actual = s2o_compile.attention_paged(query, cache, table.cuda(), starts, lengths, **shared)
            assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))

    def test_a_graph_records_lengths_of_the_device(self):
        packing = Packing(lengths=((40, 100), (3, 40), (100, 100)), head_dim=64, dtype="bf16")
        inputs = packing.inputs("cuda")
        query, key, value, starts, key_starts = packing.joined(inputs, "cuda")
        starts, key_starts = starts.cuda(), key_starts.cuda()
        expected = s2o_compile.attention_varlen(query, key, value, starts, key_starts, 128, 128)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            actual = s2o_compile.attention_varlen(query, key, value, starts, key_starts, 128, 128)
        graph.replay()
        assert torch.equal(actual, expected)
        starts[1:3] = torch.tensor([20, 23], device="cuda")
        key_starts[1:3] = torch.tensor([60, 100], device="cuda")
        graph.replay()
        assert torch.equal(actual, s2o_compile.attention_varlen(query, key, value, starts, key_starts, 128, 128))

    def test_chunks_keep_the_bits(self):
        packing = Packing(lengths=((20_000, 20_000),), heads=8, kv_heads=2, head_dim=128, dtype="bf16")
        inputs = packing.inputs("cuda")
        query, key, value, _, key_starts = packing.joined(inputs, "cuda")
        cache, table, _ = in_pages(key, value, key_starts, 16, "heads_first")
        kept = s2o_compile.PrefillCache()
        for start, stop in ((0, 8192), (8192, 16384), (16384, 20_000)):
            dims = s2o_compile.PrefillCache()
            shared = {"config": s2o_compile.S2OConfig(min_seq_len=0), "return_lse": True}
            arguments = query[start:stop], cache, table.cuda(), [0, stop - start], [stop]
            actual = s2o_compile.attention_paged(*arguments, chunks=kept, **shared)
            dims._once = dict(kept._once)
            expected = s2o_compile.attention_paged(*arguments, chunks=dims, **shared)
            assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
