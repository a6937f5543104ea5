"""torch.compile(model, backend="s2o") in all the ways torch.compile is used."""

import subprocess
import sys
import uuid

import pytest
import torch

from s2o_compile import NothingRewrittenWarning, OptionError, S2OConfig, backend, record
from s2o_compile.backend import s2o, split_options
from tests.helpers.tiny import tiny_input, tiny_model

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
EXACT = {"s2o.tau": 0.0, "s2o.min_seq_len": 0}


def test_entry_point_needs_no_import():
    code = (
        "import torch, sys; m = torch.nn.Linear(2, 2); f = torch.compile(m, backend='s2o', options={'s2o.tau': 0.5}); "
        "f(torch.ones(1, 2)); assert 's2o_compile' in sys.modules; "
        "assert not {'transformers', 'diffusers', 'onnxscript', 'torch_tensorrt'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


@pytest.mark.parametrize(
    ("kwargs", "ran"),
    [
        pytest.param({"options": EXACT}, 2, id="options"),
        pytest.param({"options": EXACT | {"max_autotune": False, "epilogue-fusion": True}}, 2, id="inductor-options"),
        pytest.param({"options": EXACT, "fullgraph": True}, 2, id="fullgraph"),
        pytest.param({"options": EXACT, "dynamic": True}, 2, id="dynamic"),
        pytest.param({"options": EXACT | {"s2o.inner_backend": "eager"}}, 2, id="inner-eager"),
    ],
)
def test_compiled_model_equals_eager(kwargs, ran):
    model, x = tiny_model(), tiny_input()
    with torch.no_grad(), record() as recording:
        compiled = torch.compile(model, backend="s2o", **kwargs)(x)
        torch.testing.assert_close(compiled, model(x))
    assert [call.path for call in recording.calls] == ["s2o"] * ran
    assert recording.report.rewritten == ran


@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune-no-cudagraphs"])
def test_mode(mode):
    model, x = tiny_model(), tiny_input()
    with torch.no_grad(), record() as recording:
        torch.testing.assert_close(torch.compile(model, backend="s2o", mode=mode)(x), model(x))
    assert [call.path for call in recording.calls] == ["dense"] * 2  # 200 tokens are few
    assert recording.report.rewritten == 2


def test_module_compile():
    model, x = tiny_model(), tiny_input()
    with torch.no_grad():
        expected = model(x)
        model.compile(backend="s2o", options=EXACT)
        with record() as recording:
            torch.testing.assert_close(model(x), expected)
    assert recording.report.rewritten == 2


def test_one_graph_serves_all_lengths():
    model = tiny_model()
    compiled = torch.compile(model, backend="s2o", options=EXACT, dynamic=True)
    with torch.no_grad(), record() as recording:
        for length in (150, 200, 333):
            torch.testing.assert_close(compiled(tiny_input(length)), model(tiny_input(length)))
    assert len(recording.graphs) == 1


def test_training_stays_dense_says_so_and_gives_the_same_gradients():
    with pytest.warns(NothingRewrittenWarning, match="torch.no_grad"):
        torch.compile(tiny_model().train(), backend="s2o", options=EXACT)(tiny_input())
    model, x = tiny_model().train().double(), tiny_input().double()  # sums of gradients round visibly in float32
    model(x).sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    with pytest.warns(NothingRewrittenWarning), record() as recording:
        torch.compile(model, backend="s2o", options=EXACT)(x).sum().backward()
    assert recording.report.rewritten == 0
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name])


def test_fx_graph_cache_hits():
    model, x = tiny_model(), tiny_input()

    def hits():
        counters = torch._dynamo.utils.counters
        return counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"]

    with torch.no_grad(), torch._inductor.config.patch(fx_graph_cache=True):
        for _ in range(2):
            torch._dynamo.reset()
            before = hits()
            torch.testing.assert_close(torch.compile(model, backend="s2o", options=EXACT)(x), model(x))
    assert hits() > before  # the second compilation found the first one's code


def test_code_of_another_schema_is_not_found_in_a_cache(monkeypatch):
    """Cached code calls the operators as they were: a version with other arguments must compile anew."""
    model, x = tiny_model(), tiny_input()

    def hits():
        counters = torch._dynamo.utils.counters
        return counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"]

    with torch.no_grad(), torch._inductor.config.patch(fx_graph_cache=True):
        torch.compile(model, backend="s2o", options=EXACT)(x)
        torch._dynamo.reset()
        monkeypatch.setattr(backend, "_schemas", lambda: uuid.uuid4().hex)  # of no earlier run either
        before = hits()
        torch.compile(model, backend="s2o", options=EXACT)(x)
    assert hits() == before


def test_cached_graph_honours_another_tau():
    """tau is part of the graph, so a cache never serves one configuration's code to another."""
    model, x = tiny_model(), tiny_input(1500)
    density = []
    for tau in (0.0, 1e6):
        torch._dynamo.reset()
        with torch.no_grad(), record() as recording:
            torch.compile(model, backend="s2o", options={"s2o.tau": tau, "s2o.min_seq_len": 0})(x)
        density.append(recording.report.density)
    assert density[1] < density[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"s2o.taw": 1.0}, r"unknown option 's2o.taw'.*Did you mean 's2o.tau'"),
        ({"max_autotun": True}, r"unknown option 'max_autotun'.*Did you mean 'max_autotune'"),
        ({"s2o.tau": -1.0}, "tau: expected a finite number >= 0, got -1.0"),
        ({"s2o.inner_backend": "eager", "max_autotune": True}, "expected no mode and no Inductor options"),
    ],
)
def test_wrong_options_are_errors(options, message):
    with pytest.raises(Exception, match=message), torch.no_grad():
        torch.compile(tiny_model(), backend="s2o", options=options)(tiny_input())


def test_split_options():
    config, inductor = split_options({"s2o.tau": 0.25, "epilogue-fusion": False})
    assert config == S2OConfig(tau=0.25)
    assert inductor == {"epilogue_fusion": False}
    with pytest.raises(OptionError):
        split_options({"nonsense": 1})


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)])
def test_autocast(dtype):
    model, x = tiny_model(), tiny_input()
    with torch.no_grad(), torch.autocast("cpu", dtype=dtype):
        expected = model(x)
        actual = torch.compile(model, backend=s2o, options=EXACT)(x)
    exact = model.double()(x.double())
    limit = 2 * (expected - exact).abs().max()
    assert (actual - exact).abs().max() <= limit
