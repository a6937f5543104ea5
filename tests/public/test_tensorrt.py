"""TensorRT around S2O: what torch-tensorrt is asked for, and what its own partitioner makes of our operators.

torch-tensorrt needs TensorRT's libraries to be imported. A stand-in records the calls here; where the package is
installed, the file of its partitioner is run for itself, without them.
"""

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

import s2o_compile
import s2o_compile.tensorrt
from s2o_compile import OptionError, S2OConfig, TensorRTUnavailableError, tensorrt
from tests.helpers.tiny import tiny_input, tiny_model

OPERATOR = "torch.ops.s2o.attention.default"
EXACT = {"s2o.tau": 0.0, "s2o.min_seq_len": 0, "s2o.inner_backend": "tensorrt"}


class Attention(torch.nn.Module):
    def forward(self, query, key, value):
        return s2o_compile.attention(query.sin(), key, value, causal=True, config=S2OConfig(min_seq_len=0)).cos()


TENSORS = tuple(torch.randn(1, 2, 150, 16, generator=torch.Generator().manual_seed(seed)) for seed in range(3))


@pytest.fixture
def recorded(monkeypatch):
    """What torch-tensorrt was called with; it runs the graphs as they are."""
    calls = []

    def compiled(program, **settings):
        calls.append((program, settings))
        return program.module()

    def backend(gm, example_inputs, *, options):
        calls.append((gm, options))
        return gm

    stand_in = ModuleType("torch_tensorrt")
    stand_in.dynamo = SimpleNamespace(compile=compiled)
    monkeypatch.setitem(sys.modules, "torch_tensorrt", stand_in)
    known = tensorrt.lookup_backend
    monkeypatch.setattr(tensorrt, "lookup_backend", lambda name: backend if name == "torch_tensorrt" else known(name))
    return calls


@torch.no_grad()
@pytest.mark.usefixtures("fresh_dynamo")
def test_as_inner_backend(recorded):
    options = EXACT | {"min_block_size": 2, "torch_executed_ops": {"torch.ops.aten.sin.default"}}
    model, x = tiny_model(), tiny_input()
    with s2o_compile.record() as recording:
        torch.testing.assert_close(torch.compile(model, backend="s2o", options=options)(x), model(x))
    assert [call.path for call in recording.calls] == ["s2o"] * 2
    ((_, settings),) = recorded
    assert settings == {"min_block_size": 2, "torch_executed_ops": {OPERATOR, "torch.ops.aten.sin.default"}}


@torch.no_grad()
@pytest.mark.usefixtures("fresh_dynamo")
def test_optimize_takes_its_settings_too(recorded):
    model, x = tiny_model(), tiny_input()
    config = S2OConfig(tau=0.0, min_seq_len=0, inner_backend="tensorrt")
    torch.testing.assert_close(s2o_compile.optimize(model, config, options={"min_block_size": 2})(x), model(x))
    assert recorded[0][1] == {"min_block_size": 2, "torch_executed_ops": {OPERATOR}}
    with pytest.raises(Exception, match="expected no mode"):
        s2o_compile.optimize(model, config, mode="max-autotune")(x)


@torch.no_grad()
def test_an_exported_program_is_compiled_around_our_operators(recorded):
    program = torch.export.export(Attention(), TENSORS)
    compiled = s2o_compile.tensorrt.compile(program, TENSORS, min_block_size=2)
    torch.testing.assert_close(compiled(*TENSORS), Attention()(*TENSORS))
    ((given, settings),) = recorded
    assert given is program
    assert settings.pop("arg_inputs") == TENSORS
    assert settings == {"kwarg_inputs": {}, "min_block_size": 2, "torch_executed_ops": {OPERATOR}}
    with pytest.raises(OptionError, match=r"Give them to s2o_compile\.export"):
        s2o_compile.tensorrt.compile(program, TENSORS, config=S2OConfig())


@torch.no_grad()
def test_a_module_is_exported_and_rewritten_first(recorded):
    model, x = tiny_model(), tiny_input()
    length = torch.export.Dim("length", min=128, max=4096)
    config = S2OConfig(tau=0.0, min_seq_len=0)
    compiled = s2o_compile.tensorrt.compile(model, (), {"x": x}, config=config, dynamic_shapes={"x": {1: length}})
    with s2o_compile.record() as recording:
        torch.testing.assert_close(compiled(x=tiny_input(300)), model(tiny_input(300)))
    assert [call.path for call in recording.calls] == ["s2o"] * 2
    assert recorded[0][1] == {"arg_inputs": (), "kwarg_inputs": {"x": x}, "torch_executed_ops": {OPERATOR}}


@pytest.mark.parametrize("missing", ["torch_tensorrt", "libnvinfer.so.11: cannot open shared object file"])
@pytest.mark.usefixtures("fresh_dynamo")
def test_what_is_missing_is_said(missing, monkeypatch, tmp_path):
    if missing == "torch_tensorrt":
        monkeypatch.setitem(sys.modules, "torch_tensorrt", None)
    else:  # the package is there, and raises as it does without TensorRT's libraries
        (tmp_path / "torch_tensorrt.py").write_text(f"raise Exception({missing!r})")
        monkeypatch.syspath_prepend(tmp_path)
    wanted = rf"got .*{missing}.*pip install 's2o-compile\[tensorrt\]'"
    with pytest.raises(TensorRTUnavailableError, match=wanted):
        s2o_compile.tensorrt.compile(Attention(), TENSORS)
    with pytest.raises(Exception, match=wanted), torch.no_grad():
        torch.compile(tiny_model(), backend="s2o", options=EXACT)(tiny_input())
    assert issubclass(TensorRTUnavailableError, ImportError)


def test_a_configuration_knows_the_name_without_the_package():
    config = S2OConfig(inner_backend="tensorrt")
    assert S2OConfig.from_json(config.to_json()) == config
    with pytest.raises(OptionError, match="Did you mean 'tensorrt'"):
        S2OConfig(inner_backend="tensorr")


PARTITIONER = """
import importlib, sys, types, torch
import s2o_compile, s2o_compile.tensorrt
from s2o_compile import S2OConfig

def stand_in(name, **content):  # for what the file imports and never runs here
    module = sys.modules[name] = types.ModuleType(name)
    vars(module).update(content)

class Converters:  # as if TensorRT had a converter for everything, ours included
    compilation_settings = None
    def __contains__(self, node): return node.op == "call_function"
    def get(self, node): return None

class Names:
    qualified_name_or_str = staticmethod(
        lambda target: target if isinstance(target, str) else torch.fx.node._get_qualified_name(target)
    )

stand_in("torch_tensorrt", __path__=[]), stand_in("torch_tensorrt.dynamo", __path__=[])
stand_in("torch_tensorrt.dynamo._defaults", MIN_BLOCK_SIZE=5, REQUIRE_FULL_COMPILATION=False)
stand_in("torch_tensorrt.dynamo.utils", COMPLEX_DTYPES=())
stand_in("torch_tensorrt.dynamo.conversion", __path__=[])
registry = {"DYNAMO_CONVERTERS": Converters(), "ConverterRegistry": Names}
stand_in("torch_tensorrt.dynamo.conversion._ConverterRegistry", **registry)
stand_in("torch_tensorrt.dynamo.partitioning", __path__=[sys.argv[1] + "/dynamo/partitioning"])
partitioner = importlib.import_module("torch_tensorrt.dynamo.partitioning._global_partitioner")

class Attention(torch.nn.Module):
    def forward(self, query, key, value):
        return s2o_compile.attention(query.sin(), key, value, causal=True, config=S2OConfig(min_seq_len=0)).cos()

inputs = tuple(torch.randn(1, 2, 150, 16) for _ in range(3))
gm = torch.export.export(Attention(), inputs).module()
settings = s2o_compile.tensorrt._with_our_operators({}, gm.graph)
cut, support = partitioner.partition(gm, min_block_size=1, torch_executed_ops=settings["torch_executed_ops"])
print(support.unsupported_operators)
engines = [name for name, _ in cut.named_children() if name.startswith("_run_on_acc_")]
print(len(engines), "engines;", sum("s2o" in str(node.target) for node in cut.graph.nodes), "between them")
torch.testing.assert_close(cut(*inputs), Attention()(*inputs))
"""


def test_torch_tensorrts_partitioner_leaves_our_operator_to_pytorch():
    package = importlib.util.find_spec("torch_tensorrt")
    if package is None:
        pytest.skip("torch-tensorrt is not installed: its partitioner cannot be read")
    command = [sys.executable, "-W", "ignore", "-c", PARTITIONER, str(Path(package.origin).parent)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["{'torch.ops.s2o.attention.default': 1}", "2 engines; 1 between them"]
