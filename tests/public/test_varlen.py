"""``attention_varlen`` and ``attention_paged``: each sequence is attention by itself, wherever its keys lie."""

import pytest
import torch

import s2o_compile
from s2o_compile.kernels.calls.varlen import Packed
from s2o_compile.kernels.statistics import record_calls
from tests.conftest import CUDA, INTERPRETED
from tests.helpers.packings import Packing, assert_exact, config, in_pages, sinks_of

# The interpreter computes with NumPy, which warns where kernels count on NaN and inf.
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero", "ignore:All-NaN slice", "ignore:invalid value")

LENGTHS = ((1, 1), (3, 40), (0, 20), (130, 300), (7, 0), (128, 128))
FEATURES = [
    Packing(lengths=LENGTHS, heads=4, kv_heads=2),
    Packing(lengths=LENGTHS, causal=False),
    Packing(lengths=LENGTHS, window=50),
    Packing(lengths=LENGTHS, softcap=5.0),  # a Triton kernel's tanh errs 1e-7 of the softcap
    Packing(lengths=LENGTHS, sinks=True),
    Packing(lengths=LENGTHS, scale=0.1, heads=3),
    Packing(lengths=((300, 200), (2, 1), (150, 260)), value_dim=24),
    Packing(lengths=LENGTHS, dtype="fp16", head_dim=40),
    Packing(lengths=LENGTHS, scale=-0.2),
    Packing(lengths=((130, 300), (5, 9)), softcap=5.0, sinks=True, window=1000),
]
TORCH, TRITON = pytest.param("cpu", "torch"), pytest.param("cpu", "triton", marks=INTERPRETED.marks)
SLOW_TRITON = pytest.param("cpu", "triton", marks=[*INTERPRETED.marks, pytest.mark.slow])


def varlen(packing, inputs, device="cpu", lengths=None, **options):
    query, key, value, *starts = packing.joined(inputs, device)
    shared = packing.options()
    starts = starts if lengths is None else [x.to(lengths) for x in starts]
    return s2o_compile.attention_varlen(
        query, key, value, *starts, **shared, sinks=sinks_of(inputs), return_lse=True, config=config(**options)
    )


def paged(packing, inputs, layout="heads_first", page_len=16, device="cpu", **options):
    query, key, value, starts, key_starts = packing.joined(inputs, device)
    cache, table, lengths = in_pages(key, value, key_starts, page_len, layout)
    return s2o_compile.attention_paged(
        query, cache, table.to(device), starts, lengths, **packing.options(), sinks=sinks_of(inputs), return_lse=True,
        config=config(**options),
    )  # fmt: skip


@pytest.mark.parametrize(("device", "implementation"), [TORCH, TRITON])
@pytest.mark.parametrize("packing", FEATURES, ids=str)
def test_every_sequence_is_exact_at_tau_0(packing, device, implementation):
    inputs = packing.inputs(device)
    output, lse = varlen(packing, inputs, device, implementation=implementation)
    assert output.is_contiguous()
    assert output.shape[1:] == (packing.heads, packing.value_dim or packing.head_dim)
    assert_exact(packing, inputs, output, lse)


PAGED = [packing for packing in FEATURES if all(a <= b or not b for a, b in packing.lengths)]
PAGED = PAGED[::2]
PAGES = (("heads_first", 32), ("two", 5), ("pair", 1))


@pytest.mark.parametrize(
    ("layout", "page_len", "device", "implementation"),
    [
        *[pytest.param(*pages, *TORCH.values) for pages in PAGES],
        *[pytest.param(*pages, *TRITON.values, marks=SLOW_TRITON.marks) for pages in PAGES],
    ],
)
def test_pages_change_no_bit(layout, page_len, device, implementation):
    packing = Packing(lengths=((130, 700), (1, 33), (129, 129)))
    inputs = packing.inputs(device)
    others = [{"tau": 0.0}, {"error": 0.05}, {"tau": 0.5, "ranking": "mean_query"}]
    for options in [{"tau": 0.5}, *(others if layout == "two" else [])]:
        with record_calls() as expected_calls:
            expected = varlen(packing, inputs, device, implementation=implementation, **options)
        with record_calls() as calls:
            actual = paged(packing, inputs, layout, page_len, implementation=implementation, **options)
        assert torch.equal(actual[0], expected[0])
        assert torch.equal(actual[1], expected[1])
        figures = [
            [(c.path, c.n_queries, c.n_keys, c.mask, c.density, c.error) for c in x] for x in (calls, expected_calls)
        ]
        assert figures[0] == figures[1]
        assert sorted(c.path for c in calls) == ["dense", "s2o", "s2o"]


@pytest.mark.parametrize(("device", "implementation"), [TORCH, SLOW_TRITON])
@pytest.mark.parametrize("packing", PAGED, ids=str)
def test_pages_under_every_mask(packing, device, implementation):
    packing = Packing(**{**vars(packing), "lengths": tuple(pair for pair in packing.lengths if pair[1])})
    inputs = packing.inputs(device)
    assert_exact(packing, inputs, *paged(packing, inputs, implementation=implementation, page_len=48))


@pytest.mark.parametrize(
    ("device", "implementation", "unread"),
    [
        pytest.param(*TORCH.values, False),
        pytest.param(*TRITON.values, False, marks=SLOW_TRITON.marks),
        pytest.param(*TRITON.values, True, marks=SLOW_TRITON.marks),
        pytest.param(*CUDA.values, "triton", False, marks=CUDA.marks),
        pytest.param(*CUDA.values, "triton", True, marks=CUDA.marks),
    ],
)
@pytest.mark.parametrize("page_len", [0, 1])
def test_other_sequences_never_leak(page_len, device, implementation, unread, monkeypatch):
    """Not through rankings either: bits stay as they are."""
    packing = Packing(lengths=((130, 130), (129, 300), (5, 30), (128, 128)))
    inputs, found = packing.inputs(device), []
    monkeypatch.setattr(Packed, "on_host", not unread)
    for hidden in ((), (0, 3)):
        query, key, value, *starts = packing.joined(inputs, device, hidden)
        options = {"config": config(implementation=implementation, tau=0.5)}
        on = device if unread else "cpu"
        if page_len:
            cache, table, lengths = in_pages(key, value, starts[1], page_len, "two")
            arguments = query, cache, table.to(device), starts[0].to(on), lengths.to(on)
            found.append(s2o_compile.attention_paged(*arguments, **options))
        else:
            found.append(s2o_compile.attention_varlen(query, key, value, *(x.to(on) for x in starts), **options))
    expected, actual = (x.tensor_split(starts[0][1:-1].tolist()) for x in found)
    assert [torch.equal(a, b) for a, b in zip(actual, expected, strict=True)] == [False, True, True, False]
    assert all(actual[at].isnan().all() for at in (0, 3))


@pytest.mark.parametrize(("device", "implementation"), [TORCH, SLOW_TRITON])
def test_marked_heads_are_exact_in_pages_as_well(device, implementation):
    packing = Packing(lengths=((130, 600),), heads=3, kv_heads=3)
    query, key, value, starts, key_starts = packing.joined(packing.inputs(device), device)
    cache, table, lengths = in_pages(key, value, key_starts, 16, "heads_first")
    options = {"config": config(implementation=implementation, tau=2.0, dense_heads={"a": (0, 2)}), "site": "a"}
    expected = s2o_compile.attention_varlen(query, key, value, starts, key_starts, **options)
    actual = s2o_compile.attention_paged(query, cache, table, starts, lengths, **options)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("lengths", [((3, 40), (7, 30)), ((3, 40), (130, 200))], ids=["short", "mixed"])
@pytest.mark.parametrize(("device", "implementation"), [TORCH, TRITON])
def test_numbers_of_a_row_need_not_lie_side_by_side(lengths, device, implementation):
    packing = Packing(lengths=lengths)
    inputs = packing.inputs(device)
    *tensors, starts, key_starts = packing.joined(inputs, device)
    query, key, value = (torch.stack([x, torch.full_like(x, 9.0)], -1)[..., 0] for x in tensors)
    assert {x.stride(-1) for x in (query, key, value)} == {2}
    options = {"config": config(implementation=implementation), "return_lse": True}
    assert_exact(packing, inputs, *s2o_compile.attention_varlen(query, key, value, starts, key_starts, **options))
    cache, table, lengths = in_pages(key, value, key_starts, 16, "two")
    assert_exact(packing, inputs, *s2o_compile.attention_paged(query, cache, table, starts, lengths, **options))


def test_the_stride_of_a_single_slot_means_nothing():
    packing = Packing(lengths=((130, 200),))
    query, key, value, starts, _ = packing.joined(packing.inputs())
    table = torch.arange(200)[None]
    caches = [tuple(x.as_strided((200, 1, 1, 16), (16, slot, 16, 1)) for x in (key, value)) for slot in (16, 7, 0)]
    found = [s2o_compile.attention_paged(query, cache, table, starts, [200], config=config()) for cache in caches]
    assert all(torch.equal(x, found[0]) for x in found)


def test_an_output_that_is_there_is_filled():
    packing = Packing(lengths=((200, 300), (4, 9)))
    inputs = packing.inputs()
    query, key, value, starts, key_starts = packing.joined(inputs)
    cache, table, lengths = in_pages(key, value, key_starts, 16, "two")
    room = torch.full((len(query), 2, 2, 16), float("nan"))[:, 1]
    for options in ({}, {"config": config(tau=0.5)}):
        expected = s2o_compile.attention_paged(query, cache, table, starts, lengths, **options)
        actual = s2o_compile.attention_paged(query, cache, table, starts, lengths, out=room, **options)
        assert actual is room
        assert torch.equal(room, expected)


class TestInGraphs:
    def test_varlen_passes_opcheck(self):
        packing = Packing(lengths=((130, 200), (4, 9)))
        query, key, value, *starts = packing.joined(packing.inputs())
        for sinks in (None, torch.zeros(2)):
            torch.library.opcheck(
                torch.ops.s2o.attention_varlen.default, (query, key, value, *starts, sinks), {"min_seq_len": 0}
            )

    def test_paged_passes_opcheck(self):
        packing = Packing(lengths=((130, 200), (4, 9)))
        query, key, value, starts, key_starts = packing.joined(packing.inputs())
        cache, table, lengths = in_pages(key, value, key_starts, 16, "two")
        arguments = (query, *cache, table, starts, lengths)
        torch.library.opcheck(torch.ops.s2o.attention_paged.default, arguments, {"min_seq_len": 0, "return_lse": True})

    def test_compiled_whole(self, fresh_dynamo):
        packing = Packing(lengths=((130, 200), (4, 9)))
        query, key, value, starts, key_starts = packing.joined(packing.inputs())
        cache, table, lengths = in_pages(key, value, key_starts, 16, "two")
        exact = config()

        def both(query, cache, out):
            first = s2o_compile.attention_varlen(query * 1, key, value, starts, key_starts, 130, 200, config=exact)
            return first, s2o_compile.attention_paged(query, cache, table, starts, lengths, config=exact, out=out)

        rooms = [torch.empty_like(query) for _ in range(2)]
        expected = both(query, cache, rooms[0])
        actual = torch.compile(both, backend="aot_eager", fullgraph=True)(query, cache, rooms[1])
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
        assert torch.equal(*rooms)

    def test_lists_in_a_compiled_function(self, fresh_dynamo):
        packing = Packing(lengths=((130, 200), (4, 9)))
        query, key, value, starts, key_starts = packing.joined(packing.inputs())

        exact = config()

        def attend(query):
            return s2o_compile.attention_varlen(query, key, value, [0, 130, 134], [0, 200, 209], config=exact)

        expected = s2o_compile.attention_varlen(query, key, value, starts, key_starts, config=exact)
        assert torch.equal(torch.compile(attend, backend="aot_eager", fullgraph=True)(query), expected)

    def test_an_exported_program_runs_and_a_package_is_refused(self, tmp_path):
        packing = Packing(lengths=((130, 200), (4, 9)))
        tensors = packing.joined(packing.inputs())

        class Attention(torch.nn.Module):
            def forward(self, query, key, value, starts, key_starts):
                return s2o_compile.attention_varlen(query, key, value, starts, key_starts)

        program = torch.export.export(Attention(), tensors)
        assert torch.equal(program.module()(*tensors), Attention()(*tensors))
        with pytest.raises(s2o_compile.PackageError, match=r"got s2o\.attention_varlen\.default, which has no"):
            s2o_compile.package(program, tmp_path / "model.pt2")

    def test_autocast_runs_in_its_dtype(self):
        packing = Packing(lengths=((130, 200),))
        query, key, value, starts, key_starts = packing.joined(packing.inputs())
        expected = s2o_compile.attention_varlen(query.bfloat16(), key.bfloat16(), value.bfloat16(), starts, key_starts)
        cache, table, lengths = in_pages(key.bfloat16(), value.bfloat16(), key_starts, 16, "two")
        with torch.autocast("cpu"):
            actual = s2o_compile.attention_varlen(query, key, value, starts, key_starts)
            from_pages = s2o_compile.attention_paged(query, cache, table, starts, lengths)
        assert torch.equal(actual, expected)
        assert torch.equal(from_pages, expected)


def test_derivatives_are_exact():
    packing = Packing(lengths=((130, 200), (4, 9), (3, 0)), heads=2, kv_heads=1, head_dim=4)
    query, key, value, *starts = packing.joined(packing.inputs())
    tensors = [x.requires_grad_() for x in (query, key, value)]
    with pytest.warns(s2o_compile.DenseGradientWarning, match="200 keys"):
        output = s2o_compile.attention_varlen(*tensors, *starts, config=config(tau=9.0))
    output.sum().backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in tensors)
    with torch.no_grad():
        assert torch.allclose(output, s2o_compile.attention_varlen(*tensors, *starts), atol=1e-5)


class TestBadInput:
    """Everything that the host can see is refused, with the name of the argument."""

    LENGTHS = ((4, 40), (6, 50))

    def arguments(self):
        packing = Packing(lengths=self.LENGTHS, heads=4, kv_heads=2)
        return packing.joined(packing.inputs())

    @pytest.mark.parametrize(
        ("change", "named"),
        [
            ({"cu_seqlens_q": [0, 4, 9]}, "cu_seqlens_q"),
            ({"cu_seqlens_q": [1, 4, 10]}, "cu_seqlens_q"),
            ({"cu_seqlens_q": [0, 12, 10]}, "cu_seqlens_q"),
            ({"cu_seqlens_q": [0.0, 4.0, 10.0]}, "cu_seqlens_q"),
            ({"cu_seqlens_q": "0, 4"}, "cu_seqlens_q"),
            ({"cu_seqlens_q": []}, "cu_seqlens_q"),
            ({"cu_seqlens_q": torch.tensor([[0, 4, 10]])}, "cu_seqlens_q"),
            ({"cu_seqlens_k": [0, 40, 91]}, "cu_seqlens_k"),
            ({"cu_seqlens_k": [0, 90]}, "sequences"),
            ({"max_seqlen_q": 5}, "max_seqlen_q"),
            ({"max_seqlen_k": 5}, "max_seqlen_k"),
            ({"max_seqlen_k": 50.0}, "max_seqlen_k"),
            ({"query": torch.zeros(1, 4, 10, 16)}, "rank of query"),
            ({"key": torch.zeros(90, 3, 16)}, "shape of key and value"),
            ({"query": torch.zeros(10, 5, 16)}, "number of heads"),
            ({"query": torch.zeros(10, 4, 16, dtype=torch.int64)}, "dtype of query"),
            ({"cu_seqlens_k": torch.tensor([0, 40, 90], dtype=torch.int16)}, "cu_seqlens_k"),
            ({"key": torch.zeros(90, 2, 16, dtype=torch.float16)}, "dtype of key"),
            ({"causal": False, "window": 3}, "window"),
            ({"sinks": torch.zeros(3)}, "sinks"),
            ({"softcap": -1.0}, "softcap"),
        ],
    )
    def test_varlen(self, change, named):
        names = ("query", "key", "value", "cu_seqlens_q", "cu_seqlens_k")
        arguments = {**dict(zip(names, self.arguments(), strict=True)), **change}
        with pytest.raises(s2o_compile.InputError, match=named):
            s2o_compile.attention_varlen(**arguments)

    @pytest.mark.parametrize(
        ("change", "named"),
        [
            ({"cu_seqlens_q": [0, 4, 9]}, "cu_seqlens_q"),
            ({"cu_seqlens_q": [0, 11, 10]}, "cu_seqlens_q"),
            ({"max_seqlen_q": 5}, "max_seqlen_q"),
            ({"max_seqlen_k": 49}, "max_seqlen_k"),
            ({"max_seqlen_k": -1}, "max_seqlen_k"),
            ({"seq_lens": [50.0, 50.0]}, "seq_lens"),
            ({"seq_lens": [40, 1000]}, "seq_lens"),
            ({"seq_lens": [40, -1]}, "seq_lens"),
            ({"seq_lens": [40, 5]}, "seq_lens"),
            ({"seq_lens": [40]}, "sequences"),
            ({"block_table": [[0, 1, 99], [2, 3, 4]]}, "block_table"),
            ({"block_table": [[0, 1, -1], [2, 3, 4]]}, "block_table"),
            ({"block_table": [[0, 1, 1], [2, 3, 4]]}, "block_table"),
            ({"block_table": [0, 1, 2]}, "block_table"),
            ({"block_table": torch.zeros(2, 3)}, "block_table"),
            ({"block_table": torch.zeros(2, 3, dtype=torch.int16)}, "block_table"),
            ({"query": torch.zeros(10, 4, 16, dtype=torch.int32)}, "dtype of query"),
            ({"kv_cache": torch.zeros(8, 2, 20, 31)}, "kv_cache"),
            ({"kv_cache": None}, "kv_cache"),
            ({"kv_cache": torch.zeros(2, 8, 20, 3, 16)}, "number of heads"),
            ({"kv_cache": torch.zeros(2, 8, 20, 2, 16, dtype=torch.float16)}, "dtype of key cache"),
            ({"kv_cache": torch.zeros(2, 8, 20, 16, 2).transpose(3, 4)}, "key cache"),
            ({"kv_cache": (torch.zeros(8, 20, 2, 16), torch.zeros(8, 24, 2, 16)[:, :20])}, "strides of kv_cache"),
            ({"out": torch.zeros(10, 4, 8)}, "out"),
            ({"chunks": s2o_compile.PrefillCache()}, "chunks"),
            ({"chunks": {}}, "chunks"),
        ],
    )
    def test_paged(self, change, named):
        query = self.arguments()[0]
        arguments = {
            "query": query,
            "kv_cache": torch.zeros(2, 8, 20, 2, 16),
            "block_table": torch.tensor([[0, 1, 2], [3, 4, 2]]),
            "cu_seqlens_q": [0, 4, 10],
            "seq_lens": [50, 50],
        }
        s2o_compile.attention_paged(**arguments)
        with pytest.raises(s2o_compile.InputError, match=named):
            s2o_compile.attention_paged(**{**arguments, **change})

    @pytest.mark.parametrize("implementation", ["torch", "triton"])
    def test_no_sequence_and_no_token(self, implementation):
        empty = torch.zeros(0, 4, 16), torch.zeros(0, 2, 16), torch.zeros(0, 2, 16)
        options = {"config": config(implementation=implementation), "return_lse": True}
        for starts in ([0], [0, 0, 0]):
            output, lse = s2o_compile.attention_varlen(*empty, starts, starts, **options)
            assert output.shape == (0, 4, 16)
            assert lse.shape == (4, 0)
        cache = torch.zeros(2, 8, 20, 2, 16)
        table = torch.zeros(0, 3, dtype=torch.int32)
        assert s2o_compile.attention_paged(empty[0], cache, table, [0], [], **options)[0].shape == (0, 4, 16)
