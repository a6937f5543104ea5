"""vLLM's plugin over a stub of its classes: which requests run sparse, that every output is right, and why not."""

from types import SimpleNamespace

import pytest
import torch

from s2o_compile import S2OConfig
from s2o_compile.kernels.statistics import record_calls
from s2o_compile.vllm import builder as builders
from tests.helpers import stub_vllm
from tests.helpers.served import HEADS, KV_HEADS, Served
from tests.helpers.stub_vllm import common_of, config_of

EXACT = S2OConfig(tau=0.0, min_seq_len=256)
NAME = "model.layers.0.self_attn.attn"


@pytest.fixture
def serve(monkeypatch):
    """A layer, its builder and what vLLM's log says, for a served batch."""

    def start(served, config=EXACT, *, device="cuda", number=1, **impl):
        stub = stub_vllm.install(monkeypatch, wanted=SimpleNamespace(name="S2O"))
        monkeypatch.setattr(builders, "server_config", lambda: config)
        builders.counters.cache_clear()
        if device == "cuda":
            from s2o_compile.vllm.cuda import S2OBackend as Backend
        else:
            from s2o_compile.vllm.cpu import S2OCPUBackend as Backend
        x = served.inputs[0]
        given = {
            "alibi_slopes": None, "sliding_window": None, "kv_cache_dtype": "auto",
            "logits_soft_cap": x.softcap, "sinks": x.sinks, **impl,
        }  # fmt: skip
        layers = {
            f"model.layers.{at}.self_attn.attn": SimpleNamespace(
                isa="vec",
                impl=Backend.get_impl_cls()(
                    num_heads=HEADS, head_size=served.head_dim, scale=x.scale, num_kv_heads=KV_HEADS, **given
                ),
            )
            for at in range(number)
        }
        builder = Backend.get_builder_cls()(None, [*layers], config_of(layers), torch.device("cpu"))
        return SimpleNamespace(layer=layers[NAME], impl=layers[NAME].impl, builder=builder, **vars(stub))

    yield start
    builders.counters.cache_clear()


def run(server, served, metadata, cache=None):
    """The output of a forward, and the operator's calls as (path, queries, keys)."""
    output = torch.full_like(served.query, torch.nan)
    cache = served.flash_cache if cache is None else cache
    with record_calls() as calls:
        server.impl.forward(server.layer, served.query, *served.new, cache, metadata, output)
    return output, [(call.path, call.n_queries, call.n_keys) for call in calls]


MIXED = [(1, 40), (300, 300), (1, 500), (140, 700), (20, 30), (1, 9)]
BATCHES = {
    "one-prefill": ([(400, 400)], [1]),
    "chunk-of-a-prefill": ([(200, 700)], [1]),
    "cached-prefix-but-one-block": ([(130, 642)], [1]),
    "eight-prefills": ([(260 + at, 260 + 7 * at) for at in range(8)], [1] * 8),
    "mixed": (MIXED, [0, 1, 0, 1, 0, 0]),
    "decode-first": ([(1, 300), (1, 20), (256, 256)], [0, 0, 1]),
    "prefill-first": ([(256, 256), (1, 300), (5, 20)], [1, 0, 0]),
    "short": ([(250, 250), (1, 800)], [0, 0]),
    "too-few-queries": ([(127, 800)], [0]),
}


@pytest.mark.parametrize("name", BATCHES)
def test_long_prefills_are_sparse_and_all_others_the_parents(serve, name):
    lengths, sparse = BATCHES[name]
    served = Served(lengths)
    server = serve(served)
    metadata = server.builder.build(0, common_of(served))
    output, calls = run(server, served, metadata)
    served.assert_close(output)
    wanted = [pair for pair, runs in zip(lengths, sparse, strict=True) if runs]
    assert calls == [("s2o", *pair) for pair in wanted]
    others = [queries for (queries, _), runs in zip(lengths, sparse, strict=True) if not runs]
    assert server.impl.calls == ([others] if others else [])


FEATURES = {
    "softcap": {"softcap": 5.0},
    "sinks": {"sinks": True},
    "both": {"softcap": 5.0, "sinks": True},
}


@pytest.mark.parametrize("name", FEATURES)
def test_softcap_and_sinks_are_sparse(serve, name):
    served = Served([(1, 33), (280, 400)], terms=FEATURES[name])
    server = serve(served)
    output, calls = run(server, served, server.builder.build(0, common_of(served)))
    served.assert_close(output)
    assert calls == [("s2o", 280, 400)]


@pytest.mark.parametrize("block", [16, 32, 256])
def test_block_sizes(serve, block):
    served = Served([(300, 611)], block=block)
    server = serve(served)
    output, calls = run(server, served, server.builder.build(0, common_of(served)))
    served.assert_close(output)
    assert calls == [("s2o", 300, 611)]


DENSE = {
    "sliding-window": ({"sliding_window": 64}, {"window": 64}, "a sliding window of 64 tokens"),
    "alibi": ({"alibi_slopes": [0.5] * HEADS}, {}, "ALiBi"),
    "fp8-cache": ({"kv_cache_dtype": "fp8"}, {}, "a cache of fp8"),
    "encoder": ({"attn_type": "encoder_only"}, {}, "encoder_only attention"),
    "head-dim": ({}, {}, "a head dim of 520"),
}


@pytest.mark.parametrize("name", DENSE)
def test_what_the_operator_cannot_do_is_the_parents_with_a_reason(serve, name):
    given, terms, reason = DENSE[name]
    served = Served([(300, 300), (1, 40)], terms=terms, head_dim=520 if name == "head-dim" else 32)
    server = serve(served, **given)
    metadata = server.builder.build(0, common_of(served))
    output, calls = run(server, served, metadata)
    assert metadata.s2o is None
    assert calls == []
    assert server.impl.calls == [[300, 1]]
    assert any(reason in line and "0 of 1 attention layers" in line for line in server.log.lines)
    if terms:
        served.assert_close(output)


def test_a_layer_with_a_window_beside_sparse_ones_gets_the_whole_batch(serve):
    """Layers of one cache group share metadata."""
    served = Served([(300, 300), (1, 40)])
    server = serve(served)
    metadata = server.builder.build(0, common_of(served))
    dense = type(server.impl)(HEADS, 32, served.inputs[0].scale, KV_HEADS, None, 64, "auto")
    windowed = Served([(300, 300), (1, 40)], terms={"window": 64})
    output, calls = run(SimpleNamespace(impl=dense, layer=server.layer), windowed, metadata)
    windowed.assert_close(output)
    assert (calls, dense.calls) == ([], [[300, 1]])
    assert torch.equal(metadata.scheduler_metadata, torch.full((1,), 2.0)), "the schedule of the whole batch is kept"


@pytest.mark.parametrize(
    "change",
    [{"causal": False}, {"mm_req_doc_ranges": {0: [(3, 9)]}}, {"rswa_prefix_lens": torch.tensor([4])}],
    ids=["bidirectional", "image-ranges", "r-swa"],
)
def test_masks_of_another_kind_are_the_parents(serve, change):
    served = Served([(300, 300)])
    server = serve(served)
    assert server.builder.build(0, common_of(served, **change)).s2o is None


def test_a_request_that_does_not_prefill_is_the_parents(serve):
    """Its length on the host may be larger than the true one."""
    served = Served([(300, 300), (200, 400)])
    server = serve(served)
    _, calls = run(server, served, server.builder.build(0, common_of(served, prefilling=[True, False])))
    assert (calls, server.impl.calls) == ([("s2o", 300, 300)], [[200]])


def test_lengths_that_the_host_does_not_have_are_read(serve):
    served = Served([(300, 300), (1, 40)])
    server = serve(served)
    output, calls = run(server, served, server.builder.build(0, common_of(served, seq_lens_cpu_upper_bound=None)))
    served.assert_close(output)
    assert calls == [("s2o", 300, 300)]


def test_padding_is_left_alone(serve):
    """Graphs pad batches with requests of no query, and tokens behind all requests."""
    served = Served([(1, 40), (300, 300)])
    server = serve(served)
    common = common_of(served)
    common.query_start_loc_cpu = common.query_start_loc = torch.tensor([0, 1, 301, 301], dtype=torch.int32)
    common.seq_lens = common.seq_lens_cpu_upper_bound = torch.tensor([40, 300, 0], dtype=torch.int32)
    common.block_table_tensor = torch.cat([common.block_table_tensor, common.block_table_tensor[:1]])
    metadata = server.builder.build(0, common)
    padded = torch.cat([served.query, torch.full_like(served.query[:3], torch.nan)])
    output = torch.full_like(padded, 7.0)
    server.impl.forward(server.layer, padded, *served.new, served.flash_cache, metadata, output)
    served.assert_close(output[:301])
    assert (output[301:] == 7.0).all()
    assert server.impl.calls == [[1]]


def test_other_blocks_reach_the_other_requests_too(serve):
    """vLLM copies metadata for a group of layers that differs in its blocks alone."""
    served, moved = Served(MIXED), Served(MIXED, spare=9)
    server = serve(served)
    first = server.builder.build(0, common_of(served))
    changed = server.builder.update_block_table(first, moved.block_table, torch.arange(moved.starts[-1]))
    output, _ = run(server, moved, changed)
    moved.assert_close(output)
    output, _ = run(server, served, first)
    served.assert_close(output)


def test_builders_that_vllm_derives_divide_nothing(serve):
    """They change the requests on the way: local attention, sinks that are keys."""
    served = Served([(300, 300)])
    server = serve(served)
    derived = type("ChunkedLocalAttentionBuilder", (type(server.builder),), {"__module__": "vllm.model_executor"})
    layers = {NAME: server.layer}
    metadata = derived(None, [NAME], config_of(layers), torch.device("cpu")).build(0, common_of(served))
    assert metadata.s2o is None


def test_a_profiling_run_and_quantized_outputs_are_the_parents(serve):
    served = Served([(300, 300)])
    server = serve(served)
    output, calls = run(server, served, None)
    assert (output == 0).all()
    metadata = server.builder.build(0, common_of(served))
    with record_calls() as recorded:
        scale = torch.ones(1)
        server.impl.forward(server.layer, served.query, *served.new, served.flash_cache, metadata, output, scale)
    assert (calls, recorded) == ([], [])


def test_whole_graphs_hold_decode_alone(monkeypatch):
    stub_vllm.install(monkeypatch)
    from s2o_compile.vllm.cuda import S2OBackend

    support = S2OBackend.get_builder_cls().get_cudagraph_support(None, None)
    assert support is stub_vllm.AttentionCGSupport.UNIFORM_BATCH
    assert not S2OBackend.supports_batch_invariance()


@pytest.mark.parametrize("lengths", [[(300, 300)], MIXED], ids=["one", "mixed"])
def test_on_a_cpu_pages_are_unpacked(serve, lengths):
    """The stub packs keys backwards, as no real instruction set does."""
    served = Served(lengths, block=32)
    server = serve(served, device="cpu")
    shape = (len(served.pages[0]), KV_HEADS, 2 * 32, served.head_dim)
    cache = torch.full(shape, torch.nan)
    slots = torch.arange(len(served.pages[0]) * 32)
    rows = [x.flatten(0, 1) for x in served.pages]
    stub_vllm.cpu_attn_reshape_and_cache(*rows, *cache.chunk(2, dim=2), slots, "vec")
    packed = cache.view(len(cache), KV_HEADS, 32, -1)
    output, calls = run(server, served, server.builder.build(0, common_of(served)), packed)
    served.assert_close(output)
    assert {path for path, *_ in calls} == {"s2o"}


def test_on_a_cpu_nothing_changes_unless_it_was_asked_for(monkeypatch):
    stub_vllm.install(monkeypatch, wanted=None)
    from s2o_compile.vllm.cpu import S2OCPUBackend

    assert S2OCPUBackend.get_impl_cls() is stub_vllm.CPUImpl
    layers = {NAME: SimpleNamespace(impl=stub_vllm.CPUImpl(HEADS, 32, 1.0, KV_HEADS, None, None, "auto"))}
    builder = S2OCPUBackend.get_builder_cls()(None, [NAME], config_of(layers), torch.device("cpu"))
    assert builder.build(0, common_of(Served([(9000, 9000)], head_dim=16))).s2o is None


def test_the_log_says_what_is_sparse_and_then_what_it_brought(serve):
    served = Served([(1, 40), (300, 300)])
    server = serve(served, S2OConfig(tau=0.25, min_seq_len=256), number=3)
    said = "3 of 3 attention layers of some/model run prefills of 256 keys or more sparse (tau 0.25)"
    assert [said in line for line in server.log.lines] == [True]
    run(server, served, server.builder.build(0, common_of(served)))
    server.builder.build(0, common_of(served))
    line = server.log.lines[-1]
    assert line.startswith(
        "S2O: 1 sparse calls, one a layer, of 300 queries beside 1 dense ones; of 1 measured calls: density "
    )
    assert ", error 0." in line
