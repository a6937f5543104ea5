"""Attention over packed sequences by their bounds: flash-attn's functions, by stubs of their signature, and torch's."""

import inspect
import sys
import types
from contextlib import suppress

import pytest
import torch

from s2o_compile.kernels.statistics import record_calls
from s2o_compile.passes.frontends import varlen
from tests.helpers.capture import Capture

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

TOKENS, HEADS, KV_HEADS, DIM = 330, 4, 2, 16
BOUNDS = torch.tensor([0, 140, 140, 290, 330], dtype=torch.int32)
OTHERS = torch.tensor([0, 90, 120, 270, 330], dtype=torch.int32)
PACKED = torch.ops.s2o.packed_attention.default
MOST = 160


def flash_attn_varlen_func(  # the signature of flash-attn 2
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False,
    block_table=None,
):  # fmt: skip
    raise AssertionError("flash-attn ran")


def in_graph(function):
    """A function that Dynamo leaves in the graph, and that traces as if it gave a tensor like the query."""

    def traced(*args, **kwargs):
        return args[0].clone() if torch.compiler.is_compiling() else function(*args, **kwargs)

    traced.__name__, traced.__signature__ = function.__name__, inspect.signature(function)
    return torch.compiler.allow_in_graph(traced)


@pytest.fixture
def flash(monkeypatch):
    function = in_graph(flash_attn_varlen_func)
    monkeypatch.setitem(sys.modules, "flash_attn", types.SimpleNamespace(flash_attn_varlen_func=function))
    return function


def tensors(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(TOKENS, heads, DIM, generator=generator).to(dtype) for heads in (HEADS, KV_HEADS, KV_HEADS)]


def exact(q, k, v, bounds, key_bounds, left=-1, right=-1, *, scale=DIM**-0.5, softcap=None):
    """Float64, sequence by sequence, each aligned to the bottom right."""
    q, k, v = q.double(), *(x.double().repeat_interleave(HEADS // KV_HEADS, 1) for x in (k, v))
    output = torch.zeros_like(q)
    for i, n, j, m in zip(bounds, bounds.diff(), key_bounds, key_bounds.diff(), strict=False):
        scores = torch.einsum("qhd,khd->hqk", q[i : i + n], k[j : j + m]) * scale
        scores = scores if softcap is None else softcap * (scores / softcap).tanh()
        distance = torch.arange(m) - torch.arange(n)[:, None] - (m - n)
        seen = torch.ones(n, m, dtype=torch.bool)
        seen = seen & (distance <= right) if right >= 0 else seen
        seen = seen & (distance >= -left) if left >= 0 else seen
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num()
        output[i : i + n] = torch.einsum("hqk,khd->qhd", weights, v[j : j + m])
    return output


def run(function, *inputs, expected, masks):
    capture = Capture({"tau": 0.0, "min_seq_len": 0})
    with torch.no_grad(), record_calls() as calls:
        output = torch.compile(function, backend=capture)(*inputs)
    assert [(record.mask, record.reason) for record in capture.records] == [(mask, "") for mask in masks]
    torch.testing.assert_close(output.double(), expected, atol=1e-5, rtol=1e-5)
    return capture, calls


def left(function, *inputs):
    """The reason why a call stays, which no CPU can run."""
    capture = Capture()
    with suppress(AssertionError, NotImplementedError, RuntimeError):
        torch.compile(function, backend=capture)(*inputs)
    (record,) = capture.records
    assert not record.rewritten, record.mask
    return record.reason


WINDOWS = {
    (-1, -1): "packed bidirectional",
    (-1, 0): "packed causal",
    (20, 0): "packed causal, window 21",
    (20, 7): "packed sliding window -20..+7",
    (-1, 7): "packed causal, offset 7",
}


@pytest.mark.parametrize("keys", [BOUNDS, OTHERS], ids=["itself", "others"])
@pytest.mark.parametrize("window", WINDOWS, ids=str)
class TestWindows:
    def test_of_torch(self, window, keys):
        attend = pytest.importorskip("torch.nn.attention.varlen").varlen_attn

        def function(q, k, v, bounds, key_bounds):
            return attend(q, k, v, bounds, key_bounds, MOST, MOST, window_size=window, enable_gqa=True)

        given = (*tensors(), BOUNDS, keys)
        _, calls = run(function, *given, expected=exact(*given, *window), masks=[WINDOWS[window]])
        assert sum(call.path in ("s2o", "window") for call in calls) == 2 - (keys is OTHERS) * (
            calls[0].path == "dense"
        )

    def test_of_flash_attn(self, window, keys, flash):
        def function(q, k, v, bounds, key_bounds):
            return flash(q, k, v, bounds, key_bounds, MOST, MOST, window_size=window, softmax_scale=0.3, softcap=2.0)

        given = (*tensors(), BOUNDS, keys)
        expected = exact(*given, *window, scale=0.3, softcap=2.0)
        run(function, *given, expected=expected, masks=[WINDOWS[window]])


@torch.no_grad()
def test_a_cap_that_dynamo_makes_an_input_is_a_constant_under_a_guard(flash):
    """With ``dynamic=True`` floats of modules enter the graph."""

    class Capped(torch.nn.Module):
        cap = 2.0

        def forward(self, q, k, v):
            return flash(q, k, v, BOUNDS, BOUNDS, MOST, MOST, causal=True, softcap=self.cap)

    model, capture = Capped(), Capture({"tau": 0.0, "min_seq_len": 0})
    compiled = torch.compile(model, backend=capture, dynamic=True)
    for model.cap in (2.0, 0.5):
        expected = exact(*tensors(), BOUNDS, BOUNDS, -1, 0, softcap=model.cap)
        torch.testing.assert_close(compiled(*tensors()).double(), expected, atol=1e-5, rtol=1e-5)
    assert [record.reason for record in capture.records] == [""] * 2


@pytest.mark.parametrize("module", ["flash_attn", "flash_attn_interface", "flash_attn.flash_attn_interface"])
def test_the_functions_of_flash_attn_by_their_module(module, monkeypatch):
    function = in_graph(flash_attn_varlen_func)
    call = lambda q, k, v, b: function(q, k, v, b, b, MOST, MOST, causal=True)  # noqa: E731
    given = (*tensors(), BOUNDS)
    assert "choose scaled_dot_product_attention" in left(call, *given)
    torch._dynamo.reset()
    monkeypatch.setitem(sys.modules, module, types.SimpleNamespace(flash_attn_varlen_func=function))
    expected = exact(*given, BOUNDS, -1, 0)
    run(call, *given, expected=expected, masks=["packed causal"])


def test_the_operator_of_flash_attn():
    """What Dynamo leaves of its Python function: an operator with four results."""
    schema = (
        "_flash_attn_varlen_forward(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, "
        "SymInt max_seqlen_q, SymInt max_seqlen_k, float dropout_p, float softmax_scale, bool causal, "
        "SymInt window_size_left=-1, SymInt window_size_right=-1, float softcap=0.0, Tensor? alibi_slopes=None, "
        "bool return_softmax=False, Tensor? block_table=None, Tensor? leftpad_k=None, Tensor? seqused_k=None, "
        "bool zero_tensors=False) -> (Tensor, Tensor, Tensor, Tensor)"
    )
    library = torch.library.Library("flash_attn", "FRAGMENT")
    library.define(schema)
    library.impl("_flash_attn_varlen_forward", lambda q, *_: (torch.empty_like(q), *[q.new_empty(0)] * 3), "Meta")
    operator = torch.ops.flash_attn._flash_attn_varlen_forward

    def function(q, k, v, bounds, reads=1, **others):
        results = operator(q, k, v, bounds, bounds, MOST, MOST, 0.0, 0.25, True, 30, 0, **others)
        return results[0] if reads == 1 else results[:reads]

    given = (*tensors(), BOUNDS)
    expected = exact(*given, BOUNDS, 30, 0, scale=0.25)
    capture, _ = run(function, *given, expected=expected, masks=["packed causal, window 31"])
    assert not [node for node in capture.nodes if "flash_attn" in str(node.target)]
    torch._dynamo.reset()
    assert "more than the output" in left(lambda *xs: function(*xs, reads=2), *given)
    torch._dynamo.reset()
    assert "leftpad_k=" in left(lambda *xs: function(*xs, leftpad_k=xs[3]), *given)
    library._destroy()


def test_layers_share_the_documents(flash):
    def function(q, k, v, bounds):
        for _ in range(2):
            q = flash(q, k, v, bounds, bounds, MOST, MOST, causal=True) + 1
        return q

    q, k, v = tensors()
    expected = exact(q, k, v, BOUNDS, BOUNDS, -1, 0) + 1
    expected = exact(expected, k, v, BOUNDS, BOUNDS, -1, 0) + 1
    capture, _ = run(function, q, k, v, BOUNDS, expected=expected, masks=["packed causal"] * 2)
    calls = [node for node in capture.nodes if node.target is PACKED]
    assert calls[0].args[3] is calls[1].args[3]


def bounds_written(flash, q, k, v, bounds):
    output = flash(q, k, v, bounds, bounds, MOST, MOST, causal=True)
    bounds.add_(1)
    return output


LEFT = {
    "paged": (lambda f, q, k, v, b: f(q, k, v, b, b, MOST, MOST, block_table=b), "block_table="),
    "alibi": (lambda f, q, k, v, b: f(q, k, v, b, b, MOST, MOST, alibi_slopes=q[0, :, 0]), "alibi_slopes="),
    "dropout": (lambda f, q, k, v, b: f(q, k, v, b, b, MOST, MOST, 0.1), "dropout_p=0.1"),
    "probabilities": (lambda f, q, k, v, b: f(q, k, v, b, b, MOST, MOST, return_attn_probs=True), "return_attn_probs"),
    "future": (lambda f, q, k, v, b: f(q, k, v, b, b, MOST, MOST, window_size=(3, -1)), "hides none behind it"),
    "bounds of floats": (lambda f, q, k, v, b: f(q, k, v, b.float(), b, MOST, MOST), "expected int32"),
    "bounds written": (bounds_written, "changed in place"),
    "rank": (lambda f, q, k, v, b: f(q[None], k, v, b, b, MOST, MOST), "expected a tensor [tokens, heads, head_dim]"),
    "groups": (lambda f, q, k, v, b: f(q[:, :3], k, v, b, b, MOST, MOST), "no multiple"),
    "float64": (lambda f, q, k, v, b: f(q.double(), k.double(), v.double(), b, b, MOST, MOST), "float64"),
}


@pytest.mark.parametrize("name", LEFT)
def test_left_with_a_reason(name, flash):
    function, reason = LEFT[name]
    assert reason in left(lambda *given: function(flash, *given), *tensors(), BOUNDS.clone())


def test_a_function_of_that_name_is_none_of_flash_attns(monkeypatch):
    """A user's function may be called so, and may be imported beside the real one."""
    theirs, ours = in_graph(flash_attn_varlen_func), in_graph(flash_attn_varlen_func)
    monkeypatch.setitem(sys.modules, "flash_attn", types.SimpleNamespace(flash_attn_varlen_func=theirs))
    assert left(lambda q, k, v, b: ours(q, k, v, b, b, MOST, MOST), *tensors(), BOUNDS)


def test_gradients_stay_with_the_kernel(flash):
    given = [x.requires_grad_() for x in tensors()]
    assert "torch.no_grad()" in left(lambda *xs: flash(*xs, BOUNDS, BOUNDS, MOST, MOST), *given)


def test_gradients_stay_with_the_kernel_of_torch():
    attend = pytest.importorskip("torch.nn.attention.varlen").varlen_attn
    given = [x.requires_grad_() for x in tensors()]
    assert "torch.no_grad()" in left(lambda *xs: attend(*xs, BOUNDS, BOUNDS, MOST, MOST, enable_gqa=True), *given)


def test_the_names_are_those_of_this_torch():
    """A torch that calls another operator keeps such attention dense, and this test says so."""
    pytest.importorskip("torch.nn.attention.varlen")
    assert varlen.VARLEN_OPERATOR in varlen.OPERATORS
    names = {argument.name for argument in torch.ops.torch_attn._varlen_attn.default._schema.arguments}
    assert {"query", "key", "value", "cu_seq_q", "cu_seq_k", "is_causal", "scale", "window_size"} <= names
