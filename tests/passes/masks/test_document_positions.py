"""Positions that restart in every document: causal inside of the documents that are made of them, and of no others."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from tests.helpers.capture import Capture
from tests.helpers.documents import BATCH, LENGTH, POSITIONS, both, check, heads, ids_of, same

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def over_positions(q, k, v, positions, *, ids=ids_of, bound=torch.le, shift=0, window=None):
    own, others = both(positions)
    mask = same(ids(positions)) & bound(others, own + shift if shift else own)
    if window is not None:
        mask = mask & (others > own - window)
    return sdpa(q, k, v, attn_mask=mask)


@pytest.mark.parametrize(
    ("options", "mask"),
    [
        ({}, "packed causal"),
        ({"bound": torch.lt, "shift": 1}, "packed causal"),
        ({"shift": 4}, "packed causal, offset 4"),
        ({"shift": -2}, "packed causal, offset -2"),
        ({"window": 15}, "packed causal, window 15"),
    ],
    ids=["plain", "less-than", "ahead", "behind", "window"],
)
def test_positions_inside_of_documents(options, mask):
    """transformers 5.24 compares positions that restart, which count up inside of each of its documents."""
    check(lambda *given: over_positions(*given, **options), POSITIONS, *heads(), masks=[mask])
    torch._dynamo.reset()
    one_row = (x[:1] for x in heads())
    check(lambda *given: over_positions(*given, **options), POSITIONS[:1], *one_row, masks=[mask])


def leaps(positions, *, step=1, compare=torch.ne, dim=-1, cast=None):
    found = compare(positions.diff(prepend=positions[:, :1] - 1, dim=dim), step)
    return (found if cast is None else found.to(cast)).cumsum(dim)


UNLIKE = {
    "restarts": lambda positions: (positions == 0).cumsum(-1),
    "another step": lambda positions: leaps(positions, step=2),
    "steps back": lambda positions: leaps(positions, compare=torch.lt),
    "of the other rows": lambda positions: leaps(positions.flip(0)),
    "of other positions": lambda positions: leaps(positions + positions),
    "prepended more": lambda positions: (positions.diff(prepend=positions[:, :2] - 1, dim=-1) != 1).cumsum(-1)[
        :, : positions.shape[1]
    ],
    "the first ones left out": lambda positions: leaps(positions).roll(1, -1),
    "second differences": lambda positions: (
        positions.diff(n=1, prepend=positions[:, :1] - 1).diff(n=1, prepend=positions[:, :1]) != 1
    ).cumsum(-1),
}


@pytest.mark.parametrize("name", UNLIKE)
def test_positions_that_prove_nothing_beside_other_ids(name):
    """The positions are the adversary's: they leap and fall inside of these documents."""
    q, k, v = heads()
    positions = torch.randint(0, 3, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    capture = Capture({"tau": 0.0, "min_seq_len": 0})
    compiled = torch.compile(lambda *given: over_positions(*given, ids=UNLIKE[name]), backend=capture)
    with torch.no_grad():
        torch.testing.assert_close(
            compiled(q, k, v, positions).nan_to_num(),
            over_positions(q, k, v, positions, ids=UNLIKE[name]).nan_to_num(),
            atol=1e-5,
            rtol=1e-5,
        )
    assert not capture.records[0].rewritten
    assert "varies along queries" in capture.records[0].reason


def read_elsewhere(q, k, v, positions):
    """Ids of the tokens before, and positions of the tokens themselves."""
    own, others = both(positions[:, 1:])
    return sdpa(q[:, :, 1:], k[:, :, 1:], v[:, :, 1:], attn_mask=same(ids_of(positions)[:, :-1]) & (others <= own))


def read_elsewhere_by_keys(q, k, v, positions):
    own, others = positions[:, None, :-1, None], positions[:, None, None, 1:]
    mask = same(ids_of(positions)[:, :-1]) & (others <= own)
    return sdpa(q[:, :, 1:], k[:, :, 1:], v[:, :, 1:], attn_mask=mask)


def read_in_another_row(q, k, v, positions):
    """Queries of every row see keys of the first row's documents, where positions count from elsewhere."""
    ids, (own, _), (_, others) = ids_of(positions), both(positions), both(positions[:1])
    return sdpa(q, k, v, attn_mask=(ids[:, None, :, None] == ids[:1, None, None]) & (others <= own))


ASKEW = {
    "backwards": lambda *given: over_positions(*given, bound=torch.ge),
    "read elsewhere": read_elsewhere,
    "read elsewhere by keys": read_elsewhere_by_keys,
    "read in another row": read_in_another_row,
}


@pytest.mark.parametrize("name", ASKEW)
def test_positions_of_other_tokens_prove_nothing(name):
    capture = Capture({"tau": 0.0, "min_seq_len": 0})
    compiled = torch.compile(ASKEW[name], backend=capture)
    with torch.no_grad():
        for positions in (POSITIONS, POSITIONS.flip(-1)):
            output, expected = (f(*heads(), positions) for f in (compiled, ASKEW[name]))
            torch.testing.assert_close(output.nan_to_num(), expected.nan_to_num(), atol=1e-5, rtol=1e-5)
    assert not capture.records[0].rewritten, capture.records[0].mask
