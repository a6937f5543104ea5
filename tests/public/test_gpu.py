"""The public face on a GPU: compiled models, CUDA graphs, and no waiting for the device."""

import zipfile
from functools import partial

import pytest
import torch

import s2o_compile
from s2o_compile import S2OConfig
from s2o_compile.kernels import schedule as slices
from s2o_compile.kernels.core import plan
from s2o_compile.kernels.core.call import AttentionCall
from s2o_compile.kernels.core.mask import AttentionMask
from s2o_compile.kernels.core.tuned import launch
from tests.helpers.tiny import tiny_input, tiny_model

pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo"),
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
LENGTH = 3000


def on_gpu():
    return tiny_model().cuda().half(), tiny_input(LENGTH).cuda().half()


@pytest.mark.parametrize("mode", [None, "reduce-overhead"], ids=["default", "cuda-graphs"])
@torch.no_grad()
def test_optimized_model_is_exact_at_tau_zero(mode):
    model, x = on_gpu()
    fast = s2o_compile.optimize(model, S2OConfig(tau=0.0, min_seq_len=0), mode=mode)
    expected = model(x)
    exact = model.float()(x.float())
    model.half()
    limit = 4 * max((expected - exact).abs().max(), exact.abs().max() * torch.finfo(torch.float16).eps)
    for _ in range(4):  # CUDA graphs record at the second call and replay from then on
        actual = fast(x).clone()
        assert (actual - exact).abs().max() <= limit


@pytest.mark.parametrize("dense_heads", [(), (1,), (0, 2)], ids=str)
@torch.no_grad()
def test_a_call_waits_for_nothing_and_is_deterministic(dense_heads):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, h, LENGTH, 64, device="cuda", dtype=torch.bfloat16) for h in (8, 4, 4))
    config = S2OConfig(min_seq_len=0)
    call = partial(s2o_compile.attention, q, k, v, causal=True, dense_heads=dense_heads, config=config)
    first = call()  # compiles the kernels
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(first, second)


@torch.no_grad()
def test_rows_beyond_two_to_the_31_elements():
    """Keys and values whose rows lie far apart: 32-bit offsets would wrap."""
    n, heads, dim = 70_000, 256, 128
    assert n * heads * dim > 2**31
    wide = torch.zeros(1, n, heads, dim, device="cuda", dtype=torch.float16).transpose(1, 2)
    torch.manual_seed(0)
    wide[:, 255] = torch.randn(1, n, dim, device="cuda", dtype=torch.float16)
    key = wide[:, 255:]
    query = key[:, :, -256:]
    config = S2OConfig(tau=0.0, min_seq_len=0)
    actual = s2o_compile.attention(query, key, key, causal=True, config=config)
    mask = torch.ones(256, n, dtype=torch.bool, device="cuda").tril(n - 256)
    compact = key.contiguous()
    expected = torch.nn.functional.scaled_dot_product_attention(query, compact, compact, attn_mask=mask)
    torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-3)


@torch.no_grad()
def test_a_quarter_of_a_million_tokens():
    """Scores, lists and rows of 32 heads of 256K tokens: 2^31 elements and more, in all."""
    triton_order = pytest.importorskip("s2o_compile.kernels.impl.triton.order")
    n, heads, dim = 2**18, 32, 64
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, n, dim, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    segment_len = plan.default_segment_len(n)
    segments = n // segment_len
    scores = torch.empty(1, heads, segments, n, device="cuda", dtype=torch.float16)
    assert scores.numel() >= 2**31
    last = scores[0, -1, -1].normal_()
    non_finite = triton_order.find_non_finite(key, value)
    index, count = triton_order.order_keys(
        scores, non_finite, AttentionMask(causal=True), n_queries=n, segment_len=segment_len
    )
    listed = index[0, -1, -1].long()
    assert count[0, -1] == len(listed) == len(listed.unique()) == n - segment_len
    eighth = len(listed) // 8
    best = last[: n - segment_len].topk(eighth).values
    assert last[listed[:eighth]].float().mean() > 0.98 * best.float().mean()
    del scores, last, index
    actual = s2o_compile.attention(query, key, value, causal=True, config=S2OConfig(tau=0.0))
    for head in (0, heads - 1):
        rows = query[0, head, -128:].double() @ key[0, head].double().T * dim**-0.5
        hidden = torch.ones(128, n, dtype=torch.bool, device="cuda").triu(n - 127)
        expected = rows.masked_fill_(hidden, -torch.inf).softmax(-1) @ value[0, head].double()
        torch.testing.assert_close(actual[0, head, -128:].double(), expected, rtol=2e-2, atol=1e-4)


@pytest.mark.parametrize("ranking", ["per_query", "mean_query"])
@torch.no_grad()
def test_many_slices_are_captured_in_a_cuda_graph(ranking, monkeypatch):
    monkeypatch.setattr(slices, "SCRATCH_BYTES", 1)
    monkeypatch.setattr(slices, "SCRATCH_SHARE", 64)
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, h, LENGTH, 64, device="cuda", dtype=torch.bfloat16) for h in (8, 4, 4))
    config = S2OConfig(min_seq_len=0, ranking=ranking)
    assert len(list(slices.slices(AttentionCall.of(query, key, value, causal=True), 512, 1, range(4)))) > 4
    expected = s2o_compile.attention(query, key, value, causal=True, config=config)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        actual = s2o_compile.attention(query, key, value, causal=True, config=config)
    for _ in range(3):
        actual.zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "cross"])
@torch.no_grad()
def test_a_package_runs_every_length(causal, tmp_path):
    class Attention(torch.nn.Module):
        def forward(self, q, k, v):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)

    def inputs(length, batch):
        generator = torch.Generator("cuda").manual_seed(length)
        make = partial(torch.randn, generator=generator, device="cuda")
        return tuple(make(batch, heads, length, 64).bfloat16() for heads in (4, 2, 2))

    length, batch = torch.export.Dim("length", min=1, max=8192), torch.export.Dim("batch", min=1, max=2)
    config = S2OConfig(tau=0.0, min_seq_len=1024)
    program = s2o_compile.export(
        Attention(), inputs(1500, 2), config=config, dynamic_shapes=({0: batch, 2: length},) * 3
    )
    packaged = s2o_compile.package(program, tmp_path / "model.pt2")
    assert packaged.sparse
    limit = launch(torch.device("cuda"), 64, torch.bfloat16).maxnreg
    with zipfile.ZipFile(packaged.path) as archive:
        (source,) = (archive.read(name).decode() for name in archive.namelist() if name.endswith("wrapper.cpp"))
    assert ("'maxnreg'" in source) == (limit is not None)
    run = torch._inductor.aoti_load_package(str(packaged.path))
    for size in (1, 2, 127, 1023, 1024, 1025, 4096, 8191):
        x = inputs(size, 1 + size % 2)
        exact = Attention()(*(part.float() for part in x))
        error, floor = ((y.float() - exact).norm() / exact.norm() for y in (run(*x), Attention()(*x)))
        assert error <= 2 * floor  # one token attends to itself, exactly
