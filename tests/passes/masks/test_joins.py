"""Masks joined of parts, as that of new keys to that of cached ones: proven for every length, or left alone."""

import itertools

import pytest
import torch
from torch.nn import functional as F

from s2o_compile.passes.graph.rejected import Rejected
from tests.helpers.masks import capture, visible

NINF, LOWEST = float("-inf"), torch.finfo(torch.float32).min
LENGTHS = ((5, 9), (7, 8), (3, 20))  # queries, and keys with some cached ones before


def triangle(q, diagonal=1, number=NINF):
    return torch.triu(torch.full((q, q), number), diagonal)


def band(q):
    return torch.ones(q, q, dtype=torch.bool).tril().triu(-3)


JOINED = {
    "hstack": (lambda q, k: torch.hstack([torch.zeros(q, k - q), triangle(q)]), "causal"),
    "cat": (lambda q, k: torch.cat([torch.zeros(q, k - q), triangle(q)], dim=-1)[None, None], "causal"),
    "concat": (lambda q, k: torch.concat((torch.zeros(1, 1, q, k - q), triangle(q)[None, None]), dim=3), "causal"),
    "concatenate": (lambda q, k: torch.concatenate([torch.zeros(q, k - q), triangle(q, 1, LOWEST)], 1), "causal"),
    "three-parts": (lambda q, k: torch.cat([torch.zeros(q, 0), torch.zeros(q, k - q), triangle(q)], 1), "causal"),
    "bool": (lambda q, k: torch.cat([torch.ones(q, k - q).bool(), torch.ones(q, q).tril().bool()], 1), "causal"),
    "hidden": (lambda q, k: ~torch.hstack([torch.zeros(q, k - q).bool(), torch.ones(q, q).triu(1) == 1]), "causal"),
    "pad": (lambda q, k: F.pad(triangle(q), (k - q, 0)), "causal"),
    "pad-bool": (lambda q, k: F.pad(torch.ones(q, q, dtype=torch.bool).tril(), (k - q, 0), value=True), "causal"),
    "pad-hidden": (lambda q, k: ~F.pad(torch.ones(q, q, dtype=torch.bool).triu(1), (k - q, 0), value=False), "causal"),
    "nothing-cached": (lambda q, k: torch.hstack([torch.zeros(k, 0), triangle(k)])[k - q :], "causal"),
    "rows": (lambda q, k: torch.vstack([torch.zeros(0, k), F.pad(triangle(q), (k - q, 0))]), "causal"),
    "one-more": (lambda q, k: torch.hstack([torch.zeros(q, k - q), triangle(q, 2)]), "causal"),
}
OTHERS = {
    "order": lambda q, k: torch.hstack([triangle(q), torch.zeros(q, k - q)]),
    "cached-hidden": lambda q, k: torch.hstack([torch.full((q, k - q), NINF), triangle(q)]),
    "cached-hidden-bool": lambda q, k: torch.cat([torch.zeros(q, k - q).bool(), torch.ones(q, q).tril().bool()], 1),
    "lower": lambda q, k: torch.hstack([torch.zeros(q, k - q), torch.tril(torch.full((q, q), NINF), -1)]),
    "window": lambda q, k: torch.cat([torch.ones(q, k - q).bool(), band(q)], 1),
    "numbers": lambda q, k: torch.hstack([torch.ones(q, k - q), triangle(q)]),
    "small-numbers": lambda q, k: torch.hstack([torch.zeros(q, k - q), triangle(q, 1, -100.0)]),
    "behind-the-diagonal": lambda q, k: torch.hstack([torch.zeros(q, k - q), triangle(q, -30)]),
    "pad-hides": lambda q, k: F.pad(triangle(q), (k - q, 0), value=NINF),
    "pad-rounded": lambda q, k: F.pad(torch.ones(q, q, dtype=torch.long).tril(), (k - q, 0), value=0.5).bool(),
    "pad-underflows": lambda q, k: F.pad(torch.ones(q, q).half().tril(), (k - q, 0), value=1e-9) != 0,
    "pad-complex": lambda q, k: F.pad(torch.ones(q, q, dtype=torch.cfloat), (k - q, 0)).bool(),
    "pad-behind": lambda q, k: F.pad(triangle(q), (0, k - q)),
    "pad-reflected": lambda q, k: F.pad(triangle(q)[None], (k - q, 0), mode="replicate")[0],
    "two-triangles": lambda q, k: torch.hstack([triangle(q)[:, : k - q], triangle(q)])[:, :k],
}


def proven(mask_of, dynamic=True):
    """The proof, after it was compared with the mask at several lengths; or the reason."""
    proof, symbols = capture(mask_of, dynamic=dynamic)
    for lengths in LENGTHS if dynamic else LENGTHS[:1]:
        if not isinstance(proof, Rejected):
            mask = mask_of(*lengths)
            seen = mask if mask.dtype is torch.bool else mask == 0
            assert torch.equal(visible(proof, symbols, lengths).expand(1, 1, *lengths), seen.expand(1, 1, *lengths))
    return proof


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", JOINED)
def test_a_joined_mask_is_proven(name, dynamic):
    mask_of, text = JOINED[name]
    proof = proven(mask_of, dynamic)
    assert not isinstance(proof, Rejected), proof.reason
    assert str(proof).startswith(text)


@pytest.mark.parametrize("name", OTHERS)
def test_another_mask_is_not_taken_for_it(name):
    proof = proven(OTHERS[name])
    if isinstance(proof, Rejected):
        assert "ALiBi" not in proof.reason or name in ("pad-reflected", "numbers")


def test_bounds_of_any_diagonal_hold_where_they_are_said():
    for cached, diagonal in itertools.product((0, 1, 4), (-6, -2, -1, 0, 1, 3)):
        proven(
            lambda q, k, c=cached, d=diagonal: torch.hstack([torch.zeros(q, c), torch.ones(q, k - c).triu(d) * LOWEST])
        )
