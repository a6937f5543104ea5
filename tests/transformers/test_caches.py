"""Every cache of transformers with every history: logits through S2O are those of "sdpa", not compiled, call by call.

The interface runs the whole table. The compiled ways take seconds a pair, so they run some, which have
every cache and every history among them; most of these are in the slow tier.
"""

from contextlib import contextmanager
from functools import cache as remembered

import pytest
import torch

import s2o_compile
from s2o_compile import S2OConfig

transformers = pytest.importorskip("transformers")

import s2o_compile.transformers  # noqa: E402
from tests.helpers import cache_histories as table  # noqa: E402
from tests.helpers.cache_argument import CACHE  # noqa: E402

EXACT = S2OConfig(tau=0.0, min_seq_len=0, inner_backend="eager")
SPARSE = {"s2o", "window", "masked"}

OLD = tuple(int(number) for number in transformers.__version__.split(".")[:2]) < (5, 23)
"""Then transformers cannot do all of this with "sdpa" either: 5.17 masks fewer keys than a reset sliding layer of a
dynamic cache holds, makes no chunked masks ahead of the forward, and overfills a static cache in chunked turns."""

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="transformers offloads caches from CUDA only")


def rows(pairs):
    marks = {True: [needs_cuda, pytest.mark.gpu], False: []}
    return [pytest.param(*pair, marks=marks["offloaded" in pair[0]], id="-".join(pair)) for pair in pairs]


TABLE = rows((cache, history) for cache in table.CACHES for history in table.histories_of(cache))


COMPILED = {
    "optimize": (
        ("dynamic", "cropped"),
        ("dynamic_all_keys", "repeated"),
        ("dynamic_sliding", "chunks"),
        ("dynamic_hybrid", "second_turn"),
        ("dynamic_chunked", "selected"),
        ("dynamic_offloaded", "second_turn"),
        ("dynamic_convolutional", "fresh"),
        ("static", "reset"),
        ("static_sliding", "below_the_window"),
        ("static_hybrid", "second_turn"),
        ("static_chunked", "fresh"),
        ("static_offloaded", "second_turn"),
        ("static_convolutional", "second_turn"),
        ("encoder_decoder", "fresh"),
        ("encoder_decoder_static", "left_padding"),
        *([("quantized", "reordered")] if "quantized" in table.CACHES else []),
    ),
    "backend": (
        ("dynamic", "reordered"),
        ("dynamic_sliding", "cropped"),
        ("static", "chunks"),
        ("static_sliding", "left_padding"),
    ),
}
QUICK = {
    ("optimize", "dynamic_hybrid", "second_turn"),
    ("backend", "static", "chunks"),
}
"""One of a dynamic cache by one way, and one of a static one by the other; the rest of them is slow."""
LAYERS = {"llama": 1, "mistral": 1}
"""Of models whose layers are all of a kind, where they are compiled."""


def made(way, family):
    """A model on the way to be tried."""
    model = table.tiny(family, LAYERS.get(family) if way in COMPILED else None)
    if way == "optimize":
        return s2o_compile.optimize(model, EXACT)
    if way == "backend":
        model.compile(backend="s2o", options={"s2o.tau": 0.0, "s2o.min_seq_len": 0, "s2o.inner_backend": "eager"})
        return model
    model.set_attn_implementation("s2o")
    if way == "sparse":
        s2o_compile.transformers.configure(model, EXACT)
    return model


def logits(model, cache, history):
    _, make = table.CACHES[cache]
    device = "cuda" if "offloaded" in cache else "cpu"
    with torch.device(device):
        return table.logits(model.to(device), make(model.config), history)


@contextmanager
def under_sdpa():
    """Skips what an old transformers cannot do with "sdpa" either."""
    try:
        yield
    except (IndexError, RuntimeError, TypeError) as error:
        if not OLD:
            raise
        pytest.skip(f"transformers {transformers.__version__} itself: {error}")


@remembered
def expected(cache, history, compiled=False):
    family, _ = table.CACHES[cache]
    if OLD and "offloaded" in cache:  # what it cannot do is an error on a CPU, and the end of the process on CUDA
        expected(cache.replace("offloaded", "hybrid"), history, compiled)
    with under_sdpa():
        return logits(table.tiny(family, LAYERS.get(family) if compiled else None), cache, history)


def assert_same(results, wanted):
    assert len(results) == len(wanted)
    for call, (result, exact) in enumerate(zip(results, wanted, strict=True)):
        torch.testing.assert_close(
            result, exact, atol=2e-5, rtol=2e-5, msg=lambda text, call=call: f"call {call}: {text}"
        )


@pytest.mark.parametrize(("cache", "history"), TABLE)
def test_the_interface_runs_sparsely(cache, history):
    wanted = expected(cache, history)
    with s2o_compile.record() as recording:
        results = logits(made("sparse", table.CACHES[cache][0]), cache, history)
    assert_same(results, wanted)
    assert {call.path for call in recording.calls if call.n_queries > 1} & SPARSE


@pytest.mark.parametrize(("cache", "history"), TABLE)
def test_short_calls_by_default_are_those_of_sdpa(cache, history):
    """Bit by bit: the same kernel gets the same mask."""
    wanted = expected(cache, history)
    with s2o_compile.record() as recording:
        results = logits(made("default", table.CACHES[cache][0]), cache, history)
    assert {call.path for call in recording.calls} == {"dense"}
    for result, exact in zip(results, wanted, strict=True):
        assert torch.equal(result, exact)


WAYS = [
    pytest.param(
        way,
        *row.values,
        marks=[*row.marks, *([] if (way, *row.values) in QUICK else [pytest.mark.slow])],
        id=f"{way}-{row.id}",
    )
    for way in COMPILED
    for row in rows(COMPILED[way])
]


@pytest.mark.parametrize(("way", "cache", "history"), WAYS)
@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled_models(way, cache, history):
    wanted = expected(cache, history, compiled=True)
    with s2o_compile.record() as recording:
        results = logits(made(way, table.CACHES[cache][0]), cache, history)
    assert_same(results, wanted)
    assert {call.path for call in recording.calls if call.n_queries > 1} & SPARSE


def test_every_cache_and_every_history_is_compiled():
    caches, histories = zip(*COMPILED["optimize"], *COMPILED["backend"], strict=True)
    assert set(caches) == set(table.CACHES)
    assert set(histories) == set(table.HISTORIES)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_dynamo")
def test_inductor_and_a_static_cache():
    model = table.tiny("llama-1")
    wanted = logits(model, "static", "second_turn")
    model.compile(backend="s2o", options={"s2o.tau": 0.0, "s2o.min_seq_len": 0})
    assert_same(logits(model, "static", "second_turn"), wanted)


GENERATED = {
    "dynamic": {},
    "static": {"cache_implementation": "static"},
    "quantized": {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}},
}
FAMILIES = ("llama", "mistral", "gemma3", "llama4")
WITHOUT_QUANTA = [(family, cache) for family in FAMILIES for cache in GENERATED if cache != "quantized"]
GENERATING = [*WITHOUT_QUANTA, ("bart", "dynamic"), ("bart", "static")]
GENERATING += [("llama-1", "quantized")] if "quantized" in table.CACHES else []


def generated(model, ids, mask, **options):
    options |= {"output_logits": True, "return_dict_in_generate": True, "disable_compile": True}
    with torch.no_grad():
        return model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=4, do_sample=False, **options)


def prompt(length=150, padding=6):
    ids = table.tokens(2, length)
    mask = torch.ones_like(ids)
    mask[0, :padding], ids[0, :padding] = 0, 0
    return ids, mask


def assert_generates_the_same(model, plain, *given, **options):
    with under_sdpa():
        theirs = generated(plain, *given, **options)
    ours = generated(model, *given, **options)
    assert torch.equal(ours.sequences, theirs.sequences)
    assert_same(ours.logits, theirs.logits)


@pytest.mark.parametrize(("family", "cache"), GENERATING)
@pytest.mark.parametrize("way", ["sparse", "default"])
def test_generate_through_the_interface(way, family, cache):
    assert_generates_the_same(made(way, family), table.tiny(family), *prompt(), **GENERATED[cache])


@pytest.mark.slow
@pytest.mark.parametrize(("family", "cache"), [("llama", "static"), ("gemma3", "dynamic"), ("bart", "static")])
@pytest.mark.usefixtures("fresh_dynamo")
def test_generate_optimized(family, cache):
    plain = table.tiny(family, LAYERS.get(family))
    assert_generates_the_same(made("optimize", family), plain, *prompt(), **GENERATED[cache])


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.usefixtures("fresh_dynamo")
def test_a_decoder_with_a_prompt_of_its_own(cache):
    """Its cache is two caches, and has no layers itself."""
    decoder = table.tokens(2, table.TURN, seed=3)
    given = {"decoder_input_ids": decoder, "decoder_attention_mask": torch.ones_like(decoder)} | GENERATED[cache]
    assert_generates_the_same(made("optimize", "bart"), table.tiny("bart"), *prompt(30), **given)


@pytest.mark.parametrize(("family", "cache"), WITHOUT_QUANTA)
@pytest.mark.parametrize("way", ["sparse", "default"])
def test_beams(way, family, cache):
    with under_sdpa():
        theirs = generated(table.tiny(family), *prompt(), num_beams=3, **GENERATED[cache])
    ours = generated(made(way, family), *prompt(), num_beams=3, **GENERATED[cache])
    assert torch.equal(ours.sequences, theirs.sequences)


def conversation(model, cache, turns, **options):
    """Turns of generate() with one cache; new tokens after each answer."""
    ids, mask = prompt()
    logits = []
    for turn in range(turns):
        out = generated(model, ids, mask, **{CACHE: cache}, **options)
        logits.append(torch.stack(out.logits))
        ids = torch.cat([out.sequences, table.tokens(2, table.TURN, seed=turn)], dim=1)
        mask = torch.cat([mask, mask.new_ones(2, ids.shape[1] - mask.shape[1])], dim=1)
    return logits


TURNS = [cache for cache in table.CACHES if not cache.startswith("encoder")]


def on_their_devices(names):
    return [pytest.param(name, marks=[needs_cuda, pytest.mark.gpu] if "offloaded" in name else []) for name in names]


def conversations_agree(way, name, options, turns=3):
    family, make = table.CACHES[name]
    if OLD and "offloaded" in name:
        conversations_agree(way, name.replace("offloaded", "hybrid"), options, turns)
    device = "cuda" if "offloaded" in name else "cpu"
    with torch.device(device):
        layers = LAYERS.get(family) if way in COMPILED else None
        plain, ours = table.tiny(family, layers).to(device), made(way, family).to(device)
        with under_sdpa():
            wanted = conversation(plain, make(plain.config), turns, **options)
        assert_same(conversation(ours, make(ours.config), turns, **options), wanted)


@pytest.mark.parametrize("options", [{}, {"prefill_chunk_size": 128}], ids=["whole", "chunked"])
@pytest.mark.parametrize("name", on_their_devices(TURNS))
@pytest.mark.parametrize("way", ["sparse", pytest.param("default", marks=pytest.mark.slow)])
def test_turns_of_generate_through_the_interface(way, name, options):
    conversations_agree(way, name, options)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"), [("static", {"prefill_chunk_size": 128}), ("static_hybrid", {})], ids=["chunked", "whole"]
)
@pytest.mark.usefixtures("fresh_dynamo")
def test_turns_of_generate_optimized(name, options):
    conversations_agree("optimize", name, options, turns=2)
