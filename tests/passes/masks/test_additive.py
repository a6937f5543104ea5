"""Float masks: which are masks at all, and what a row without any key gives under them."""

import pytest
import torch
from torch.nn import functional as F

from s2o_compile.passes import pipeline
from s2o_compile.passes.graph.rejected import Rejected
from tests.helpers.masks import capture, k_index, q_index, visible

MIN = torch.finfo(torch.float32).min
INF = float("-inf")
BLIND_OPERATOR = any(argument.name == "fully_masked" for argument in torch.ops.s2o.attention.default._schema.arguments)


def causal(q, k):
    return k_index(k) <= q_index(q)


def past(q, k):
    """The first query sees no key."""
    return k_index(k) < q_index(q)


def zeros(q, k):
    return torch.zeros(q, k)


MASKS = {
    "where": (lambda q, k: torch.where(past(q, k), 0.0, MIN), "mean"),
    "where-tensor": (lambda q, k: torch.where(past(q, k), torch.tensor(0.0), MIN), "mean"),
    "where-swapped": (lambda q, k: torch.where(~past(q, k), MIN, 0.0), "mean"),
    "masked-fill": (lambda q, k: zeros(q, k).masked_fill(~past(q, k), MIN), "mean"),
    "masked-fill-twice": (
        lambda q, k: zeros(q, k).masked_fill(~causal(q, k), MIN).masked_fill(~past(q, k), MIN),
        "mean",
    ),
    "masked-fill-of-itself": (
        lambda q, k: (1.0 - past(q, k).float()).masked_fill((1.0 - past(q, k).float()).bool(), MIN),
        None,
    ),
    "masked-fill-of-its-own-truth": (lambda q, k: inverted_fill(past(q, k).float()), "mean"),
    "triu": (lambda q, k: torch.full((q, k), MIN).triu(0), "mean"),
    "one-minus": (lambda q, k: (1.0 - past(q, k).float()) * MIN, "mean"),
    "one-minus-int": (lambda q, k: (1 - past(q, k).int()) * MIN, "mean"),
    "one-minus-view": (lambda q, k: (1.0 - past(q, k)[None, None].to(torch.float32)) * MIN, "mean"),
    "negated-times": (lambda q, k: (~past(q, k)).float() * MIN, "mean"),
    "times-full": (lambda q, k: torch.full((q, k), MIN) * ~past(q, k), "mean"),
    "product-of-bits": (lambda q, k: (1.0 - causal(q, k).float() * past(q, k).float()) * MIN, "mean"),
    "minimum": (
        lambda q, k: torch.minimum(torch.where(causal(q, k), 0.0, MIN), torch.where(past(q, k), 0.0, MIN)),
        "mean",
    ),
    "plus-zero": (lambda q, k: zeros(q, k) + torch.where(past(q, k), 0.0, MIN), "mean"),
    "half-of-infinity": (lambda q, k: torch.where(past(q, k), 0.0, INF), "zeros"),
    "log": (lambda q, k: past(q, k).float().log(), "zeros"),
    "cast-that-overflows": (lambda q, k: torch.where(past(q, k), 0.0, MIN).to(torch.bfloat16).float(), "zeros"),
    "bfloat16": (
        lambda q, k: zeros(q, k).bfloat16().masked_fill(~past(q, k), torch.finfo(torch.bfloat16).min).float(),
        "mean",
    ),
    "sum-of-infinities": (
        lambda q, k: torch.where(causal(q, k), 0.0, INF) + torch.where(past(q, k), 0.0, INF),
        "zeros",
    ),
    "sum": (lambda q, k: torch.where(causal(q, k), 0.0, MIN) + torch.where(past(q, k), 0.0, MIN), None),
    "sum-with-infinity": (lambda q, k: torch.where(causal(q, k), 0.0, INF) + torch.where(past(q, k), 0.0, MIN), None),
    "two-fills": (lambda q, k: torch.where(causal(q, k), 0.0, INF).masked_fill(~past(q, k), MIN), None),
    "half": (
        lambda q, k: zeros(q, k).half().masked_fill(~past(q, k), torch.finfo(torch.half).min).float(),
        None,
    ),
    "infinity-times": (lambda q, k: (1.0 - past(q, k).float()) * INF, None),  # 0 * -inf is NaN
    "small": (lambda q, k: (1.0 - past(q, k).float()) * -1e4, None),
    "one-minus-two-bits": (lambda q, k: (1.0 - causal(q, k).float() - past(q, k).float()) * MIN, None),
}


def inverted_fill(mask):
    inverted = 1.0 - mask
    return inverted.masked_fill(inverted.to(torch.bool), MIN)


@pytest.mark.parametrize(("mask_of", "fully_masked"), MASKS.values(), ids=MASKS)
def test_rows_without_keys_give_what_the_mask_makes_them(mask_of, fully_masked):
    proof, symbols = capture(mask_of)
    if fully_masked is None:
        assert isinstance(proof, Rejected), str(proof)
        return
    assert not isinstance(proof, Rejected), proof
    assert proof.fully_masked == fully_masked
    for lengths in ((6, 11), (7, 7), (3, 14)):
        q, k = lengths
        mask = mask_of(*lengths).expand(1, 1, q, k)
        assert torch.equal(visible(proof, symbols, lengths), mask == 0)
        weights = (torch.randn(1, 1, q, k) + mask).softmax(-1)[0, 0, 0]
        assert weights.isnan().all() if fully_masked == "zeros" else weights.eq(1 / k).all()


ALWAYS_SEEN = {
    "sum": lambda q, k: torch.where(causal(q, k), 0.0, MIN) + torch.where(k_index(k) <= q_index(q) + 1, 0.0, MIN),
    "half": lambda q, k: zeros(q, k).half().masked_fill(~causal(q, k), torch.finfo(torch.half).min).float(),
    "window": lambda q, k: torch.where(causal(q, k) & (k_index(k) > q_index(q) - 3), 0.0, MIN),
}


@pytest.mark.parametrize("mask_of", ALWAYS_SEEN.values(), ids=ALWAYS_SEEN)
def test_where_every_row_sees_a_key_it_does_not_matter_how_others_are_hidden(mask_of):
    proof, _ = capture(mask_of, dynamic=False, lengths=(8, 8))
    assert str(proof).startswith("causal")
    assert proof.fully_masked == "zeros"


def test_a_window_that_may_end_before_the_keys_begin_has_fully_masked_rows():
    proof, _ = capture(lambda q, k: torch.where(causal(q, k) & (k_index(k) > q_index(q) - 3), 0.0, MIN))
    assert proof.fully_masked == "mean"  # with more queries than keys the last ones are behind their window


def test_an_integer_mask_that_enters_the_graph_may_hold_other_numbers():
    proof, _ = capture(
        lambda q, k, pad: (1.0 - pad[:, None, None].float()) * MIN, torch.ones(2, 9, dtype=torch.long), dynamic=False
    )
    assert isinstance(proof, Rejected)
    assert "adds numbers to the scores" in proof.reason


PADDED = {
    "one-minus": lambda pad: (1.0 - pad[:, None, None].float()) * MIN,
    "one-minus-expanded": lambda pad: (1.0 - pad[:, None, None].expand(2, 1, 40, 40).to(torch.float32)) * MIN,
    "masked-fill": lambda pad: torch.zeros(2, 1, 40, 40).masked_fill(~pad[:, None, None], MIN),
    "where": lambda pad: torch.where(pad[:, None, None], torch.tensor(0.0), MIN),
}


@pytest.mark.skipif(not BLIND_OPERATOR, reason="the operator knows no fully masked rows")
@pytest.mark.parametrize("mask_of", PADDED.values(), ids=PADDED)
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_a_batch_entry_of_padding_only_gives_the_mean_of_all_values(mask_of, is_causal):
    def function(q, k, v, pad):
        mask = mask_of(pad)
        if is_causal:
            mask = torch.minimum(mask, torch.where(causal(40, 40), 0.0, MIN))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    pad = torch.ones(2, 40, dtype=torch.bool)
    pad[0, :7], pad[1] = False, False
    q, k, v = (torch.randn(2, 4, 40, 16) for _ in range(3))
    records = []

    def backend(gm, example_inputs):
        records.extend(pipeline.run(gm, {"tau": 0.0, "min_seq_len": 0}))
        return gm.forward

    torch._dynamo.reset()
    actual = torch.compile(function, backend=backend, fullgraph=True)(q, k, v, pad)
    torch.testing.assert_close(actual, function(q, k, v, pad), atol=1e-5, rtol=1e-5)
    assert records[0].rewritten


@pytest.mark.parametrize("mask_of", PADDED.values(), ids=PADDED)
def test_padding_may_leave_a_row_without_keys(mask_of):
    proof, _ = capture(
        lambda q, k, pad: mask_of(pad), torch.ones(2, 40, dtype=torch.bool), dynamic=False, lengths=(40, 40)
    )
    assert str(proof) == "bidirectional, key padding"
    assert proof.fully_masked == "mean"


def test_a_mask_in_another_dtype_than_the_query_is_not_trusted_with_fully_masked_rows():
    def function(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=torch.where(past(9, 9), 0.0, MIN))

    records = []

    def backend(gm, example_inputs):
        records.extend(pipeline.run(gm, {}))
        return gm.forward

    torch._dynamo.reset()
    torch.compile(function, backend=backend)(*(torch.randn(1, 2, 9, 16, dtype=torch.bfloat16) for _ in range(3)))
    assert "expected torch.bfloat16" in records[0].reason
