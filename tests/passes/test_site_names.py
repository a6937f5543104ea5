"""One name for a site: the path of its module in the model, under every entry point and behind every wrapper."""

import copy
import functools

import pytest
import torch
from torch import fx, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import s2o_compile
from s2o_compile import S2OConfig
from s2o_compile.capture import audit
from s2o_compile.kernels.support import torch_compile
from s2o_compile.passes import site_names
from tests.helpers.tiny import TinyAttention, TinyModel, tiny_input, tiny_model

pytestmark = [pytest.mark.usefixtures("fresh_dynamo")]
EXACT = S2OConfig(tau=0.0, min_seq_len=0, inner_backend="eager")
NAMES = ["model.layers.0", "model.layers.1"]


def passing_all(function):
    """A decorator that knows nothing of what it passes on, as transformers' own for arguments that it renames."""

    @functools.wraps(function)
    def passed(*args, **kwargs):
        return function(*args, **kwargs)

    return passed


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = tiny_model()

    def forward(self, x):
        return self.model(x)


class Decorated(Plain):
    forward = passing_all(passing_all(Plain.forward))


class DecoratedInside(Plain):
    def __init__(self):
        super().__init__()
        self.model.__class__ = type("Inside", (TinyModel,), {"forward": passing_all(TinyModel.forward)})


class OddlyNamed(Plain):
    def forward(this, tokens):
        return this.model(tokens)


def layer_by_layer(wrap):
    def make():
        model = Plain()
        model.model.layers[1] = wrap(model.model.layers[1])
        return model

    return make


MODELS = {
    "plain": Plain,
    "decorated": Decorated,
    "decorated inside": DecoratedInside,
    "without self": OddlyNamed,
    "data parallel": lambda: nn.DataParallel(Plain()),
    "checkpointed layer": layer_by_layer(checkpoint_wrapper),
    "compiled layer": layer_by_layer(functools.partial(torch.compile, backend="eager")),
}


def compiled(model):
    options = {"s2o.min_seq_len": 0, "s2o.inner_backend": "eager"}
    return torch.compile(model, backend="s2o", options=options)


def in_place(model, x):
    model = copy.copy(model)
    model.compile(backend="s2o", options={"s2o.inner_backend": "eager"})
    return model(x)


class Holder:
    def __init__(self, model):
        self.parts = {"generator": [model]}

    def run(self, *args):
        return self.parts["generator"][0](*args)


ENTRIES = {
    "compile": lambda model, x: compiled(model)(x),
    "compile in place": in_place,
    "optimize": lambda model, x: s2o_compile.optimize(model, EXACT)(x),
    "optimize twice": lambda model, x: s2o_compile.optimize(s2o_compile.optimize(model, EXACT), EXACT)(x),
    "function": lambda model, x: compiled(lambda y: model(y) + 1)(x),
    "argument": lambda model, x: compiled(lambda net, y: net(y))(model, x),
    "partial": lambda model, x: compiled(functools.partial(lambda net, y: net(y), model))(x),
    "method": lambda model, x: compiled(model.forward)(x),
    "holder": lambda model, x: compiled(Holder(model).run)(x),
    "without gradients": lambda model, x: compiled(torch.no_grad()(lambda y: model(y)))(x),
}


@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_every_entry_point_gives_a_site_the_same_name(kind):
    model, x = MODELS[kind]().eval(), tiny_input()
    found = {"explain": s2o_compile.explain(model, x, config=EXACT)}
    for entry, run in ENTRIES.items() if kind in ("plain", "decorated") else [*ENTRIES.items()][:3]:
        torch._dynamo.reset()
        with s2o_compile.record() as recording:
            run(model, x)
        found[entry] = recording.report
    assert {entry: [site.name for site in report.sites] for entry, report in found.items()} == dict.fromkeys(
        found, NAMES
    )
    assert not found["explain"].not_found
    assert [ran.path for ran in audit.take(model, (x,), {})] == NAMES
    assert {*NAMES} <= {*torch_compile.names_of_modules(model).values()}


@pytest.mark.parametrize("kind", ["decorated", "data parallel", "checkpointed layer"])
@torch.no_grad()
def test_exported_sites_have_the_same_names(kind):
    with s2o_compile.record() as recording:
        s2o_compile.export(MODELS[kind]().eval(), (tiny_input(),), config=EXACT)
    assert [site.name for site in recording.report.sites] == NAMES


@torch.no_grad()
def test_settings_by_site_hold_behind_a_decorator():
    """Names of ``explain`` mark heads of the compiled model; under other names the settings did nothing."""
    model, x = Decorated().eval(), tiny_input()
    names = [site.name for site in s2o_compile.explain(model, x, config=EXACT).sites]
    marked = S2OConfig(min_seq_len=0, inner_backend="eager", dense_heads=dict.fromkeys(names, (0, 1)))
    for run in (s2o_compile.optimize(model, marked), torch.compile(model, backend="s2o", options={
        "s2o.min_seq_len": 0, "s2o.inner_backend": "eager", "s2o.dense_heads": dict(marked.dense_heads)
    })):  # fmt: skip
        torch._dynamo.reset()
        with s2o_compile.record() as recording:
            run(x)
        assert [call.path for call in recording.calls] == ["dense", "dense"]


@torch.no_grad()
def test_several_models_in_one_function_keep_their_own_names():
    first, second = Plain().eval(), Decorated().eval()
    both = compiled(lambda x: first(x) + second(x))
    with s2o_compile.record() as recording:
        both(tiny_input())
    names = [site.name for site in recording.report.sites]
    assert names == [f"{model}.{name}" for model in ("first", "second") for name in NAMES]


@torch.no_grad()
def test_modules_in_a_plain_list_and_modules_with_two_names():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = self.again = TinyAttention()
            self.hidden = [TinyAttention()]

        def forward(self, x):
            return self.hidden[0](self.again(self.first(x)))

    with s2o_compile.record() as recording:
        compiled(Odd().eval())(tiny_input())
    assert [site.name for site in recording.report.sites] == ["first", "first#2", "hidden.0"]


@pytest.mark.parametrize("fast_path", [True, False], ids=["fused", "by parts"])
@torch.no_grad()
def test_a_fused_encoder_layer_is_named_as_one_that_runs_part_by_part(fast_path):
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    torch.backends.mha.set_fastpath_enabled(fast_path)
    try:
        report = s2o_compile.explain(model, tiny_input(), config=EXACT)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    assert [(site.name, site.found) for site in report.sites] == [(f"layers.{at}.self_attn", True) for at in range(2)]


class Stubborn:
    def __getattr__(self, name):
        raise RuntimeError(name)


@pytest.mark.parametrize("frame", [{}, {"L": {"args": [Stubborn()], "self": Stubborn()}}], ids=["unknown", "raising"])
def test_a_frame_that_tells_no_model_leaves_the_path_behind_the_variable(frame, monkeypatch):
    monkeypatch.setattr(site_names, "captured_frame", lambda: frame)
    graph = fx.Graph()
    for place, source in enumerate(("L['args'][0].layers.0", "L['self'].layers.1")):
        graph.placeholder(f"x{place}").meta["nn_module_stack"] = {str(place): (source, nn.Linear)}
    for node, path in zip(graph.nodes, ("0.layers.0", "layers.1"), strict=True):
        assert site_names.module_paths({node: ""}) == {node: path}
