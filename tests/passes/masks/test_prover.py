"""The mask prover: what it accepts is the mask at every length, and what it rejects it rejects for the right reason."""

import random

import pytest
import torch

from s2o_compile.passes.graph.rejected import Rejected
from tests.helpers.masks import capture, k_index, q_index, visible

LENGTHS = ((6, 11), (7, 7), (3, 14))  # (queries, keys) to evaluate at; the capture sees (5, 9)
INF = float("-inf")


ACCEPTED = {
    "top-left": (lambda q, k: k_index(k) <= q_index(q), "causal, offset 0"),
    "bottom-right": (lambda q, k: k_index(k) <= q_index(q) + (k - q), "causal"),
    "bottom-right-other-side": (lambda q, k: k_index(k) - k <= q_index(q) - q, "causal"),
    "strict": (lambda q, k: k_index(k) < q_index(q) + (k - q) + 1, "causal"),
    "swapped": (lambda q, k: q_index(q) + (k - q) >= k_index(k), "causal"),
    "swapped-strict": (lambda q, k: q_index(q) + (k - q + 1) > k_index(k), "causal"),
    "negated": (lambda q, k: ~(k_index(k) > q_index(q) + (k - q)), "causal"),
    "negated-view": (lambda q, k: ~(k_index(k) > q_index(q))[None, None].expand(2, 1, q, k), "causal, offset 0"),
    "negated-union": (lambda q, k: ~((k_index(k) > q_index(q)) | (k_index(k) <= q_index(q) - 4)), "offset 0, window 4"),
    "difference": (lambda q, k: q_index(q) - k_index(k) >= 0, "causal, offset 0"),
    "strict-past": (lambda q, k: k_index(k) < q_index(q), "causal, offset -1"),
    "offset": (lambda q, k: k_index(k) <= q_index(q) + 3, "causal, offset 3"),
    "four-dims": (lambda q, k: (k_index(k) <= q_index(q)).expand(2, 1, q, k), "causal, offset 0"),
    "tril": (lambda q, k: torch.ones(q, k, dtype=torch.bool).tril(), "causal, offset 0"),
    "tril-diagonal": (lambda q, k: torch.ones(q, k, dtype=torch.bool).tril(diagonal=k - q), "causal"),
    "tril-float": (lambda q, k: torch.tril(torch.ones(q, k)).view(1, 1, q, k) != 0, "causal, offset 0"),
    "tril-to-bool": (lambda q, k: torch.tril(torch.ones(q, k)).to(torch.bool), "causal, offset 0"),
    "triu-equals-zero": (lambda q, k: torch.triu(torch.ones(q, k), diagonal=1) == 0, "causal, offset 0"),
    "not-triu": (lambda q, k: ~torch.ones(q, k, dtype=torch.bool).triu(1), "causal, offset 0"),
    "where-ones": (lambda q, k: torch.where(k_index(k) <= q_index(q), 1, 0) == 1, "causal, offset 0"),
    "where-zeros": (lambda q, k: torch.where(k_index(k) > q_index(q), 0.0, 1.0) != 0, "causal, offset 0"),
    "where-complement": (
        lambda q, k: (1 - torch.where(k_index(k) > q_index(q), 1, 0)).bool(),
        "causal, offset 0",
    ),
    "window-gt": (lambda q, k: (k_index(k) <= q_index(q)) & (k_index(k) > q_index(q) - 4), "offset 0, window 4"),
    "window-ge": (lambda q, k: (k_index(k) <= q_index(q)) & (k_index(k) >= q_index(q) - 3), "offset 0, window 4"),
    "window-lt": (lambda q, k: (k_index(k) <= q_index(q)) & (q_index(q) - 4 < k_index(k)), "offset 0, window 4"),
    "window-le": (lambda q, k: (q_index(q) - 3 <= k_index(k)) & (k_index(k) <= q_index(q)), "offset 0, window 4"),
    "window-difference": (
        lambda q, k: (q_index(q) - k_index(k) >= 0) & (q_index(q) - k_index(k) < 4),
        "offset 0, window 4",
    ),
    "window-bottom-right": (
        lambda q, k: (k_index(k) <= q_index(q) + (k - q)) & (k_index(k) > q_index(q) + (k - q) - 4),
        "causal, window 4",
    ),
    "window-around": (
        lambda q, k: (k_index(k) <= q_index(q) + 2) & (k_index(k) >= q_index(q) - 2),
        "offset 2, window 5",
    ),
    "distance": (lambda q, k: abs(q_index(q) - k_index(k)) <= 2, "offset 2, window 5"),
    "distance-strict": (lambda q, k: (q_index(q) - k_index(k)).abs() < 3, "offset 2, window 5"),
    "distance-swapped": (lambda q, k: torch.abs(k_index(k) - q_index(q)) < 3, "offset 2, window 5"),
    "distance-negated": (lambda q, k: ~(torch.abs(k_index(k) - q_index(q)) > 2), "offset 2, window 5"),
    "distance-view": (
        lambda q, k: abs(q_index(q) - k_index(k))[None, None].expand(2, 1, q, k) <= 2,
        "offset 2, window 5",
    ),
    "distance-and-causal": (
        lambda q, k: (abs(q_index(q) - k_index(k)) <= 3) & (k_index(k) <= q_index(q)),
        "offset 0, window 4",
    ),
    "tightest": (lambda q, k: (k_index(k) <= q_index(q) + 3) & (k_index(k) <= q_index(q) + 1), "causal, offset 1"),
    "diagonal": (lambda q, k: k_index(k) == q_index(q), "offset 0, window 1"),
    "logical-and": (
        lambda q, k: torch.logical_and(k_index(k) <= q_index(q), torch.ones(q, k, dtype=torch.bool)),
        "causal, offset 0",
    ),
    "mul": (lambda q, k: (k_index(k) <= q_index(q)) * (k_index(k) >= q_index(q) - 3), "offset 0, window 4"),
    "where": (lambda q, k: torch.where(k_index(k) <= q_index(q), k_index(k) >= 0, False), "causal, offset 0"),
    "masked-fill": (
        lambda q, k: torch.ones(q, k, dtype=torch.bool).masked_fill(k_index(k) > q_index(q), False),
        "causal, offset 0",
    ),
    "sliced": (lambda q, k: (torch.arange(k + 4) <= torch.arange(q + 2)[:, None])[:q, :k], "causal, offset 0"),
    "rows-cut-off": (lambda q, k: (torch.arange(k) <= torch.arange(q + 2)[:, None])[2:], "causal, offset 2"),
    "chunks": (lambda q, k: (k_index(k) // 4 == q_index(q) // 4) & (k_index(k) <= q_index(q)), "offset 0, chunk 4"),
    "chunks-div": (
        lambda q, k: (
            (k_index(k) <= q_index(q))
            & (torch.div(k_index(k), 4, rounding_mode="floor") == torch.floor_divide(q_index(q), 4))
        ),
        "offset 0, chunk 4",
    ),
    "chunks-swapped-view": (
        lambda q, k: ((torch.arange(q) // 3)[:, None] == (torch.arange(k) // 3)[None]) & (k_index(k) <= q_index(q)),
        "offset 0, chunk 3",
    ),
    "chunks-bottom-right": (
        lambda q, k: (k_index(k) // 4 == (q_index(q) + (k - q)) // 4) & (k_index(k) <= q_index(q) + (k - q)),
        "causal, chunk 4",
    ),
    "chunks-and-window": (
        lambda q, k: (k_index(k) // 4 == q_index(q) // 4) & (k_index(k) <= q_index(q)) & (k_index(k) > q_index(q) - 2),
        "offset 0, window 2, chunk 4",
    ),
    "chunks-float-min": (
        lambda q, k: torch.where(
            (k_index(k) // 4 == q_index(q) // 4) & (k_index(k) <= q_index(q)), 0.0, torch.finfo(torch.float32).min
        ),
        "offset 0, chunk 4",
    ),
    "ones": (lambda q, k: torch.ones(q, k, dtype=torch.bool), "bidirectional"),
    "always": (lambda q, k: (q_index(q) >= 0).expand(q, k), "bidirectional"),
    "beyond-the-keys": (lambda q, k: k_index(k) <= q_index(q) + k, "bidirectional"),
    "float-where": (lambda q, k: torch.where(k_index(k) <= q_index(q), 0.0, INF), "causal, offset 0"),
    "float-masked-fill": (
        lambda q, k: torch.zeros(q, k).masked_fill(k_index(k) > q_index(q), INF)[None, None],
        "causal, offset 0",
    ),
    "float-triu": (lambda q, k: torch.full((q, k), INF).triu(1), "causal, offset 0"),
    "float-min": (
        lambda q, k: torch.where(k_index(k) <= q_index(q), 0.0, torch.finfo(torch.float32).min),
        "causal, offset 0",
    ),
    "float-zeros": (lambda q, k: torch.zeros(q, k), "bidirectional"),
}


@pytest.mark.parametrize(("mask_of", "expected"), ACCEPTED.values(), ids=ACCEPTED)
def test_accepted_masks_hold_at_every_length(mask_of, expected):
    proof, symbols = capture(mask_of)
    assert not isinstance(proof, Rejected), proof
    assert str(proof).removeprefix("causal, ") == expected.removeprefix("causal, ")
    for lengths in LENGTHS:
        mask = mask_of(*lengths)
        mask = mask if mask.dtype is torch.bool else mask == 0
        stated = visible(proof, symbols, lengths)
        assert torch.equal(stated.expand(2, 1, *lengths), mask.expand(2, 1, *lengths))


def test_equal_lengths_make_top_left_and_bottom_right_one():
    proof, _ = capture(lambda q, k: k_index(k) <= q_index(q), dynamic=False, lengths=(8, 8))
    assert str(proof) == "causal"
    assert proof.offset is None


AROUND = {
    "distance": (lambda q, k: abs(q_index(q) - k_index(k)) <= 2, "sliding window -2..+2"),
    "two-comparisons": (
        lambda q, k: (k_index(k) < q_index(q) + 2) & (k_index(k) > q_index(q) - 4),
        "sliding window -3..+1",
    ),
    "difference": (lambda q, k: (k_index(k) - q_index(q) <= 1) & (k_index(k) - q_index(q) >= 0), "window -0..+1"),
    "future-only": (lambda q, k: (k_index(k) <= q_index(q) + 3) & (k_index(k) > q_index(q)), "window +1..+3"),
    "causal": (lambda q, k: (k_index(k) <= q_index(q)) & (k_index(k) > q_index(q) - 4), "causal, window 4"),
    "offset-back": (lambda q, k: k_index(k) <= q_index(q) - 1, "causal, offset -1"),
}


@pytest.mark.parametrize(("mask_of", "text"), AROUND.values(), ids=AROUND)
def test_a_window_around_the_query_is_printed_as_one(mask_of, text):
    def same_length(q, k):
        return mask_of(q, q)

    proof, symbols = capture(same_length, dynamic=False, lengths=(9, 9))
    assert not isinstance(proof, Rejected), proof
    assert text in str(proof)
    assert torch.equal(visible(proof, symbols, (9, 9))[0, 0], mask_of(9, 9))


PADDING = {
    "bool-input": lambda q, k, pad: pad[:, None, None, :],
    "and-causal": lambda q, k, pad: (k_index(k) <= q_index(q)) & pad[:, None, None],
    "integer-input": lambda q, k, pad: pad.long()[:, None, None].bool() & (k_index(k) <= q_index(q)),
    "not-equal-zero": lambda q, k, pad: (pad.long() != 0)[:, None, None].expand(2, 1, q, k),
    "gathered": lambda q, k, pad: pad[torch.arange(2)[:, None, None, None], torch.arange(k)[None, None, None]],
    "longer-than-the-keys": lambda q, k, pad: torch.cat([pad, pad], 1)[:, None, None, :k],
    "inverted": lambda q, k, pad: ~(~pad[:, None, None] | (k_index(k) > q_index(q))),
    "masked-fill": lambda q, k, pad: (k_index(k) <= q_index(q))[None, None].masked_fill(~pad[:, None, None], False),
    "float-inf": lambda q, k, pad: torch.zeros(2, 1, q, k).masked_fill(~pad[:, None, None], INF),
    "twice": lambda q, k, pad: pad[:, None, None] & pad.flip(0)[:, None, None] & (k_index(k) <= q_index(q)),
    "one-row-for-all": lambda q, k, pad: pad[0].expand(q, k),
}


@pytest.mark.parametrize("mask_of", PADDING.values(), ids=PADDING)
def test_key_padding_stays_an_operand(mask_of):
    pad = torch.tensor([[False] * 4 + [True] * 5, [True] * 9])
    torch._dynamo.mark_dynamic(pad, 1)
    proof, symbols = capture(mask_of, pad)
    assert not isinstance(proof, Rejected), proof
    assert proof.key_masks
    assert str(proof).endswith("key padding")
    everything = torch.ones(2, 9, dtype=torch.bool)  # without the padding, the rest must be what the mask is
    rest = mask_of(5, 9, everything)
    rest = rest if rest.dtype is torch.bool else rest == 0
    assert torch.equal(visible(proof, symbols, (5, 9)).expand(2, 1, 5, 9), rest.expand(2, 1, 5, 9))


def in_place_and(q, k):
    mask = k_index(k) <= q_index(q)
    mask &= k_index(k) > 1
    return mask


def set_item(q, k):
    mask = k_index(k) <= q_index(q)
    mask[:, 0] = False
    return mask


def moved_index(q, k):
    index = torch.arange(k)
    index += 1
    return index[None] <= q_index(q)


def filled(q, k):
    mask = torch.ones(q, k, dtype=torch.bool)
    mask.fill_(False)
    return mask


def triangle_of_a_changed_tensor(q, k):
    ones = torch.ones(q, k, dtype=torch.bool)
    ones[0] = False
    return ones.tril()


def padding_written_later(q, k, pad):
    keep = pad.clone()
    mask = (k_index(k) <= q_index(q)) & keep[:, None, None]
    keep.fill_(True)
    return mask


def changed_distance(q, k):
    distance = abs(q_index(q) - k_index(k))
    distance += 1
    return distance <= 2


def learned():
    """Causal by its values, but values may change."""
    return torch.tril(torch.ones(5, 9)).bool()


PAD = torch.tensor([[False] * 4 + [True] * 5, [True] * 9])
REJECTED = {
    "future": (lambda q, k: k_index(k) >= q_index(q), (), "no keys after the query"),
    "union": (lambda q, k: (k_index(k) <= q_index(q)) | (k_index(k) < 2), (), "union of masks"),
    "negated-intersection": (lambda q, k: ~((k_index(k) > 3) & (k_index(k) > q_index(q))), (), "union of masks"),
    "not-equal": (lambda q, k: k_index(k) != q_index(q), (), "union of masks"),
    "far-keys": (lambda q, k: abs(q_index(q) - k_index(k)) >= 2, (), "union of masks"),
    "distance-of-a-changed-tensor": (changed_distance, (), "changed in place"),
    "chunks-left-padded": (
        lambda q, k, pad: (k_index(k) - pad[:, None, None, None]) // 4 == (q_index(q) - pad[:, None, None, None]) // 4,
        (torch.zeros(2, dtype=torch.long),),
        "chunked attention",
    ),
    "chunks-not-causal": (
        lambda q, k: (k_index(k) // 4 == q_index(q) // 4).expand(q, k),
        (),
        "without a causal mask of the same offset",
    ),
    "chunks-of-another-offset": (
        lambda q, k: (k_index(k) // 4 == q_index(q) // 4) & (k_index(k) <= q_index(q) + (k - q)),
        (),
        "without a causal mask of the same offset",
    ),
    "chunks-shifted": (
        lambda q, k: ((k_index(k) + 1) // 4 == (q_index(q) + 1) // 4) & (k_index(k) <= q_index(q)),
        (),
        "counts its chunks from position 1",
    ),
    "chunks-of-two-lengths": (
        lambda q, k: (k_index(k) // 4 == q_index(q) // 5) & (k_index(k) <= q_index(q)),
        (),
        "chunks of 4 keys with chunks of 5",
    ),
    "chunks-and-chunks": (
        lambda q, k: (
            (k_index(k) // 4 == q_index(q) // 4) & (k_index(k) // 6 == q_index(q) // 6) & (k_index(k) <= q_index(q))
        ),
        (),
        "chunks of different lengths",
    ),
    "chunks-of-queries": (
        lambda q, k: (q_index(q) // 4 == q_index(q) // 4) & (k_index(k) <= q_index(q)),
        (),
        "chunks of other things",
    ),
    "chunks-of-floats": (
        lambda q, k: (k_index(k).float() // 4 == q_index(q).float() // 4) & (k_index(k) <= q_index(q)),
        (),
        "varies along queries",
    ),
    "chunks-before": (
        lambda q, k: (k_index(k) // 4 <= q_index(q) // 4).expand(q, k),
        (),
        "only a comparison of two",
    ),
    "strided": (lambda q, k: 2 * k_index(k) <= q_index(q), (), "neither a causal bound nor a sliding window"),
    "anti-diagonal": (lambda q, k: k_index(k) + q_index(q) <= k, (), "varies along queries and keys"),
    "first-keys": (lambda q, k: (k_index(k) < 3).expand(q, k), (), "varies along keys"),
    "window-without-causal": (lambda q, k: k_index(k) > q_index(q) - 3, (), "no keys after the query"),
    "empty-window": (lambda q, k: (k_index(k) <= q_index(q)) & (k_index(k) > q_index(q)), (), "may be empty"),
    "tightest-unknown": (
        lambda q, k: (k_index(k) <= q_index(q) + 3) & (k_index(k) <= q_index(q) + (k - q)),
        (),
        "tightest depends on the lengths",
    ),
    "head-dependent": (
        lambda q, k: k_index(k) <= q_index(q) + torch.arange(4)[:, None, None],
        (),
        "varies along heads",
    ),
    "batch-dependent": (
        lambda q, k: k_index(k) <= q_index(q) + torch.arange(2)[:, None, None, None],
        (),
        "varies along batch entries",
    ),
    "false": (lambda q, k: torch.zeros(q, k, dtype=torch.bool), (), "False everywhere"),
    "learned": (lambda q, k, mask: mask, (learned(),), "values of the graph input"),
    "learned-expanded": (lambda q, k, mask: mask[None, None].expand(2, 1, 5, 9), (learned(),), "varies along queries"),
    "gated": (
        lambda q, k, gate: (k_index(k) <= q_index(q)) & gate,
        (torch.tensor(True),),
        "does not vary along the keys",
    ),
    "position-ids": (
        lambda q, k, position_ids: k_index(k) <= position_ids[:, :, None][:, None],
        (torch.arange(5).expand(2, 5),),
        "values of the graph input",
    ),
    "cache-position": (
        lambda q, k, start: k_index(k) <= q_index(q) + start,
        (torch.tensor(4),),
        "values of the graph input",
    ),
    "query-padding": (lambda q, k, pad: pad[:, None, :5, None].expand(2, 1, 5, 9), (PAD,), "varies along queries"),
    "padding-by-head": (lambda q, k, pad: pad[None, :, None].repeat(1, 2, 1, 1), (PAD,), "varies along heads"),
    "in-place-and": (in_place_and, (), "varies along keys"),
    "set-item": (set_item, (), "changed in place by setitem"),
    "moved-index": (moved_index, (), "changed in place by"),
    "filled": (filled, (), "False everywhere"),
    "triangle-of-a-changed-tensor": (triangle_of_a_changed_tensor, (), "changed in place by setitem"),
    "padding-written-later": (padding_written_later, (PAD,), "changed in place by fill_"),
    "float-bias": (lambda q, k: torch.where(k_index(k) <= q_index(q), 0.0, -1.0), (), "adds numbers to the scores"),
    "alibi-in-one-dimension": (
        lambda q, k, slopes: (slopes[:, None] * torch.arange(9)).view(2, 4, 1, 9).reshape(8, 1, 9).view(2, 4, 1, 9),
        (torch.ones(8),),
        "ALiBi and other position biases",
    ),
    "alibi": (lambda q, k: (k_index(k) - q_index(q)).float(), (), "ALiBi and other position biases"),
    "float-input": (lambda q, k, bias: bias, (torch.zeros(5, 9),), "let the model make its mask"),
    "finite-half": (
        lambda q, k: (
            torch.zeros(q, k).half().masked_fill(k_index(k) >= q_index(q), torch.finfo(torch.half).min).float()
        ),
        (),
        "rows without any key",
    ),
    "where-twos": (lambda q, k: torch.where(k_index(k) <= q_index(q), 2, 0) == 1, (), "varies along queries"),
    "visible-minus-inf": (lambda q, k: torch.where(k_index(k) <= q_index(q), INF, 0.0), (), "no keys"),
    "minus-one-of-uint8": (
        lambda q, k: ((k_index(k) <= q_index(q)).to(torch.uint8) - 1) * 1e9,
        (),
        "adds numbers to the scores",
    ),
    "bits-above-a-number-that-rounds-to-one": (
        lambda q, k: ~((k_index(k) > q_index(q)).bfloat16() > 0.999),
        (),
        "is the same everywhere",
    ),
    "integer-bits-above-a-number-that-rounds-to-one": (
        lambda q, k: ~((k_index(k) > q_index(q)).long() > 0.9999999999),
        (),
        "is the same everywhere",
    ),
    "bits-from-a-number-on-that-rounds-to-zero": (
        lambda q, k: (k_index(k) <= q_index(q)).half() >= 1e-9,
        (),
        "only int64 and int32 count exactly",
    ),
    "rounded-fill": (lambda q, k: torch.full((q, k), 0.5, dtype=torch.float32).long().bool(), (), "rounds"),
}


@pytest.mark.parametrize(("mask_of", "extra", "why"), REJECTED.values(), ids=REJECTED)
def test_rejected_masks_say_why(mask_of, extra, why):
    dynamic = not any(tensor.ndim for tensor in extra)
    proof, _ = capture(mask_of, *extra, dynamic=dynamic)
    assert isinstance(proof, Rejected), str(proof)
    assert why in proof.reason


def test_a_mask_made_for_one_length_is_proven_for_that_length_only():
    fixed, symbols = capture(lambda q, k: torch.arange(9)[None] <= torch.arange(5)[:, None], dynamic=False)
    assert str(fixed) == "causal, offset 0"
    assert symbols == (5, 9)


def test_a_run_time_number_as_offset_is_rejected():
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        proof, _ = capture(lambda q, k, start: k_index(k) <= q_index(q) + (start + 1).item(), torch.tensor(3))
    assert isinstance(proof, Rejected)
    assert "computed at run time" in proof.reason


FLIPPED = {torch.le: torch.ge, torch.lt: torch.gt, torch.ge: torch.le, torch.gt: torch.lt, torch.eq: torch.eq}
NEGATED = {torch.le: torch.gt, torch.lt: torch.ge, torch.ge: torch.lt, torch.gt: torch.le, torch.eq: torch.ne}


def random_term(rng):
    """A causal bound or a sliding window in a random form, now and then with a mistake in it."""
    bounds = ((torch.le, 0), (torch.lt, 1), (torch.ge, -4), (torch.gt, -5), (torch.eq, 0))
    compare, shift = rng.choices(bounds, (4, 4, 2, 2, 0.3))[0]
    shift += rng.choice((0, 0, 0, 1, -1, 2))
    if rng.random() < 0.15:
        compare = FLIPPED[compare]
    scale = 2 if rng.random() < 0.05 else 1
    aligned, swapped, negated, slid = (rng.random() < 0.4 for _ in range(4))

    def term(q, k):
        row = q_index(q) * scale + (k - q if aligned else 0) + shift
        column = k_index(k + 2)[:, 2:] - 2 if slid else k_index(k)
        written = NEGATED[compare] if negated else compare
        mask = FLIPPED.get(written, written)(row, column) if swapped else written(column, row)
        return ~mask if negated else mask

    return term


def random_mask(rng):
    """One to three random terms, mostly joined by AND."""
    terms = [random_term(rng) for _ in range(rng.choice((1, 2, 2, 3)))]
    ands = (torch.logical_and, torch.bitwise_and, torch.mul)
    joins = [torch.logical_or if index and rng.random() < 0.15 else rng.choice(ands) for index in range(len(terms))]
    negated, as_where = rng.random() < 0.1, rng.random() < 0.2

    def mask_of(q, k):
        mask = torch.ones(q, k, dtype=torch.bool)
        for join, term in zip(joins, terms, strict=True):
            mask = torch.where(term(q, k), mask, False) if as_where else join(mask, term(q, k))
        return ~mask if negated else mask

    return mask_of


@pytest.mark.slow
def test_whatever_is_proven_of_random_masks_is_true_at_every_length():
    rng = random.Random(0)
    proven = windows = 0
    for _ in range(60):
        mask_of = random_mask(rng)
        proof, symbols = capture(mask_of)
        if isinstance(proof, Rejected):
            assert proof.reason
            continue
        proven += 1
        windows += proof.window is not None
        for lengths in LENGTHS:
            mask = mask_of(*lengths)
            assert torch.equal(visible(proof, symbols, lengths)[0, 0], mask), (str(proof), lengths)
    assert proven >= 15  # a prover that rejects everything would pass the rest
    assert windows >= 3
