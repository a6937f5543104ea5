"""flex_attention whose functions are not proven: they are kept, and the call is made sparse.

Compiling one kernel takes seconds, so that every case here stands for several.
"""

import dataclasses

import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

import s2o_compile
from s2o_compile import S2OConfig
from s2o_compile.kernels.impl.flex import sample as flex_sample
from s2o_compile.kernels.impl.flex import user_mods as flex_site
from s2o_compile.passes import pipeline
from s2o_compile.passes.frontends.flex import sparse as flex_sparse
from s2o_compile.passes.site import OWN_FUNCTIONS
from s2o_compile.report import Report, Site
from tests.conftest import distance

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
BATCH, HEADS, KV_HEADS, LENGTH, DIM = 2, 4, 2, 900, 16
SLOPES = torch.tensor([0.5, 0.25, 0.05, 0.01])
DOCUMENTS = torch.arange(LENGTH) // 310
SOME = 2.0
INF = float("inf")


@pytest.fixture(autouse=True)
def inference(fresh_dynamo):
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def tensors():
    return [torch.randn(BATCH, LENGTH, n, DIM).transpose(1, 2) for n in (HEADS, KV_HEADS, KV_HEADS)]


def alibi(score, b, h, i, j):
    return score - SLOPES[h] * (i - j).abs()


def document(b, h, i, j):
    return (DOCUMENTS[i] == DOCUMENTS[j]) & (i >= j)


BLOCKS = create_block_mask(document, None, None, LENGTH, LENGTH, device="cpu")


def exact(query, key, value, score_mod=None, mask_mod=None):
    """The formula itself, in float64."""
    query, key, value = (x.double().repeat_interleave(HEADS // x.shape[1], 1) for x in (query, key, value))
    scores = query @ key.mT * DIM**-0.5
    at = torch.arange(BATCH).view(-1, 1, 1, 1), torch.arange(HEADS).view(-1, 1, 1), torch.arange(LENGTH)[:, None]
    at = *at, torch.arange(LENGTH)
    scores = scores if score_mod is None else score_mod(scores, *at)
    scores = scores if mask_mod is None else scores.masked_fill(~mask_mod(*at), -INF)
    return scores.softmax(-1).nan_to_num() @ value


def compiled(attend, tau, segment_len=128):
    config = S2OConfig(tau=tau, min_seq_len=0, segment_len=segment_len)
    with s2o_compile.record() as recording:
        output = torch.compile(attend, backend="s2o", options={f"s2o.{k}": v for k, v in vars(config).items()})(
            *(given := tensors())
        )
    (site,) = recording.report.sites
    return given, output, site


@pytest.fixture(scope="module")
def sparse_calls():
    """The sites that were made sparse, with the blocks they visit."""
    seen = []
    place = flex_site.lay_out

    def watched(grid, *given, **more):
        layout = place(grid, *given, **more)
        if not isinstance(grid.partial, torch._subclasses.FakeTensor):
            seen.append((grid, layout))
        return layout

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flex_site, "lay_out", watched)
        yield seen


def visited(site, layout):
    """Bool [B, Hq, N, N], the pairs in the blocks that a layout lists."""
    pairs = torch.zeros(BATCH * KV_HEADS, HEADS // KV_HEADS, LENGTH, LENGTH, dtype=torch.int32)
    for row, g, tile in torch.cartesian_prod(*map(torch.arange, layout.full_count.shape)).tolist():
        partial = layout.partial_index[row, g, tile, : layout.partial_count[row, g, tile]]
        full = layout.full_index[row, g, tile, : layout.full_count[row, g, tile]]
        blocks = torch.cat([partial, full]).long()
        places = (blocks[:, None] * 128 + torch.arange(128)).flatten()
        listed = (places >= layout.ranked_start[row, tile]) & (places < layout.ranked_stop[row, g, tile])
        keys = layout.index[row, places[listed | (places < LENGTH)]]
        rows = min(128, LENGTH - tile * 128)
        pairs[row, g, tile * 128 : (tile + 1) * 128].index_add_(
            1, keys, torch.ones_like(keys, dtype=torch.int32)[None].expand(rows, -1)
        )
    assert pairs.max() == 1, "a key is counted twice"
    return pairs.view(BATCH, HEADS, LENGTH, LENGTH).bool()


def test_a_bias_and_documents(sparse_calls):
    """ALiBi over a document mask: attention over the keys visited, and what the block mask leaves out stays out."""

    def attend(q, k, v):
        return flex_attention(q, k, v, score_mod=alibi, block_mask=BLOCKS, enable_gqa=True).transpose(1, 2).flatten(2)

    given, output, site = compiled(attend, SOME)
    assert (site.rewritten, site.mask, site.reason) == (True, OWN_FUNCTIONS, "")
    pairs = visited(*sparse_calls[-1])
    output = output.unflatten(2, (HEADS, DIM)).transpose(1, 2)
    assert distance(output, exact(*given, alibi, lambda *at: document(*at) & pairs)) < 1e-5
    dense = exact(*given, alibi, document)
    assert distance(output, dense) > 1e-3, "nothing was left out"
    _, layout = sparse_calls[-1]
    listed = BLOCKS.to_dense().sum().item() * BATCH * HEADS
    assert (layout.full_count + layout.partial_count).sum() < 0.8 * listed


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tau": 0.0}, "tau=0 leaves nothing out"),
        ({"error": 0.05}, "cannot measure the error that error=0.05 allows"),
        ({"tau": None, "error": 0.1}, "cannot measure the error that error=0.1 allows"),
        ({"implementation": "torch"}, "knows no functions of its own"),
        ({"min_seq_len": 901}, "are short"),
    ],
    ids=["exact", "budget", "budget-alone", "torch", "short"],
)
def test_what_keeps_it_dense_is_said(options, said):
    records = captured(lambda q, k, v: flex_attention(q, k, v, score_mod=alibi, enable_gqa=True), **options)
    assert not records[0].rewritten
    assert "adds a bias" in records[0].reason
    assert said in records[0].reason


def test_the_ceiling_of_the_default_is_left_out_and_said():
    attend = lambda q, k, v: flex_attention(q, k, v, score_mod=alibi, enable_gqa=True)  # noqa: E731
    (record,) = captured(attend, tau=None)
    assert record.rewritten
    assert record.unheld_error == 0.1
    site = Site(**dataclasses.asdict(record))
    assert "rewritten, error 0.1 not held (FlexAttention)" in str(Report(sites=(site,), graphs=1))
    assert captured(attend)[0].unheld_error is None


def test_a_device_has_a_crossover_of_its_own(monkeypatch):
    monkeypatch.setattr(flex_sparse, "PAYS_FROM", {"cpu": 10**6})
    attend = lambda q, k, v: flex_attention(q, k, v, score_mod=alibi, enable_gqa=True)  # noqa: E731
    assert "are short" in captured(attend, min_seq_len=None)[0].reason
    assert captured(attend)[0].rewritten  # a length that was asked for counts


def captured(attend, given=None, mark=False, **options):
    records = []

    def backend(gm, _):
        records.extend(pipeline.run(gm, {"tau": SOME, "min_seq_len": 0, **options}))
        return gm.forward

    given = tensors() if given is None else given
    if mark:
        for x in given:
            torch._dynamo.mark_dynamic(x, 2)
    torch.compile(attend, backend=backend)(*given)
    return records


def test_symbolic_lengths_stay_dense():
    attend = lambda q, k, v: flex_attention(q, k, v, score_mod=alibi, enable_gqa=True)  # noqa: E731
    assert "symbolic" in captured(attend, mark=True)[0].reason


def test_functions_that_fail_on_many_scores_stay_dense(monkeypatch):
    def fail(*_):
        raise RuntimeError

    monkeypatch.setattr(flex_sample, "over_all", fail)
    records = captured(lambda q, k, v: flex_attention(q, k, v, score_mod=alibi, enable_gqa=True))
    assert "cannot be run for many scores (RuntimeError)" in records[0].reason


def test_small_blocks_stay_dense():
    blocks = create_block_mask(document, None, None, LENGTH, LENGTH, device="cpu", BLOCK_SIZE=64)
    records = captured(lambda q, k, v: flex_attention(q, k, v, score_mod=alibi, block_mask=blocks, enable_gqa=True))
    assert "expected multiples of 128" in records[0].reason


def test_uncompiled_it_is_the_call_itself():
    given = tensors()
    attend = lambda q, k, v: flex_attention(q, k, v, score_mod=alibi, block_mask=BLOCKS, enable_gqa=True)  # noqa: E731
    config = {"s2o.tau": SOME, "s2o.min_seq_len": 0, "s2o.inner_backend": "eager"}
    output = torch.compile(attend, backend="s2o", options=config)(*given)
    assert distance(output, exact(*given, alibi, document)) < 1e-5


def test_what_the_mask_hides_ranks_last():
    tables = torch.ones(1, 1, 2, 2, dtype=torch.bool)
    candidate = flex_sample.candidates(
        flex_sample.BlockGrid(1, 1, 1, 256, 256, 128, tables, ~tables), torch.arange(256)
    )
    logits = torch.zeros(1, 1, 4 * flex_sample.HALF, 256)
    logits[..., 10] = -INF
    non_finite = torch.zeros(1, 1, 256, dtype=torch.bool)
    lists, left = flex_sample.rank_samples(logits, candidate, non_finite)
    assert sorted(lists[0, 0, 0, :128].tolist()) == list(range(128, 256)), (
        "a segment's in-segment keys stand in its list"
    )
    assert lists[0, 0, 1, 127] == 10
    torch.testing.assert_close(left[0, 0, 1, :2], torch.tensor([127 / 255, 0.0]))
    non_finite[..., 10:12] = True
    lists, left = flex_sample.rank_samples(logits, candidate, non_finite)
    assert (lists[0, 0, 1, 0], lists[0, 0, 1, 127]) == (11, 10), "what is visited by all is no number"
    assert left[0, 0, 1, 0] > 1e30


@pytest.mark.parametrize(("kind", "needs"), [("full", "none"), ("partial", "the mask"), ("hidden", "no visit")])
def test_what_blocks_of_lists_need(kind, needs):
    """The last tile's list holds keys of blocks 0 and 1, half of each; block 1 is visible as a whole."""
    full = torch.ones(4, 4, dtype=torch.bool).tril(-1)[None, None].clone()
    partial = torch.eye(4, dtype=torch.bool)[None, None].clone()
    full[..., 3, 0], partial[..., 3, 0] = kind == "full", kind == "partial"
    if kind == "hidden":
        full[..., 3, 1] = False
    lists = torch.arange(512, dtype=torch.int32).roll(-64).expand(1, 1, 4, -1)
    listed = torch.tensor([[[0, 128, 256, 384]]])
    visits = torch.tensor([[[0, 9, 9, 1]]], dtype=torch.int32)
    _, place, *_, counts, order, full_counts, full_order = flex_site.place_blocks(
        lists, listed, visits, partial, full, 512, 512, 128, 8
    )
    assert place[0, 512:640].tolist() == list(range(64, 192))
    tables = ((counts, order), (full_counts, full_order))
    masked, whole = (table[0, 0, 3, : count[0, 0, 3]].tolist() for count, table in tables)
    assert (masked, whole) == {"none": ([3], [4]), "the mask": ([3, 4], []), "no visit": ([3], [])}[needs]


def weekly(score, b, h, i, j):
    """A bias that grows with no distance: far keys count as much as near ones."""
    return score + SLOPES[h] * (j % 7)


def every_16th(b, h, i, j):
    return (i - j) % torch.tensor(16) == 0


@pytest.mark.slow
def test_a_mask_of_every_16th_key(sparse_calls):
    """Queries of one column would stand for none of the others."""
    blocks = create_block_mask(every_16th, None, None, LENGTH, LENGTH, device="cpu")
    attend = lambda q, k, v: flex_attention(q, k, v, score_mod=weekly, block_mask=blocks, enable_gqa=True)  # noqa: E731
    given, output, site = compiled(attend, 0.5, segment_len=512)
    assert site.mask == OWN_FUNCTIONS
    dense = exact(*given, weekly, every_16th)
    assert (output - dense).norm() < 0.1 * dense.norm()


@pytest.mark.slow
def test_tables_narrower_than_the_keys(sparse_calls):
    """As from_kv_blocks takes them: as many columns as the longest row lists."""
    apart = lambda b, h, i, j: (j // 128 - i // 128) % torch.tensor(8) == 3  # noqa: E731
    order = torch.tensor([3, 4, 5, 6, 7, 0, 1, 2], dtype=torch.int32).view(1, 1, 8, 1)
    blocks = BlockMask.from_kv_blocks(
        torch.ones(1, 1, 8, dtype=torch.int32), order, BLOCK_SIZE=128, mask_mod=apart, seq_lengths=(LENGTH, LENGTH),
        compute_q_blocks=False,
    )  # fmt: skip
    attend = lambda q, k, v: flex_attention(q, k, v, score_mod=alibi, block_mask=blocks, enable_gqa=True)  # noqa: E731
    given, output, site = compiled(attend, 1e-6)
    assert site.mask == OWN_FUNCTIONS
    assert distance(output, exact(*given, alibi, apart)) < 1e-4


@pytest.mark.parametrize("chosen", [{"BLOCK_M": 256}, {"fwd_BLOCK_N": 256}, {"BACKEND": "FLASH"}], ids=str)
def test_kernels_that_do_not_suit_the_blocks_stay_dense(chosen):
    attend = lambda q, k, v: flex_attention(q, k, v, score_mod=alibi, enable_gqa=True, kernel_options=chosen)  # noqa: E731
    assert "does not suit blocks of 128" in captured(attend)[0].reason


def test_promises_about_blocks_are_not_passed_on(monkeypatch):
    """Contiguous blocks, rows that are never empty: of the call's own block mask, and false of the blocks visited."""
    passed = []
    operator = torch.ops.higher_order.flex_attention
    monkeypatch.setattr(
        flex_site.torch.ops.higher_order, "flex_attention", lambda *x: passed.append(x[6]) or operator(*x)
    )
    promises = {"BLOCKS_ARE_CONTIGUOUS": True, "fwd_ROWS_GUARANTEED_SAFE": True, "BLOCK_M": 64}
    attend = lambda q, k, v: flex_attention(q, k, v, score_mod=alibi, enable_gqa=True, kernel_options=promises)  # noqa: E731
    assert captured(attend)[0].rewritten
    kept = {"BLOCKS_ARE_CONTIGUOUS": False, "fwd_ROWS_GUARANTEED_SAFE": False, "BLOCK_M": 64}
    assert any(kept.items() <= given.items() for given in passed)


def test_a_tau_for_other_heads_stays_dense():
    attend = lambda q, k, v: flex_attention(q, k, v, score_mod=alibi, enable_gqa=True)  # noqa: E731
    assert "a tau is given for each of 3" in captured(attend, head_tau=[0.5] * 3)[0].reason
