"""Hand-written masks that fill by finite numbers, and masks that are repeated for the heads."""

import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

import s2o_compile
from s2o_compile import S2OConfig

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
LENGTH, HEADS = 150, 4
EXACT = S2OConfig(tau=0.0, min_seq_len=0, inner_backend="eager")
OPTIONS = {"s2o.tau": 0.0, "s2o.min_seq_len": 0, "s2o.inner_backend": "eager"}


def inputs(dtype, factor, *, fully_masked):
    q, k, v = torch.randn(3, 2, HEADS, LENGTH, 16, generator=torch.Generator().manual_seed(0)).unbind(0)
    tokens = torch.arange(LENGTH) < torch.tensor([[LENGTH], [LENGTH - 9]])
    tokens[0] &= not fully_masked
    return (factor * q).to(dtype), (factor * k).to(dtype), v.to(dtype), tokens


def above(q):
    return torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)


def causal(q, k, v, tokens):
    return (q @ k.mT / 4).masked_fill(above(q), -10000).softmax(-1) @ v


def whole_rows(q, k, v, tokens):
    """Padded queries see nothing, either."""
    mask = tokens[:, None, :, None] * tokens[:, None, None]
    return (q / 4 @ k.mT).masked_fill(mask == 0, -1e4).softmax(-1) @ v


def two_fills(q, k, v, tokens):
    scores = (q @ k.mT / 4).masked_fill(above(q), -1e4)
    return torch.where(tokens[:, None, None], scores, -1e4).softmax(-1) @ v


READ = (causal, whole_rows, two_fills)


@pytest.mark.parametrize("fully_masked", [False, True], ids=["", "fully-masked"])
@pytest.mark.parametrize("factor", [1, 60], ids=["small", "large"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("form", READ, ids=lambda form: form.__name__)
@torch.no_grad()
def test_fills_that_may_hide_nothing(form, dtype, factor, fully_masked):
    """-1e4 hides small scores, and not those of thousands: the operator asks in every run."""
    given = inputs(dtype, factor, fully_masked=fully_masked)
    exact = form(*(x.double() for x in given[:3]), given[3])
    compiled = torch.compile(form, backend="s2o", options=OPTIONS)
    with s2o_compile.record() as recording:
        output = compiled(*given)
    assert [call.path for call in recording.calls] == ["s2o" if factor == 1 else "masked"]
    (site,) = recording.report.sites
    assert site.rewritten
    assert "read at run time" in site.mask
    error, eager_error = ((x.double() - exact).abs().max() for x in (output, form(*given)))
    assert error <= 2 * eager_error + 1e-6


def different_fills(q, k, v, tokens):
    return (q @ k.mT / 4).masked_fill(above(q), -1e4).masked_fill(~tokens[:, None, None], -2e4).softmax(-1) @ v


def weak_fill(q, k, v, tokens):
    return (q @ k.mT / 4).masked_fill(above(q), -100).softmax(-1) @ v


def scaled_behind(q, k, v, tokens):
    return ((q @ k.mT).masked_fill(above(q), -1e4) / 4).softmax(-1) @ v


def zeroed_behind(q, k, v, tokens):
    mask = above(q)
    return (q @ k.mT / 4).masked_fill(mask, -1e4).softmax(-1).masked_fill(mask, 0.0) @ v


@pytest.mark.parametrize(
    "form", [different_fills, weak_fill, scaled_behind, zeroed_behind], ids=lambda form: form.__name__
)
@torch.no_grad()
def test_fills_that_stay_dense(form):
    (site,) = s2o_compile.explain(form, *inputs(torch.float32, 1, fully_masked=False), config=EXACT).sites
    assert not site.rewritten
    assert "which large scores outweigh; expected -inf" in site.reason


def flat(x):
    """[B, H, N, D] as [H * B, N, D]."""
    return x.transpose(0, 1).reshape(-1, *x.shape[2:])


def repeated(q, k, v, tokens):
    q, k, v = map(flat, (q, k, v))
    mask = (~tokens).unsqueeze(1).expand(-1, q.shape[1], -1).repeat(HEADS, 1, 1)
    return torch.bmm((torch.bmm(q, k.mT) / 4).masked_fill(mask, -math.inf).softmax(2), v)


def repeated_causal(q, k, v, tokens):
    """Along queries the mask is not the same: reading one row of it would be wrong."""
    q, k, v = map(flat, (q, k, v))
    mask = (above(q[None]) | ~tokens.unsqueeze(1)).repeat(HEADS, 1, 1)
    return torch.bmm((torch.bmm(q, k.mT) / 4).masked_fill(mask, -math.inf).softmax(2), v)


def repeated_and_written(q, k, v, tokens):
    q, k, v = map(flat, (q, k, v))
    mask = (~tokens).unsqueeze(1).expand(-1, q.shape[1], -1).repeat(HEADS, 1, 1)
    mask[:, 3] = True
    mask[:, 3, 0] = False
    return torch.bmm((torch.bmm(q, k.mT) / 4).masked_fill(mask, -math.inf).softmax(2), v)


@pytest.mark.parametrize(
    ("form", "mask"),
    [(repeated, "bidirectional, key padding"), (repeated_causal, None), (repeated_and_written, None)],
    ids=lambda x: getattr(x, "__name__", ""),
)
@pytest.mark.filterwarnings("ignore::s2o_compile.NothingRewrittenWarning")
@torch.no_grad()
def test_a_mask_repeated_for_the_heads(form, mask):
    given = inputs(torch.float32, 1, fully_masked=False)
    (site,) = s2o_compile.explain(form, *given, config=EXACT).sites
    assert site.rewritten is (mask is not None)
    assert mask is None or mask in site.mask
    compiled = torch.compile(form, backend="s2o", options=OPTIONS)
    torch.testing.assert_close(compiled(*given), form(*given), atol=1e-5, rtol=1e-5)


def copied_and_written(q, k, v, tokens):
    copy = tokens.float()[:, None, None].expand(-1, 1, q.shape[2], -1).clone()
    copy[:, :, 30:, :20] = 0
    return sdpa(q, k, v, attn_mask=copy > 0.5)


def copied_and_cut(q, k, v, tokens):
    copy = tokens.float()[:, None, None].expand(-1, 1, q.shape[2], -1).clone()
    copy.tril_()
    return sdpa(q, k, v, attn_mask=copy > 0.5)


def written_by_a_view(q, k, v, tokens):
    copy = tokens.float()[:, None, None].expand(-1, 1, q.shape[2], -1).contiguous()
    copy.flatten(0, 1)[:, 30:, :20] = 0
    return sdpa(q, k, v, attn_mask=copy > 0.5)


@pytest.mark.parametrize("form", [copied_and_written, copied_and_cut, written_by_a_view])
@torch.no_grad()
def test_a_copy_of_an_expanded_mask_that_is_written_to_varies_along_queries(form):
    given = inputs(torch.float32, 1, fully_masked=False)
    compiled = torch.compile(form, backend="s2o", options=OPTIONS)
    torch.testing.assert_close(compiled(*given), form(*given), atol=1e-5, rtol=1e-5)


def added_twice(q, k, v, first, second):
    return (q @ k.mT / 4 + first + second).softmax(-1) @ v


@pytest.mark.parametrize("factor", [1, 8, 40])
@pytest.mark.parametrize("number", [-1e4, -1e9, -1e30, torch.finfo(torch.float32).min])
@torch.no_grad()
def test_two_masks_that_are_added_round_once(number, factor):
    """Eager adds both to the scores, one after the other, and the operator adds their sum.

    That shows in rows which both hide, whose output is then rounding alone: it is no further from the formula.
    """
    q, k, v, _ = inputs(torch.float32, factor, fully_masked=False)
    masks = [torch.zeros(2, 1, LENGTH, LENGTH) for _ in range(2)]
    masks[0].masked_fill_(above(q), number)
    for mask in masks:
        mask[0, :, 40:80] = number  # these rows see no key
    compiled = torch.compile(added_twice, backend="s2o", options=OPTIONS)
    with s2o_compile.record() as recording:
        output = compiled(q, k, v, *masks)
    assert len(recording.calls) == 1
    eager, exact = added_twice(q, k, v, *masks), added_twice(*(x.double() for x in (q, k, v, *masks)))
    for rows in (slice(40, 80), slice(80, None)):
        error, eager_error = ((x.double() - exact)[:, :, rows].abs().max() for x in (output, eager))
        if eager_error.isnan():  # their sum is -inf: as ever, zeros instead of NaN
            assert not output[0, :, rows].any()
        else:
            assert error <= 2 * eager_error + 1e-5
