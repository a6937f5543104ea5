"""``s2o_compile.attention`` on shards of a sequence, over gloo ranks: one start of the ranks makes all calls."""

from functools import cache

import pytest
import torch
import torch.distributed as dist

import s2o_compile
from s2o_compile import S2OConfig
from tests.conftest import quick_rows
from tests.helpers.ranks import check_ranks

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")

HEADS, KV_HEADS, DIM, SEGMENT = 4, 4, 16, 128
PADDED = 77

CALLS = {
    "causal": {"causal": True},
    "bidirectional": {},
    "window": {"causal": True, "window": 100},
    "window-of-all": {"causal": True, "window": 10**6},
    "chunks": {"causal": True, "attention_chunk": 200},
    "softcap-lse": {"causal": True, "softcap": 3.0, "return_lse": True},
    "sinks": {"causal": True, "sinks": torch.linspace(-1, 2, HEADS)},
    "padding": {"causal": True, "key_mask": "left"},
    "padding-means": {"causal": True, "key_mask": "left", "fully_masked": "mean"},
    "padding-bidirectional": {"key_mask": "right"},
    "dense-heads": {"causal": True, "dense_heads": (1, 2)},
    "scale-0": {"causal": True, "scale": 0.0},
}
"""Keywords of calls; a key mask by the side of its padding."""

CONFIGS = {
    "exact": S2OConfig(tau=0.0, min_seq_len=0, segment_len=SEGMENT),
    "tau": S2OConfig(tau=0.5, min_seq_len=0, segment_len=SEGMENT),
    "tau-by-head": S2OConfig(tau=(0.1, 0.2, 0.3, 0.4), min_seq_len=0, segment_len=SEGMENT),
    "head-mean-query": S2OConfig(tau=0.5, min_seq_len=0, segment_len=SEGMENT, ranking_per="head", ranking="mean_query"),
    "short": S2OConfig(),
    "budget": S2OConfig(error=0.02, min_seq_len=0, segment_len=SEGMENT),
}
TILES_OF_ONE_DEVICE = {"tau", "tau-by-head", "head-mean-query"}
NO_PLAN_OF_ONE_DEVICE = {"bidirectional", "chunks", "padding-bidirectional"}


def tensors(length, batch):
    torch.manual_seed(0)
    query, key, value = (torch.randn(batch, heads, length, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS))
    key[:, :, 3] *= 4  # a key that many queries look for
    return query, key, value


def keywords_of(call, length):
    keywords = dict(CALLS[call])
    if "key_mask" in keywords:
        side, mask = keywords["key_mask"], torch.ones(2, length, dtype=torch.bool)
        mask[1, slice(PADDED) if side == "left" else slice(length - PADDED, None)] = False
        keywords["key_mask"] = mask
    return keywords


def cases(ranks):
    """Calls, configurations and methods: all of them on two ranks, and what the number of ranks may change on more."""
    some = ["causal", "padding"] if ranks > 2 else CALLS
    chosen = [(call, "exact", "all_gather") for call in some]
    chosen += [("causal", config, "all_gather") for config in (["tau"] if ranks > 2 else CONFIGS)]
    chosen += [("causal", "tau", "ulysses"), ("padding", "exact", "ulysses"), ("padding", "tau", "all_gather")]
    return list(dict.fromkeys(chosen))


def both(length, call, config, method):
    """The results of one device and those of the ranks, gathered, with the computed pairs of both."""
    from s2o_compile.distributed import shard_sequence

    keywords = keywords_of(call, length) | {"config": CONFIGS[config]}
    query, key, value = tensors(length, 2 if "key_mask" in keywords else 1)
    with s2o_compile.record() as alone:
        wanted = s2o_compile.attention(query, key, value, **keywords)
    sequence = shard_sequence(
        dist.group.WORLD, length, key_mask=keywords.pop("key_mask", None), method=method, segment_len=SEGMENT
    )
    with sequence.attending(), s2o_compile.record() as recording:
        found = s2o_compile.attention(*(sequence.shard(x, 2) for x in (query, key, value)), **keywords)
    wanted, found = (x if isinstance(x, tuple) else (x,) for x in (wanted, found))
    pairs = torch.tensor(
        [sum(call.pairs for call in recording.calls), sum(call.area.sum() for call in recording.calls)]
    )
    dist.all_reduce(pairs)
    return wanted, [sequence.gather(x, 2) for x in found], alone.calls, pairs.tolist()


def compare(rank, length, all_cases):
    found = {}
    for call, config, method in all_cases:
        wanted, output, alone, (pairs, area) = both(length, call, config, method)
        found[call, config, method] = (
            max((a - b).abs().nan_to_num(0.0).max().item() for a, b in zip(wanted, output, strict=True)),
            all(torch.equal(a, b) for a, b in zip(wanted, output, strict=True)),
            all(x.shape == y.shape and x.dtype == y.dtype for x, y in zip(wanted, output, strict=True)),
            pairs / sum(call.pairs for call in alone),
            area / sum(call.area.sum().item() for call in alone),
        )
    return found


LENGTHS = {2: 600, 4: 8 * SEGMENT + 37}
QUICK = [("causal", "tau", "all_gather"), ("padding", "exact", "all_gather"), ("causal", "tau", "ulysses")]


@cache
def results(ranks, quick):
    """One start of the ranks for the cases of each tier."""
    chosen = QUICK if quick else [case for case in cases(ranks) if ranks > 2 or case not in QUICK]
    answers = check_ranks(compare, ranks, LENGTHS[ranks], chosen)
    assert all(answer == answers[0] for answer in answers)
    return answers[0]


def rows():
    for ranks in LENGTHS:
        for case in cases(ranks):
            quick = ranks == 2 and case in QUICK
            marks = [] if quick else [pytest.mark.slow]
            yield pytest.param(ranks, case, quick, id=f"{ranks}-{'-'.join(case)}", marks=marks)


@pytest.mark.parametrize(("ranks", "case", "quick"), list(rows()))
def test_as_one_device(ranks, case, quick):
    error, same, shaped, pairs, area = results(ranks, quick)[case]
    call, config, method = case
    assert shaped
    if config in TILES_OF_ONE_DEVICE and call not in NO_PLAN_OF_ONE_DEVICE:
        assert same
        assert method == "ulysses" or pairs == pytest.approx(1.0)
    if config in ("exact", "short"):
        assert error < 1e-5
    if config == "budget":
        assert error < 0.5
    assert method == "ulysses" or call == "chunks" or area == pytest.approx(1.0)


PACKED_LENGTHS = {2: (611, 413, 1, 206), 4: (1207, 301, 1, 794)}
"""Documents by the number of ranks, so long that pieces of them are sparse; multiples of nothing."""

PACKED = {
    "causal": {"causal": True},
    "bidirectional": {},
    "window": {"causal": True, "window": 50},
    "bottom-right": {"causal": True, "bottom_right": True},
    "padding": {"causal": True, "fully_masked": "mean"},
    "dense-heads": {"causal": True, "dense_heads": [1, 3]},
    "in-pieces": {"causal": True},
}
PACKED_ROWS = {
    "quick": (2, ("causal",), (0.0,)),
    "2": (2, tuple(PACKED), (0.0, 0.5)),
    "4": (4, ("causal", "padding"), (0.0, 0.5)),
}


def packed_call(name, lengths):
    """Query, key, value, documents [B or 1, N] and a key mask; rows differ."""
    torch.manual_seed(0)
    tensors = [torch.randn(2, heads, sum(lengths), DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    orders = lengths, lengths[::-1]
    ids = torch.stack([torch.arange(len(order)).repeat_interleave(torch.tensor(order)) for order in orders])
    if name == "in-pieces":  # every document stands at several places
        ids = ids[:1] % 2
    key_mask = torch.rand(2, sum(lengths)) > 0.1 if name == "padding" else None
    return tensors, ids, key_mask


def compare_packed(rank, names, taus, lengths):
    from s2o_compile.distributed import shard_sequence

    found, attend = {}, torch.ops.s2o.packed_attention
    for name in names:
        tensors, ids, key_mask = packed_call(name, lengths)
        sinks = torch.linspace(-1, 1, HEADS) if name == "causal" else None
        for tau in taus:
            options = PACKED[name] | {"tau": tau, "min_seq_len": 64, "segment_len": SEGMENT}
            wanted, _ = attend(*tensors, ids, None, key_mask, sinks, **options)
            for method in ("all_gather", "ulysses"):
                sequence = shard_sequence(
                    dist.group.WORLD, sum(lengths), documents=ids, key_mask=key_mask, method=method
                )
                mine, own = [sequence.shard(x, 2) for x in tensors], sequence.shard(ids, 1)
                others = own.clone() if "bottom_right" in options else None
                with sequence.attending(), s2o_compile.record() as recording:
                    output, _ = attend(*mine, own, others, None, sinks, **options)
                output = sequence.gather(output, 2)
                error = ((output - wanted).norm() / wanted.norm()).item()
                paths = {path for paths in sequence.ranks.objects([c.path for c in recording.calls]) for path in paths}
                found[name, tau, method] = error, torch.equal(output, wanted), paths
    return found


@pytest.mark.parametrize("row", quick_rows(PACKED_ROWS, {"quick"}))
def test_packed_documents_as_on_one_device(row):
    ranks, names, taus = PACKED_ROWS[row]
    answers = check_ranks(compare_packed, ranks, names, taus, PACKED_LENGTHS[ranks])
    assert all(answer == answers[0] for answer in answers)
    for (name, tau, method), (error, same, paths) in answers[0].items():
        assert same or method == "all_gather", name
        assert error < (1e-6 if tau == 0 else 0.2), name
        if name in ("causal", "dense-heads"):
            assert "s2o" in paths
