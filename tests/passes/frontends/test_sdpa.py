"""From captured graph to rewritten graph: the SDPA frontend, repeat_kv, the rewriter and the report."""

import logging

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right, causal_upper_left
from torch.nn.attention.flex_attention import flex_attention

import s2o_compile
from s2o_compile.passes import pipeline
from s2o_compile.passes.graph.nodes import value_of
from tests.helpers.capture import EXACT, Capture, heads, rewritten

FORMS = {
    "positional": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, None, 0.0, True),
    "keywords": lambda q, k, v: F.scaled_dot_product_attention(query=q, key=k, value=v, is_causal=True),
    "torch.nn.functional": lambda q, k, v: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True),
    "builtin": lambda q, k, v: torch._C._nn.scaled_dot_product_attention(q, k, v, is_causal=True),
    "aten": lambda q, k, v: torch.ops.aten.scaled_dot_product_attention.default(q, k, v, None, 0.0, True),
    "aten-packet": lambda q, k, v: torch.ops.aten.scaled_dot_product_attention(q, k, v, is_causal=True),
    "scale": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.5),
    "value-dim": lambda q, k, v: F.scaled_dot_product_attention(q, k, v[..., :12], is_causal=True),
    "mask": lambda q, k, v: F.scaled_dot_product_attention(
        q, k, v, torch.arange(k.shape[2])[None] <= torch.arange(q.shape[2])[:, None]
    ),
}


@pytest.mark.parametrize("function", FORMS.values(), ids=FORMS)
def test_every_spelling_is_rewritten(function):
    capture = rewritten(function, heads(), heads(), heads())
    (record,) = capture.records
    assert record.rewritten
    assert record.reason == ""
    assert record.mask == "causal"
    assert record.query_shape == ("2", "4", "40", "16")
    assert record.dtype == "float32"
    assert len(capture.calls) == 1


RANKS = {
    "batch-of-heads": lambda q, k, v: F.scaled_dot_product_attention(q[0], k[0], v[0], is_causal=True),
    "windows": lambda q, k, v: F.scaled_dot_product_attention(*(x.unflatten(2, (5, 8)) for x in (q, k, v))),
    "windows-moved": lambda q, k, v: F.scaled_dot_product_attention(
        *(x.unflatten(2, (8, 5)).transpose(2, 3) for x in (q, k, v)), scale=0.3, is_causal=True
    ),
    "windows-of-all-keys": lambda q, k, v: F.scaled_dot_product_attention(
        q.unflatten(2, (5, 8)), k[:, :, None], v[:, :, None]
    ),
}


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("function", RANKS.values(), ids=RANKS)
def test_other_ranks(function, dynamic):
    q, k, v = heads(), heads(), heads()
    capture = rewritten(function, q, k, v, mark=[(x, 0) for x in (q, k, v)] if dynamic else [])
    assert [record.reason for record in capture.records] == [""]
    assert len(capture.calls) == 1


@pytest.mark.parametrize("layout", ["transposed", "contiguous"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_output_keeps_the_strides_of_sdpa(layout, dynamic):
    q, k, v = (heads() if layout == "transposed" else heads().contiguous() for _ in range(3))
    mark = [(tensor, 2) for tensor in (q, k, v)] if dynamic else []
    capture = rewritten(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), q, k, v, mark=mark)
    (output,) = (next(iter(call.users)) for call in capture.calls)
    assert value_of(output).stride() == capture.original[0].stride()
    assert value_of(output).shape == capture.original[0].shape


def test_code_behind_a_transposed_query_may_view_the_output():
    def function(q, k, v):
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).view(2, 40, 64)

    assert rewritten(function, heads(), heads(), heads()).records[0].mask == "bidirectional"


def test_is_causal_is_aligned_to_the_top_left():
    capture = rewritten(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), heads(length=20), heads(), heads()
    )
    assert capture.records[0].mask == "causal, offset 0"
    assert capture.calls[0].kwargs["causal_offset"] == 0


def masked(q, k, v, mask):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def causal_mask(q, k, offset=0):
    return torch.arange(k.shape[2])[None] <= torch.arange(q.shape[2])[:, None] + offset


DENSE = {
    "dropout": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=0.1), "model.eval()"),
    "one-token": (lambda q, k, v: F.scaled_dot_product_attention(q[:, :, :1], k, v), "decode stays dense"),
    "float64": (lambda q, k, v: F.scaled_dot_product_attention(q.double(), k.double(), v.double()), "float64"),
    "rank-2": (lambda q, k, v: F.scaled_dot_product_attention(q[0, 0], k[0, 0], v[0, 0]), "ranks 2, 2, 2, expected 4"),
    "masked-rank-3": (
        lambda q, k, v: F.scaled_dot_product_attention(q[0], k[0], v[0], torch.ones(40, 40, dtype=torch.bool).tril()),
        "ranks 3, 3, 3, expected 4",
    ),
    "mixed-ranks": (lambda q, k, v: F.scaled_dot_product_attention(q, k[0], v[0]), "ranks 4, 3, 3, expected 4"),
    "wide-heads": (
        lambda q, k, v: F.scaled_dot_product_attention(*(x.repeat(1, 1, 1, 33) for x in (q, k, v))),
        "at most 512",
    ),
    "opaque-mask": (
        lambda q, k, v: masked(q, k, v, (q @ k.transpose(-1, -2)) > 0),
        "matmul (matmul) is not index arithmetic",
    ),
}


@pytest.mark.parametrize(("function", "why"), DENSE.values(), ids=DENSE)
def test_what_is_left_dense_says_why(function, why):
    torch._dynamo.reset()
    capture = Capture()
    torch.compile(function, backend=capture)(heads(), heads(), heads())
    (record,) = capture.records
    assert not record.rewritten
    assert why in record.reason
    assert not capture.calls


def test_gradients_stay_dense():
    capture = Capture()
    q = heads().requires_grad_()
    torch._dynamo.reset()
    torch.compile(FORMS["positional"], backend=capture)(q, heads(), heads()).sum().backward()
    assert q.grad is not None
    assert "torch.no_grad()" in capture.records[0].reason
    with torch.no_grad():
        assert rewritten(FORMS["positional"], q, heads(), heads()).records[0].rewritten


def test_autocast_that_changes_the_dtype_stays_dense():
    def function(q, k, v):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return FORMS["positional"](q, k, v)

    capture = rewritten(function, heads(), heads(), heads())
    assert "autocast turns its torch.float32 query into torch.bfloat16" in capture.records[0].reason


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("function", [FORMS["positional"], lambda q, k, v: (q @ k.mT).softmax(-1) @ v])
@pytest.mark.parametrize("levels", [1, 2, 3])
def test_vmap_stays_dense(function, levels):
    inputs = [torch.stack([heads(), heads()]) for _ in range(3)]
    for _ in range(levels):
        function = torch.vmap(function)
    capture = rewritten(lambda q, k, v: function(q, k, v), *inputs)
    assert "torch.vmap" in capture.records[0].reason


def test_a_gradient_inside_stays_dense_and_says_so():
    form = FORMS["positional"]
    capture = rewritten(lambda q, k, v: torch.func.grad(lambda x: form(x, k, v).sum())(q), heads(), heads(), heads())
    assert "under a transform" in capture.records[0].reason


@pytest.mark.parametrize("bias", [causal_lower_right, causal_upper_left])
def test_causal_biases_of_torch_are_proven(bias):
    """In their code torch asks which kernels SDPA may choose."""
    capture = rewritten(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=bias(q.shape[2], k.shape[2])),
        heads(length=30), heads(), heads(),
    )  # fmt: skip
    assert [(record.mask, record.reason) for record in capture.records] == [
        ("causal" if bias is causal_lower_right else "causal, offset 0", "")
    ]
    assert len(capture.calls) == 1


def test_a_replaced_sdpa_stays_dense(monkeypatch):
    capture = Capture()
    torch._dynamo.reset()
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *args, **kwargs: None)
    torch.compile(FORMS["builtin"], backend=capture)(heads(), heads(), heads())
    assert "replaced by another function" in capture.records[0].reason


def test_attention_inside_a_higher_order_operator_is_reported():
    def function(q, k, v):
        return torch.utils.checkpoint.checkpoint(FORMS["positional"], q, k, v, use_reentrant=False)

    capture = rewritten(function, heads(), heads(), heads())
    (record,) = capture.records
    assert not record.rewritten
    assert "checkpoint" in record.reason
    assert record.query_shape == ("2", "4", "40", "16")


def test_one_key_head_for_all():
    expanded = rewritten(
        lambda q, k, v: F.scaled_dot_product_attention(q, k.expand(2, 4, 40, 16), v.expand(2, 4, 40, 16)),
        heads(4), heads(1), heads(1),
    )  # fmt: skip
    assert expanded.records[0].key_shape[1] == "1"
    broadcast = rewritten(FORMS["positional"], heads(4), heads(1), heads(1))
    assert broadcast.records[0].key_shape[1] == "1"


def test_native_groups():
    capture = rewritten(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True), heads(4), heads(2), heads(2)
    )
    assert capture.records[0].key_shape[1] == "2"


def test_layers_share_one_key_mask_and_the_square_mask_is_gone():
    def function(q, k, v, pad):
        mask = causal_mask(q, k) & pad.bool()[:, None, None]
        for _ in range(3):
            q = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return q

    pad = torch.tensor([[0] * 3 + [1] * 37, [1] * 40])
    q = heads()
    capture = rewritten(lambda *a: function(*a)[:, :, 3:], q, heads(), heads(), pad)  # rows without keys are undefined
    assert [record.mask for record in capture.records] == ["causal, key padding"] * 3
    assert len({call.args[3] for call in capture.calls}) == 1
    assert value_of(capture.calls[0].args[3]).shape == (2, 40)
    assert not any(value.shape[-2:] == (40, 40) for value in capture.values)
    assert not any(node.name.startswith("arange") for node in capture.nodes)


PADDINGS = {
    "inverted": lambda pad: ~pad[:, None, None],
    "cut": lambda pad: pad.repeat(1, 2)[:, None, None, 40:],
    "keys-first": lambda pad: (pad.long().t() > 0).t()[:, None, None],
    "one-row": lambda pad: pad[1][None, None, None].expand(2, 1, 40, 40),
    "of-four-dims": lambda pad: pad[:, None, None].clone(),
    "two": lambda pad: pad[:, None, None] & pad.flip(0)[:, None, None],
}


@pytest.mark.parametrize("mask_of", PADDINGS.values(), ids=PADDINGS)
def test_key_masks_of_every_shape(mask_of):
    pad = torch.rand(2, 40) < 0.5
    capture = rewritten(lambda q, k, v, pad: masked(q, k, v, mask_of(pad)), heads(), heads(), heads(), pad)
    assert capture.records[0].mask == "bidirectional, key padding"
    assert value_of(capture.calls[0].args[3]).shape == (2, 40)


def test_offsets_that_only_sizes_tell_are_computed_in_the_graph():
    def function(q, k, v, cache):
        offset = cache.shape[0] + q.shape[2] // 2
        return masked(q, k, v, causal_mask(q, k, offset))

    capture = Capture()
    torch._dynamo.reset()
    compiled = torch.compile(function, backend=capture)
    for queries, past in ((20, 7), (30, 4), (10, 30)):
        inputs = heads(length=queries), heads(), heads(), torch.empty(past)
        for tensor, dim in zip(inputs, (2, 2, 2, 0), strict=True):
            torch._dynamo.mark_dynamic(tensor, dim)
        torch.testing.assert_close(compiled(*inputs), function(*inputs), atol=1e-5, rtol=1e-5)
    assert len(capture.graphs) == 1
    assert isinstance(capture.calls[0].kwargs["causal_offset"], torch.fx.Node)


def test_one_dynamic_graph_serves_every_length():
    def function(q, k, v, pad):
        offset = k.shape[2] - q.shape[2]
        window = causal_mask(q, k, offset) & ~causal_mask(q, k, offset - 8)
        return masked(q, k, v, window & pad[:, None, None])

    capture, lengths = Capture(), ((20, 40), (33, 33), (5, 70))
    torch._dynamo.reset()
    compiled = torch.compile(function, backend=capture)
    for queries, keys in lengths:
        pad = torch.ones(2, keys, dtype=torch.bool)
        pad[0, : keys - queries] = False
        inputs = heads(length=queries), heads(length=keys), heads(length=keys), pad
        for tensor in inputs[:3]:
            torch._dynamo.mark_dynamic(tensor, 2)
        torch._dynamo.mark_dynamic(pad, 1)
        torch.testing.assert_close(compiled(*inputs), function(*inputs), atol=1e-5, rtol=1e-5)
    assert len(capture.graphs) == 1
    assert capture.records[0].mask == "causal, window 8, key padding"


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.project = torch.nn.Linear(64, 192)

    def forward(self, x):
        q, k, v = self.project(x).unflatten(-1, (3, 4, 16)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return F.scaled_dot_product_attention(y, k, v, is_causal=True).transpose(1, 2).reshape(x.shape)


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(Block() for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def test_the_report_names_modules_and_the_operator_carries_the_names(caplog):
    with torch.no_grad(), caplog.at_level(logging.INFO, logger="s2o_compile.passes.pipeline"):
        capture = rewritten(Net(), torch.randn(2, 40, 64))
    names = ["layers.0", "layers.0#2", "layers.1", "layers.1#2"]
    assert [record.name for record in capture.records] == names
    assert [call.kwargs["site"] for call in capture.calls] == names
    assert capture.calls[0].kwargs["tau"] == 0.0
    assert "nn_module_stack" in capture.calls[0].meta
    assert any("4 of 4 attentions rewritten" in message for message in caplog.messages)


def test_a_call_names_no_option_that_is_the_default():
    """Every argument that a graph names is read again in each of its calls."""
    defaults = s2o_compile.S2OConfig().operator_options()
    gm = torch.fx.symbolic_trace(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True))
    for options, named in ((defaults, set()), (defaults | {"tau": 0.25}, {"tau"})):
        capture = Capture(options)
        torch._dynamo.reset()
        torch.compile(gm, backend=capture)(heads(), heads(), heads())
        (call,) = capture.calls
        assert set(call.kwargs) & set(defaults) == named


def test_a_graph_without_attention_is_left_alone():
    assert rewritten(lambda x: x.clone().add_(1) * 2, torch.ones(3)).records == []


@pytest.mark.slow
def test_inductor_compiles_the_rewritten_graph():
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.utils import fresh_cache

    def backend(gm, example_inputs):
        assert all(record.rewritten for record in pipeline.run(gm, EXACT))
        return compile_fx(gm, example_inputs)

    q, k, v = heads(), heads(2), heads(2)
    for tensor in (q, k, v):
        torch._dynamo.mark_dynamic(tensor, 2)

    def function(q, k, v):
        mask = causal_mask(q, k, k.shape[2] - q.shape[2])
        return masked(q, *(x.repeat_interleave(2, dim=1) for x in (k, v)), mask).transpose(1, 2).reshape(2, -1, 64) * 2

    torch._dynamo.reset()
    with fresh_cache():  # another commit's code may call the operator with other arguments
        actual = torch.compile(function, backend=backend)(q, k, v)
    torch.testing.assert_close(actual, function(q, k, v), atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without:UserWarning")
@pytest.mark.parametrize("form", ["sdpa", "flex", "eager"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_sequence_first_code_may_view_the_output(form, dynamic):
    """A query that lies as [N, B, H, D] gives an output that lies so, and a view that joins N and B is legal."""

    def attend(x):
        q = x.view(*x.shape[:2], 4, 16).permute(1, 2, 0, 3)
        if form == "sdpa":
            output = F.scaled_dot_product_attention(q, q, q)
        elif form == "flex":
            output = flex_attention(q, q, q)
        else:
            return (q @ q.transpose(-2, -1)).softmax(-1) @ q
        return output.permute(2, 0, 1, 3).view(-1, 64)

    x = torch.randn(40, 2, 64)
    with torch.no_grad():
        capture = rewritten(attend, x, mark=[(x, 0)] if dynamic else ())
        assert [record.rewritten for record in capture.records] == [True]
        assert torch.compile(attend, backend=Capture())(x).stride() == attend(x).stride()


@pytest.mark.parametrize("empty", [(0, 2), (2, 0)], ids=["batch", "queries"])
def test_an_attention_over_nothing_is_left(empty):
    batch, length = empty
    q, k = torch.randn(batch, 4, length, 16), torch.randn(batch, 4, 40, 16)
    capture = rewritten(lambda q, k: F.scaled_dot_product_attention(q, k, k), q, k)
    assert "no element" in capture.records[0].reason
