"""Steps between the products of hand-written attention: each is read as what it does, or the attention stays dense."""

import pytest
import torch
from torch.nn import functional as F

from tests.helpers.capture import heads, rewritten

LOWEST, NINF = torch.finfo(torch.float32).min, float("-inf")
PADDING = torch.arange(40)[None] >= torch.tensor([[40], [30]])
LEFT_PADDING = torch.arange(40)[None] < torch.tensor([[0], [10]])
ALL_PADDING = torch.arange(40)[None] >= torch.tensor([[40], [0]])
SINKS = torch.rand(4)


def above(q):
    return torch.arange(q.shape[2])[None] > torch.arange(q.shape[2])[:, None]


def bias(q, hidden=NINF):
    return torch.where(above(q), hidden, 0.0)


def scores_of(q, k):
    return q @ k.transpose(-2, -1)


def padded(mask=PADDING):
    return mask[:, None, None]


def filled_in_place(q, k, v):
    scores = scores_of(q, k)
    scores.masked_fill_(above(q), LOWEST)
    return scores.softmax(-1) @ v


def filled_in_place_by_shape(q, k, v):
    """The mask asks the scores for their shape, as XLM's does."""
    scores = scores_of(q / 4, k)
    mask = (PADDING == 1).view(2, 1, 1, -1).expand_as(scores)
    scores.masked_fill_(mask, LOWEST)
    return scores.float().softmax(-1).type_as(scores) @ v


def several_in_place(q, k, v):
    scores = scores_of(q, k)
    scores.mul_(0.25)
    scores.masked_fill_(above(q), NINF)
    scores.masked_fill_(padded(), NINF)
    return scores.softmax(-1) @ v


def in_place_by_name(q, k, v):
    scores = scores_of(q, k)
    scores /= 4
    scores.add_(bias(q))
    return F.softmax(scores, dim=-1, dtype=torch.float32) @ v


def scaled_behind_the_mask(q, k, v):
    return ((scores_of(q, k) + bias(q, LOWEST)) / 4.0).softmax(-1) @ v


def scaled_on_both_sides(q, k, v):
    return ((scores_of(q, k) * 0.5).masked_fill(padded(LEFT_PADDING), LOWEST) * 0.5).softmax(-1) @ v


def capped_then_scaled(q, k, v):
    return ((5.0 * torch.tanh(scores_of(q, k) / 5.0) + bias(q)) * 0.5).softmax(-1) @ v


def cogview(q, k, v):
    """softmax((x / a - max(x / a)) * a), which does not overflow in half precision."""
    scaled = (scores_of(q, k) + bias(q, LOWEST)) / 32
    return ((scaled - scaled.amax(dim=-1).unsqueeze(-1)) * 32).softmax(-1) @ v


def floored(q, k, v):
    """Rows hidden by two masks are a mean behind the floor: the sum of two lowest numbers overflows, and is raised."""
    scores = scores_of(q, k) + bias(q, LOWEST) + torch.where(padded(LEFT_PADDING), LOWEST, 0.0)
    return torch.max(scores, torch.tensor(LOWEST)).softmax(-1) @ v


def clamped(q, k, v):
    return (scores_of(q, k) + bias(q)).clamp(min=LOWEST).softmax(-1) @ v


def nothing_added(q, k, v):
    return (0 + (scores_of(q, k) + 0) / 4 + bias(q) + torch.zeros(40, 40)).softmax(-1) @ v


def sinks_first(q, k, v):
    sinks = SINKS.view(1, 4, 1, 1).expand(2, 4, 40, 1)
    return torch.cat([sinks, scores_of(q, k) + bias(q)], dim=-1).softmax(-1)[..., 1:] @ v


def sinks_cut_by_length(q, k, v):
    sinks = SINKS.view(1, 4, 1, 1).expand(2, 4, 40, 1)
    return torch.cat([scores_of(q, k) + bias(q), sinks], dim=-1).softmax(-1)[:, :, :, :40] @ v


def without_nan(q, k, v):
    scores = scores_of(q, k).masked_fill(above(q), NINF).masked_fill(padded(LEFT_PADDING), NINF)
    return torch.nan_to_num(scores.softmax(-1)) @ v


def without_nan_by_hand(q, k, v):
    weights = (scores_of(q, k) + bias(q) + torch.where(padded(LEFT_PADDING), NINF, 0.0)).softmax(-1)
    return torch.where(torch.isnan(weights), torch.zeros_like(weights), weights) @ v


def without_nan_by_fill(q, k, v):
    weights = scores_of(q, k).masked_fill(padded(ALL_PADDING), NINF).softmax(-1)
    return weights.masked_fill(weights.isnan(), 0.0) @ v


def zeroed(q, k, v):
    """Padding behind and before the softmax: rows without any key are zeros, not means."""
    mask = padded(ALL_PADDING)
    return scores_of(q, k).masked_fill(mask, LOWEST).softmax(-1).masked_fill(mask, 0.0) @ v


def zeroed_above_a_floor(q, k, v):
    mask = padded(ALL_PADDING)
    weights = scores_of(q, k).masked_fill(mask, LOWEST).clamp_min(LOWEST).softmax(-1)
    return weights.masked_fill(mask, 0.0) @ v


def zeroed_in_place(q, k, v):
    mask = padded(ALL_PADDING)
    weights = scores_of(q, k).masked_fill(mask, -1e9).softmax(-1)
    weights.masked_fill_(mask, 0)
    return weights.view(8, 40, 40).view(2, 4, 40, 40) @ v


def zeroed_by_where(q, k, v):
    mask = ~padded()
    weights = torch.where(mask, scores_of(q, k), LOWEST).softmax(-1)
    return torch.where(mask, weights, 0.0) @ v


def filled_by_a_billion(q, k, v):
    return scores_of(q, k).masked_fill(above(q), -1e9).softmax(-1) @ v


def filled_by_a_billion_fully_masked(q, k, v):
    """A fill replaces the scores: the fully masked rows of a padded batch are means whatever the number is."""
    return scores_of(q, k).masked_fill(padded(ALL_PADDING), -1e9).softmax(-1) @ v


def lowered_by_a_billion(q, k, v):
    return (scores_of(q, k) + bias(q, -1e10)).softmax(-1) @ v


def fused_under_a_billion(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias(q, -1e9))


def lowered_by_nothing(q, k, v):
    """The mask of a model that got none: (1 - ones) * -10000, as MarkupLM's."""
    mask = torch.ones(2, 40).unsqueeze(1).unsqueeze(2).to(q.dtype)
    return (scores_of(q, k) + (1.0 - mask) * -10000.0).softmax(-1) @ v


REWRITTEN = {
    "lowered-by-nothing": (lowered_by_nothing, "bidirectional"),
    "filled-in-place": (filled_in_place, "causal"),
    "filled-in-place-by-shape": (filled_in_place_by_shape, "bidirectional, key padding"),
    "several-in-place": (several_in_place, "causal, key padding"),
    "in-place-by-name": (in_place_by_name, "causal"),
    "scaled-behind-the-mask": (scaled_behind_the_mask, "causal"),
    "scaled-on-both-sides": (scaled_on_both_sides, "bidirectional, key padding"),
    "capped-then-scaled": (capped_then_scaled, "causal"),
    "cogview": (cogview, "causal"),
    "floored": (floored, "causal, key padding"),
    "clamped": (clamped, "causal"),
    "nothing-added": (nothing_added, "causal"),
    "sinks-first": (sinks_first, "causal"),
    "sinks-cut-by-length": (sinks_cut_by_length, "causal"),
    "nan-to-num": (without_nan, "causal, key padding"),
    "nan-to-num-by-hand": (without_nan_by_hand, "causal, key padding"),
    "nan-to-num-by-fill": (without_nan_by_fill, "bidirectional, key padding"),
    "zeroed": (zeroed, "bidirectional, key padding"),
    "zeroed-above-a-floor": (zeroed_above_a_floor, "bidirectional, key padding"),
    "zeroed-in-place": (zeroed_in_place, "bidirectional, key padding"),
    "zeroed-by-where": (zeroed_by_where, "bidirectional, key padding"),
    "filled-by-a-billion": (filled_by_a_billion, "causal"),
    "filled-by-a-billion-fully-masked": (filled_by_a_billion_fully_masked, "bidirectional, key padding"),
    "lowered-by-a-billion": (lowered_by_a_billion, "causal"),
    "sdpa-lowered-by-a-billion": (fused_under_a_billion, "causal"),
}


@pytest.mark.parametrize(("function", "mask"), REWRITTEN.values(), ids=REWRITTEN)
@torch.no_grad()
def test_rewritten(function, mask):
    capture = rewritten(function, heads(), heads(), heads())
    assert [(record.reason, record.mask) for record in capture.records] == [("", mask)]


def filled_through_a_view(q, k, v):
    scores = scores_of(q, k)
    scores.view(8, 40, 40).masked_fill_(above(q), NINF)
    return scores.softmax(-1) @ v


def filled_in_part(q, k, v):
    scores = scores_of(q, k)
    scores[:, :, :20].masked_fill_(above(q)[:20], NINF)
    return scores.softmax(-1) @ v


def filled_too_late(q, k, v):
    scores = scores_of(q, k)
    weights = scores.softmax(-1)
    scores.masked_fill_(above(q), NINF)
    return weights @ v


def read_before_the_fill(q, k, v):
    scores = scores_of(q, k)
    total = scores.sum()
    scores.masked_fill_(above(q), NINF)
    return scores.softmax(-1) @ v + total


def maximum_before_the_fill(q, k, v):
    scores = scores_of(q, k)
    largest = scores.amax(-1, keepdim=True)
    scores.masked_fill_(above(q), NINF)
    return (scores - largest).softmax(-1) @ v


def negated_behind_the_mask(q, k, v):
    return ((scores_of(q, k) + bias(q, LOWEST)) * -0.5).softmax(-1) @ v


def shrunk_behind_the_mask(q, k, v):
    """Hidden keys are 3.4 below the others only."""
    return ((scores_of(q, k) + bias(q, LOWEST)) * 1e-38).softmax(-1) @ v


def shrunk_fill(q, k, v):
    return ((scores_of(q, k) * 0.5).masked_fill(above(q), -1e9) * 1e-8).softmax(-1) @ v


def enlarged_fully_masked_rows(q, k, v):
    """The lowest number overflows when it is doubled."""
    return ((2 * scores_of(q, k).masked_fill(padded(ALL_PADDING), LOWEST)).softmax(-1) @ v).nan_to_num(7.0)


def floored_above_the_lowest(q, k, v):
    return (scores_of(q, k) + bias(q)).clamp(min=-5.0).softmax(-1) @ v


def clamped_on_both_sides(q, k, v):
    return (scores_of(q, k) + bias(q)).clamp(LOWEST, 1.0).softmax(-1) @ v


def floored_under_another_fill(q, k, v):
    """Rows without any key hold -1e9 and the lowest number: no mean."""
    scores = (scores_of(q, k) + bias(q, LOWEST)).masked_fill(padded(LEFT_PADDING), -1e9)
    return torch.maximum(scores, torch.tensor(LOWEST)).softmax(-1) @ v


def sinks_first_cut_last(q, k, v):
    sinks = SINKS.view(1, 4, 1, 1).expand(2, 4, 40, 1)
    return torch.cat([sinks, scores_of(q, k)], dim=-1).softmax(-1)[..., :-1] @ v


def sinks_scaled_too(q, k, v):
    sinks = SINKS.view(1, 4, 1, 1).expand(2, 4, 40, 1)
    return (torch.cat([scores_of(q, k), sinks], dim=-1) * 0.5).softmax(-1)[..., :-1] @ v


def nan_to_one(q, k, v):
    return torch.nan_to_num(scores_of(q, k).masked_fill(padded(), NINF).softmax(-1), nan=1.0) @ v


def zeroed_but_nan(q, k, v):
    weights = scores_of(q, k).masked_fill(padded(), NINF).softmax(-1)
    return torch.where(weights.isnan(), weights, 0.0) @ v


def nan_reported(q, k, v):
    weights = scores_of(q, k).softmax(-1)
    broken = weights.isnan()
    return weights.masked_fill(broken, 0.0) @ v + broken.sum()


def zeroed_by_another_mask(q, k, v):
    weights = scores_of(q, k).masked_fill(padded(), LOWEST).softmax(-1)
    return weights.masked_fill(padded(LEFT_PADDING), 0.0) @ v


def zeroed_where_it_is_seen(q, k, v):
    mask = padded()
    return torch.where(mask, scores_of(q, k).masked_fill(mask, LOWEST).softmax(-1), 0.0) @ v


def filled_by_one(q, k, v):
    mask = padded()
    return scores_of(q, k).masked_fill(mask, LOWEST).softmax(-1).masked_fill(mask, 1.0) @ v


def zeroed_under_two_masks(q, k, v):
    """A row without any key: a mean over the keys that are no padding."""
    mask = padded(LEFT_PADDING)
    weights = (scores_of(q, k).masked_fill(mask, LOWEST) + bias(q, LOWEST)).softmax(-1)
    return weights.masked_fill(mask, 0.0) @ v


def zeroed_under_two_masks_above_a_floor(q, k, v):
    mask = padded(LEFT_PADDING)
    weights = (scores_of(q, k).masked_fill(mask, NINF) + bias(q)).clamp(LOWEST).softmax(-1)
    return weights.masked_fill(mask, 0.0) @ v


def lowered_by_a_billion_fully_masked(q, k, v):
    """Scores beside -1e9 do not vanish in float32, they are rounded: neither zeros nor a mean."""
    return (scores_of(q, k) + torch.where(padded(), -1e9, 0.0)).softmax(-1) @ v


def filled_by_ten_thousand(q, k, v):
    return scores_of(q, k).masked_fill(above(q), -1e4).softmax(-1) @ v


def lowered_by_ten_thousand(q, k, v):
    return (scores_of(q, k) + above(q) * -10000.0).softmax(-1) @ v


DENSE = {
    "filled-through-a-view": (filled_through_a_view, "changed in place by"),
    "filled-in-part": (filled_in_part, "changed in place by"),
    "filled-too-late": (filled_too_late, "changed in place by"),
    "read-before-the-fill": (read_before_the_fill, "read by"),
    "maximum-before-the-fill": (maximum_before_the_fill, "(sub) stands between"),
    "negated-behind-the-mask": (negated_behind_the_mask, "multiplied by -0.5"),
    "shrunk-behind-the-mask": (shrunk_behind_the_mask, "hides scores by -3.4"),
    "shrunk-fill": (shrunk_fill, "hides scores by -10.0"),
    "enlarged-fully-masked-rows": (enlarged_fully_masked_rows, "several finite numbers"),
    "floored-above-the-lowest": (floored_above_the_lowest, "(clamp) stands between"),
    "clamped-on-both-sides": (clamped_on_both_sides, "(clamp) stands between"),
    "floored-under-another-fill": (floored_under_another_fill, "several finite numbers"),
    "sinks-first-cut-last": (sinks_first_cut_last, "getitem"),
    "sinks-scaled-too": (sinks_scaled_too, "after sinks were joined"),
    "nan-to-one": (nan_to_one, "pass nan_to_num"),
    "zeroed-but-nan": (zeroed_but_nan, "hides probabilities behind the softmax"),
    "nan-reported": (nan_reported, "read by"),
    "zeroed-by-another-mask": (zeroed_by_another_mask, "behind the softmax"),
    "zeroed-where-it-is-seen": (zeroed_where_it_is_seen, "behind the softmax"),
    "filled-by-one": (filled_by_one, "(masked_fill) before they meet"),
    "zeroed-under-two-masks": (zeroed_under_two_masks, "several finite numbers"),
    "zeroed-under-two-masks-above-a-floor": (zeroed_under_two_masks_above_a_floor, "above a floor"),
    "lowered-by-a-billion-fully-masked": (lowered_by_a_billion_fully_masked, "which rows without any key show"),
    "filled-by-ten-thousand": (filled_by_ten_thousand, "-10000.0"),
    "lowered-by-ten-thousand": (lowered_by_ten_thousand, "-10000.0, which large scores outweigh"),
}


@pytest.mark.parametrize(("function", "reason"), DENSE.values(), ids=DENSE)
@torch.no_grad()
def test_left_dense(function, reason):
    capture = rewritten(function, heads(), heads(), heads())
    assert [record.rewritten for record in capture.records] == [False]
    assert reason in capture.records[0].reason


def test_a_billion_in_float16_is_infinite():
    def function(q, k, v):
        return (scores_of(q, k) + bias(q, -1e9).to(q.dtype)).softmax(-1) @ v

    with torch.no_grad():
        capture = rewritten(function, *(heads(dtype=torch.float16) for _ in range(3)), tolerance=1e-2)
    assert [record.reason for record in capture.records] == [""]


def test_a_billion_in_bfloat16_is_less():
    def function(q, k, v):
        return scores_of(q, k).masked_fill(above(q), -1e9).softmax(-1) @ v

    torch.manual_seed(0)
    with torch.no_grad():
        capture = rewritten(function, *(heads(dtype=torch.bfloat16) for _ in range(3)), tolerance=5e-2)
    assert [record.reason for record in capture.records] == [""]


CAST_DOWN = {
    "fill": (lambda scores: scores.masked_fill(padded(ALL_PADDING), LOWEST), ""),
    "mask": (lambda scores: scores + torch.where(padded(ALL_PADDING), LOWEST, 0.0), ""),
    "scaled": (lambda scores: scores.masked_fill(padded(ALL_PADDING), LOWEST) * 0.5, "scaled and cast to"),
    "floor": (lambda scores: scores.masked_fill(padded(ALL_PADDING), NINF).clamp(min=LOWEST), "(clamp) stands between"),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize(("hide", "reason"), CAST_DOWN.values(), ids=CAST_DOWN)
@torch.no_grad()
def test_a_number_that_a_cast_makes_infinite_gives_fully_masked_rows_what_infinity_gives(hide, reason, dtype):
    def function(q, k, v):
        return hide(scores_of(q, k).float()).to(dtype).softmax(-1).nan_to_num() @ v

    torch.manual_seed(0)  # eager attention rounds its weights to bfloat16: of many draws one is further off
    capture = rewritten(function, *(heads(dtype=dtype) for _ in range(3)), tolerance=5e-2)
    (record,) = capture.records
    assert record.rewritten == (reason == "")
    assert reason in record.reason


def test_the_smallest_float16_hides_no_float32_scores():
    """A product of float16 numbers, computed in float32, may lie far below -65504."""

    def function(q, k, v):
        return scores_of(q.float(), k.float()).masked_fill(above(q), -65504.0).softmax(-1).to(v.dtype) @ v

    q, k, v = (heads(dtype=torch.float16) for _ in range(3))
    with torch.no_grad():
        capture = rewritten(function, 600 * q, 600 * k, v, tolerance=1e-2)
    assert [record.rewritten for record in capture.records] == [False]
    assert (
        "hides scores by -65504.0, which large scores outweigh; expected -inf or torch.finfo(torch.float32).min"
        in capture.records[0].reason
    )
