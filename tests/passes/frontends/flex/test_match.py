"""flex_attention without a block mask of its own: score_mods proven or named; kernels of other packages named."""

import pytest
import torch
from torch.nn.attention.flex_attention import AuxRequest, flex_attention

from s2o_compile.passes.frontends import third_party as third_party
from tests.conftest import quick_rows
from tests.helpers.capture import heads, rewritten

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without:UserWarning")
INF = float("inf")
LENGTH = 150
PAD = torch.arange(LENGTH) < torch.tensor([[LENGTH], [77]])
HEAD = torch.tensor([0.5, 1.0, 2.0, 0.1])
BIAS = torch.randn(LENGTH, LENGTH)
VISIBLE = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
LEARNED = torch.where(torch.ones(LENGTH, LENGTH).tril().bool(), 0.0, -INF)
SHIFT = torch.tensor(3)


@pytest.fixture(autouse=True)
def inference():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def sized(count=4, **options):
    return tuple(heads(count, length=LENGTH, **options) for _ in range(3))


def scored(score_mod, **options):
    return lambda q, k, v: flex_attention(q, k, v, score_mod=score_mod, **options)


def capped(score, b, h, i, j):
    return 2.0 * torch.tanh(score / 2.0)


def causal_rows(score, b, h, i, j):
    return torch.where(i >= j, score, -INF)


PROVEN = {
    "none": (None, "bidirectional"),
    "identity": (lambda s, b, h, i, j: s, "bidirectional"),
    "scaled": (lambda s, b, h, i, j: s * 0.3, "bidirectional"),
    "scaled-by-head": (lambda s, b, h, i, j: s * HEAD[h], "bidirectional"),
    "softcap": (capped, "bidirectional"),
    "softcap-of-scaled": (lambda s, b, h, i, j: 2.0 * torch.tanh(0.4 * s), "bidirectional"),
    "causal": (causal_rows, "causal"),
    "strictly-causal": (lambda s, b, h, i, j: torch.where(i > j, s, -INF), "causal, offset -1"),
    "ahead": (lambda s, b, h, i, j: torch.where(i + 2 >= j, s, -INF), "causal, offset 2"),
    "hidden-first": (lambda s, b, h, i, j: torch.where(j > i, -INF, s), "causal"),
    "window": (lambda s, b, h, i, j: torch.where((i >= j) & (i - j < 9), s, -INF), "causal, window 9"),
    "around": (lambda s, b, h, i, j: torch.where((i - j).abs() <= 5, s, -INF), "sliding window -5..+5"),
    "two-wheres": (
        lambda s, b, h, i, j: torch.where(i - j < 9, torch.where(i >= j, s, -INF), -INF),
        "causal, window 9",
    ),
    "filled": (lambda s, b, h, i, j: s.masked_fill(j > i, -INF), "causal"),
    "added": (lambda s, b, h, i, j: s + torch.where(i >= j, 0.0, -INF), "causal"),
    "padding": (lambda s, b, h, i, j: torch.where(PAD[b, j], s, -INF), "bidirectional, key padding"),
    "padding-by-rows": (lambda s, b, h, i, j: torch.where(PAD[b][j], s, -INF), "bidirectional, key padding"),
    "padding-hides": (lambda s, b, h, i, j: torch.where(~PAD[b, j], -INF, s), "bidirectional, key padding"),
    "all": (
        lambda s, b, h, i, j: torch.where((i >= j) & PAD[b, j] & (i - j < 40), capped(s * HEAD[h], b, h, i, j), -INF),
        "causal, window 40, key padding",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", quick_rows(PROVEN, list(PROVEN)[::2]))
def test_proven_score_mods_are_rewritten(name):
    score_mod, mask = PROVEN[name]
    capture = rewritten(scored(score_mod), *sized())
    (record,) = capture.records
    assert (record.reason, record.mask) == ("", mask)
    assert len(capture.calls) == 1
    assert not [value for value in capture.values if value.shape[-2:] == (LENGTH, LENGTH)], "the scores remain"


def test_the_softcap_is_the_operators():
    (call,) = rewritten(scored(capped, scale=0.3), *sized()).calls
    assert call.kwargs["softcap"] == 2.0
    assert call.kwargs["scale"] == pytest.approx(0.3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    capture = rewritten(scored(causal_rows), *sized(dtype=dtype), tolerance=2e-2)
    assert [record.mask for record in capture.records] == ["causal"]


@pytest.mark.parametrize("score_mod", [None, causal_rows], ids=["plain", "causal"])
def test_groups_stay_grouped(score_mod):
    q, k, v = sized()
    capture = rewritten(scored(score_mod, enable_gqa=True), q, k[:, :2], v[:, :2])
    assert capture.records[0].rewritten
    assert capture.records[0].key_shape[1] == "2"


def test_every_length():
    def attend(q, k, v):
        width = q.shape[2] // 2
        return flex_attention(
            q, k, v, score_mod=lambda s, b, h, i, j: torch.where(i - j < width, causal_rows(s, b, h, i, j), -INF)
        )

    q, k, v = sized()
    (record,) = rewritten(attend, q, k, v, mark=[(x, 2) for x in (q, k, v)]).records
    assert record.reason == ""
    assert record.mask.startswith("causal")


def test_kernel_options_change_nothing():
    (record,) = rewritten(scored(causal_rows, kernel_options={"BLOCK_M": 64}), *sized()).records
    assert record.rewritten


def alibi(score, b, h, i, j):
    return score + HEAD[h] * (j - i)


LEFT = {
    "alibi": (alibi, "adds a bias to the scores"),
    "relative": (lambda s, b, h, i, j: s + (i - j), "adds a bias to the scores"),
    "table": (lambda s, b, h, i, j: s + BIAS[i, j], "adds a bias to the scores"),
    "causal-by-value": (lambda s, b, h, i, j: s + LEARNED[i, j], "adds a bias to the scores"),
    "alibi-and-causal": (lambda s, b, h, i, j: torch.where(i >= j, alibi(s, b, h, i, j), -INF), "ALiBi"),
    "captured-mask": (lambda s, b, h, i, j: torch.where(VISIBLE[i, j], s, -INF), "unknown at compile time"),
    "captured-offset": (lambda s, b, h, i, j: torch.where(i + SHIFT >= j, s, -INF), "unknown at compile time"),
    "or": (lambda s, b, h, i, j: torch.where((i >= j) | (j < 9), s, -INF), "union of masks"),
    "by-head": (lambda s, b, h, i, j: torch.where((i >= j) | (h > 1), s, -INF), "varies along heads"),
    "scaled-by-key": (lambda s, b, h, i, j: s * BIAS[0, j], "varies along the keys"),
    "small-fill": (lambda s, b, h, i, j: torch.where(i >= j, s, -1e4), "hides scores by -10000.0"),
    "cap-of-mask": (lambda s, b, h, i, j: torch.tanh(torch.where(i >= j, s, -INF)), "stands between the scores"),
    "squared": (lambda s, b, h, i, j: s * s, "%s"),
    "sine": (lambda s, b, h, i, j: torch.sin(s), "sin"),
    "constant": (lambda s, b, h, i, j: torch.where(i >= j, 0.0, -INF), "%s"),
    "row": (lambda s, b, h, i, j: s * BIAS[i].sum(), "it calls sum, which is not elementwise"),
}


@pytest.mark.parametrize("name", quick_rows(LEFT, list(LEFT)[::2]))
def test_other_score_mods_are_left_and_named(name):
    score_mod, reason = LEFT[name]
    capture = rewritten(scored(score_mod), *sized())
    (record,) = capture.records
    assert not record.rewritten
    assert reason.replace("%s", "") in record.reason
    assert record.query_shape == ("2", "4", str(LENGTH), "16")
    assert sum("flex" in str(node.target) for node in capture.nodes if node.op == "call_function") == 1
    assert not [node for node in capture.nodes if node.target in (torch.matmul, torch.softmax)], "inlined nodes remain"


FLOAT16_FILLS = {
    "positional": lambda s, b, h, i, j: torch.where(i >= j, s, -65504.0),
    "keyword": lambda s, b, h, i, j: s.masked_fill(mask=i < j, value=-65504.0),
    "factor": lambda s, b, h, i, j: 32 * torch.where(i >= j, s, -2047.0),
    "cast": lambda s, b, h, i, j: s + torch.where(i >= j, input=torch.zeros(()), other=-65504.0).half(),
}


@pytest.mark.parametrize("score_mod", FLOAT16_FILLS.values(), ids=FLOAT16_FILLS)
def test_float16_scores_are_float32_inside(score_mod):
    q, k, v = sized(dtype=torch.float16)
    capture = rewritten(scored(score_mod), 300 * q, 300 * k, v, tolerance=2e-2)
    assert "use -inf" in capture.records[0].reason or "expected -inf" in capture.records[0].reason


def test_the_log_sum_exp_stays():
    attend = scored(None, return_aux=AuxRequest(lse=True))
    (record,) = rewritten(lambda q, k, v: attend(q, k, v)[1].lse, *sized()).records
    assert "more than the output" in record.reason


def test_padding_is_read_where_it_was_read():
    def attend(q, k, v, pad):
        pad = pad.clone()
        pad[0, 3] = False
        out = flex_attention(q, k, v, score_mod=lambda s, b, h, i, j: torch.where(pad[b, j], s, -INF))
        pad[:, 9:] = False
        return out, pad

    (record,) = rewritten(attend, *sized(), PAD).records
    assert record.mask == "bidirectional, key padding"


@torch.library.custom_op("toy::flash_attn_forward", mutates_args=())
def kernel(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, k, v)


@kernel.register_fake
def _(q, k, v):
    return torch.empty_like(q)


def test_kernels_of_other_packages_are_named():
    capture = rewritten(lambda q, k, v: kernel(q, k, v), *sized())
    (record,) = capture.records
    assert not record.rewritten
    assert "kernel of its own" in record.reason


def test_torch_itself_is_not_foreign():
    capture = rewritten(lambda q, k, v: torch.nn.functional.scaled_dot_product_attention(q, k, v), *sized())
    assert not any(third_party.is_attention(node) for node in capture.nodes)
