"""Document masks: proven where integers of queries are compared with integers of keys, and left where anything differs.

Every run is compared with the function in eager, on ids that stand in one piece and on ids that come back.
"""

import random

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from s2o_compile.passes import pipeline
from s2o_compile.passes.graph.nodes import value_of
from tests.helpers import fuzz_packed
from tests.helpers.capture import Capture

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

PACKED = torch.ops.s2o.packed_attention.default
BATCH, LENGTH = 2, 160
LOWEST = torch.finfo(torch.float32).min
IN_ORDER = torch.stack([torch.arange(LENGTH) >= 90, torch.arange(LENGTH) // 60])
IN_PIECES = torch.stack([torch.arange(LENGTH) // 40 % 2, torch.arange(LENGTH) // 9 % 3])
POSITIONS = torch.stack([torch.cat([torch.arange(n), torch.arange(3, LENGTH - n + 3)]) for n in (90, 40)])


def heads(length=LENGTH):
    generator = torch.Generator().manual_seed(length)
    return [torch.randn(BATCH, 2, length, 8, generator=generator) for _ in range(3)]


def index(x):
    return torch.arange(x.shape[2])


def causal(q, k, ahead=0):
    return index(k) <= index(q)[:, None] + ahead


def same(ids):
    return ids[:, None, :, None] == ids[:, None, None]


def ids_of(positions):
    return (positions.diff(prepend=positions[:, :1] - 1, dim=-1) != 1).cumsum(-1)


def both(positions):
    """A comparison of the positions of queries with those of keys."""
    return positions[:, None, :, None], positions[:, None, None]


def added(visible, number=-torch.inf):
    return torch.zeros(visible.shape).masked_fill(~visible, number)


def written_out(q, k, v, mask):
    return (q @ k.mT * 8**-0.5 + mask).softmax(-1) @ v


def in_place(q, k, v, ids):
    mask = ids[:, None, :, None] == ids[:, None, None]
    mask &= causal(q, k)
    return sdpa(q, k, v, attn_mask=mask)


def llama_factory(q, k, v, ids):
    """How a trainer spells it: ids, 0 for padding, as a mask that is multiplied."""
    spread = ids[:, None, None].expand(BATCH, 1, LENGTH, LENGTH)
    mask = torch.eq(spread, spread.transpose(-1, -2)).int() * torch.where(spread != 0, 1, 0)
    mask = mask * torch.tril(torch.ones((LENGTH, LENGTH), dtype=torch.long))
    return sdpa(q, k, v, attn_mask=torch.where(mask != 0, torch.tensor(0.0), -torch.inf))


def of_other_lengths(q, k, v, ids):
    """A turn on top of a cache: the last queries, and all keys."""
    own = torch.arange(q.shape[2]) + (k.shape[2] - q.shape[2])
    mask = (ids[:, None, own, None] == ids[:, None, None]) & (index(k) <= own[:, None])
    return sdpa(q, k, v, attn_mask=mask)


def two_layers(q, k, v, ids):
    mask = same(ids) & causal(q, k)
    return sdpa(sdpa(q, k, v, attn_mask=mask), k, v, attn_mask=mask & (ids != 1)[:, None, None])


PROVEN = {
    "causal": (lambda q, k, v, ids: sdpa(q, k, v, attn_mask=same(ids) & causal(q, k)), ["packed causal"]),
    "bidirectional": (lambda q, k, v, ids: sdpa(q, k, v, attn_mask=same(ids)), ["packed bidirectional"]),
    "one row for all": (lambda q, k, v, ids: sdpa(q, k, v, attn_mask=same(ids[1:])), ["packed bidirectional"]),
    "rank 2": (
        lambda q, k, v, ids: sdpa(q, k, v, attn_mask=(ids[1][:, None] == ids[1]) & causal(q, k)),
        ["packed causal"],
    ),
    "window": (
        lambda q, k, v, ids: sdpa(q, k, v, attn_mask=same(ids) & causal(q, k) & (index(k) > index(q)[:, None] - 20)),
        ["packed causal, window 20"],
    ),
    "around": (
        lambda q, k, v, ids: sdpa(q, k, v, attn_mask=same(ids) & (abs(index(k) - index(q)[:, None]) <= 5)),
        ["packed sliding window -5..+5"],
    ),
    "padding": (
        lambda q, k, v, ids: sdpa(q, k, v, attn_mask=same(ids) & causal(q, k) & (ids != 0)[:, None, None]),
        ["packed causal, key padding"],
    ),
    "negated": (
        lambda q, k, v, ids: sdpa(q, k, v, attn_mask=~((ids[:, None, :, None] != ids[:, None, None]) | ~causal(q, k))),
        ["packed causal"],
    ),
    "swapped": (
        lambda q, k, v, ids: sdpa(q, k, v, attn_mask=(ids[:, None, None] == ids[:, None, :, None]) & causal(q, k)),
        ["packed causal"],
    ),
    "transposed": (lambda q, k, v, ids: sdpa(q, k, v, attn_mask=same(ids).mT & causal(q, k)), ["packed causal"]),
    "wider": (
        lambda q, k, v, ids: sdpa(q, k, v, attn_mask=same(ids.int().long()[:, :]) & causal(q, k)),
        ["packed causal"],
    ),
    "additive": (lambda q, k, v, ids: sdpa(q, k, v, attn_mask=added(same(ids) & causal(q, k))), ["packed causal"]),
    "written out": (
        lambda q, k, v, ids: written_out(q, k, v, added(same(ids) & causal(q, k), LOWEST)),
        ["packed causal"],
    ),
    "rows without a key": (
        lambda q, k, v, ids: written_out(q, k, v, added(same(ids) & (ids != 0)[:, None, None], LOWEST)),
        ["packed bidirectional, key padding"],
    ),
    "other documents without a key": (
        lambda q, k, v, ids: written_out(q, k, v, added(ids[:, None, :, None] == (ids + 1)[:, None, None], LOWEST)),
        ["packed bidirectional"],
    ),
    "in place": (in_place, ["packed causal"]),
    "a trainer's": (llama_factory, ["packed causal, key padding"]),
    "two layers": (two_layers, ["packed causal", "packed causal, key padding"]),
    "a sum": (
        lambda q, k, v, ids: sdpa(q, k, v, attn_mask=same((ids == 0).cumsum(-1)) & causal(q, k)),
        ["packed causal"],
    ),
    "boundaries": (
        lambda q, k, v, ids: sdpa(
            q,
            k,
            v,
            attn_mask=(torch.bucketize(index(q), ids[0])[:, None] == torch.bucketize(index(k), ids[0])) & causal(q, k),
        ),
        ["packed causal"],
    ),
    "chunks": (
        lambda q, k, v, ids: sdpa(
            q,
            k,
            v,
            attn_mask=torch.div(index(q), 50, rounding_mode="trunc")[:, None]
            == torch.div(index(k), 50, rounding_mode="trunc"),
        ),
        ["packed bidirectional"],
    ),
    "other ids": (
        lambda q, k, v, ids: sdpa(q, k, v, attn_mask=ids[:, None, :, None] == ids.flip(-1)[:, None, None]),
        ["packed bidirectional"],
    ),
}


def check(function, ids, *inputs, masks, dynamic=False):
    capture = Capture({"tau": 0.0, "min_seq_len": 0})
    compiled = torch.compile(function, backend=capture)
    with torch.no_grad():
        for given in (ids, ids.flip(0), ids.flip(-1)):
            tensors = [*inputs, given.clone()]
            for x, dim in zip(tensors, (2, 2, 2, 1), strict=True):
                if dynamic:
                    torch._dynamo.mark_dynamic(x, dim)
            output = compiled(*tensors)
            expected = function(*inputs, given.clone())
            torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)
    assert [(record.mask, record.reason) for record in capture.records] == [(mask, "") for mask in masks]
    return capture


@pytest.mark.parametrize("ids", [IN_ORDER, IN_PIECES], ids=["in-order", "in-pieces"])
@pytest.mark.parametrize("name", PROVEN)
def test_proven(name, ids):
    function, masks = PROVEN[name]
    capture = check(function, ids, *heads(), masks=masks)
    assert len([node for node in capture.nodes if node.target is PACKED]) == len(masks)
    squares = [value for value in capture.values if value.shape[-2:] == (LENGTH, LENGTH)]
    assert name in ("in place", "a trainer's") or not squares, "the mask remains"


@pytest.mark.parametrize("name", ["causal", "window", "padding", "written out"])
def test_proven_for_every_length(name):
    function, masks = PROVEN[name]
    capture = check(function, IN_ORDER, *heads(), masks=masks, dynamic=True)
    assert len(capture.graphs) == 1


def test_a_turn_on_top_of_a_cache():
    q, k, v = heads()
    check(of_other_lengths, IN_ORDER, q[:, :, 60:], k, v, masks=["packed causal"])
    torch._dynamo.reset()
    check(of_other_lengths, IN_PIECES, q[:, :, 60:], k, v, masks=["packed causal"])


def test_layers_share_the_ids():
    capture = check(two_layers, IN_ORDER, *heads(), masks=PROVEN["two layers"][1])
    calls = [node for node in capture.nodes if node.target is PACKED]
    assert calls[0].args[3] is calls[1].args[3]
    assert calls[0].args[4] is calls[1].args[4] is None


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


def written_between(q, k, v, ids):
    mask = same(ids) & causal(q, k)
    ids.add_(torch.arange(LENGTH) // 30)
    return sdpa(q, k, v, attn_mask=mask)


def written_before(q, k, v, ids):
    first = ids[:, None, :, None] + 0
    ids.add_(torch.arange(LENGTH) // 30)
    return sdpa(q, k, v, attn_mask=(first == ids[:, None, None]) & causal(q, k))


def of_heads(q, k, v, ids):
    """[B, N, N] broadcasts over heads, not over the batch."""
    return sdpa(q, k, v, attn_mask=(ids[:, :, None] == ids[:, None]) & causal(q, k))


def of_windows(q, k, v, ids):
    """Two halves in the batch see the documents of the first."""
    return sdpa(q, k, v, attn_mask=(ids.view(2 * BATCH, 1, -1, 1) == ids.view(2 * BATCH, 1, 1, -1))[:BATCH])


LEFT = {
    "unequal": (
        lambda q, k, v, ids: sdpa(q, k, v, attn_mask=ids[:, None, :, None] != ids[:, None, None]),
        "varies along queries",
    ),
    "at most": (
        lambda q, k, v, ids: sdpa(q, k, v, attn_mask=ids[:, None, None] <= ids[:, None, :, None]),
        "varies along queries",
    ),
    "union": (lambda q, k, v, ids: sdpa(q, k, v, attn_mask=same(ids) | causal(q, k)), "union"),
    "floating": (
        lambda q, k, v, ids: sdpa(q, k, v, attn_mask=same(ids.float()) & causal(q, k)),
        "NaN is not even equal to itself",
    ),
    "two numberings": (
        lambda q, k, v, ids: sdpa(q, k, v, attn_mask=same(ids) & same(ids.flip(-1)) & causal(q, k)),
        "number documents differently",
    ),
    "chunks across": (
        lambda q, k, v, ids: sdpa(
            q, k, v, attn_mask=same(ids) & causal(q, k) & (index(k) // 50 == index(q)[:, None] // 50)
        ),
        "chunks that are counted across them",
    ),
    "by head": (of_heads, "varies along heads"),
    "of the queries": (
        lambda q, k, v, ids: sdpa(q, k, v, attn_mask=same(ids) & causal(q, k) & (ids != 1)[:, None, :, None]),
        "varies along queries",
    ),
    "written between": (written_between, "changed in place"),
    "written before": (written_before, "changed in place"),
    "the diagonal": (
        lambda q, k, v, ids: sdpa(q, k, v, attn_mask=ids[:, None, :, None] == ids[:, None, :, None].mT.roll(1, 2)),
        None,
    ),
}


@pytest.mark.parametrize("name", LEFT)
def test_left_as_it_is(name):
    function, reason = LEFT[name]
    capture = Capture({"tau": 0.0, "min_seq_len": 0})
    compiled = torch.compile(function, backend=capture)
    with torch.no_grad():
        for ids in (IN_ORDER, IN_PIECES):
            torch.testing.assert_close(
                compiled(*heads(), ids.clone()), function(*heads(), ids.clone()), atol=1e-5, rtol=1e-5
            )
    if reason is not None:
        assert not capture.records[0].rewritten, capture.records[0].mask
        assert reason in capture.records[0].reason


def test_a_padding_mask_is_no_document_mask():
    """Tensors that are compared token by token, and lengths that are compared with positions, stay key masks."""

    def function(q, k, v, ids):
        lengths = ids.amax(-1)[:, None] * 40 + 60
        keep = (ids == ids.flip(0)) & (index(k)[None] == index(k)[None]) & (index(k)[None] < lengths)
        return sdpa(q, k, v, attn_mask=causal(q, k) & (keep | (index(k) == 0))[:, None, None])

    check(function, IN_ORDER, *heads(), masks=["causal, key padding"])


def test_narrow_ids_are_compared_as_narrow_ones():
    """256 and 0 are one document once they are bytes: the cast is a part of the ids."""
    ids = torch.arange(LENGTH).expand(BATCH, -1) // 50 * 256
    function = lambda q, k, v, ids: sdpa(q, k, v, attn_mask=same(ids.to(torch.uint8)) & causal(q, k))  # noqa: E731
    check(function, ids, *heads(), masks=["packed causal"])
    torch._dynamo.reset()
    one_side = lambda q, k, v, ids: sdpa(  # noqa: E731
        q, k, v, attn_mask=(ids.to(torch.uint8)[:, None, :, None] == ids[:, None, None]) & (index(k) >= 0)
    )
    check(one_side, ids, *heads(), masks=["packed bidirectional"])


def test_ids_and_padding_from_another_device():
    """The device "meta" stands for a GPU: the mask is made of copies of what the host holds."""

    def function(q, k, v, ids):
        there = ids.to("meta")
        return sdpa(q, k, v, attn_mask=same(there) & (there != 0)[:, None, None])

    def padded(q, k, v, ids):
        return sdpa(q, k, v, attn_mask=(ids != 0).to("meta")[:, None, None])

    for attend, operands in ((function, (3, 5)), (padded, (3,))):
        capture = Capture({"tau": 0.0, "min_seq_len": 0})
        torch.compile(attend, backend=capture)(*(x.to("meta") for x in heads()), IN_ORDER)
        (call,) = [node for node in capture.nodes if "s2o." in str(node.target)]
        assert {value_of(call.args[at]).device.type for at in operands} == {"meta"}


def search(seeds):
    """Random modules that compute something else compiled; how many attentions were packed, and how many not."""
    wrong, found, left = [], 0, 0
    for seed in seeds:
        rng = random.Random(seed)
        batch = rng.choice((1, 2))
        function = fuzz_packed.random_attention(rng)
        torch._dynamo.reset()
        capture = Capture({"tau": 0.0, "min_seq_len": rng.choice((0, 40, 10**6))})
        compiled = torch.compile(function, backend=capture)
        with torch.no_grad():
            for _ in range(3):
                given = fuzz_packed.inputs(rng, batch)
                try:
                    expected = function(*(x.clone() for x in given))
                except RuntimeError:  # shapes that do not fit
                    break
                output = compiled(*(x.clone() for x in given))
                seen = ~expected.isnan()  # softmax of nothing but -inf
                if not torch.allclose(output[seen], expected[seen], atol=1e-5, rtol=1e-5):
                    wrong.append((seed, [record.mask for record in capture.records]))
        found += any(record.mask.startswith("packed") for record in capture.records)
        left += any(not record.rewritten for record in capture.records)
    return wrong, found, left


def test_a_few_random_modules():
    wrong, found, left = search(range(1000, 1012))
    assert not wrong
    assert found >= 2
    assert left >= 2


@pytest.mark.slow
def test_no_wrong_document_mask_is_ever_proven():
    wrong, found, left = search(range(400))
    assert not wrong
    assert found >= 60
    assert left >= 100


def test_a_failure_of_the_pass_is_none_of_the_user(monkeypatch):
    """The ids are read behind the proof: where that fails the attention stays."""
    monkeypatch.setattr(pipeline.Rewriter, "_documents", lambda *_: 1 / 0)
    function, _ = PROVEN["causal"]
    capture = Capture({"tau": 0.0, "min_seq_len": 0})
    torch.compile(function, backend=capture)(*heads(), IN_ORDER)
    assert "ZeroDivisionError" in capture.records[0].reason
