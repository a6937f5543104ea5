"""The implementation for CUDA over a paged cache on a GPU, with metadata as vLLM makes it, judged by float64.

No vLLM is needed: the parent is the stub. Its plain formula takes the requests that are not sparse.
"""

from types import SimpleNamespace

import pytest
import torch

from s2o_compile import S2OConfig
from s2o_compile.kernels.statistics import record_calls
from s2o_compile.vllm import builder as builders
from tests.helpers import stub_vllm
from tests.helpers.served import HEADS, KV_HEADS, Served
from tests.helpers.stub_vllm import common_of, config_of

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
NAME = "model.layers.0.self_attn.attn"
CASES = {
    "prefill": ([(3000, 3000)], {}, "bf16", 16),
    "chunk": ([(1024, 5000)], {}, "bf16", 16),
    "chunk-fp16": ([(1024, 5000)], {}, "fp16", 128),
    "mixed": ([(1, 900), (1300, 2600), (4, 4100), (700, 2100), (1, 17)], {}, "bf16", 32),
    "softcap": ([(1, 33), (1200, 2400)], {"softcap": 5.0}, "bf16", 16),
    "sinks": ([(1, 33), (1200, 2400)], {"sinks": True}, "bf16", 16),
    "block-256": ([(2000, 4321)], {}, "bf16", 256),
}


@pytest.fixture
def make(monkeypatch):
    """A layer's implementation and the builder of its metadata."""
    stub_vllm.install(monkeypatch)
    from s2o_compile.vllm.cuda import S2OBackend

    def build(served, config):
        monkeypatch.setattr(builders, "server_config", lambda: config)
        builders.counters.cache_clear()
        x = served.inputs[0]
        impl = S2OBackend.get_impl_cls()(
            HEADS, served.head_dim, x.scale, KV_HEADS, None, None, "auto", x.softcap, sinks=x.sinks
        )
        layers = {NAME: SimpleNamespace(impl=impl)}
        return impl, S2OBackend.get_builder_cls()(None, [NAME], config_of(layers), torch.device("cuda"))

    yield build
    builders.counters.cache_clear()


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_a_batch_on_a_gpu(make, name, head_dim):
    lengths, terms, dtype, block = CASES[name]
    served = Served(lengths, head_dim=head_dim, block=block, dtype=dtype, device="cuda", terms=terms)
    impl, builder = make(served, S2OConfig(tau=0.0, min_seq_len=2048))
    metadata = builder.build(0, common_of(served))
    output = torch.full_like(served.query, torch.nan)
    with record_calls() as calls:
        impl.forward(None, served.query, *served.new, served.flash_cache, metadata, output)
    served.assert_close(output)
    sparse = [("s2o", *pair) for pair in lengths if pair[0] >= 128 and pair[1] >= 2048]
    assert [(call.path, call.n_queries, call.n_keys) for call in calls] == sparse
    assert impl.calls == ([[n for n, keys in lengths if n < 128 or keys < 2048]] if len(sparse) < len(lengths) else [])


@torch.no_grad()
def test_chunks_are_the_prefill_and_wait_for_nothing(make):
    """The chunks of a prompt, one after the other over one cache; lengths are on the host, so nothing is read back."""
    whole, config = (
        Served([(6000, 6000)], head_dim=64, dtype="bf16", device="cuda"),
        S2OConfig(min_seq_len=2048, tau=0.0),
    )
    impl, builder = make(whole, config)
    output = torch.full_like(whole.query, torch.nan)
    cache, first = whole.flash_cache, 0
    for end in (2048, 4096, 6000):
        starts = torch.tensor([0, end - first], dtype=torch.int32)
        lens = torch.tensor([end], dtype=torch.int32)
        common = common_of(
            whole, query_start_loc=starts.cuda(), query_start_loc_cpu=starts, seq_lens=lens.cuda(),
            num_actual_tokens=end - first, max_query_len=end - first, max_seq_len=end, seq_lens_cpu_upper_bound=lens,
        )  # fmt: skip
        metadata = builder.build(0, common)
        impl.forward(None, whole.query[first:end], None, None, cache, metadata, output[first:end])
        torch.cuda.synchronize()
        if first:  # the first call tunes and compiles
            torch.cuda.set_sync_debug_mode("error")
            try:
                impl.forward(None, whole.query[first:end], None, None, cache, metadata, output[first:end])
            finally:
                torch.cuda.set_sync_debug_mode("default")
        first = end
    whole.assert_close(output)
