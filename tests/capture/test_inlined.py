"""An optimized model inside code that somebody else compiles, transforms or traces: sparse there, heard, or refused."""

import warnings

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.functional import scaled_dot_product_attention as sdpa
from torch.utils.flop_counter import FlopCounterMode

import s2o_compile
from s2o_compile import NothingRewrittenWarning, S2OConfig
from tests.helpers.tiny import TinyAttention, tiny_input, tiny_model

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
EXACT = S2OConfig(tau=0.0, min_seq_len=0, inner_backend="eager")


def optimized(model=None):
    return s2o_compile.optimize(tiny_model() if model is None else model, EXACT)


def warned(call):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(warning.message) for warning in caught if warning.category is NothingRewrittenWarning]


def in_function(fast, x):
    return torch.compile(lambda x: fast(x) + 1, backend="eager", fullgraph=True)(x) - 1


def in_module(fast, x):
    return torch.compile(nn.Sequential(nn.Identity(), fast), backend="aot_eager")(x)


def itself(fast, x):
    return torch.compile(fast, backend="eager", fullgraph=True)(x)


def hooked(fast, x):
    fast.register_forward_hook(lambda *_: None)
    return in_function(fast, x)


def functional(fast, x):
    return torch.func.functional_call(fast, dict(fast.named_parameters()), (x,))


def functional_in_function(fast, x):
    return torch.compile(lambda x: functional(fast, x), backend="eager")(x)


def behind_a_break(fast, x):
    @torch.compile(backend="eager")
    def call(x):
        torch._dynamo.graph_break()
        return fast(x)

    return call(x)


def without_compiler(fast, x):
    return torch.compile(torch.compiler.disable(lambda x: fast(x)), backend="eager")(x)


def inner_modules(fast, x):
    """As ``encode`` of an autoencoder: a compiled function calls modules of the model, never the model."""

    @torch.compile(backend="eager", fullgraph=True)
    def call(x):
        for layer in fast.layers:
            x = x + layer(x)
        return fast.head(x)

    return call(x)


def in_a_plain_list(fast, x):
    """A module that is no submodule, so that nobody saves its weights twice."""

    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.held = [fast]

        def forward(self, x):
            return self.held[0](x)

    return torch.compile(Holder(), backend="eager", fullgraph=True)(x)


WAYS = (
    in_function, in_module, in_a_plain_list, itself, hooked, functional, functional_in_function, behind_a_break,
    without_compiler, inner_modules,
)  # fmt: skip


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@torch.no_grad()
def test_it_is_sparse_in_the_code_of_others(way):
    x, fast = tiny_input(), optimized()
    with s2o_compile.record() as recording:
        torch.testing.assert_close(way(fast, x), tiny_model()(x))
    assert [(call.site, call.path) for call in recording.calls] == [("layers.0", "s2o"), ("layers.1", "s2o")]
    assert [site.name for site in recording.report.sites if site.rewritten] == ["layers.0", "layers.1"]
    for status in (s2o_compile.status(fast), recording.status):
        assert (status.calls, status.graphs, status.sparse, status.rewritten) == (1, 1, 2, 2)


@pytest.mark.slow
@torch.no_grad()
def test_inductor_compiles_it():
    x, fast = tiny_input(), optimized()
    torch.testing.assert_close(torch.compile(lambda x: fast(x) + 1)(x), tiny_model()(x) + 1, atol=1e-5, rtol=1e-5)
    assert s2o_compile.status(fast).sparse == 2


@torch.no_grad()
def test_code_around_the_model_stays_as_it_is():
    """The dense original is compared with the copy, in one function."""
    dense, fast, x = tiny_model(), optimized(), tiny_input()
    with s2o_compile.record() as recording:
        difference = torch.compile(lambda x: dense(x) - fast(x), backend="eager", fullgraph=True)(x)
    assert difference.abs().max() < 1e-5
    assert len(recording.report.sites) == len(recording.calls) == 2


@torch.no_grad()
def test_each_model_has_its_own_settings():
    """Two models in one graph, and a graph that is S2O's itself: sites are named by the model that they are in."""
    marked = S2OConfig(min_seq_len=0, inner_backend="eager", dense_heads={"layers.1": (0, 1)})
    first, second, x = optimized(), s2o_compile.optimize(tiny_model(), marked), tiny_input()
    for options in ({"backend": "eager"}, {"backend": "s2o", "options": {"s2o.inner_backend": "eager"}}):
        torch.compiler.reset()
        with s2o_compile.record() as recording:
            torch.compile(lambda x: first(x) - second(x), **options)(x)
        paths = [(call.site, call.path) for call in recording.calls]
        assert sorted(paths) == [("layers.0", "s2o"), ("layers.0", "s2o"), ("layers.1", "dense"), ("layers.1", "s2o")]
        assert recording.status.calls == 1
    assert s2o_compile.status(first).sparse
    assert s2o_compile.status(second).sparse


def test_gradients_leave_it_dense_and_right():
    x, fast, dense = tiny_input().requires_grad_(), optimized(), tiny_model()
    compiled = torch.compile(lambda x: fast(x).sum(), backend="eager")
    said = warned(lambda: compiled(x).backward())
    assert "gradients are wanted" in said[0]
    (expected,) = torch.autograd.grad(dense(x).sum(), x)
    torch.testing.assert_close(x.grad, expected)


@torch.no_grad()
def test_the_callers_recompile_limit():
    """Dynamo gives the caller up and runs it in Python, which calls the model: that compiles itself."""
    fast = optimized()
    with torch._dynamo.config.patch(recompile_limit=1):
        call = torch.compile(lambda x: fast(x) + 1, backend="eager", dynamic=False)
        assert warned(lambda: [call(tiny_input(length)) for length in (150, 160)]) == []
    assert s2o_compile.status(fast).sparse == 4


class Methods(nn.Module):
    """Methods that attend in their own body, by torch's call or written out, and a leaf that does."""

    class Product(nn.Module):
        def forward(self, q, k, v):
            return torch.matmul(torch.softmax(q @ k.mT / 8**0.5, -1), v)

    def __init__(self):
        super().__init__()
        self.first, self.product = nn.Linear(32, 32), self.Product()

    def heads(self, x):
        return self.first(x).unflatten(-1, (4, 8)).transpose(1, 2)

    def attend(self, x):
        q = self.heads(x)
        return scaled_dot_product_attention(q, q, q, is_causal=True)

    def by_another_name(self, x):
        q = self.heads(x)
        return sdpa(q, q, q, is_causal=True)

    def written_out(self, x):
        q = self.heads(x)
        return (q @ q.mT / 8**0.5).softmax(-1) @ q

    def by_a_function(self, x):
        return attend_by_function(self.heads(x))

    def by_a_leaf(self, x):
        q = self.heads(x)
        return self.product(q, q, q)

    def generate(self, x):
        """Nothing of its own attends."""
        return self.attend(x) + self.by_a_leaf(x).softmax(-1)

    def forward(self, x):
        return self.attend(x)


def attend_by_function(q):
    return torch.einsum("bhqk,bhkd->bhqd", torch.softmax(torch.einsum("bhqd,bhkd->bhqk", q, q), -1), q)


METHODS = {
    **{"attend": 1, "by_another_name": 1, "written_out": 1, "by_a_function": 1, "by_a_leaf": 1},
    **{"generate": 2, "forward": 1},
}


@pytest.mark.parametrize("compiled", [False, True], ids=["called", "inlined"])
@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_methods_that_attend_themselves(method, compiled):
    torch.manual_seed(0)
    model, x = Methods(), tiny_input()
    fast = optimized(model)

    def call(x):
        return getattr(fast, method)(x)

    run = torch.compile(call, backend="eager", fullgraph=True) if compiled else call
    with s2o_compile.record() as recording:
        torch.testing.assert_close(run(x), getattr(model, method)(x), atol=1e-5, rtol=1e-5)
    assert [call.path for call in recording.calls] == ["s2o"] * METHODS[method]
    assert s2o_compile.status(fast).sparse == METHODS[method]
    torch.testing.assert_close(fast(x), model(x), atol=1e-5, rtol=1e-5)


def test_other_methods_stay_methods():
    fast = optimized(Methods())
    for name, is_own in {"attend": True, "generate": False, "heads": False}.items():
        assert (name in vars(type(fast))) is is_own
    assert fast.product is not Methods().product
    assert fast.attend.__name__ == "attend"
    assert fast.first is not None


def vmap(fast, x):
    return torch.vmap(fast)(x[None])


def gradient(fast, x):
    return torch.func.grad(lambda x: fast(x).sum())(x)


def counted(fast, x):
    with FlopCounterMode(display=False):
        return fast(x)


def eager(fast, x):
    with torch.compiler.set_stance("force_eager"):
        return torch.compile(lambda x: fast(x), backend="eager")(x)


@pytest.mark.parametrize("way", [vmap, gradient, counted, eager], ids=lambda way: way.__name__)
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@torch.no_grad()
def test_it_is_heard_where_nothing_is_compiled(way):
    fast, x = optimized(), tiny_input()
    said = warned(lambda: [way(fast, x) for _ in range(2)])
    assert len(said) == 1
    assert "these ran uncompiled: the model itself" in said[0]
    assert ("call the model outside" in said[0]) is (way is not eager)
    assert s2o_compile.status(fast).calls == 2
    fast(x)  # Dynamo has not given up on the model
    other = optimized()
    other(x)
    assert ("recompile_limit" in warned(lambda: way(other, x))[0]) is (way is eager)
    assert "rewritten attentions ran: 2 sparse" in str(s2o_compile.status(fast))


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
@pytest.mark.parametrize("wrapped", [False, True], ids=["itself", "wrapped"])
@torch.no_grad()
def test_export_is_refused(strict, wrapped):
    fast = optimized()
    with pytest.raises(TypeError, match=r"torch.export: expected an uncompiled module.*s2o_compile.export"):
        torch.export.export(nn.Sequential(fast) if wrapped else fast, (tiny_input(),), strict=strict)


@pytest.mark.filterwarnings("ignore:.*jit.*deprecated:DeprecationWarning")
@pytest.mark.parametrize("wrapped", [False, True], ids=["itself", "wrapped"])
def test_torchscript_is_refused(wrapped):
    model, x = optimized(), tiny_input()
    model = nn.Sequential(model) if wrapped else model
    with pytest.raises(TypeError, match=r"torch.jit.script: expected an uncompiled module.*s2o_compile.export"):
        torch.jit.script(model)
    for trace in (lambda: torch.jit.trace(model, (x,)), lambda: make_fx(model)(x)):
        with pytest.raises(RuntimeError, match="dynamo-optimized function"):
            trace()


def checkpointed(fast, x):
    return torch.utils.checkpoint.checkpoint(fast, x, use_reentrant=False)


def chosen(fast, x):
    return torch.cond(x.sum() > 0, lambda x: fast(x), lambda x: fast(x) * 2, (x,))


@pytest.mark.parametrize("way", [checkpointed, chosen], ids=lambda way: way.__name__)
@torch.no_grad()
def test_bodies_of_operators_are_left_as_they_are_and_said(way):
    fast, x = optimized(), tiny_input()
    said = warned(lambda: torch.compile(lambda x: way(fast, x), backend="eager")(x))
    assert "whose body is left as it is" in said[0]
    assert set(s2o_compile.status(fast).left_dense) != set()


class Layer(nn.Module):
    """Attention in a module that forward calls behind a break of the outer graph."""

    def __init__(self):
        super().__init__()
        self.attention = TinyAttention()

    def forward(self, x):
        torch._dynamo.graph_break()
        return self.attention(x)


@torch.no_grad()
def test_breaks_inside_the_model():
    model, x = Layer().eval(), tiny_input()
    fast = optimized(model)
    torch.testing.assert_close(torch.compile(lambda x: fast(x) + 1, backend="eager")(x), model(x) + 1)
    assert s2o_compile.status(fast).sparse == 1
