"""``s2o::packed_attention``: every document by itself, equal to float64 under the mask that the ids spell out."""

import dataclasses
import random

import pytest
import torch

from s2o_compile.kernels.calls import packed
from s2o_compile.kernels.core.documents import Documents, by_pairs, ids_of
from s2o_compile.kernels.statistics import record_calls
from s2o_compile.kernels.support.errors import InputError, NoGradientError
from tests.conftest import CUDA, Case, softmax_attention

OPERATOR = torch.ops.s2o.packed_attention.default
BATCH, LENGTH = 2, 300


def runs(rng, length, pieces):
    """Ids of documents that stand in a random order, each in one piece."""
    ends = torch.tensor(sorted(rng.sample(range(1, length), pieces - 1)), dtype=torch.long)
    order = torch.tensor(rng.sample(range(-3, pieces), pieces))
    return order[torch.bucketize(torch.arange(length), ends, right=True)]


KINDS = {
    "one": lambda rng: torch.zeros(1, LENGTH),
    "rows alike": lambda rng: runs(rng, LENGTH, 4)[None],
    "rows differ": lambda rng: torch.stack([runs(rng, LENGTH, n) for n in (3, 6)]),
    "many short": lambda rng: torch.stack([runs(rng, LENGTH, 60) for _ in range(2)]),
    "one length": lambda rng: (torch.arange(LENGTH) // 50)[None],
    "in pieces": lambda rng: torch.stack([torch.arange(LENGTH) // n % 3 for n in (40, 7)]),
}
MASKS = (
    {},
    {"causal": True},
    {"causal": True, "window": 40},
    {"causal": True, "causal_offset": -7},
    {"causal": True, "causal_offset": 3, "window": 9},
)


def exact(inputs, pairs):
    """Float64 under a mask of all pairs; a row that sees no key has zeros, or the mean of all values."""
    wide = inputs.to(torch.float64)
    key, value = (x.repeat_interleave(wide.query.shape[1] // x.shape[1], 1) for x in (wide.key, wide.value))
    scores = wide.query @ key.mT * inputs.scale
    if inputs.softcap is not None:
        scores = inputs.softcap * (scores / inputs.softcap).tanh()
    scores = scores.masked_fill(~pairs, -torch.inf)
    if inputs.sinks is not None:
        sinks = wide.sinks[:, None, None].expand(*scores.shape[:3], 1)
        weights = torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1).nan_to_num()
    output = weights @ value
    if inputs.fully_masked == "mean" and inputs.sinks is None:
        output = torch.where(pairs.any(-1, keepdim=True), output, value.mean(2, keepdim=True))
    return output


def compare(inputs, ids, key_ids=None, **options):
    """Runs the operator and compares it with float64; the calls that it made."""
    terms = {name: options[name] for name in ("causal", "causal_offset", "window", "bottom_right") if name in options}
    ids, key_ids = (None if x is None else x.long().to(inputs.query.device) for x in (ids, key_ids))
    mask = inputs.mask.key_mask
    pairs_of = by_pairs(lambda query, key, value, pairs, sinks: pairs)
    pairs = pairs_of(inputs.query, inputs.key, inputs.value, ids, key_ids, mask, **terms)
    given = {"softcap": inputs.softcap, "fully_masked": inputs.fully_masked, "tau": 0.0, "min_seq_len": 0} | options
    with record_calls() as calls:
        output, _ = OPERATOR(*inputs.tensors, ids, key_ids, mask, inputs.sinks, **given)
    expected = exact(inputs, pairs)
    least = 1e-5 if inputs.query.dtype is torch.float32 else 2e-2
    assert (output.double() - expected).abs().max() <= least * max(expected.abs().max().item(), 1)
    return calls


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("mask", MASKS, ids=lambda mask: "-".join(f"{k}{v}" for k, v in mask.items()) or "full")
@pytest.mark.parametrize("kind", KINDS)
def test_every_document_by_itself(kind, mask, device):
    rng = random.Random(0)
    for shortest in (0, 100, 10**6):
        case = Case(batch=BATCH, heads=4, kv_heads=2, queries=LENGTH, head_dim=16, padding=rng.choice(("", "left")))
        compare(case.inputs(device), KINDS[kind](rng), **mask, min_seq_len=shortest)


@pytest.mark.parametrize(
    "case",
    [
        Case(batch=BATCH, heads=4, kv_heads=2, queries=LENGTH, head_dim=16, softcap=3.0),
        Case(batch=BATCH, heads=4, kv_heads=2, queries=LENGTH, head_dim=16, sinks=True, padding="left"),
        Case(batch=BATCH, heads=4, kv_heads=4, queries=LENGTH, head_dim=16, value_dim=24, layout="packed"),
        Case(batch=BATCH, heads=2, kv_heads=1, queries=LENGTH, head_dim=16, padding="left", fully_masked="mean"),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["rows alike", "rows differ", "in pieces"])
def test_every_feature(case, kind):
    compare(case.inputs(), KINDS[kind](random.Random(1)), causal=True)
    compare(case.inputs(), KINDS[kind](random.Random(1)), min_seq_len=100)


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("kind", ["in order", "in pieces", "of one length"])
def test_documents_of_other_keys(kind, mask):
    """Cross attention, a document without keys, and keys of documents without queries."""
    ids = torch.tensor([5, 1, 3, 8]).repeat_interleave(75)
    names, lengths = {
        "in order": ([1, 9, 3, 5], [60, 20, 200, 80]),
        "in pieces": ([1, 3, 1, 9, 5], [60, 100, 90, 30, 80]),
        "of one length": ([5, 1, 3, 8], [90] * 4),
    }[kind]
    key_ids = torch.tensor(names).repeat_interleave(torch.tensor(lengths))
    case = Case(batch=BATCH, heads=4, kv_heads=2, queries=300, keys=360, head_dim=16)
    compare(dataclasses.replace(case, batch=1).inputs(), ids[None], key_ids[None], **mask)
    for rows in (1, BATCH):
        compare(case.inputs(), ids.expand(rows, -1), key_ids[None], **mask)
    compare(dataclasses.replace(case.inputs(), fully_masked="mean"), ids[None], key_ids[None], **mask)


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_aligned_to_the_bottom_right_of_each(mask):
    bounds, key_bounds = torch.tensor([0, 140, 140, 190, 240, 300]), torch.tensor([0, 200, 230, 230, 300, 360])
    case = Case(heads=4, kv_heads=2, queries=300, keys=360, head_dim=16)
    ids, key_ids = ids_of(bounds.int(), 300), ids_of(key_bounds.int(), 360)
    calls = compare(case.inputs(), ids, key_ids, **mask, bottom_right=True)
    assert [call.n_queries for call in calls] == [140, 110]  # short neighbours share a call
    inputs = case.inputs()
    offset = mask.get("causal_offset", 0)
    for q, k in ((slice(0, 140), slice(0, 200)), (slice(240, 300), slice(300, 360))):
        own = dataclasses.replace(inputs.mask, causal=bool(mask), offset=k.stop - k.start - (q.stop - q.start) + offset)
        own = dataclasses.replace(own, window=mask.get("window"))
        part = dataclasses.replace(
            inputs, query=inputs.query[:, :, q], key=inputs.key[:, :, k], value=inputs.value[:, :, k], mask=own
        )
        output, _ = OPERATOR(*inputs.tensors, ids, key_ids, **mask, bottom_right=True, tau=0.0, min_seq_len=0)
        expected, _ = softmax_attention(part, torch.float64)
        assert (output[:, :, q].double() - expected).abs().max() < 1e-5


def test_paths_and_densities_are_of_the_documents():
    """At tau > 0 a document gets bit by bit what it gets alone."""
    inputs = Case(heads=2, kv_heads=1, queries=3100, head_dim=32).inputs(heavy=64)
    ids = torch.tensor([0, 1, 2]).repeat_interleave(torch.tensor([2000, 1000, 100]))[None]
    given = {"causal": True, "tau": 0.5, "min_seq_len": 300}
    with record_calls() as calls:
        output, _ = OPERATOR(*inputs.tensors, ids, **given)
    assert [(call.path, call.n_keys, call.mask) for call in calls] == [
        ("s2o", 2000, "causal"),
        ("s2o", 1000, "causal"),
        ("dense", 100, "causal"),
    ]
    with record_calls() as alone:
        expected, _ = torch.ops.s2o.attention(*(x[:, :, :2000] for x in inputs.tensors), **given)
    assert torch.equal(output[:, :, :2000], expected)
    assert calls[0].density == alone[0].density < 0.9
    assert calls[0].area.item() == 2000 * 2001 / 2


def test_neighbours_of_one_length_are_one_call():
    inputs = Case(heads=2, kv_heads=1, queries=800, head_dim=16).inputs()
    calls = compare(inputs, (torch.arange(800) // 200)[None], causal=True)
    assert [(call.path, call.n_queries, len(call.area)) for call in calls] == [("s2o", 200, 4)]


def test_short_neighbours_share_a_call():
    inputs = Case(heads=2, kv_heads=1, queries=800, head_dim=16).inputs()
    ids = torch.tensor([0, 1, 2, 3]).repeat_interleave(torch.tensor([60, 90, 50, 600]))[None]
    calls = compare(inputs, ids, causal=True, min_seq_len=300)
    assert [(call.path, call.n_queries) for call in calls] == [("dense", 200), ("s2o", 600)]


def test_masks_of_many_rows_are_made_in_parts(monkeypatch):
    monkeypatch.setattr(packed, "ELEMENTS", 64 * LENGTH)
    case = Case(heads=2, kv_heads=1, queries=LENGTH, head_dim=16)
    compare(case.inputs(), KINDS["in pieces"](random.Random(0))[:1], causal=True, window=20, min_seq_len=10**6)


def test_hidden_keys_of_other_documents_never_leak():
    case = Case(heads=2, kv_heads=1, queries=400, head_dim=16)
    inputs, ids = case.inputs(), (torch.arange(400) // 200)[None]
    clean, _ = OPERATOR(*inputs.tensors, ids, causal=True, tau=0.0, min_seq_len=0)
    inputs.key[:, :, 200:], inputs.value[:, :, 200:] = torch.nan, torch.nan
    output, _ = OPERATOR(*inputs.tensors, ids, causal=True, tau=0.0, min_seq_len=0)
    assert torch.equal(output[:, :, :200], clean[:, :, :200])


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.int64])
def test_every_integer(dtype):
    case = Case(heads=2, kv_heads=1, queries=LENGTH, head_dim=16)
    inputs, ids = case.inputs(), (torch.arange(LENGTH) >= 130)[None]
    expected, _ = OPERATOR(*inputs.tensors, ids.long(), causal=True)
    assert torch.equal(OPERATOR(*inputs.tensors, ids.to(dtype), causal=True)[0], expected)


BAD = {
    "floating": (torch.zeros(1, 40), None, r"documents: expected integers of shape \(2, 40\) or \(1, 40\)"),
    "length": (torch.zeros(1, 39, dtype=torch.long), None, "documents: expected integers"),
    "batch": (torch.zeros(3, 40, dtype=torch.long), None, "documents: expected integers"),
    "key length": (torch.zeros(1, 40, dtype=torch.long), torch.zeros(1, 40, dtype=torch.long), "key_documents"),
    "no keys": (torch.zeros(1, 40, dtype=torch.long), None, "key_documents: expected the documents of 60 keys"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    ids, key_ids, message = BAD[name]
    keys = 60 if name in ("key length", "no keys") else 40
    query, key = torch.randn(2, 2, 40, 8), torch.randn(2, 2, keys, 8)
    with pytest.raises(InputError, match=message):
        OPERATOR(query, key, key, ids, key_ids)


def given(requires_grad=False):
    case = Case(batch=BATCH, heads=4, kv_heads=2, queries=40, head_dim=16, padding="left")
    inputs = case.inputs()
    tensors = [x.detach().requires_grad_(requires_grad) for x in inputs.tensors]
    return (*tensors, (torch.arange(40) // 15)[None], None, inputs.mask.key_mask), {"causal": True, "window": 9}


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(requires_grad):
    utils = ["test_schema", "test_faketensor", "test_autograd_registration"]
    utils += [] if requires_grad else ["test_aot_dispatch_dynamic"]
    arguments, keywords = given(requires_grad)
    assert set(torch.library.opcheck(OPERATOR, arguments, keywords, test_utils=utils).values()) == {"SUCCESS"}


def test_tags():
    unsafe = getattr(torch.Tag, "cudagraph_unsafe", None)
    assert unsafe is None or unsafe in OPERATOR.tags


def test_autocast():
    arguments, keywords = given()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, _ = OPERATOR(*arguments, **keywords)
    expected, _ = OPERATOR(*(x.bfloat16() for x in arguments[:3]), *arguments[3:], **keywords)
    assert output.dtype is torch.bfloat16
    assert torch.equal(output, expected)


def test_vmap():
    arguments, keywords = given()
    query, ids = torch.stack([arguments[0]] * 2), torch.stack([arguments[3], torch.zeros_like(arguments[3])])
    attend = torch.vmap(lambda q, i: OPERATOR(q, *arguments[1:3], i, *arguments[4:], **keywords)[0])
    expected = [OPERATOR(q, *arguments[1:3], i, *arguments[4:], **keywords)[0] for q, i in zip(query, ids, strict=True)]
    torch.testing.assert_close(attend(query, ids), torch.stack(expected))


def test_derivatives():
    """A backward says that there is none; transforms of torch.func run densely and have them."""
    arguments, keywords = given(requires_grad=True)
    with pytest.raises(NoGradientError):
        OPERATOR(*arguments, **keywords)[0].sum().backward()
    arguments, keywords = given()
    pairs = Documents.of(arguments[3], None).visible(dataclasses.replace(Case(queries=40).inputs().mask, window=9))
    pairs = pairs & arguments[5][:, None, None]

    def dense(query):
        key, value = (x.repeat_interleave(2, 1) for x in arguments[1:3])
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=pairs).square().sum()

    def ours(query):
        return OPERATOR(query, *arguments[1:], **keywords)[0].square().sum()

    torch.testing.assert_close(torch.func.grad(ours)(arguments[0]), torch.func.grad(dense)(arguments[0]))
