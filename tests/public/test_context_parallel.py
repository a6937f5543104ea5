"""Inside torch's ``context_parallel`` a rank holds a shard of the keys: attention to it alone is refused."""

import warnings

import pytest
import torch
import torch.distributed as dist

import s2o_compile
from s2o_compile import InputError, S2OConfig
from tests.helpers.tiny import tiny_input, tiny_model

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")

LENGTH = 256
EVERYTHING = torch.ones(1, 1, dtype=torch.bool)
CALLS = {
    "short": s2o_compile.attention,
    "long": lambda *tensors: s2o_compile.attention(*tensors, config=S2OConfig(min_seq_len=0)),
    "gradient": lambda q, k, v: s2o_compile.attention(q.clone().requires_grad_(), k, v),
    "mask": lambda *tensors: s2o_compile.attention(*tensors, attn_mask=EVERYTHING),
    "operator": torch.ops.s2o.attention,
    "plan": lambda q, k, v: s2o_compile.plan(q, k, v, min_seq_len=0),
}


def refused_inside(rank, store, ranks):
    """Enters ``context_parallel`` as one of the ranks and makes every call; outside they run."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.experimental import context_parallel

    store = dist.HashStore() if store is None else dist.FileStore(store, ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    try:
        x = torch.randn(1, 2, LENGTH, 16)
        with context_parallel(init_device_mesh("cpu", (ranks,)), buffers=[x], buffer_seq_dims=[2]):
            assert x.shape[2] == LENGTH // ranks
            for call in CALLS.values():
                with pytest.raises(InputError, match=r"context_parallel: expected all keys .* s2o_compile.distributed"):
                    call(x, x, x)
        for call in CALLS.values():
            call(x, x, x)
    finally:
        dist.destroy_process_group()


def test_one_rank():
    refused_inside(0, None, 1)


@pytest.mark.usefixtures("fresh_dynamo")
def test_a_compiled_model_says_that_it_ran_the_ring_of_torch():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.experimental import context_parallel

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model, x = tiny_model(), tiny_input(LENGTH)
        fast = s2o_compile.optimize(model, S2OConfig(min_seq_len=0, inner_backend="eager"))
        mesh = init_device_mesh("cpu", (1,))
        with torch.no_grad(), s2o_compile.record() as recording, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with context_parallel(mesh, buffers=[x], buffer_seq_dims=[1]):
                fast(x)
            torch.compiler.reset()
            fast(x)  # sparse outside
            with context_parallel(mesh, buffers=[x], buffer_seq_dims=[1]), pytest.raises(InputError, match="all keys"):
                fast(x)  # that graph, whose shapes fit here, too
    finally:
        dist.destroy_process_group()
    reasons = [site.reason for site in recording.report.sites]
    assert all("torch's context_parallel, which runs its own dense attention in a ring" in x for x in reasons[:2])
    assert reasons[2:] == ["", ""]


@pytest.mark.slow
@pytest.mark.parametrize(
    "call", [{"length": 256}, {"length": 64}, {"length": 64, "grad": True}, {"length": 64, "dropout": 0.1}], ids=str
)
def test_the_interface_of_transformers_refuses_every_length(call):
    """Below ``min_seq_len`` it would be torch's ring, which a CPU does not have."""
    pytest.importorskip("transformers")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.experimental import context_parallel

    from s2o_compile.transformers import configure, s2o_attention_forward

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        module = torch.nn.Module()
        configure(module, S2OConfig(min_seq_len=200))
        x = torch.randn(1, 2, call["length"], 16, requires_grad="grad" in call)
        buffer = torch.randn(1, call["length"])
        for mask in (None, torch.ones(1, 1, call["length"], call["length"], dtype=torch.bool)):
            with (
                context_parallel(init_device_mesh("cpu", (1,)), buffers=[buffer], buffer_seq_dims=[1]),
                pytest.raises(InputError, match=r"context_parallel: expected all keys .* s2o_compile.distributed"),
            ):
                s2o_attention_forward(module, x, x, x, mask, dropout=call.get("dropout", 0.0))
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks(tmp_path):
    torch.multiprocessing.spawn(refused_inside, (str(tmp_path / "store"), 2), nprocs=2)


def test_a_function_of_somebody_elses_is_no_context(monkeypatch):
    sdpa = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", lambda *given, **more: sdpa(*given, **more)
    )
    x = torch.randn(1, 2, 8, 16)
    assert torch.equal(s2o_compile.attention(x, x, x), sdpa(x, x, x))
