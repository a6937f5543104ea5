"""Derivatives by every means that torch has, through every way in: those of dense attention, or an error, never zeros.

The configuration leaves keys out, so that a value or a derivative of sparse attention would show.
"""

import pytest
import torch
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks
from torch.func import grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

import s2o_compile
from s2o_compile.errors import InputError
from s2o_compile.kernels.support.errors import NoGradientError

pytestmark = pytest.mark.filterwarnings("ignore::s2o_compile.DenseGradientWarning")
LENGTH = 640
SPARSE = s2o_compile.S2OConfig(tau=4.0, min_seq_len=0, segment_len=128, inner_backend="eager")
MASK = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
Q, K, V, T = (torch.randn(1, 2, LENGTH, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(4))
SINKS = torch.tensor([0.5, -1.0])


def dense(q):
    return scaled_dot_product_attention(q, K, V, is_causal=True)


def with_sinks(q):
    logits = (q @ K.mT / 8**0.5).masked_fill(~MASK, -torch.inf)
    sinks = SINKS[None, :, None, None].expand(*logits.shape[:3], 1)
    return torch.cat([logits, sinks], -1).softmax(-1)[..., :LENGTH] @ V


class Attend(torch.nn.Module):
    def forward(self, q):
        return dense(q)


PLAN = s2o_compile.plan(Q, K, V, causal=True, config=SPARSE)
EAGER = {
    "attention": lambda q: s2o_compile.attention(q, K, V, causal=True, config=SPARSE),
    "default": lambda q: s2o_compile.attention(q, K, V, causal=True),
    "masked": lambda q: s2o_compile.attention(q, K, V, attn_mask=MASK, config=SPARSE),
    "sinks": lambda q: s2o_compile.attention(q, K, V, sinks=SINKS, causal=True, config=SPARSE),
    "plan": lambda q: s2o_compile.attention(q, K, V, causal=True, config=SPARSE, plan=PLAN),
}


def loss(f):
    return lambda q: f(q).square().sum()


def by_duals(f):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(Q, T))).tangent


def by_backward(run):
    def gradient(f):
        q = Q.clone().requires_grad_()
        with torch.enable_grad():
            output = run(f, q)
            output.square().sum().backward()
        return torch.stack([output.detach(), q.grad])

    return gradient


class Again(torch.autograd.Function):
    """As reversible layers do: the forward keeps nothing, and the backward runs it again."""

    @staticmethod
    def forward(ctx, f, q):
        ctx.f = f
        ctx.save_for_backward(q)
        return f(q)

    @staticmethod
    def backward(ctx, gradient):
        q = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            output = ctx.f(q)
        return None, *torch.autograd.grad(output, q, gradient)


def hooked(f, q):
    with saved_tensors_hooks(lambda x: x.clone(), lambda x: x):
        return f(q)


def few(f):
    """A function of two numbers, for whole Jacobians."""
    return lambda x: f(Q + x[0] * T + x[1] * T.flip(0, 1, 2))


TWO, BOTH = torch.tensor([0.1, 0.2]), torch.stack([Q, T])
BACKWARD = {
    "backward": by_backward(lambda f, q: f(q)),
    "checkpoint": by_backward(lambda f, q: checkpoint(f, q, use_reentrant=False)),
    "reentrant": by_backward(lambda f, q: checkpoint(f, q, use_reentrant=True)),
    "function": by_backward(Again.apply),
    "hooks": by_backward(hooked),
}
TRANSFORMS = {
    "jvp": lambda f: jvp(f, (Q,), (T,))[1],
    "duals": by_duals,
    "linearize": lambda f: linearize(f, Q)[1](T),
    "jacfwd": lambda f: jacfwd(few(f))(TWO),
    "grad": lambda f: grad(loss(f))(Q),
    "vjp": lambda f: vjp(f, Q)[1](T)[0],
    "jacrev": lambda f: jacrev(lambda x: few(f)(x)[0, :, -1, :2])(TWO),
    "hessian": lambda f: hessian(lambda x: loss(few(f))(x))(TWO),
    "vmap_grad": lambda f: vmap(grad(loss(f)))(BOTH),
    "grad_vmap": lambda f: grad(lambda both: vmap(f)(both).square().sum())(BOTH),
    "vmap_jvp": lambda f: vmap(lambda q: jvp(f, (q,), (T,))[1])(BOTH),
    "jvp_vmap": lambda f: jvp(vmap(f), (BOTH,), (BOTH.flip(0),))[1],
    "jvp_grad": lambda f: jvp(grad(loss(f)), (Q,), (T,))[1],
    "grad_jvp": lambda f: grad(lambda q: jvp(f, (q,), (T,))[1].square().sum())(Q),
    "grad_grad": lambda f: grad(lambda q: grad(loss(f))(q).square().sum())(Q),
}


def expected(transform, f=dense):
    with sdpa_kernel(SDPBackend.MATH):  # the only kernel of SDPA with every derivative
        return transform(f)


def assert_like_dense(transform, f, reference=dense):
    wanted = expected(transform, reference)
    assert wanted.abs().max() > 0
    torch.testing.assert_close(transform(f), wanted, atol=1e-5 * wanted.abs().max().item(), rtol=1e-4)


REFERENCES = {"sinks": with_sinks}
FEW = ("jvp", "duals", "grad_vmap", "jvp_grad")
PAIRS = [("attention", name) for name in TRANSFORMS] + [(entry, name) for entry in EAGER for name in FEW]


@pytest.mark.filterwarnings("ignore:There is a performance drop", "ignore:Attempted to insert a get_attr")
@pytest.mark.parametrize(("entry", "transform"), dict.fromkeys(PAIRS))
def test_transforms(entry, transform):
    assert_like_dense(TRANSFORMS[transform], EAGER[entry], REFERENCES.get(entry, dense))


@pytest.mark.parametrize("transform", ["jvp", "duals", "grad", "grad_vmap"])
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_no_grad_outside_switches_no_transform_off(transform):
    with torch.no_grad():
        assert_like_dense(TRANSFORMS[transform], EAGER["attention"])


@pytest.mark.parametrize("transform", BACKWARD)
@pytest.mark.parametrize("entry", EAGER)
def test_value_and_gradient(entry, transform):
    assert_like_dense(BACKWARD[transform], EAGER[entry], REFERENCES.get(entry, dense))


OPERATORS = {
    "attention": lambda q: torch.ops.s2o.attention(q, K, V, causal=True, min_seq_len=0, segment_len=128)[0],
    "masked": lambda q: torch.ops.s2o.masked_attention(q, K, V, MASK, min_seq_len=0, segment_len=128)[0],
}


@pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS)
class TestOperators:
    @pytest.mark.parametrize("transform", [*FEW, "grad", "vmap_jvp"])
    @pytest.mark.filterwarnings("ignore:There is a performance drop")
    def test_transforms(self, operator, transform):
        assert_like_dense(TRANSFORMS[transform], operator)

    def test_a_backward_of_plain_autograd_may_be_a_forgotten_no_grad(self, operator):
        with pytest.raises(NoGradientError):
            BACKWARD["backward"](operator)


@pytest.mark.parametrize("transform", ["jvp", "duals", "grad"])
def test_a_log_sum_exp_is_refused(transform):
    for call in (s2o_compile.attention, torch.ops.s2o.attention):
        with pytest.raises(InputError, match=r"return_lse: expected no gradients, no tangents .* leave return_lse out"):
            TRANSFORMS[transform](lambda q, call=call: call(q, K, V, causal=True, return_lse=True)[1])


def test_a_plan_drops_tangents():
    def ranked(q):
        return s2o_compile.plan(q, K, V, causal=True, config=SPARSE).key_index

    with forward_ad.dual_level():
        assert torch.equal(ranked(forward_ad.make_dual(Q, T)), ranked(Q))


def test_nothing_changes_outside():
    """Neither a level that was left nor an inference mode makes a call dense."""
    jvp(EAGER["attention"], (Q,), (T,))
    for quiet in (torch.no_grad, torch.inference_mode):
        with quiet():
            assert (EAGER["attention"](Q) - dense(Q)).norm() > 0.05 * dense(Q).norm()


COMPILED = {
    "optimize": lambda config: s2o_compile.optimize(Attend(), config),
    "backend": lambda config: torch.compile(
        Attend(), backend="s2o", options={f"s2o.{name}": getattr(config, name) for name in ("tau", "min_seq_len")}
    ),
}


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.filterwarnings("ignore::s2o_compile.NothingRewrittenWarning")
class TestCompiled:
    @pytest.mark.parametrize("grad_mode", [torch.enable_grad, torch.no_grad])
    @pytest.mark.parametrize("entry", COMPILED)
    def test_duals(self, entry, grad_mode):
        compiled = COMPILED[entry](SPARSE)
        with grad_mode():
            before = compiled(Q)
            assert_like_dense(by_duals, compiled)
            assert torch.equal(compiled(Q), before)

    def test_compiled_while_a_level_is_open(self):
        compiled = COMPILED["optimize"](SPARSE)
        with torch.no_grad():
            assert_like_dense(by_duals, compiled)
            assert torch.equal(compiled(Q), EAGER["attention"](Q))

    @pytest.mark.parametrize("transform", BACKWARD)
    def test_value_and_gradient(self, transform):
        assert_like_dense(BACKWARD[transform], COMPILED["optimize"](SPARSE))

    @pytest.mark.parametrize("transform", ["grad", "vjp", "vmap_grad", "grad_vmap"])
    @pytest.mark.filterwarnings("ignore:There is a performance drop")
    def test_transforms_of_compiled_functions(self, transform):
        assert_like_dense(TRANSFORMS[transform], COMPILED["optimize"](SPARSE))

    @pytest.mark.parametrize("transform", ["jvp", "duals", "grad", "grad_vmap"])
    @pytest.mark.parametrize("inner", ["eager", "aot_eager"])
    def test_transforms_inside(self, transform, inner):
        """Dynamo traces them: the graph holds levels, duals and the attention."""
        f = TRANSFORMS[transform]
        options = {"s2o.min_seq_len": 0, "s2o.inner_backend": inner}
        wanted = expected(f)
        attention = torch.compile(lambda: f(EAGER["attention"]), backend="s2o", options=options)
        with torch.no_grad():
            torch.testing.assert_close(attention(), wanted, atol=1e-4, rtol=1e-4)

    def test_the_pass_leaves_attention_under_tangents(self):
        def written_out(q):
            return (q @ K.mT / 8**0.5).masked_fill(~MASK, -torch.inf).softmax(-1) @ V

        report = s2o_compile.explain(lambda: jvp(written_out, (Q,), (T,)), config=SPARSE)
        assert "takes derivatives in forward mode" in report.sites[0].reason
