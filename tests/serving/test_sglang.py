"""SGLang's plugin over a stub of the classes of SGLang 0.5.23."""

import json
import logging

import pytest
import torch

from s2o_compile import ImplementationUnavailableError, OptionError, S2OConfig
from s2o_compile.kernels.core import tuned
from s2o_compile.kernels.statistics import record_calls
from s2o_compile.serving import sglang as plugin
from s2o_compile.varlen import attention_paged
from tests.helpers import stub_sglang
from tests.helpers.served import Served
from tests.helpers.stub_sglang import AttentionType, ForwardMode, layer_of, runner_and_batch


@pytest.fixture
def start(monkeypatch, caplog):
    """The backend that the plugin makes of a runner, by what SGLang calls."""
    backends, _, ranks = stub_sglang.install(monkeypatch)
    monkeypatch.setenv("S2O_TAU", "0")
    monkeypatch.setenv("S2O_MIN_SEQ_LEN", "256")
    plugin.counters.cache_clear()
    caplog.set_level(logging.INFO)

    def make(runner):
        plugin.register()
        return backends["s2o"](runner)

    make.ranks = ranks
    yield make
    plugin.counters.cache_clear()
    tuned.forget()


def extend(backend, served, batch, layer=None, **kwargs):
    """The output [T, Hq, D] and the operator's calls as (path, queries, keys)."""
    layer = layer or layer_of(served)
    query = served.query.flatten(1)
    with record_calls() as calls:
        output = backend.forward(query, *served.new, layer, batch, **kwargs)
    assert output.shape == query.shape
    return output.view_as(served.query), [(call.path, call.n_queries, call.n_keys) for call in calls]


MIXED = [(300, 300), (1, 40), (140, 700), (20, 33)]


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("lengths", [[(400, 400)], [(200, 700)], MIXED], ids=["prefill", "chunk", "mixed"])
def test_a_batch_with_a_long_prefill_is_ours(start, page_size, lengths):
    served = Served(lengths)
    runner, batch = runner_and_batch(served, page_size=page_size, mode=ForwardMode.MIXED)
    backend = start(runner)
    output, calls = extend(backend, served, batch)
    served.assert_close(output)
    assert backend.calls == []
    sparse = [("s2o", *pair) for pair in lengths if pair[0] >= 128]
    assert [call for call in calls if call[0] == "s2o"] == sparse
    assert len(calls) == len(lengths), "short requests run densely in the same call"


def test_a_batch_of_short_requests_is_the_dense_backends(start):
    served = Served([(250, 250), (5, 900)])
    runner, batch = runner_and_batch(served, page_size=1)
    backend = start(runner)
    output, calls = extend(backend, served, batch)
    served.assert_close(output)
    assert (calls, backend.calls) == ([], [[250, 5]])


@pytest.mark.parametrize("terms", [{"softcap": 5.0}, {"sinks": True}], ids=str)
def test_softcap_and_sinks(start, terms):
    served = Served([(300, 400)], terms=terms)
    runner, batch = runner_and_batch(served, page_size=1)
    sinks = served.inputs[0].sinks
    output, calls = extend(start(runner), served, batch, **({} if sinks is None else {"sinks": sinks}))
    served.assert_close(output)
    assert calls == [("s2o", 300, 400)]


DENSE = {
    "window": ({"sliding_window_size": 63}, {}, "a sliding window of 63 tokens"),
    "encoder": ({"attn_type": AttentionType.ENCODER_ONLY}, {}, "encoder_only attention"),
    "images": ({"attn_type": AttentionType.DECODER_BIDIRECTIONAL}, {}, "decoder_bidirectional attention"),
    "cross": ({"is_cross_attention": True}, {}, "cross attention"),
    "chunks": ({"use_irope": True}, {}, "local attention in chunks"),
    "verify": ({}, {"forward_mode": ForwardMode.TARGET_VERIFY}, "the mode TARGET_VERIFY"),
    "speculation": ({}, {"spec_info": object()}, "speculative decoding"),
    "lse": ({}, {"mha_return_lse": True}, "a log-sum-exp"),
}


@pytest.mark.parametrize("name", DENSE)
def test_the_rest_is_the_dense_backends_with_a_reason(start, caplog, name):
    of_layer, of_batch, reason = DENSE[name]
    served = Served([(300, 300)], terms={"window": 64} if name == "window" else {})
    runner, batch = runner_and_batch(served, page_size=1)
    vars(batch).update(of_batch)
    backend = start(runner)
    layer = layer_of(served, **of_layer)
    output, calls = extend(backend, served, batch, layer)
    served.assert_close(output)
    assert (calls, backend.calls) == ([], [[300]])
    extend(backend, served, batch, layer)
    assert [reason in line for line in caplog.messages].count(True) == 1, "it is said once"


def test_a_quantized_cache_is_the_dense_backends(start):
    served = Served([(300, 300)])
    runner, _ = runner_and_batch(served, page_size=1)
    pool = runner.token_to_kv_pool
    pool.buffers = tuple(x.to(torch.float8_e4m3fn) for x in pool.buffers)
    backend = start(runner)
    reason = backend._cache_reason(layer_of(served), served.query)
    assert reason == "a cache of torch.float8_e4m3fn beside queries of torch.float32"


def test_a_cache_of_another_layout_is_the_dense_backends(start):
    """SGLANG_USE_HND_KVCACHE lays heads before the tokens of a page."""
    served = Served([(300, 300)])
    runner, _ = runner_and_batch(served, page_size=16)
    pool = runner.token_to_kv_pool
    pool.buffers = tuple(x.unflatten(0, (-1, 16)).transpose(1, 2) for x in pool.buffers)
    reason = start(runner)._cache_reason(layer_of(served), served.query)
    assert reason == "a cache of 4 dimensions, not [tokens, heads, D]"


def test_nothing_is_copied_out_of_pages_of_a_token(start, monkeypatch):
    served = Served([(300, 400), (1, 40)])
    runner, batch = runner_and_batch(served, page_size=1)
    caches = []

    def attend(query, cache, *arguments, **options):
        caches.extend(cache)
        return attention_paged(query, cache, *arguments, **options)

    monkeypatch.setattr(plugin, "attention_paged", attend)
    extend(start(runner), served, batch)
    assert [x.data_ptr() for x in caches] == [x.data_ptr() for x in runner.token_to_kv_pool.buffers]


def test_lengths_that_the_host_does_not_know_are_the_dense_backends(start):
    served = Served([(300, 300)])
    _, batch = runner_and_batch(served, page_size=1)
    assert plugin.why_dense(layer_of(served), batch, 300, {}) == ""
    assert plugin.why_dense(layer_of(served), batch, 304, {}) == "queries of no request"
    batch.extend_prefix_lens_cpu = None
    assert plugin.why_dense(layer_of(served), batch, 300, {}) == "lengths that the host does not know"


def test_a_layer_that_reads_anothers_cache_writes_none(start):
    served = Served([(300, 300)])
    runner, batch = runner_and_batch(served, page_size=1)
    backend = start(runner)
    extend(backend, served, batch)
    batch.out_cache_loc = None
    query = served.query.flatten(1)
    output = backend.forward(query, None, None, layer_of(served), batch, save_kv_cache=False)
    served.assert_close(output.view_as(served.query))


def test_all_else_is_the_dense_backends_own(start):
    """Its metadata, its graphs, its decode: an instance of its class."""
    served = Served([(300, 300)])
    runner, batch = runner_and_batch(served, page_size=1)
    backend = start(runner)
    assert isinstance(backend, stub_sglang.DenseBackend)
    backend.init_forward_metadata(batch)
    assert backend.forward_metadata is batch
    assert backend.get_cuda_graph_seq_len_fill_value() == 1
    batch.forward_mode = ForwardMode.DECODE
    extend(backend, served, batch)
    assert backend.calls == ["decode"]


def test_a_rank_takes_the_settings_of_its_own_heads(start, monkeypatch, tmp_path):
    config = S2OConfig(site_tau={"model.layers.0.self_attn": (0.1, 0.2, 0.3, 0.4)}, min_seq_len=256)
    (tmp_path / "s2o.json").write_text(config.to_json())
    monkeypatch.delenv("S2O_TAU")
    monkeypatch.setenv("S2O_CONFIG", str(tmp_path / "s2o.json"))
    served = Served([(300, 300)])
    found = []
    for number in range(2):
        runner, _ = runner_and_batch(served, page_size=1)
        start.ranks.attn_tp_rank, start.ranks.attn_tp_size = number, 2
        layer = layer_of(served, tp_q_head_num=2, tp_k_head_num=1)
        found.append(start(runner)._config_of(layer).site_tau["model.layers.0.self_attn"])
    assert found == [(0.1, 0.2), (0.3, 0.4)]


def test_the_log_says_what_ran_sparse(start, caplog):
    served = Served([(300, 300), (1, 40)])
    runner, batch = runner_and_batch(served, page_size=1)
    extend(start(runner), served, batch)
    assert "S2O: prefills of 256 keys or more run sparse (tau 0); all else runs by triton" in caplog.messages
    assert caplog.messages[-1].startswith("S2O: 1 sparse calls, one a layer, of 300 queries beside 1 dense ones; of 1 ")


@pytest.mark.parametrize(
    ("crossover", "said"),
    [
        (300, "prefills of 300 keys or more run sparse (tau 0); all else runs by triton"),
        (0, "prefills of 128 keys or more run sparse (tau 0); all else runs by triton"),
        ("never", "no prefill runs sparse: float32 on this CPU: SDPA is faster at any length"),
    ],
)
def test_the_log_says_the_length_of_this_device_and_dtype(start, caplog, monkeypatch, tmp_path, crossover, said):
    monkeypatch.delenv("S2O_MIN_SEQ_LEN")
    entry = {"crossovers": {"float32": crossover, "bfloat16": 7777}}
    (tmp_path / "tuned.json").write_text(json.dumps({"format": tuned.FORMAT, "devices": {"cpu": entry}}))
    monkeypatch.setenv(tuned.FILE_VARIABLE, str(tmp_path / "tuned.json"))
    tuned.forget()
    served = Served([(300, 300)])
    runner, batch = runner_and_batch(served, page_size=1)
    backend = start(runner)
    _, calls = extend(backend, served, batch)
    extend(backend, served, batch)
    assert bool(calls) == (crossover != "never")
    (line,) = (line for line in caplog.messages if "run sparse" in line or "runs sparse" in line)
    assert line.startswith(f"S2O: {said}")


def test_a_server_of_dense_layers_alone_claims_nothing(start, caplog):
    served = Served([(300, 300)])
    runner, batch = runner_and_batch(served, page_size=1)
    extend(start(runner), served, batch, layer_of(served, is_cross_attention=True))
    assert not [line for line in caplog.messages if "sparse" in line]


def test_registering_twice_is_registering_once(monkeypatch):
    backends, choices, _ = stub_sglang.install(monkeypatch)
    plugin.register()
    plugin.register()
    assert choices == ["triton", "fa3", "s2o"]
    assert backends["s2o"] is plugin.create


def test_what_cannot_run_says_so(start, monkeypatch):
    runner, _ = runner_and_batch(Served([(300, 300)]), page_size=1)
    runner.use_mla_backend = True
    with pytest.raises(ImplementationUnavailableError, match=r"got MLA\. Choose --attention-backend triton"):
        start(runner)
    runner.use_mla_backend = False
    for size in ("attn_cp_size", "attn_dcp_size"):
        vars(start.ranks)[size] = 2
        with pytest.raises(ImplementationUnavailableError, match="got context parallelism"):
            start(runner)
        vars(start.ranks)[size] = 1
    runner.kv_index_translator.is_translating = True
    with pytest.raises(ImplementationUnavailableError, match="got --enable-unified-memory"):
        start(runner)
    monkeypatch.setenv("S2O_SGLANG_DENSE", "fa33")
    with pytest.raises(OptionError, match=r"S2O_SGLANG_DENSE: unknown backend 'fa33'.*Did you mean 'fa3'"):
        start(runner)
