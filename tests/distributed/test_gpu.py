"""Two NCCL ranks: the operator and a model on shards beside one GPU."""

import pytest
import torch
import torch.distributed as dist

import s2o_compile
from s2o_compile import S2OConfig
from tests.helpers.ranks import check_ranks, run_ranks
from tests.helpers.tiny import tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]

LENGTH = 9 * 1024 + 77
CALLS = {
    "causal": {"causal": True},
    "padding": {"causal": True, "key_mask": True},
    "sinks-lse": {"causal": True, "sinks": True, "return_lse": True},
    "window": {"causal": True, "window": 1000},
    "bidirectional": {},
}


def compare_calls(rank):
    from s2o_compile.distributed import shard_sequence

    found = {}
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, h, LENGTH, 64, device="cuda", dtype=torch.bfloat16) for h in (8, 4, 4))
    for name, given in CALLS.items():
        keywords = dict(given)
        if "sinks" in keywords:
            keywords["sinks"] = torch.linspace(-1, 2, 8, device="cuda")
        key_mask = None
        if keywords.pop("key_mask", None):
            key_mask = torch.ones(2, LENGTH, dtype=torch.bool, device="cuda")
            key_mask[1, :333] = False
        for tau in (0.0, 0.5):
            config = S2OConfig(tau=tau, min_seq_len=0)
            wanted = s2o_compile.attention(query, key, value, key_mask=key_mask, **keywords, config=config)
            for method in ("all_gather", "ulysses"):
                sequence = shard_sequence(dist.group.WORLD, LENGTH, key_mask=key_mask, method=method)
                with sequence.attending():
                    shards = [sequence.shard(x, 2) for x in (query, key, value)]
                    output = s2o_compile.attention(*shards, **keywords, config=config)
                pairs = list(zip(*(x if isinstance(x, tuple) else (x,) for x in (output, wanted)), strict=True))
                pairs = [(sequence.gather(a, 2), b) for a, b in pairs]
                error = max((a.float() - b.float()).abs().nan_to_num(0.0).max().item() for a, b in pairs)
                found[name, tau, method] = error, all(torch.equal(a, b) for a, b in pairs)
    return found


def test_calls():
    for found in check_ranks(compare_calls, 2, backend="nccl", seconds=120):
        for (name, tau, method), (error, same) in found.items():
            assert same or name == "bidirectional", (name, tau, method)
            assert error < 2e-2 or tau > 0, (name, tau, method)


def compare_models(rank):
    from s2o_compile.distributed import context_parallel

    model = tiny_model().cuda().bfloat16()
    x = torch.randn(1, LENGTH, 32, generator=torch.Generator().manual_seed(1)).cuda().bfloat16()
    config = S2OConfig(tau=0.0, min_seq_len=0)
    parallel = context_parallel(model, dist.group.WORLD, config, tokens="x", positions=None)
    with torch.no_grad():
        wanted, exact = model(x), tiny_model().cuda()(x.float())
        return [(y.float() - exact).abs().max().item() for y in (parallel(x), wanted)]


def test_a_compiled_model():
    for error, of_dense in check_ranks(compare_models, 2, backend="nccl", seconds=300):
        assert error < 4 * of_dense + 1e-3


def attend_on_the_cpu(rank):
    from s2o_compile.distributed import shard_sequence

    sequence = shard_sequence(dist.group.WORLD, LENGTH)
    x = sequence.shard(torch.randn(1, 2, LENGTH, 16), 2)
    with sequence.attending():
        s2o_compile.attention(x, x, x, causal=True)


def test_cpu_tensors_of_an_nccl_group():
    for answer in run_ranks(attend_on_the_cpu, 2, backend="nccl", seconds=120):
        assert "expected CUDA tensors, which NCCL exchanges, got cpu" in str(answer)
