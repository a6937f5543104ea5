"""Sparse sequences by lengths that only the device knows: the bits of the same call with lengths of the host.

On a CPU the host is made to believe that it cannot see them; kernels are interpreted.
"""

from itertools import pairwise

import pytest
import torch

import s2o_compile
from s2o_compile.kernels.calls import varlen
from tests.conftest import CUDA, INTERPRETED, quick_rows
from tests.helpers.packings import Packing, assert_exact, config, in_pages, sinks_of

pytestmark = pytest.mark.filterwarnings("ignore:divide by zero", "ignore:All-NaN slice", "ignore:invalid value")

LENGTHS = ((3, 40), (200, 260), (0, 20), (2, 0), (130, 300))
"""The second and the last are sparse from 250 keys on."""

CASES = {
    "one sparse": ({"lengths": ((3, 40), (0, 20), (130, 250), (2, 0))}, {"tau": 2.0}),
    "tau": ({}, {"tau": 2.0}),
    "budget": ({}, {"error": 0.05}),
    "sinks": ({"sinks": True, "softcap": 5.0, "heads": 4, "kv_heads": 2}, {"tau": 2.0}),
    "everything visible": ({"causal": False}, {"tau": 2.0}),
    "a window that hides nothing": ({"window": 300}, {"tau": 2.0}),
    "a window": ({"window": 30}, {"tau": 2.0}),
    "groups of heads": ({"heads": 4, "kv_heads": 2, "value_dim": 8}, {"tau": 2.0, "ranking_per": "head"}),
}


@pytest.fixture
def unread(monkeypatch):
    """Gives what makes lengths unreadable from then on."""

    def read(_):
        raise AssertionError("the host waited for the device")

    def hide():
        monkeypatch.setattr(varlen.Packed, "on_host", False)
        monkeypatch.setattr(varlen.Packed, "read", read)

    return hide


def options_of(packing, inputs, **options):
    made = config(**{"implementation": "triton", "min_seq_len": 250, **options})
    return {**packing.options(), "sinks": sinks_of(inputs), "return_lse": True, "config": made}


def assert_same(packing, actual, expected):
    """Equal bits; of queries without keys the log-sum-exp of either call is that of a sink, or -inf.

    Sinks are put in by torch. On a CPU its sigmoid and logaddexp round otherwise where a row ends: 4 to 8 % of numbers.
    """
    rounded = packing.sinks and not actual[0].is_cuda
    equal = torch.allclose if rounded else torch.equal
    assert equal(actual[0], expected[0])
    first = 0
    for queries, keys in packing.lengths:
        rows = slice(first, first + queries)
        assert not keys or equal(actual[1][:, rows], expected[1][:, rows])
        first += queries


@pytest.mark.parametrize("device", [INTERPRETED, CUDA])
@pytest.mark.parametrize("name", quick_rows(CASES, ["one sparse"]))
def test_the_bits_of_lengths_that_the_host_knows(name, device, unread):
    fields, options = CASES[name]
    packing = Packing(**{"lengths": LENGTHS, **fields})
    inputs = packing.inputs(device)
    query, key, value, starts, key_starts = packing.joined(inputs, device)
    shared = options_of(packing, inputs, **options)
    expected = s2o_compile.attention_varlen(query, key, value, starts, key_starts, **shared)
    unread()
    lengths = starts.to(device), key_starts.to(device)
    bounds = (200, 300) if packing.window == 300 else ()  # without bounds it might hide keys
    assert_same(packing, s2o_compile.attention_varlen(query, key, value, *lengths, *bounds, **shared), expected)


@pytest.mark.slow
@pytest.mark.parametrize("device", [INTERPRETED, CUDA])
def test_rows_whose_numbers_lie_apart(device, unread):
    packing = Packing(lengths=((3, 40), (130, 260)))
    inputs = packing.inputs(device)
    *tensors, starts, key_starts = packing.joined(inputs, device)
    shared = options_of(packing, inputs, tau=2.0)
    expected = s2o_compile.attention_varlen(*tensors, starts, key_starts, **shared)
    unread()
    apart = [x.mT.contiguous().mT for x in tensors]
    lengths = starts.to(device), key_starts.to(device)
    assert_same(packing, s2o_compile.attention_varlen(*apart, *lengths, 130, 260, **shared), expected)


@pytest.mark.slow
@pytest.mark.parametrize("device", [INTERPRETED, CUDA])
def test_pages_as_well(device, unread):
    packing = Packing(lengths=tuple(pair for pair in LENGTHS if pair[1]))
    inputs = packing.inputs(device)
    query, key, value, starts, key_starts = packing.joined(inputs, device)
    cache, table, lengths = in_pages(key, value, key_starts, 16, "two")
    shared = options_of(packing, inputs, tau=2.0)
    expected = s2o_compile.attention_paged(query, cache, table, starts, lengths, **shared)
    unread()
    found = s2o_compile.attention_paged(
        query, cache, table.to(device), starts.to(device), lengths.to(device), 200, 300, **shared
    )
    assert_same(packing, found, expected)


@pytest.mark.parametrize("device", [INTERPRETED, CUDA])
def test_sequences_longer_than_the_bounds_run_exactly(device, unread, poison_empty):
    unread()
    packing = Packing(lengths=((140, 160), (150, 150)), heads=1)
    inputs = packing.inputs(device)
    query, key, value, *starts = packing.joined(inputs, device)
    starts = [x.to(device) for x in starts]
    shared = options_of(packing, inputs, tau=9.0, min_seq_len=0)
    assert_exact(packing, inputs, *s2o_compile.attention_varlen(query, key, value, *starts, 130, 140, **shared))


@pytest.mark.parametrize("device", [INTERPRETED, CUDA])
@pytest.mark.parametrize(
    "starts",
    [
        pytest.param([0, 128, 90, 400], marks=pytest.mark.slow),
        pytest.param([-3, 140, 140, 10**6], marks=pytest.mark.slow),
        pytest.param([150, 20, 150, 0], marks=pytest.mark.slow),
        [140, 140, -7, 10**6],
    ],
)
def test_lengths_that_are_none_touch_nothing_outside(starts, device, unread):
    """Tokens that exist are all that is read and written; queries of no sequence get zeros."""
    unread()
    generator = torch.Generator().manual_seed(0)
    tokens = 150
    room = [torch.full((tokens + 200, 2, 16), float("nan")) for _ in range(3)]
    for x in room:
        x[100 : 100 + tokens] = torch.randn(tokens, 2, 16, generator=generator)
    inside = [x.to(device)[100 : 100 + tokens] for x in room]
    around = torch.full((tokens + 200, 2, 16), 7.0, device=device)
    cu = torch.tensor(starts, device=device)
    options = {"config": config(implementation="triton", tau=2.0)}
    output = s2o_compile.attention_varlen(*inside, cu, cu, **options)
    assert output.isfinite().all()
    held = torch.zeros(tokens, dtype=torch.bool)
    for first, last in pairwise(starts):
        held[max(first, 0) : max(last, 0)] = True
    assert not output.cpu()[~held].any()
    cache = torch.stack(inside[1:]).view(2, 15, 10, 2, 16)
    table = torch.tensor([[-9, 3, 2**30, *range(12)]] * (len(starts) - 1), device=device, dtype=torch.int32)
    lengths = torch.tensor([140, -5, 10**6][: len(starts) - 1], device=device)
    out = around[100 : 100 + tokens]
    s2o_compile.attention_paged(inside[0], cache, table, cu, lengths, out=out, **options)
    assert out.isfinite().all()
    assert (around[:100] == 7).all()
    assert (around[100 + tokens :] == 7).all()


@pytest.mark.parametrize("device", [INTERPRETED, CUDA])
@pytest.mark.parametrize("starts", [[0], [0, 0, 0]])
def test_no_sequence_and_no_token(starts, device, unread):
    unread()
    empty = torch.zeros(0, 4, 16, device=device), *torch.zeros(2, 0, 2, 16, device=device)
    starts = torch.tensor(starts, device=device)
    output, lse = s2o_compile.attention_varlen(
        *empty, starts, starts, return_lse=True, config=config(implementation="triton")
    )
    assert output.shape == (0, 4, 16)
    assert lse.shape == (4, 0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestOnGPU:
    PACKINGS = (((3000, 9000), (1, 300), (6000, 6000)), ((500, 700), (8501, 8501), (0, 6099)), ((9001, 15300),) * 1)

    def both(self, packing, options):
        inputs = packing.inputs("cuda")
        query, key, value, starts, key_starts = packing.joined(inputs, "cuda")
        return query, key, value, starts, key_starts, {"return_lse": True, "config": s2o_compile.S2OConfig(**options)}

    @pytest.mark.parametrize("options", [{"tau": 0.5}, {"error": 0.02}], ids=["tau", "budget"])
    @pytest.mark.parametrize("page_len", [0, 16])
    def test_the_bits_at_the_sizes_of_prompts(self, options, page_len):
        packing = Packing(lengths=self.PACKINGS[0], heads=8, kv_heads=2, head_dim=128, dtype="bf16")
        options = {"min_seq_len": 4096, "segment_len": 512, **options}
        query, key, value, starts, key_starts, shared = self.both(packing, options)
        if page_len:
            cache, table, lengths = in_pages(key, value, key_starts, page_len, "two")
            on_host = query, cache, table.cuda(), starts, lengths
            on_device = query, cache, table.cuda(), starts.cuda(), lengths.cuda()
            attend = s2o_compile.attention_paged
        else:
            on_host, on_device = (
                (query, key, value, starts, key_starts),
                (query, key, value, starts.cuda(), key_starts.cuda()),
            )
            attend = s2o_compile.attention_varlen
        expected = attend(*on_host, **shared)
        torch.cuda.set_sync_debug_mode("error")
        try:
            actual = attend(*on_device, 6000, 9000, **shared)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))

    @pytest.mark.parametrize("options", [{"tau": 0.5}, {"error": 0.02}], ids=["tau", "budget"])
    def test_a_graph_is_replayed_with_other_lengths(self, options):
        made = []
        for lengths in self.PACKINGS:
            lengths = (*lengths, *[(0, 0)] * (3 - len(lengths)))
            packing = Packing(lengths=lengths, heads=8, kv_heads=2, head_dim=128, dtype="bf16")
            made.append(self.both(packing, {"min_seq_len": 4096, "segment_len": 512, **options}))
        query, key, value, starts, key_starts, shared = made[0]
        shared = {**shared, "max_seqlen_q": 9001, "max_seqlen_k": 15300}
        buffers = [x.clone() for x in (query, key, value)]
        lengths = starts.cuda(), key_starts.cuda()
        s2o_compile.attention_varlen(*buffers, *lengths, **shared)  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            actual = s2o_compile.attention_varlen(*buffers, *lengths, **shared)
        for *tensors, starts, key_starts, _ in made:
            for buffer, x in zip((*buffers, *lengths), (*tensors, starts, key_starts), strict=True):
                buffer.copy_(x)
            graph.replay()
            expected = s2o_compile.attention_varlen(*tensors, starts.cuda(), key_starts.cuda(), **shared)
            assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))

    def test_a_call_that_reads_lengths_cannot_be_captured(self):
        x = torch.randn(300, 2, 64, device="cuda", dtype=torch.bfloat16)
        starts = torch.tensor([0, 300], device="cuda")
        options = s2o_compile.S2OConfig(min_seq_len=0, ranking="mean_query")
        with (
            pytest.raises(s2o_compile.InputError, match="CUDA graph"),
            torch.cuda.graph(torch.cuda.CUDAGraph()),
        ):
            s2o_compile.attention_varlen(x, x, x, starts, starts, config=options)
