"""Chunks of one prefill with a `PrefillCache`: the same bits as without one, over the same dimensions."""

import pytest
import torch

import s2o_compile
from s2o_compile import PrefillCache
from s2o_compile.kernels.statistics import record_calls
from tests.conftest import INTERPRETED
from tests.helpers.packings import Packing, assert_exact, config, in_pages

IMPLEMENTATIONS = [pytest.param("torch"), pytest.param("triton", marks=INTERPRETED.marks)]
LENGTH = 420


class Prefill:
    """A sequence in a cache, whose queries come in chunks."""

    def __init__(self, **options):
        self.packing = Packing(lengths=((LENGTH, LENGTH),), heads=2, kv_heads=1)
        self.inputs = self.packing.inputs()
        self.query, key, value, _, starts = self.packing.joined(self.inputs)
        self.cache, self.table, _ = in_pages(key, value, starts, 16, "heads_first")
        self.options = options

    def chunk(self, start, stop, chunks=None, **options):
        return s2o_compile.attention_paged(
            self.query[start:stop], self.cache, self.table, [0, stop - start], [stop], chunks=chunks, return_lse=True,
            config=config(**{"tau": 0.5, **self.options, **options}),
        )  # fmt: skip

    def all(self, ends, chunks=None, **options):
        return [self.chunk(a, b, chunks, **options) for a, b in zip([0, *ends[:-1]], ends, strict=True)]


def with_basis_of(other):
    """A new cache that ranks by the dimensions of another one, and knows nothing else of it."""
    made = PrefillCache()
    made._once = dict(other._once)
    return made


def same(some, others):
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("ends", [(128, 256, LENGTH), (150, 290, LENGTH)], ids=["whole_segments", "shifted"])
def test_every_chunk_has_the_bits_of_a_chunk_by_itself(ends, implementation):
    prefill, kept = Prefill(implementation=implementation), PrefillCache()
    with record_calls() as calls:
        for start, stop in zip((0, *ends[:-1]), ends, strict=True):
            actual = prefill.chunk(start, stop, kept)
            assert same(actual, prefill.chunk(start, stop, with_basis_of(kept)))
    assert {call.path for call in calls} == {"s2o"}
    assert kept.nbytes > 0


def test_the_first_chunk_that_ranks_chooses_as_without_a_cache():
    prefill, kept = Prefill(), PrefillCache()
    assert same(prefill.chunk(200, LENGTH, kept), prefill.chunk(200, LENGTH))


def test_chunks_are_exact_at_tau_0():
    prefill = Prefill()
    parts = prefill.all((130, 300, 310, LENGTH), PrefillCache(), tau=0.0)
    output, lse = torch.cat([x for x, _ in parts]), torch.cat([x for _, x in parts], 1)
    assert_exact(prefill.packing, prefill.inputs, output, lse)


def test_nothing_of_earlier_chunks_is_made_again(monkeypatch):
    from s2o_compile.kernels.ranking import per_query

    taken = []
    project = per_query.project

    def counted(x, factor):
        taken.append(x.shape[2])
        return project(x, factor)

    monkeypatch.setattr(per_query, "project", counted)
    prefill = Prefill()
    prefill.all((130, 290, LENGTH), PrefillCache())
    assert sum(taken) == LENGTH  # every key once


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_chunks_that_ran_elsewhere_and_chunks_that_run_again(implementation):
    prefill, kept = Prefill(implementation=implementation), PrefillCache()
    for start, stop in ((0, 130), (200, 330), (130, 280), (280, LENGTH)):
        actual = prefill.chunk(start, stop, kept)
        assert same(actual, prefill.chunk(start, stop, with_basis_of(kept))), (start, stop)


def test_new_keys_of_a_chunk_that_runs_again_are_read():
    prefill, kept = Prefill(), PrefillCache()
    prefill.all((256, LENGTH), kept)
    prefill.cache[prefill.table[0, 20]] *= 4.0
    assert same(prefill.chunk(256, LENGTH, kept), prefill.chunk(256, LENGTH, with_basis_of(kept)))


@pytest.mark.parametrize("way", ["few_queries", "short_keys", "derivatives"])
def test_new_keys_of_a_chunk_that_runs_densely_are_read_by_later_ones(way):
    prefill, kept = Prefill(), PrefillCache()
    prefill.all((128, 280), kept)
    start, stop = (100, 150) if way == "few_queries" else (20, 150)
    prefill.cache[prefill.table[0, 8]] = torch.randn(prefill.cache.shape[1:]) * 4.0  # keys 128 to 144
    if way == "derivatives":
        query = prefill.query[start:stop].clone().requires_grad_()
        s2o_compile.attention_paged(query, prefill.cache, prefill.table, [0, len(query)], [stop], chunks=kept)
    else:
        prefill.chunk(start, stop, kept, min_seq_len=1000)
    actual = prefill.chunk(stop, LENGTH, kept)
    assert same(actual, prefill.chunk(stop, LENGTH, with_basis_of(kept)))


def test_a_cleared_one_serves_another_sequence():
    prefill, kept = Prefill(), PrefillCache()
    prefill.all((256, LENGTH), kept)
    kept.clear()
    assert kept.nbytes == 0
    prefill.cache *= 1.5
    assert same(prefill.chunk(200, LENGTH, kept), prefill.chunk(200, LENGTH))


def test_chunks_inside_and_outside_of_inference_mode():
    prefill, kept = Prefill(), PrefillCache()
    with torch.inference_mode():
        prefill.chunk(0, 256, kept)
    actual = prefill.chunk(256, LENGTH, kept)
    assert same(actual, prefill.chunk(256, LENGTH, with_basis_of(kept)))


def test_another_layer_is_refused():
    prefill, kept = Prefill(), PrefillCache()
    prefill.chunk(0, 256, kept)
    with pytest.raises(s2o_compile.InputError, match="one PrefillCache for each layer"):
        prefill.chunk(256, LENGTH, kept, ranking="mean_query")
