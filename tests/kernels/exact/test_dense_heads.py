"""Heads marked dense: exact there, unchanged elsewhere, in every kind of call."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import s2o_compile
from s2o_compile import S2OConfig
from s2o_compile.kernels import planner as rank
from s2o_compile.kernels.core import plan
from s2o_compile.kernels.exact import dense_heads
from s2o_compile.kernels.statistics import record_calls
from s2o_compile.kernels.support.errors import InputError
from tests.conftest import CUDA, INTERPRETED, Case, bounds, distance, exact_attention, lay_out, on, visible_pairs
from tests.helpers import operator_calls

OPERATOR, MASKED = torch.ops.s2o.attention.default, torch.ops.s2o.masked_attention.default


@pytest.fixture(autouse=True)
def short_lists(monkeypatch):
    """The smallest chunks, so that a few hundred keys are enough to stop early."""
    for module in (plan, rank):
        monkeypatch.setattr(module, "default_chunk_len", lambda _: 128)


def call(inputs, dense_heads, **options):
    return operator_calls.call(inputs, **{"tau": 4.0, "segment_len": 128, "dense_heads": dense_heads, **options})


def rows_of(heads, inputs):
    """Bool [Hq]: query heads of some key/value heads."""
    kv_heads = inputs.key.shape[1]
    marked = torch.zeros(kv_heads, dtype=torch.bool)
    marked[list(heads)] = True
    return marked.repeat_interleave(inputs.query.shape[1] // kv_heads)


CASES = [
    (Case(queries=520, heads=8, kv_heads=4), (0, 2)),
    (Case(queries=520, heads=4, kv_heads=4, dtype="fp16"), (0, 1)),
    (Case(queries=520, heads=4, kv_heads=4, dtype="fp16"), (3,)),
    (Case(queries=520, heads=3, kv_heads=3, batch=2, padding="left"), (1,)),
    (Case(queries=520, heads=4, kv_heads=4, batch=2, padding="all", fully_masked="mean"), (0, 3)),
    (Case(queries=200, keys=600, heads=4, kv_heads=2), (1,)),
    (Case(queries=520, keys=500, heads=4, kv_heads=2, causal=False), (0,)),
    (Case(queries=700, heads=4, kv_heads=2, chunk=640), (1,)),
    (Case(queries=520, heads=4, kv_heads=2, sinks=True), (0,)),
    (Case(queries=520, heads=4, kv_heads=2, softcap=20.0), (0,)),
    (Case(queries=520, heads=4, kv_heads=4, value_dim=32), (0, 2)),
    (Case(queries=520, heads=4, kv_heads=4, layout="transposed"), (0, 1, 3)),
    (Case(queries=520, heads=4, kv_heads=4, layout="packed", dtype="fp16"), (0, 2, 3)),
    (Case(queries=520, heads=4, kv_heads=4, layout="strided"), (2,)),
]

INTERPRETED_CASES = [
    (Case(queries=390, heads=2, kv_heads=2, batch=2, padding="left"), (1,)),
    (Case(queries=390, heads=2, kv_heads=2, batch=2, padding="all", fully_masked="mean"), (0,)),
    (Case(queries=200, keys=600, heads=4, kv_heads=2), (1,)),
    (Case(queries=390, keys=400, heads=4, kv_heads=2, causal=False), (0,)),
    (Case(queries=700, heads=2, kv_heads=2, chunk=640), (1,)),
]
"""Short ones: interpreted, each takes seconds."""


@pytest.mark.filterwarnings("ignore:divide by zero encountered:RuntimeWarning")
class TestExecution:
    @pytest.mark.parametrize(
        ("implementation", "return_lse", "device", "case", "heads"),
        [
            pytest.param(*kind, *row.values, marks=row.marks, id=f"{name}-{row.id}")
            for name, kind, interpreted in (
                ("torch", ("torch", False), CASES),
                ("torch-lse", ("torch", True), CASES),
                ("triton-lse", ("triton", True), INTERPRETED_CASES),
            )
            for row in (*on(INTERPRETED, *interpreted), *on(CUDA, *CASES))
        ],
    )
    def test_marked_heads_are_exact_and_the_others_unchanged(
        self, device, case, heads, implementation, return_lse, poison_empty
    ):
        inputs = case.inputs(device)
        options = {"implementation": implementation, "return_lse": return_lse}
        with record_calls() as calls:
            plain, plain_lse = call(inputs, None, **options)
            marked, marked_lse = call(inputs, list(heads), **options)
        exact, exact_lse = exact_attention(inputs)
        limit, lse_limit = bounds(inputs)
        dense = rows_of(heads, inputs).to(device)
        assert distance(marked[:, dense], exact[:, dense]) <= limit
        assert distance(marked[:, dense], exact[:, dense]) < distance(plain[:, dense], exact[:, dense])
        assert torch.equal(marked[:, ~dense], plain[:, ~dense])
        assert marked.stride() == plain.stride()
        if return_lse:
            assert distance(marked_lse[:, dense], exact_lse[:, dense]) <= lse_limit
            assert torch.equal(marked_lse[:, ~dense], plain_lse[:, ~dense])
        sparse, both = calls[: len(calls) // 2], calls[len(calls) // 2 :]
        for before, after in zip(sparse, both, strict=True):
            if after.computed is not None:  # a short last chunk runs dense
                assert torch.equal(before.computed[:, ~dense.cpu()], after.computed[:, ~dense.cpu()])
                assert (after.computed[:, dense.cpu()] >= before.computed[:, dense.cpu()]).all()

    @pytest.mark.parametrize(("device", "heads"), [*on(INTERPRETED, ((0, 1),), ((1, 3),)), *on(CUDA, ((0, 1),))])
    @pytest.mark.parametrize("implementation", ["torch", "triton"])
    def test_marked_heads_have_the_bits_of_sdpa(self, device, heads, implementation):
        inputs = Case(queries=300, heads=4, kv_heads=4, dtype="fp16").inputs(device)
        output, _ = call(inputs, list(heads), implementation=implementation)
        rows = rows_of(heads, inputs).to(device)
        query, key, value = inputs.query[:, rows], inputs.key[:, list(heads)], inputs.value[:, list(heads)]
        dense = scaled_dot_product_attention(query, key, value, is_causal=True, scale=inputs.scale, enable_gqa=True)
        assert torch.equal(output[:, rows], dense)

    @pytest.mark.parametrize(
        "case", [Case(queries=520, heads=4, kv_heads=2), Case(queries=300, padding="left")], ids=str
    )
    def test_all_heads_marked_is_dense(self, case):
        inputs = case.inputs()
        with record_calls() as calls:
            result = call(inputs, list(range(case.kv_heads)))
        assert [c.path for c in calls] == ["dense"]
        assert distance(result[0], exact_attention(inputs)[0]) <= bounds(inputs)[0]

    def test_no_mask_of_all_pairs_is_made(self, monkeypatch):
        """With padding SDPA would be given Nq x Nk flags."""
        monkeypatch.setattr(dense_heads, "attend_by_sdpa", None)
        call(Case(queries=300, heads=4, kv_heads=2, padding="left").inputs(), [1])
        call(Case(queries=300, keys=600, heads=4, kv_heads=2).inputs(), [1])

    def test_a_window_is_exact_already(self):
        inputs = Case(queries=300, heads=4, kv_heads=2, window=100).inputs()
        assert torch.equal(call(inputs, [1])[0], call(inputs, None)[0])

    def test_density_counts_dense_tiles_whole(self):
        inputs = Case(queries=520, heads=4, kv_heads=2).inputs()
        with record_calls() as calls:
            call(inputs, [1])
        assert calls[0].path == "s2o"
        assert calls[0].computed[0, 2:].tolist() == [[128, 256, 384, 512, 520]] * 2

    def test_a_mask_that_is_read_keeps_the_marks(self):
        inputs = Case(queries=520, heads=4, kv_heads=2).inputs()
        mask = visible_pairs(inputs)
        options = {"scale": inputs.scale, "min_seq_len": 0, "tau": 4.0, "segment_len": 128}
        marked, _ = MASKED(*inputs.tensors, mask, dense_heads=[1], **options)
        assert torch.equal(marked, call(inputs, [1])[0])
        assert not torch.equal(marked, MASKED(*inputs.tensors, mask, **options)[0])

    @pytest.mark.parametrize("layout", ["plain", "transposed", "packed"])
    @pytest.mark.parametrize("heads", [[], [0], [0, 2]], ids=str)
    def test_opcheck(self, heads, layout):
        inputs = Case(queries=300, heads=4, kv_heads=4).inputs()
        tensors = lay_out(layout, *inputs.tensors)
        given = {"causal": True, "min_seq_len": 0, "dense_heads": heads}
        assert set(torch.library.opcheck(OPERATOR, tensors, given).values()) == {"SUCCESS"}
        del given["causal"]
        given = (*tensors, visible_pairs(inputs)), given
        assert set(torch.library.opcheck(MASKED, *given).values()) == {"SUCCESS"}


class TestFunction:
    CONFIG = S2OConfig(min_seq_len=0, tau=4.0, segment_len=128)

    def test_takes_the_heads_of_the_call(self):
        inputs = Case(queries=520, heads=4, kv_heads=2).inputs()
        marked = s2o_compile.attention(*inputs.tensors, causal=True, dense_heads=(1,), config=self.CONFIG)
        assert torch.equal(marked, call(inputs, [1])[0])

    def test_takes_them_with_a_mask(self):
        inputs = Case(queries=520, heads=4, kv_heads=2).inputs()
        mask = visible_pairs(inputs)
        marked = s2o_compile.attention(*inputs.tensors, attn_mask=mask, dense_heads=(1,), config=self.CONFIG)
        assert torch.equal(marked, call(inputs, [1])[0])

    @pytest.mark.parametrize("heads", [(2,), (-1,)], ids=str)
    @pytest.mark.parametrize("given", ["keywords", "attn_mask", "gradients"])
    def test_a_head_that_is_not_there(self, heads, given):
        inputs = Case(queries=520, heads=4, kv_heads=2).inputs()
        query = inputs.query.requires_grad_(given == "gradients")
        mask = {"attn_mask": visible_pairs(inputs)} if given == "attn_mask" else {"causal": True}
        said = rf"dense_heads: expected key/value heads from 0 to 1, got \[{heads[0]}\]. Mark a group of query heads"
        with pytest.raises(InputError, match=said):
            s2o_compile.attention(query, *inputs.tensors[1:], dense_heads=heads, **mask)


@pytest.mark.parametrize(
    ("heads", "longest", "expected"),
    [([], 4, []), ([2], 4, [(2, 3)]), ([0, 1, 3], 4, [(0, 2), (3, 4)]), ([0, 1, 2, 3, 4], 2, [(0, 2), (2, 4), (4, 5)])],
    ids=str,
)
def test_runs(heads, longest, expected):
    assert [(run.start, run.stop) for run in dense_heads.runs(heads, longest)] == expected
