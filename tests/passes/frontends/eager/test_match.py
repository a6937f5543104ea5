"""Hand-written attention: every form is found and exact, everything else is left dense with its reason."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.helpers.capture import heads, rewritten

LOWEST = torch.finfo(torch.float32).min
PER_ROW = torch.rand(8, 1, 1)
PER_HEAD, PER_KEY, PER_PAIR = torch.rand(4, 1, 1), torch.rand(40), torch.rand(4, 40, 40)


def below(q, k, offset=0):
    return torch.arange(k.shape[-2])[None] <= torch.arange(q.shape[-2])[:, None] + offset


def bias(q, k, hidden=float("-inf")):
    return torch.where(below(q, k), 0.0, hidden)


def plain(q, k, v):
    return torch.matmul(torch.softmax(torch.matmul(q, k.transpose(-1, -2)), dim=-1), v)


def operators(q, k, v):
    return F.softmax(q @ k.transpose(2, 3) / math.sqrt(q.shape[-1]), dim=-1) @ v


def scaled_query(q, k, v):
    return ((q * 0.25) @ k.permute(0, 1, 3, 2)).softmax(-1) @ v


def upcast(q, k, v):
    weights = torch.matmul(q, k.transpose(2, 3)) * 0.25 + bias(q, k, LOWEST)
    weights = F.softmax(weights, dim=-1, dtype=torch.float32).to(q.dtype)
    return torch.matmul(F.dropout(weights, p=0.1, training=False), v).transpose(1, 2).contiguous()


def einsum(q, k, v):
    scores = torch.einsum("bhid,bhjd->bhij", q, k) * 0.25
    return torch.einsum("bhij,bhjd->bhid", scores.softmax(dim=-1), v)


def einsum_by_length(q, k, v):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / 4
    scores = scores.masked_fill(~below(q.transpose(1, 2), k.transpose(1, 2)), float("-inf"))
    return torch.einsum("bhqk,bkhd->bqhd", torch.softmax(scores, -1), v).flatten(2)


def einsum_keys_first(q, k, v):
    return torch.einsum("bhij,bhjd->bhid", torch.einsum("bhjd,bhid->bhij", k, q).softmax(-1), v)


def flat(q, k, v):
    b, h, n, d = q.shape
    q, k, v = (x.reshape(b * h, n, d) for x in (q, k, v))
    weights = torch.bmm(q, k.transpose(1, 2)).view(b, h, n, n) * 0.25 + bias(q, k)
    return torch.bmm(weights.softmax(-1).view(b * h, n, n), v).view(b, h, n, d)


def baddbmm(q, k, v):
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    scores = torch.baddbmm(bias(q, k), q, k.transpose(1, 2), beta=1, alpha=0.25)
    return torch.bmm(scores.softmax(-1), v)


def baddbmm_into_nothing(q, k, v):
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    scores = torch.baddbmm(torch.empty(len(q), q.shape[1], q.shape[1]), q, k.transpose(1, 2), beta=0, alpha=0.25)
    return torch.bmm(scores.softmax(-1), v)


def masked_by_tril(q, k, v):
    scores = q @ k.transpose(-2, -1) * k.shape[-1] ** -0.5
    scores = scores.masked_fill(torch.tril(torch.ones(q.shape[2], q.shape[2])) == 0, float("-inf"))
    return F.softmax(scores, dim=-1) @ v


def masked_by_where(q, k, v):
    scores = torch.where(below(q, k), q @ k.mT, LOWEST)
    return scores.softmax(-1) @ v


def in_place(q, k, v):
    scores = q @ k.transpose(-2, -1)
    scores /= 4
    scores += bias(q, k)
    return scores.softmax(-1) @ v


def two_masks(q, k, v):
    scores = q @ k.transpose(-2, -1) + bias(q, k)
    far = torch.arange(k.shape[2])[None] < torch.arange(q.shape[2])[:, None] - 9
    return scores.masked_fill(far, float("-inf")).softmax(-1) @ v


def shifted(q, k, v):
    scores = q @ k.transpose(-2, -1) / 4 + bias(q, k)
    return torch.softmax(scores - scores.max(dim=-1, keepdim=True).values, dim=-1) @ v


def shifted_by_amax(q, k, v):
    scores = q @ k.transpose(-2, -1) / 4
    return torch.softmax(scores - scores.amax(-1, keepdim=True).detach(), dim=-1) @ v


def one_key_head(q, k, v):
    return (q @ k[:, :1].transpose(-2, -1) / 4).softmax(-1) @ v[:, :1]


def repeated_keys(q, k, v):
    k, v = (x[:, :2][:, :, None].expand(-1, -1, 2, -1, -1).reshape(q.shape) for x in (k, v))
    return (q @ k.transpose(-2, -1) / 4 + bias(q, k)).softmax(-1) @ v


def scaled_by_heads(q, k, v):
    factor = torch.linspace(0.1, 1, 4).view(4, 1, 1)
    return (q @ k.transpose(-2, -1) * factor).softmax(-1) @ v


def keys_by_queries(q, k, v):
    """Roles swapped: the rows of the scores are those of k."""
    return (k @ q.transpose(-2, -1) / 4 + bias(k, q)).softmax(-1) @ v


def capped(q, k, v):
    scores = torch.tanh(q @ k.transpose(-2, -1) * 0.25 / 5.0) * 5.0
    return (scores + bias(q, k)).softmax(-1) @ v


def with_sinks(q, k, v):
    scores = q @ k.transpose(-2, -1) / 4 + bias(q, k)
    sinks = PER_HEAD.flatten().reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[2], -1)
    joined = torch.cat([scores, sinks], dim=-1)
    joined = joined - joined.max(dim=-1, keepdim=True).values
    return joined.softmax(-1, dtype=torch.float32)[..., :-1] @ v


def narrow_values(q, k, v):
    return (q @ k.transpose(-2, -1) / 4 + bias(q, k)).softmax(-1) @ v[..., :12]


def finite_with_fully_masked_rows(q, k, v):
    """A finite mask: rows without any key get the mean of all values."""
    far = torch.arange(k.shape[2])[None] <= torch.arange(q.shape[2])[:, None] - 5
    return (q @ k.transpose(-2, -1) + torch.where(far, 0.0, LOWEST)).softmax(-1) @ v


def flat_scores(q, k, v):
    """Products of scores in 3 dimensions, of values in 4."""
    b, h, n, _ = q.shape
    scores = torch.bmm(q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2)).view(b, h, n, n)
    return (scores / 4 + bias(q, k)).softmax(-1) @ v


FORMS = {
    "flat-scores": (flat_scores, "causal"),
    "softcap": (capped, "causal"),
    "sinks": (with_sinks, "causal"),
    "narrow-values": (narrow_values, "causal"),
    "fully-masked-rows": (finite_with_fully_masked_rows, "causal, offset -5"),
    "matmul": (plain, "bidirectional"),
    "operators": (operators, "bidirectional"),
    "scaled-query": (scaled_query, "bidirectional"),
    "upcast": (upcast, "causal"),
    "einsum": (einsum, "bidirectional"),
    "einsum-BNHD": (einsum_by_length, "causal"),
    "einsum-keys-first": (einsum_keys_first, "bidirectional"),
    "bmm": (flat, "causal"),
    "baddbmm": (baddbmm, "causal"),
    "baddbmm-beta-0": (baddbmm_into_nothing, "bidirectional"),
    "tril": (masked_by_tril, "causal"),
    "where": (masked_by_where, "causal"),
    "in-place": (in_place, "causal"),
    "two-masks": (two_masks, "causal, window 10"),
    "minus-max": (shifted, "causal"),
    "minus-amax": (shifted_by_amax, "bidirectional"),
    "one-key-head": (one_key_head, "bidirectional"),
    "repeated-keys": (repeated_keys, "causal"),
    "scale-per-head": (scaled_by_heads, "bidirectional"),
    "roles-swapped": (keys_by_queries, "causal"),
}


@pytest.mark.parametrize("sizes", ["static", "dynamic"])
@pytest.mark.parametrize(("function", "mask"), FORMS.values(), ids=FORMS)
def test_every_spelling_is_rewritten(function, mask, sizes):
    q, k, v = heads(), heads(), heads()
    mark = [(tensor, dim) for tensor in (q, k, v) for dim in (0, 2)] if sizes == "dynamic" else []
    capture = rewritten(function, q, k, v, mark=mark)
    (record,) = capture.records
    assert (record.rewritten, record.reason) == (True, "")
    # Lengths of queries and keys are two symbols unless the code ties them: then top left is not bottom right.
    assert record.mask.replace(", offset 0", "" if sizes == "dynamic" else "?") == mask
    assert len(capture.calls) == 1
    lengths = [value.shape[-2:] for value in capture.values if value.ndim > 2]
    assert not [rows for rows, columns in lengths if rows == columns != 1], "the scores are still computed"
    if function is repeated_keys:
        assert record.key_shape[1] == "2"


def zeroed_when_transposed(q, k, v):
    hidden = ~below(q, k)
    weights = (q @ k.mT).masked_fill(hidden, float("-inf")).softmax(-1).mT
    return v.mT @ weights.masked_fill(hidden, 0.0)


def weights(q, k):
    return torch.softmax(q @ k.transpose(-2, -1) / 4, dim=-1)


def returned(q, k, v):
    attended = weights(q, k)
    return attended @ v, attended


def with_residual(q, k, v):
    return (q @ k.transpose(-2, -1) + k @ q.transpose(-2, -1)).softmax(-1) @ v


def overwritten(q, k, v):
    scores = q @ k.transpose(-2, -1)
    probabilities = scores.softmax(-1)
    raw = scores.sum()
    scores.mul_(2)
    return probabilities @ v + raw


def read_between(q, k, v):
    scores = q @ k.transpose(-2, -1)
    early = scores * 1
    scores += bias(q, k)
    return scores.softmax(-1) @ v + early.sum() + scores.shape[0]


def in_place_before_and_after(q, k, v):
    scores = q @ k.transpose(-2, -1)
    scores /= 4
    probabilities = scores.softmax(-1)
    scores.zero_()
    return probabilities @ v


def query_overwritten(q, k, v):
    q = q * 1
    probabilities = (q @ k.transpose(-2, -1)).softmax(-1)
    q.mul_(2)
    return probabilities @ v + q


def rounded_scores(q, k, v):
    return (q @ k.transpose(-2, -1)).half().float().softmax(-1) @ v


def rounded_probabilities(q, k, v):
    return (q @ k.transpose(-2, -1)).softmax(-1).bfloat16().float() @ v


def one_head_scaled(q, k, v):
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    return (torch.bmm(q, k.transpose(-2, -1)) * PER_ROW).softmax(-1) @ v


DENSE = {
    "query-overwritten": (query_overwritten, "changed in place before"),
    "rounded-scores": (rounded_scores, "rounds to torch.float16"),
    "rounded-probabilities": (rounded_probabilities, "rounds to torch.bfloat16"),
    "one-head-scaled": (one_head_scaled, "another split into heads"),
    "output_attentions": (returned, "read by"),
    "softmax-over-queries": (lambda q, k, v: (q @ k.mT).softmax(-2) @ v, "does not multiply its probabilities along"),
    "softmax-over-heads": (lambda q, k, v: (q @ k.mT).softmax(1) @ v, "neither queries nor keys"),
    "dropout": (lambda q, k, v: F.dropout(weights(q, k), 0.1, True) @ v * 0, "model.eval()"),
    "head-mask": (lambda q, k, v: (weights(q, k) * PER_HEAD) @ v, "(mul) before they meet the values"),
    "alibi": (lambda q, k, v: (q @ k.mT + torch.arange(40.0) * 0.1).softmax(-1) @ v, "adds numbers to the scores"),
    "learned-bias": (lambda q, k, v: (q @ k.mT + PER_PAIR).softmax(-1) @ v, "adds numbers to the scores"),
    "residual-scores": (with_residual, "adds numbers to the scores"),
    "number-added": (lambda q, k, v: (q @ k.mT + 1.0).softmax(-1) @ v, "adds a number"),
    "relu-scores": (lambda q, k, v: (q @ k.mT).relu().softmax(-1) @ v, "(relu) stands between"),
    "scale-along-keys": (lambda q, k, v: (q @ k.mT * PER_KEY).softmax(-1) @ v, "varies along the keys"),
    "finite-fill": (lambda q, k, v: (q @ k.mT).masked_fill(~below(q, k), -1e4).softmax(-1) @ v, "-10000.0"),
    "finite-bias": (lambda q, k, v: (q @ k.mT + bias(q, k, -1e8)).softmax(-1) @ v, "hides keys by -100000000.0"),
    "fill-by-zero": (lambda q, k, v: (q @ k.mT).masked_fill(~below(q, k), 0.0).softmax(-1) @ v, "by 0.0"),
    "divided-along-keys": (lambda q, k, v: (q @ k.mT / PER_KEY).softmax(-1) @ v, "varies along the keys"),
    "zeroed-when-transposed": (zeroed_when_transposed, "after they were transposed"),
    "inverse": (lambda q, k, v: (PER_HEAD / (q @ k.mT)).softmax(-1) @ v, "by the scores"),
    "one-token": (lambda q, k, v: weights(q[:, :, :1], k) @ v, "decode stays dense"),
    "six-dimensions": (lambda q, k, v: weights(q[None, None], k[None, None]) @ v[None, None], "expected at most"),
    "float64": (lambda q, k, v: weights(q.double(), k.double()) @ v.double(), "float64"),
    "in-place-afterwards": (overwritten, "changed in place"),
    "in-place-around": (in_place_before_and_after, "changed in place by zero_"),
    "bool-mask-added": (lambda q, k, v: (q @ k.mT + below(q, k)).softmax(-1) @ v, "added to the scores as numbers"),
    "in-place-and-read": (read_between, "read by"),
}


@pytest.mark.parametrize(("function", "reason"), DENSE.values(), ids=DENSE)
def test_everything_else_stays_dense_and_is_named(function, reason):
    capture = rewritten(function, heads(), heads(), heads())
    assert [record.rewritten for record in capture.records] == [False]
    assert reason in capture.records[0].reason
    assert not capture.calls


def routed(x, gate, experts):
    chosen = torch.softmax(x @ gate, dim=-1)
    best, index = chosen.topk(2, dim=-1)
    return (experts[index] * best[..., None]).sum(-2)


class Mixture(nn.Module):
    """A soft mixture of experts: its softmax feeds a product, but no product feeds its softmax."""

    def __init__(self):
        super().__init__()
        self.gate, self.experts = nn.Linear(16, 8), nn.Parameter(torch.randn(8, 16))

    def forward(self, x):
        return torch.softmax(self.gate(x), dim=-1) @ self.experts


NO_ATTENTION = {
    "router": (routed, (torch.randn(3, 5, 16), torch.randn(16, 8), torch.randn(8, 16))),
    "soft-mixture": (Mixture(), (torch.randn(3, 5, 16),)),
    "classifier": (lambda x, w: torch.softmax(x @ w.T, dim=-1), (torch.randn(5, 16), torch.randn(7, 16))),
}


@pytest.mark.parametrize(("function", "inputs"), NO_ATTENTION.values(), ids=NO_ATTENTION)
@torch.no_grad()
def test_other_softmaxes_are_no_attention(function, inputs):
    assert rewritten(function, *inputs).records == []


def test_gradients_keep_it_dense():
    (record,) = rewritten(plain, heads().requires_grad_(), heads(), heads()).records
    assert "torch.no_grad()" in record.reason


def test_autocast_keeps_it_dense():
    def function(q, k, v):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return plain(q, k, v)

    (record,) = rewritten(function, heads(), heads(), heads()).records
    assert "autocast" in record.reason


def test_upcast_queries_and_keys_are_read_before_the_cast():
    def function(q, k, v):
        return (q.float() @ k.float().transpose(-2, -1) / 4).softmax(-1).to(v.dtype) @ v

    capture = rewritten(function, *(heads(dtype=torch.bfloat16) for _ in range(3)), tolerance=1e-2)
    assert capture.records[0].rewritten
    assert capture.records[0].dtype == "bfloat16"


def test_a_scale_that_is_a_parameter_is_kept():
    class Tempered(nn.Module):
        def __init__(self):
            super().__init__()
            self.temperature = nn.Parameter(torch.tensor(0.3))

        def forward(self, q, k, v):
            return (q @ k.transpose(-2, -1) * self.temperature).softmax(-1) @ v

    with torch.no_grad():
        capture = rewritten(Tempered(), heads(), heads(), heads())
    assert capture.records[0].rewritten


def test_layers_share_one_mask():
    def function(q, k, v):
        mask = bias(q, k)
        for _ in range(3):
            q = (q @ k.transpose(-2, -1) / 4 + mask).softmax(-1) @ v
        return q

    capture = rewritten(function, heads(), heads(), heads())
    assert [record.mask for record in capture.records] == ["causal"] * 3
