"""Document masks: proven where integers of queries are compared with integers of keys, and left where anything differs.

Every run is compared with the function in eager, on ids that stand in one piece and on ids that come back.
"""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from s2o_compile.passes import pipeline
from s2o_compile.passes.graph.nodes import value_of
from tests.helpers.capture import Capture
from tests.helpers.documents import (
    BATCH,
    IN_ORDER,
    IN_PIECES,
    LENGTH,
    LOWEST,
    PACKED,
    added,
    causal,
    check,
    heads,
    index,
    same,
    written_out,
)

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


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


def test_a_failure_of_the_pass_is_none_of_the_user(monkeypatch):
    """The ids are read behind the proof: where that fails the attention stays."""
    monkeypatch.setattr(pipeline.Rewriter, "_documents", lambda *_: 1 / 0)
    function, _ = PROVEN["causal"]
    capture = Capture({"tau": 0.0, "min_seq_len": 0})
    torch.compile(function, backend=capture)(*heads(), IN_ORDER)
    assert "ZeroDivisionError" in capture.records[0].reason
