"""flex_attention under block masks: mask_mods proven, tables that follow from them or are promised to."""

import pytest
import torch
from torch.nn.attention.flex_attention import (
    BlockMask,
    and_masks,
    create_block_mask,
    flex_attention,
    noop_mask,
    or_masks,
)

from s2o_compile import S2OConfig, optimize, record
from s2o_compile.passes.masks.assumptions import check_blocks
from tests.conftest import quick_rows
from tests.helpers.capture import heads, rewritten

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without:UserWarning")
INF = float("inf")
QUERIES, KEYS = 200, 300
PAD = torch.arange(KEYS) < torch.tensor([[KEYS], [177]])
IDS = PAD.long()
DOCUMENTS = torch.arange(KEYS) // 70
FLOATS = DOCUMENTS.float()
VISIBLE = torch.ones(QUERIES, KEYS, dtype=torch.bool).tril()
SHIFT = torch.tensor(3)
GATE = torch.arange(QUERIES) > 3
NUMBER = torch.zeros(())


@pytest.fixture(autouse=True)
def inference():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def sized(queries=QUERIES, keys=KEYS):
    return tuple(heads(length=length) for length in (queries, keys, keys))


def masked(mask_mod, batch=None, head=None, score_mod=None, **options):
    """Attention whose block mask is made where it is called."""

    def attend(q, k, v):
        blocks = create_block_mask(mask_mod, batch, head, q.shape[2], k.shape[2], device="cpu", **options)
        return flex_attention(q, k, v, score_mod=score_mod, block_mask=blocks)

    return attend


def causal(b, h, i, j):
    return i >= j


def window(b, h, i, j):
    return i - j < 64


def padding(b, h, i, j):
    return PAD[b, j]


def bottom_right(b, h, i, j):
    return j <= i + (KEYS - QUERIES)


def capped(score, b, h, i, j):
    return torch.where(i - j < 50, 2 * torch.tanh(score / 2), -INF)


PROVEN = {
    "causal": (masked(causal), "causal, offset 0"),
    "bottom-right": (masked(bottom_right), "causal"),
    "strict": (masked(lambda b, h, i, j: i > j), "causal, offset -1"),
    "ahead": (masked(lambda b, h, i, j: j - 2 <= i), "causal, offset 2"),
    "window": (masked(and_masks(causal, window)), "causal, offset 0, window 64"),
    "around": (masked(lambda b, h, i, j: abs(i - j) < 9), "causal, offset 8, window 17"),
    "not": (masked(lambda b, h, i, j: ~(j > i)), "causal, offset 0"),
    "union-of-hidden": (masked(lambda b, h, i, j: ~((j > i) | (i - j > 9))), "causal, offset 0, window 10"),
    "padding": (masked(padding, 2), "bidirectional, key padding"),
    "number-padding": (masked(lambda b, h, i, j: IDS[b, j] > 0, 2), "bidirectional, key padding"),
    "causal-padding": (masked(and_masks(bottom_right, padding), 2), "causal, key padding"),
    "every-second-key": (masked(lambda b, h, i, j: (i >= j) & (j % 2 == 0)), "causal, offset 0, key padding"),
    "chunks": (masked(lambda b, h, i, j: (i >= j) & (i // 64 == j // 64)), "causal, offset 0, chunk 64"),
    "documents": (
        masked(and_masks(causal, lambda b, h, i, j: DOCUMENTS[i] == DOCUMENTS[j])), "packed causal, offset 0"
    ),
    "documents-by-row": (
        masked(and_masks(bottom_right, lambda b, h, i, j: IDS[b, i] == IDS[b, j]), 2), "packed causal"
    ),
    "nothing-hidden": (masked(noop_mask), "bidirectional"),
    "every-head": (masked(causal, 2, 4), "causal, offset 0"),
    "small-blocks": (masked(causal, BLOCK_SIZE=64), "causal, offset 0"),
    "oblong-blocks": (masked(causal, BLOCK_SIZE=(32, 64)), "causal, offset 0"),
    "score-mod-too": (masked(causal, score_mod=capped), "causal, offset 0, window 50"),
}  # fmt: skip


QUICK = (
    *("causal", "window", "around", "causal-padding", "every-second-key", "chunks", "union-of-hidden", "score-mod-too"),
    *(
        "captured-mask",
        "or",
        "documents",
        "documents-of-floats",
        "by-head",
        "another-mask-mod",
        "factory-of-another-dtype",
        "tables-swapped",
    ),
    *("tables-written", "padding-written"),
)
"""The rest is slow: Dynamo takes a second for each block mask."""


@pytest.mark.parametrize("name", quick_rows(PROVEN, [name for name in QUICK if name in PROVEN]))
def test_tables_made_in_the_graph_are_proven(name):
    attend, mask = PROVEN[name]
    capture = rewritten(attend, *sized())
    (record,) = capture.records
    assert (record.reason, record.mask) == ("", mask)
    assert not [value for value in capture.values if value.shape[-2:] == (QUERIES, KEYS)], "the mask remains"


def test_layers_share_a_block_mask():
    def attend(q, k, v):
        blocks = create_block_mask(and_masks(bottom_right, padding), 2, None, QUERIES, KEYS, device="cpu")
        for _ in range(2):
            q = flex_attention(q, k, v, block_mask=blocks)
        return q

    capture = rewritten(attend, *sized())
    assert [record.mask for record in capture.records] == ["causal, key padding"] * 2
    assert len({call.args[3] for call in capture.calls}) == 1


def test_every_length():
    q, k, v = sized(256, 256)
    capture = rewritten(masked(causal, BLOCK_SIZE=64), q, k, v, mark=[(x, 2) for x in (q, k, v)])
    (record,) = capture.records
    assert record.reason == ""
    assert record.mask.startswith("causal")
    assert "s" in record.query_shape[2]


def another_mask_mod(q, k, v):
    blocks = create_block_mask(causal, None, None, QUERIES, KEYS, device="cpu")
    tables = (blocks.kv_num_blocks, blocks.kv_indices, blocks.full_kv_num_blocks, blocks.full_kv_indices)
    return flex_attention(
        q,
        k,
        v,
        block_mask=BlockMask.from_kv_blocks(*tables, mask_mod=lambda b, h, i, j: i > j, seq_lengths=(QUERIES, KEYS)),
    )


def factory_of_another_dtype(q, k, v):
    """0.7 beside an integer is 0."""
    blocks = create_block_mask(
        lambda b, h, i, j: (i >= j) & (j * b.new_full((), 0.7) >= 0), None, None, QUERIES, KEYS, device="cpu"
    )
    blocks.mask_mod = lambda b, h, i, j: (i >= j) & (j * NUMBER.new_full((), 0.7) >= 0)
    return flex_attention(q, k, v, block_mask=blocks)


def tables_swapped(q, k, v):
    blocks = create_block_mask(causal, None, None, QUERIES, KEYS, device="cpu")
    tables = (blocks.full_kv_num_blocks, blocks.full_kv_indices, blocks.kv_num_blocks, blocks.kv_indices)
    return flex_attention(
        q, k, v, block_mask=BlockMask.from_kv_blocks(*tables, mask_mod=causal, seq_lengths=(QUERIES, KEYS))
    )


def tables_half(q, k, v):
    blocks = create_block_mask(causal, None, None, QUERIES, KEYS, device="cpu")
    tables = (blocks.kv_num_blocks, blocks.kv_indices)
    return flex_attention(
        q, k, v, block_mask=BlockMask.from_kv_blocks(*tables, mask_mod=causal, seq_lengths=(QUERIES, KEYS))
    )


def tables_doubled(q, k, v):
    blocks = create_block_mask(causal, None, None, QUERIES, KEYS, device="cpu")
    tables = (blocks.kv_num_blocks, blocks.kv_indices) * 2
    return flex_attention(
        q, k, v, block_mask=BlockMask.from_kv_blocks(*tables, mask_mod=causal, seq_lengths=(QUERIES, KEYS))
    )


def tables_written(q, k, v):
    blocks = create_block_mask(causal, None, None, QUERIES, KEYS, device="cpu")
    blocks.kv_num_blocks[:, :, -1] = 0
    return flex_attention(q, k, v, block_mask=blocks)


def tables_cropped(q, k, v):
    blocks = create_block_mask(causal, None, None, 2 * QUERIES, 2 * KEYS, device="cpu")
    return flex_attention(q, k, v, block_mask=blocks._adjust(QUERIES, KEYS))


def tables_computed(q, k, v):
    counts, order = torch.ones(1, 1, 2, dtype=torch.int32), torch.zeros(1, 1, 2, 3, dtype=torch.int32)
    blocks = BlockMask.from_kv_blocks(counts, order, mask_mod=causal, seq_lengths=(QUERIES, KEYS))
    return flex_attention(q, k, v, block_mask=blocks)


def padding_written(q, k, v):
    pad = PAD.clone()
    blocks = create_block_mask(lambda b, h, i, j: pad[b, j], 2, None, QUERIES, KEYS, device="cpu")
    pad[:, :140] = False
    return flex_attention(q, k, v, block_mask=blocks)


LEFT = {
    "offset-is-data": (masked(lambda b, h, i, j: i + SHIFT >= j), "unknown at compile time"),
    "captured-mask": (masked(lambda b, h, i, j: VISIBLE[i, j]), "unknown at compile time"),
    "gated": (masked(lambda b, h, i, j: (i >= j) & GATE[i]), "varies along queries"),
    "or": (masked(or_masks(causal, lambda b, h, i, j: j < 9)), "union of masks"),
    "xor": (masked(lambda b, h, i, j: (i >= j) ^ (j < 9)), "xor"),
    "documents-of-floats": (masked(lambda b, h, i, j: FLOATS[i] == FLOATS[j]), "NaN"),
    "other-documents": (masked(lambda b, h, i, j: DOCUMENTS[i] != DOCUMENTS[j]), "varies along queries"),
    "by-head": (masked(lambda b, h, i, j: (i >= j) | (h > 1), None, 4), "varies along heads"),
    "by-batch": (masked(lambda b, h, i, j: i >= j + b, 2), "varies along batch entries"),
    "modulo": (masked(lambda b, h, i, j: (i - j) % 2 == 0), "varies along"),
    "swapped": (masked(lambda b, h, i, j: j >= i), None),
    "batch-not-given": (masked(padding), "B and H where the mask_mod looks at b and h"),
    "another-mask-mod": (another_mask_mod, "made of its own mask_mod"),
    "factory-of-another-dtype": (factory_of_another_dtype, "made of its own mask_mod"),
    "tables-swapped": (tables_swapped, "not by create_block_mask"),
    "tables-half": (tables_half, "not by create_block_mask"),
    "tables-doubled": (tables_doubled, "not by create_block_mask"),
    "tables-written": (tables_written, "not by create_block_mask"),
    "tables-cropped": (tables_cropped, "not by create_block_mask"),
    "tables-computed": (tables_computed, "not by create_block_mask"),
    "padding-written": (padding_written, "made of its own mask_mod"),
}


@pytest.mark.parametrize("name", quick_rows(LEFT, [name for name in QUICK if name in LEFT]))
def test_what_is_not_proven_is_left(name):
    attend, reason = LEFT[name]
    capture = rewritten(attend, *sized())
    (record,) = capture.records
    if reason is None:  # proven, and another mask than causal
        assert record.mask != "causal"
        return
    assert not record.rewritten, record.mask
    assert reason in record.reason
    assert not [node for node in capture.nodes if node.target in (torch.matmul, torch.softmax)], "inlined nodes remain"


def test_no_other_layout_of_a_block_mask_is_read(monkeypatch):
    short = BlockMask.as_tuple
    monkeypatch.setattr("s2o_compile.passes.frontends.flex.block_tables._LAYOUTS", (1,))
    (record,) = rewritten(masked(causal), *sized()).records
    assert "no torch version" in record.reason
    assert BlockMask.as_tuple is short


CONFIG = {"tau": 0.0, "min_seq_len": 0, "inner_backend": "eager"}


class Outside(torch.nn.Module):
    """Two layers under a block mask that the caller made."""

    def forward(self, q, k, v, blocks):
        for _ in range(2):
            q = flex_attention(q, k, v, block_mask=blocks)
        return q


def made(mask_mod=None, **options):
    return create_block_mask(
        mask_mod or and_masks(bottom_right, padding), 2, None, QUERIES, KEYS, device="cpu", **options
    )


def test_without_a_promise_tables_from_outside_prove_nothing(fresh_dynamo):
    run = optimize(Outside(), S2OConfig(**CONFIG))
    with record() as recording, pytest.warns(UserWarning, match="assume_block_masks"):
        run(*sized(), made())
    assert [site.rewritten for site in recording.report.sites] == [False, False]
    assert all("its mask_mod is proven: causal, key padding" in site.reason for site in recording.report.sites)


def test_a_kept_promise_passes_the_check(fresh_dynamo):
    run = optimize(Outside(), S2OConfig(**CONFIG, assume_block_masks=True, check_assumptions=True))
    for options in ({}, {"BLOCK_SIZE": 64}):
        q, k, v = sized()
        with record() as recording:
            torch.testing.assert_close(run(q, k, v, made(**options)), Outside()(q, k, v, made(**options)))
        assert [site.mask for site in recording.report.sites] == ["causal, key padding (promised)"] * 2


def test_a_promise_is_none_about_the_mask_mod(fresh_dynamo):
    run = optimize(Outside(), S2OConfig(**CONFIG, assume_block_masks=True))
    with record() as recording, pytest.warns(UserWarning, match="NaN"):
        run(*sized(), made(lambda b, h, i, j: FLOATS[i] == FLOATS[j]))
    assert not any(site.rewritten for site in recording.report.sites)


def missing(blocks):
    blocks.kv_num_blocks[0, 0, 1] -= 1


def twice(blocks):
    blocks.full_kv_num_blocks[0, 0, 1] += 1
    blocks.full_kv_indices[0, 0, 1, :2] = blocks.full_kv_indices[0, 0, 1, 0]


def whole_that_is_not(blocks):
    blocks.kv_num_blocks[0, 0, 0] -= 1
    at = blocks.full_kv_num_blocks[0, 0, 0].item()
    blocks.full_kv_indices[0, 0, 0, at] = blocks.kv_indices[0, 0, 0, blocks.kv_num_blocks[0, 0, 0]]
    blocks.full_kv_num_blocks[0, 0, 0] += 1


def outside(blocks):
    blocks.kv_num_blocks[0, 0, 0] += 1
    blocks.kv_indices[0, 0, 0, blocks.kv_num_blocks[0, 0, 0] - 1] = 99


@pytest.mark.parametrize("breach", [missing, twice, whole_that_is_not, outside])
def test_a_broken_promise_is_an_error(breach, fresh_dynamo):
    run = optimize(Outside(), S2OConfig(**CONFIG, assume_block_masks=True, check_assumptions=True))
    q, k, v = sized()
    run(q, k, v, made())
    blocks = made()
    breach(blocks)
    with pytest.raises(RuntimeError, match="assume_block_masks=True promises"):
        run(q, k, v, blocks)


def test_tables_promised_of_two_masks_are_compared_with_both(fresh_dynamo):
    def attend(q, k, v, tables):
        for mask_mod in (causal, and_masks(causal, window)):
            blocks = BlockMask.from_kv_blocks(*tables, 32, mask_mod, (QUERIES, KEYS))
            q = flex_attention(q, k, v, block_mask=blocks)
        return q

    blocks = made(causal, BLOCK_SIZE=32)
    tables = (blocks.kv_num_blocks, blocks.kv_indices, blocks.full_kv_num_blocks, blocks.full_kv_indices)
    options = {f"s2o.{name}": value for name, value in CONFIG.items()}
    promised = {"s2o.assume_block_masks": True, "s2o.check_assumptions": True}
    run = torch.compile(attend, backend="s2o", options=options | promised)
    with pytest.raises(RuntimeError, match="assume_block_masks=True promises"):
        run(*sized(), tables)


@pytest.mark.parametrize("size", [(128, 128), (32, 64), (256, 16)], ids=str)
@pytest.mark.parametrize("mask_mod", [causal, padding, and_masks(causal, window), noop_mask])
def test_the_check_accepts_what_create_block_mask_makes(mask_mod, size):
    blocks = made(mask_mod, BLOCK_SIZE=size)
    b, i, j = torch.arange(2)[:, None, None, None], torch.arange(QUERIES)[:, None], torch.arange(KEYS)
    mask = torch.broadcast_to(mask_mod(b, b, i, j), (2, 1, QUERIES, KEYS))
    tables = (blocks.kv_num_blocks, blocks.kv_indices, blocks.full_kv_num_blocks, blocks.full_kv_indices)
    check_blocks(mask, QUERIES, KEYS, *size, *tables)
    if mask_mod is not noop_mask:
        with pytest.raises(RuntimeError, match="assume_block_masks=True promises"):
            check_blocks(~mask, QUERIES, KEYS, *size, *tables)


def test_the_check_knows_tables_without_whole_blocks():
    blocks = BlockMask.from_kv_blocks(*full_lists(made(causal)), mask_mod=causal, seq_lengths=(QUERIES, KEYS))
    mask = torch.ones(QUERIES, KEYS, dtype=torch.bool).tril()
    check_blocks(mask, QUERIES, KEYS, 128, 128, blocks.kv_num_blocks, blocks.kv_indices)


def full_lists(blocks):
    """Every block listed as one that the mask_mod is called for."""
    order = torch.arange(blocks.kv_indices.shape[-1], dtype=torch.int32).expand_as(blocks.kv_indices)
    return torch.full_like(blocks.kv_num_blocks, order.shape[-1]), order.contiguous()
