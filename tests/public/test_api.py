"""optimize, explain, attention: what users call."""

import dataclasses

import pytest
import torch
from torch import nn

import s2o_compile
from s2o_compile import InputError, OptionError, S2OConfig, UnknownSiteWarning
from s2o_compile.kernels.observe import observe_attention
from tests.helpers.tiny import tiny_input, tiny_model

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
EXACT = S2OConfig(tau=0.0, min_seq_len=0, inner_backend="eager")


def test_optimize_keeps_the_original_and_shares_its_weights():
    model = tiny_model()
    fast = s2o_compile.optimize(model, EXACT)
    assert isinstance(fast, type(model))
    assert type(fast).__qualname__ == type(model).__qualname__
    assert fast.state_dict().keys() == model.state_dict().keys()
    assert all(a is b for a, b in zip(fast.parameters(), model.parameters(), strict=True))
    x = tiny_input()
    with torch.no_grad(), s2o_compile.record() as recording:
        expected = model(x)
        assert not recording.calls
        torch.testing.assert_close(fast(x), expected)
        assert len(recording.calls) == 2


def test_optimize_with_mode_and_options():
    fast = s2o_compile.optimize(
        tiny_model(), S2OConfig(tau=0.0, min_seq_len=0), mode="reduce-overhead", options={"epilogue_fusion": True}
    )
    with torch.no_grad(), s2o_compile.record() as recording:
        torch.testing.assert_close(fast(tiny_input()), tiny_model()(tiny_input()))
    assert [call.path for call in recording.calls] == ["s2o", "s2o"]


def test_optimize_again_takes_the_new_configuration():
    fast = s2o_compile.optimize(
        s2o_compile.optimize(tiny_model(), EXACT), S2OConfig(min_seq_len=100_000, inner_backend="eager")
    )
    with torch.no_grad(), s2o_compile.record() as recording:
        fast(tiny_input())
    assert [call.path for call in recording.calls] == ["dense", "dense"]


@pytest.mark.parametrize(
    ("make", "kwargs", "error", "message"),
    [
        (lambda: torch.relu, {}, TypeError, "expected a torch.nn.Module, got builtin_function_or_method"),
        (lambda: torch.compile(tiny_model()), {}, TypeError, "Pass the original module"),
        (tiny_model, {"options": {"s2o.tau": 1.0}}, OptionError, r"Pass config=S2OConfig\(tau=...\)"),
        (tiny_model, {"options": {"max_autotun": 1}}, OptionError, "Did you mean 'max_autotune'"),
    ],
    ids=["no-module", "already-compiled", "s2o-option", "unknown-option"],
)
def test_optimize_refuses(make, kwargs, error, message):
    with pytest.raises(error, match=message):
        s2o_compile.optimize(make(), **kwargs)


def test_explain_reports_sites_and_density():
    with torch.no_grad():
        report = s2o_compile.explain(tiny_model(), tiny_input(), config=EXACT)
    assert [site.name for site in report.sites] == ["layers.0", "layers.1"]
    assert all(site.rewritten and site.mask == "causal" and not site.reason for site in report.sites)
    assert report.sites[0].query_shape == ("1", "4", "200", "8")
    assert report.sites[0].key_shape == ("1", "2", "200", "8")
    assert all(site.density is not None and site.density >= 1.0 for site in report.sites)
    text = str(report)
    assert "2 attention sites found, 2 rewritten, 0 left dense; mean density" in text
    assert "layers.1" in text


def test_reports_show_the_error_that_was_measured():
    """The same as by hand; an attention that left nothing out has none to speak of, one that ran dense none at all."""
    torch.manual_seed(0)
    model, x, loose = tiny_model(), tiny_input(1500) * 4, dataclasses.replace(EXACT, tau=2.0, segment_len=128)
    exact, seen = {}, {}

    def compare(call):
        seen[call.site], exact[call.site] = call.result.output, call.exact()

    fast = s2o_compile.optimize(model, loose)
    with torch.no_grad(), s2o_compile.record() as recording, observe_attention(compare):
        fast(x)
    assert len(recording.report.sites) == 2
    for site in recording.report.sites:
        true = ((seen[site.name] - exact[site.name]).norm() / exact[site.name].norm()).item()
        assert site.error == pytest.approx(true, rel=0.6)
        assert f"{site.error:.1%}" in str(recording.report)
    assert max(site.error for site in recording.report.sites) > 1e-3
    assert f"mean error {recording.report.error:.1%} (sampled)" in str(recording.report)
    with torch.no_grad():
        assert s2o_compile.explain(model, x, config=EXACT).error < 1e-5
        assert s2o_compile.explain(model, x).error is None


def test_a_budget_holds_in_an_optimized_model():
    torch.manual_seed(0)
    model, x = tiny_model(), tiny_input(1500) * 4
    fields = dataclasses.asdict(EXACT) | {"segment_len": 128}
    errors = {}
    for name, quality in {"tau": {"tau": 2.0}, "budget": {"tau": 0.5, "error": 0.01}}.items():
        fast = s2o_compile.optimize(model, S2OConfig(**{**fields, **quality}))
        with torch.no_grad(), s2o_compile.record() as recording:
            fast(x)
        errors[name] = [site.error for site in recording.report.sites]
    assert max(errors["budget"]) <= 0.01 < max(errors["tau"])


@pytest.mark.parametrize("kind", ["optimized", "twice", "compiled", "in place", "function"])
@torch.no_grad()
def test_explain_of_what_is_optimized_or_compiled_already(kind):
    model, x = tiny_model(), tiny_input()
    fast = s2o_compile.optimize(model, EXACT)
    given = {"optimized": fast, "twice": s2o_compile.optimize(fast, EXACT), "function": lambda y: fast(y)}
    given |= {"compiled": torch.compile(model, backend="eager"), "in place": tiny_model()}
    given["in place"].compile(backend="eager")
    report = s2o_compile.explain(given[kind], x, config=EXACT)
    assert [(site.name, site.found, site.rewritten) for site in report.sites] == [
        (f"layers.{at}", True, True) for at in range(2)
    ]


def test_explain_says_when_sites_ran_dense_for_being_short():
    with torch.no_grad():
        report = s2o_compile.explain(tiny_model(), tiny_input())
    assert [site.path for site in report.sites] == ["dense", "dense"]
    assert "ran dense (short)" in str(report)


def test_explain_names_the_reason():
    report = s2o_compile.explain(tiny_model(), tiny_input(), config=EXACT)
    assert not any(site.rewritten for site in report.sites)
    assert "torch.no_grad" in report.sites[0].reason
    assert "0 rewritten, 2 left dense" in str(report)


def test_explain_is_loud_when_nothing_is_found():
    report = s2o_compile.explain(nn.Linear(2, 2), torch.ones(1, 2))
    assert report.sites == ()
    assert str(report).startswith("NO ATTENTION FOUND")


@torch.no_grad()
def test_a_recording_has_attentions_that_were_compiled_before_and_direct_calls():
    fast, q = s2o_compile.optimize(tiny_model(), EXACT), torch.randn(1, 2, 200, 16)
    fast(tiny_input())
    with s2o_compile.record() as recording:
        fast(tiny_input())
        s2o_compile.attention(q, q, q, causal=True, config=EXACT)
        s2o_compile.attention(q[:, :, :9], q, q, config=EXACT)
    report = recording.report
    assert report.sites == ()
    assert [site.name for site in report.called] == ["layers.0", "layers.1", ""]
    assert [site.path for site in report.called] == ["s2o", "s2o", "dense"]
    assert report.called[0].density > 0
    text = str(report)
    assert "NO ATTENTION FOUND" not in text
    assert "called, ran dense (short)" in text
    assert "CALLED: 3 more ran S2O's operator" in text


def test_explain_names_graph_breaks():
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = tiny_model()

        def forward(self, x):
            y = self.inner(x)
            torch._dynamo.graph_break()
            return self.inner(x + y.mean())

    with torch.no_grad():
        report = s2o_compile.explain(Broken(), tiny_input(), config=EXACT)
    assert report.graphs == 2
    assert report.rewritten == 4
    assert "breaks:" in str(report)


def test_explain_can_be_called_often():
    """Captures of one call must not use up Dynamo's recompilation limit for the next."""
    model = tiny_model()
    with torch.no_grad():
        for _ in range(12):
            assert s2o_compile.explain(model, tiny_input(), config=EXACT).rewritten == 2


def test_attention_function_is_exact_at_tau_zero():
    q, k, v = (torch.randn(2, h, 300, 16, generator=torch.Generator().manual_seed(h)) for h in (4, 2, 2))
    out, lse = s2o_compile.attention(q, k, v, causal=True, return_lse=True, config=EXACT)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(out, expected)
    logits = (q @ k.repeat_interleave(2, 1).transpose(-1, -2) / 4).masked_fill(
        ~torch.ones(300, 300).bool().tril(), -torch.inf
    )
    torch.testing.assert_close(lse, logits.logsumexp(-1))


@pytest.mark.filterwarnings("ignore::s2o_compile.DenseGradientWarning")
def test_attention_function_is_differentiable_and_dense():
    q, k, v = (torch.randn(1, 2, 200, 16, requires_grad=True) for _ in range(3))
    with s2o_compile.record() as recording:
        s2o_compile.attention(q, k, v, causal=True, config=EXACT).sum().backward()
    ours = q.grad.clone()
    q.grad = None
    torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward()
    torch.testing.assert_close(ours, q.grad)
    assert not recording.calls
    with pytest.raises(s2o_compile.InputError, match=r"Use torch\.no_grad"):
        s2o_compile.attention(q, k, v, return_lse=True, config=EXACT)


def test_attention_function_under_vmap():
    q, k, v = (torch.randn(3, 2, 2, 150, 16) for _ in range(3))
    mapped = torch.vmap(lambda q, k, v: s2o_compile.attention(q, k, v, causal=True, config=EXACT))(q, k, v)
    looped = torch.stack([s2o_compile.attention(*x, causal=True, config=EXACT) for x in zip(q, k, v, strict=True)])
    torch.testing.assert_close(mapped, looped)


def test_attention_function_in_a_compiled_function_breaks_no_graph():
    torch._dynamo.reset()
    q, k, v = (torch.randn(1, h, 40, 16) for h in (4, 2, 2))
    compiled = torch.compile(
        lambda q, k, v: s2o_compile.attention(q, k, v, causal=True), fullgraph=True, backend="eager"
    )
    torch.testing.assert_close(compiled(q, k, v), s2o_compile.attention(q, k, v, causal=True))


def bare(kind):
    """A module of torch.nn itself, its inputs and options."""
    x = torch.randn(2, 140, 32)
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    return {
        "MultiheadAttention": (nn.MultiheadAttention(32, 4, batch_first=True), (x, x, x), {"need_weights": False}),
        "TransformerEncoder": (nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), (x,), {}),
        "Transformer": (nn.Transformer(32, 4, 1, 1, 64, batch_first=True), (x, x), {}),
    }[kind]


@pytest.mark.parametrize("kind", ["MultiheadAttention", "TransformerEncoder", "Transformer"])
@pytest.mark.filterwarnings("ignore:.*nested_tensor.*:UserWarning")
@torch.no_grad()
def test_a_bare_module_of_torch_is_optimized(kind):
    model, inputs, options = bare(kind)
    expected = model.eval()(*inputs, **options)
    fast = s2o_compile.optimize(model, EXACT)
    with s2o_compile.record() as recording:
        actual = fast(*inputs, **options)
    assert recording.calls
    assert recording.report.rewritten == len(recording.report.sites)
    if kind == "MultiheadAttention":
        actual, expected = actual[0], expected[0]
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


class TestDenseHeads:
    CONFIG = S2OConfig(tau=4.0, min_seq_len=0, segment_len=128, dense_heads={"layers.1": [1], "layers.7": (0,)})

    @torch.no_grad()
    def test_marks_reach_the_sites_that_they_name(self):
        report = s2o_compile.explain(tiny_model(), tiny_input(1000), config=self.CONFIG)
        assert [site.dense_heads for site in report.sites] == [(), (1,)]
        assert report.sites[1].density > report.sites[0].density
        assert "rewritten, kv heads 1 dense" in str(report)

    @torch.no_grad()
    def test_a_name_of_no_site_is_in_the_report(self):
        report = s2o_compile.explain(tiny_model(), tiny_input(), config=self.CONFIG)
        assert report.unknown_sites == ("layers.7",)
        assert "NO SUCH SITE" in str(report)
        assert "layers.7" in str(report)

    @torch.no_grad()
    def test_a_name_of_no_site_is_warned_of(self):
        fast = s2o_compile.optimize(tiny_model(), dataclasses.replace(self.CONFIG, inner_backend="eager"))
        said = "dense_heads: unknown site 'layers.7': expected one of layers.0, layers.1. Did you mean 'layers.[01]'"
        with pytest.warns(UnknownSiteWarning, match=said):
            fast(tiny_input())

    @torch.no_grad()
    def test_a_head_that_the_site_does_not_have(self):
        config = S2OConfig(inner_backend="eager", dense_heads={"layers.0": (2,)})
        with pytest.raises(InputError, match=r"dense_heads: expected key/value heads from 0 to 1, got .2."):
            s2o_compile.optimize(tiny_model(), config)(tiny_input())

    @torch.no_grad()
    def test_compiled_with_every_head_marked_it_is_the_model_itself(self):
        model, x = tiny_model(), tiny_input(600)
        marks = {"layers.0": (0, 1), "layers.1": (1, 0)}
        fast = torch.compile(
            model, backend="s2o", options={"s2o.min_seq_len": 0, "s2o.tau": 4.0, "s2o.dense_heads": marks}
        )
        with s2o_compile.record() as recording:
            torch.testing.assert_close(fast(x), model(x))
        assert [call.path for call in recording.calls] == ["dense"] * 2
