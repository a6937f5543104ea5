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
