"""Chunked attention: chunks folded into the batch are attention under the chunked mask, at every length and offset."""

import dataclasses

import pytest
import torch

import s2o_compile
from s2o_compile.kernels.exact import chunked
from s2o_compile.kernels.exact.chunked import chunk_runs
from s2o_compile.kernels.statistics import record_calls
from s2o_compile.kernels.support.errors import InputError
from tests.conftest import CUDA, INTERPRETED, Case, assert_close, distance, exact_attention, on
from tests.helpers.operator_calls import public

# Interpreted, log2(0) warns through numpy where a row sees no key; a GPU gives -inf silently.
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero encountered:RuntimeWarning")

CASES = [
    Case(queries=600, chunk=200),  # whole chunks alone
    Case(queries=650, chunk=200, heads=4, kv_heads=2, batch=2),  # the last is cut off
    Case(queries=300, keys=500, chunk=150, dtype="bf16"),  # a second turn starts inside a chunk
    Case(queries=300, keys=640, offset=130, chunk=150),  # a static cache: keys behind the last query
    Case(queries=300, keys=120, chunk=100, fully_masked="mean"),  # the first queries stand before the first key
    Case(queries=300, keys=120, offset=10, chunk=100),  # the last ones see nothing
    Case(queries=500, chunk=150, window=40),
    Case(queries=500, chunk=150, batch=2, padding="left", fully_masked="mean"),
    Case(queries=500, chunk=150, batch=2, padding="all", value_dim=40, softcap=20.0, sinks=True),
    Case(queries=500, chunk=150, layout="transposed", dtype="fp16"),
    Case(queries=100, chunk=700),  # hides nothing
    Case(queries=1, keys=500, chunk=150),
]


def config(**options):
    return s2o_compile.S2OConfig(**{"tau": 0.0, "min_seq_len": 0, **options})


class TestExact:
    @pytest.mark.parametrize("shortest", [0, 10**6], ids=["sparse", "dense"])
    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_equals_dense_attention(self, case, shortest):
        inputs = case.inputs()
        given = config(min_seq_len=shortest)
        result = public(inputs, return_lse=True, config=given)
        assert_close(result, exact_attention(inputs), inputs)
        assert_close((public(inputs, config=given), result[1]), exact_attention(inputs), inputs)

    @pytest.mark.parametrize(("device", "case"), [*on(INTERPRETED, CASES[9]), *on(CUDA, *CASES)])
    def test_equals_dense_attention_with_triton(self, device, case):
        pytest.importorskip("triton")
        inputs = case.inputs(device)
        result = public(inputs, return_lse=True, config=config(implementation="triton"))
        assert_close(result, exact_attention(inputs), inputs)

    @pytest.mark.parametrize("case", [case for case in CASES if case.dtype == "fp32"], ids=str)
    def test_with_gradients(self, case):
        inputs = case.inputs()
        leaves = {name: getattr(inputs, name).clone().requires_grad_() for name in ("query", "key", "value")}
        output = public(dataclasses.replace(inputs, **leaves))
        assert output.requires_grad
        assert_close((output.detach(), exact_attention(inputs)[1]), exact_attention(inputs), inputs)

    def test_opcheck(self):
        inputs = CASES[1].inputs()
        given = {"causal": True, "attention_chunk": 200, "min_seq_len": 0, "implementation": "torch"}
        result = torch.library.opcheck(torch.ops.s2o.attention.default, inputs.tensors, given)
        assert set(result.values()) == {"SUCCESS"}


class TestWork:
    def test_every_chunk_chooses_its_own_path(self):
        inputs = Case(queries=500, chunk=200).inputs()
        with record_calls() as calls:
            public(inputs, config=config(min_seq_len=150))
        assert [(c.path, c.n_queries, c.n_keys) for c in calls] == [("s2o", 200, 200), ("dense", 100, 100)]

    def test_whole_chunks_of_one_sequence_are_views(self):
        inputs = CASES[0].inputs()
        seen = []

        def attend(part):
            seen.extend(part.tensors)
            return part.query, None

        chunked.attend_chunks(inputs.call, attend)
        assert [x.shape[0] for x in seen] == [3, 3, 3]
        assert [x.data_ptr() for x in seen] == [x.data_ptr() for x in inputs.tensors]

    def test_each_chunk_stops_early_by_itself(self):
        inputs = Case(queries=6000, chunk=3000).inputs(heavy=64)
        with record_calls() as calls:
            output = public(inputs, config=config(tau=1.0))
        expected, _ = exact_attention(inputs)
        assert calls[0].density < 0.7
        assert distance(output, expected) < 0.2 * inputs.value.abs().max()

    @pytest.mark.parametrize("size", [1, 3, 7, 100])
    @pytest.mark.parametrize("offset", [-20, -3, 0, 5, 14, 40])
    @pytest.mark.parametrize(("queries", "keys"), [(1, 1), (20, 20), (9, 30), (30, 9)])
    def test_runs_cover_every_query_once(self, size, offset, queries, keys):
        covered = []
        for first, count in chunk_runs(size, offset, queries, keys):
            covered += range(max(first * size - offset, 0), min((first + count) * size - offset, queries))
            if count > 1:  # whole: in queries and in keys
                assert first * size >= max(offset, 0)
                assert (first + count) * size <= min(offset + queries, keys)
        assert covered == list(range(queries))


@pytest.mark.parametrize("given", [{"attention_chunk": 0, "causal": True}, {"attention_chunk": 8}])
def test_a_wrong_chunk_says_so(given):
    x = torch.zeros(1, 1, 16, 16)
    with pytest.raises(InputError, match=r"attention_chunk: expected at least 1, together with causal=True, got"):
        s2o_compile.attention(x, x, x, **given)
