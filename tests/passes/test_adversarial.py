"""Graphs made to fool the passes: each is left dense for the right reason or handled exactly, as eager says.

Learned masks, packed positions, gates and writes are also tried on the prover alone (masks/test_prover.py,
masks/test_in_place.py); dropout, autocast, vmap and checkpoint in frontends/test_sdpa.py; transformers' position ids in
test_transformers_models.py.
"""

import pytest
import torch
from torch.nn import functional as F

from s2o_compile.passes import pipeline

sdpa = F.scaled_dot_product_attention
LENGTH, INF = 24, float("-inf")
pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def compare(function, *inputs, dynamic=(), **options):
    """Runs a function compiled with the passes and in eager; equal results. Returns the records of all graphs."""
    records = []

    def backend(gm, example_inputs):
        records.extend(pipeline.run(gm, {"tau": 0.0, "min_seq_len": 0}))
        return gm.forward

    for tensor in dynamic:
        torch._dynamo.mark_dynamic(tensor, 2)
    compiled = torch.compile(function, backend=backend, **options)
    with torch.no_grad():
        actual = compiled(*(x.clone() if isinstance(x, torch.Tensor) else x for x in inputs))
        expected = function(*(x.clone() if isinstance(x, torch.Tensor) else x for x in inputs))
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    return records, compiled


def heads(length=LENGTH, count=4, dtype=torch.float32):
    return torch.randn(2, count, length, 16, dtype=dtype)


def index(x):
    return torch.arange(x.shape[2])


def causal(q, k, offset=0):
    return index(k) <= index(q)[:, None] + offset


class LearnedMask(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.bias = torch.nn.Parameter(
            torch.zeros(LENGTH, LENGTH).masked_fill(torch.ones(LENGTH, LENGTH).triu(1) > 0, INF)
        )
        self.register_buffer("keep", torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril())
        self.scale = torch.nn.Parameter(torch.tensor(0.3))

    def forward(self, q, k, v, kind):
        if kind == "bias":
            return sdpa(q, k, v, attn_mask=self.bias)
        if kind == "buffer":
            return sdpa(q, k, v, attn_mask=self.keep)
        return sdpa(q * self.scale, k, v, is_causal=True, scale=1.0)


@pytest.mark.parametrize(
    ("kind", "why"), [("bias", "adds numbers to the scores"), ("buffer", "values of the"), ("scale", "")]
)
def test_what_a_module_stores_is_no_proof(kind, why):
    records, _ = compare(LearnedMask(), heads(), heads(), heads(), kind)
    assert why in records[0].reason
    assert records[0].rewritten == (not why)


def prefix_lm(q, k, v, pad):
    return sdpa(q, k, v, attn_mask=causal(q, k) | (index(k) < 5))


def gated(q, k, v, pad):
    return sdpa(q, k, v, attn_mask=causal(q, k) & (q.mean((1, 3)) > -9)[:, None, :, None])


def gate_of_keys(q, k, v, pad):
    return sdpa(q, k, v, attn_mask=causal(q, k) & (k.mean(-1) > -9)[:, :, None])


def alibi(q, k, v, pad):
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625])[:, None, None]
    bias = slopes * (index(k) - index(q)[:, None])
    return sdpa(q, k, v, attn_mask=bias.masked_fill(~causal(q, k), INF))


def one_window_a_head(q, k, v, pad):
    window = torch.arange(1, 5)[:, None, None]
    return sdpa(q, k, v, attn_mask=causal(q, k) & (index(k) > index(q)[:, None] - 4 * window))


def padding_of_heads(q, k, v, pad):
    keep = torch.stack([pad, ~pad | (index(k) == 0), pad, pad], 1)[:, :, None]
    return sdpa(q, k, v, attn_mask=causal(q, k) & keep)


def queries_hidden(q, k, v, pad):
    return sdpa(q, k, v, attn_mask=causal(q, k) & pad[:, None, :, None]).nan_to_num()


def written_after(q, k, v, pad):
    mask = causal(q, k)
    out = sdpa(q, k, v, attn_mask=mask)
    mask.fill_(True)
    return out, sdpa(q, k, v, attn_mask=mask)


def written_in_part(q, k, v, pad):
    mask = causal(q, k)
    mask[:, :3] = True
    return sdpa(q, k, v, attn_mask=mask)


def scale_of_a_tensor(q, k, v, pad):
    return sdpa(q, k, v, is_causal=True, scale=pad.sum().item() / 48)


def dropped(q, k, v, pad):
    return sdpa(q, k, v, is_causal=True, dropout_p=0.0 if pad.shape[0] == 1 else 1e-9)


def chunked_behind_padding(q, k, v, pad):
    first = pad.long().argmax(-1)[:, None, None, None]  # of the tokens that are no padding
    own = (index(k) - first) // 8 == (index(q)[:, None] - first) // 8
    return sdpa(q, k, v, attn_mask=causal(q, k) & own)


def packed_by_floats(q, k, v, pad):
    segment = pad.float().cumsum(-1)
    return sdpa(q, k, v, attn_mask=causal(q, k) & (segment[:, None, :, None] == segment[:, None, None]))


DENSE = {
    prefix_lm: "union of masks",
    gated: "varies along queries",
    gate_of_keys: "varies along heads",
    alibi: "adds numbers to the scores",
    one_window_a_head: "varies along heads",
    padding_of_heads: "varies along heads",
    queries_hidden: "varies along queries",
    written_after: "changed in place by fill_",
    written_in_part: "changed in place by setitem",
    dropped: "call model.eval()",
    chunked_behind_padding: "leave attention_mask unset",
    packed_by_floats: "number the documents by integers",
}


@pytest.mark.parametrize("function", DENSE, ids=lambda function: function.__name__)
def test_left_dense_with_the_reason(function):
    pad = torch.ones(2, LENGTH, dtype=torch.bool)
    pad[0, 7:9] = False
    records, _ = compare(function, heads(), heads(), heads(), pad)
    assert records
    assert not any(record.rewritten for record in records)
    reasons = [record.reason for record in records]
    assert all(DENSE[function] in reason for reason in reasons), reasons


def strict(q, k, v):
    return sdpa(q, k, v, attn_mask=index(k) < index(q)[:, None])


def one_ahead(q, k, v):
    return sdpa(q, k, v, attn_mask=causal(q, k, 1))


def around(q, k, v):
    return sdpa(q, k, v, attn_mask=abs(index(k) - index(q)[:, None]) <= 3)


def ahead_only(q, k, v):
    return sdpa(q, k, v, attn_mask=causal(q, k, 4) & (index(k) >= index(q)[:, None]))


def chunked(q, k, v):
    return sdpa(q, k, v, attn_mask=causal(q, k) & (index(k) // 8 == index(q)[:, None] // 8))


def written_before(q, k, v):
    mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool)
    mask &= causal(q, k)
    mask.masked_fill_(index(k) <= index(q)[:, None] - 6, False)
    return sdpa(q, k, v, attn_mask=mask)


def two_masks(q, k, v):
    near = causal(q, k) & (index(k) > index(q)[:, None] - 5)
    q = sdpa(q, k, v, attn_mask=causal(q, k))
    return sdpa(sdpa(q, k, v, attn_mask=near), k, v, attn_mask=causal(q, k, 2))


def swapped(q, k, v):
    return sdpa(k, q, v, attn_mask=causal(q, k).T.T)


def swapped_mask(q, k, v):
    return sdpa(q, k, v, attn_mask=(index(q)[:, None] <= index(k)).T)


def views_of_the_output(q, k, v):
    out = sdpa(q.transpose(1, 2).contiguous().transpose(1, 2), k, v, is_causal=True)
    flat = out.transpose(1, 2).view(2, -1, 64)
    flat[:, 0] += 1
    return out[:, :, 1:], flat.view(2, -1, 4, 16)[..., ::2]


HANDLED = {
    strict: ["causal, offset -1"],
    one_ahead: ["causal, offset 1"],
    around: ["sliding window -3..+3"],
    chunked: ["causal, chunk 8"],
    ahead_only: ["sliding window -0..+4"],
    written_before: ["causal, window 6"],
    two_masks: ["causal", "causal, window 5", "causal, offset 2"],
    swapped: ["causal"],
    swapped_mask: ["causal"],
    views_of_the_output: ["causal"],
}


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("function", HANDLED, ids=lambda function: function.__name__)
def test_handled_exactly(function, dynamic):
    q, k, v = (heads() for _ in range(3))
    records, _ = compare(function, q, k, v, dynamic=(q, k, v) if dynamic else ())
    assert [record.reason for record in records] == [""] * len(records)
    assert [record.mask for record in records] == HANDLED[function]


def test_a_mask_that_is_causal_for_the_example_length_only():
    stored = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()

    def function(q, k, v):
        edge = torch.arange(LENGTH)[:, None]  # the number, not the length
        mask = index(k) <= (edge if q.shape[2] == LENGTH else index(q)[:, None] + 3)
        return sdpa(q, k, v, attn_mask=mask), sdpa(q, k, v, attn_mask=mask & stored[: q.shape[2], : k.shape[2]])

    records, compiled = compare(function, heads(), heads(), heads())
    assert [record.mask for record in records] == ["causal", ""]
    with torch.no_grad():
        inputs = [heads(16) for _ in range(3)]
        torch.testing.assert_close(compiled(*inputs), function(*inputs), atol=1e-5, rtol=1e-5)
    assert [record.mask for record in records[2:]] == ["causal, offset 3", ""]


def test_cond_is_reported_and_left_alone():
    def function(q, k, v, flag):
        return torch.cond(
            flag,
            lambda q, k, v: sdpa(q, k, v, is_causal=True).clone(),
            lambda q, k, v: sdpa(q, k, v, attn_mask=index(k) >= index(q)[:, None]).clone(),
            (q, k, v),
        )

    records, _ = compare(function, heads(), heads(), heads(), torch.tensor(True))
    assert len(records) == 2
    assert all("inside cond" in record.reason for record in records)


def test_a_model_in_float32_with_inputs_in_bfloat16():
    inputs = [heads(dtype=torch.bfloat16) for _ in range(3)]
    records, _ = compare(lambda q, k, v: sdpa(q.float(), k.float(), v.float(), is_causal=True), *inputs)
    assert records[0].rewritten
    assert records[0].dtype == "float32"


def test_a_scale_read_from_a_tensor_is_the_one_read():
    records, compiled = compare(scale_of_a_tensor, heads(), heads(), heads(), torch.ones(2, LENGTH, dtype=torch.bool))
    inputs = [heads() for _ in range(3)]
    for kept in (40, 17):  # another scale in the same code
        pad = torch.arange(2 * LENGTH).view(2, LENGTH) < kept
        torch.testing.assert_close(compiled(*inputs, pad), scale_of_a_tensor(*inputs, pad), atol=1e-5, rtol=1e-5)
    assert all(record.rewritten for record in records)


@pytest.mark.parametrize("width", [3, 90])
def test_a_window_around_the_query_is_exact_at_lengths_that_run_sparse(width):
    def function(q, k, v):
        return sdpa(q, k, v, attn_mask=abs(index(k) - index(q)[:, None]) <= width)

    records, _ = compare(function, heads(400), heads(400), heads(400))
    assert [record.mask for record in records] == [f"sliding window -{width}..+{width}"]


def test_chunks_are_exact_at_lengths_that_run_sparse():
    def function(q, k, v, pad):
        near = index(k) // 150 == (index(q)[:, None] + 100) // 150
        return sdpa(q, k, v, attn_mask=causal(q, k, 100) & near & pad[:, None, None])

    pad = torch.ones(2, 400, dtype=torch.bool)
    pad[0, 290:310] = False
    records, _ = compare(function, heads(300), heads(400), heads(400), pad)
    assert [record.mask for record in records] == ["causal, chunk 150, key padding"]
