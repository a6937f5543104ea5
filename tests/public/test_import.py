"""``import s2o_compile``: what it loads, and what it loads on first use."""

import subprocess
import sys
from pathlib import Path

import pytest

import s2o_compile

ROOT = Path(__file__).parents[2]
EAGER = [
    "api",
    "backend",
    "by_site",
    "capture",
    "capture.attending",
    "capture.audit",
    "capture.compiled_copy",
    "capture.entry",
    "capture.generation_masks",
    "capture.inlined",
    "capture.one_at_a_time",
    "capture.optimized_class",
    "capture.rebound",
    "config",
    "errors",
    "functional",
    "planning",
    "recording",
    "report",
    "rewriting",
]
MOST_MODULES = 128
"""Modules of this project that the import loads, kernels and passes included."""
LATER = (
    "aot",
    "cli",
    "diffusers",
    "kernels.impl.aot",
    "kernels.impl.flex.sample",
    "kernels.impl.flex.user_mods",
    "kernels.support.torch_inductor",
    "onnx",
    "passes.frontends",
    "passes.masks.prover",
    "passes.pipeline",
    "quality",
    "serving",
    "speed",
    "tensorrt",
    "transformers",
    "varlen",
    "kernels.calls.varlen",
    "vllm",
)
LAZY = (
    *("Benchmark", "Evaluation", "Package", "PrefillCache", "TaskScores", "attention_paged", "attention_varlen"),
    *("bench", "calibrate", "evaluate", "evaluate_tasks", "export", "package"),
)


def run(code, *flags):
    """The words that a fresh process prints."""
    command = [sys.executable, *flags, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    return done.stdout.split()


@pytest.fixture(scope="module")
def loaded():
    return run("import sys, s2o_compile; print(*sys.modules)")


def test_the_import_loads_what_every_call_needs(loaded):
    ours = [name.removeprefix("s2o_compile.") for name in loaded if name.startswith("s2o_compile.")]
    public = [name for name in ours if name.partition(".")[0] not in ("kernels", "passes")]
    assert sorted(public) == sorted(EAGER)
    assert len(ours) <= MOST_MODULES


@pytest.mark.parametrize("name", LATER)
def test_the_rest_is_loaded_on_first_use(loaded, name):
    assert not [module for module in loaded if f"{module}.".startswith(f"s2o_compile.{name}.")]


def test_the_import_needs_no_other_package(loaded):
    tops = {name.partition(".")[0] for name in loaded}
    assert not tops & {"transformers", "diffusers", "onnx", "matplotlib", "rich", "typer", "torch_tensorrt"}
    assert not tops & {"vllm", "sglang"}


# Dynamo alone takes longer to import than all of torch without it, and brings the rest of these along.
SLOW_TO_IMPORT = {"torch._dynamo", "torch._inductor", "torch.distributed.tensor", "torch.onnx", "sympy"}


def test_the_import_waits_for_no_compiler(loaded):
    assert not {name for name in loaded if name.startswith(tuple(SLOW_TO_IMPORT))}


def test_a_plain_call_waits_for_no_compiler():
    """The import changes no handler of Ctrl-C, either, but in the command line's own process."""
    code = """
import signal
before = signal.getsignal(signal.SIGINT)
import sys, torch, s2o_compile
assert signal.getsignal(signal.SIGINT) is before
q, k, v = torch.randn(3, 1, 2, 300, 16).unbind(0)
s2o_compile.attention(q, k, v, causal=True, config=s2o_compile.S2OConfig(tau=0.5, min_seq_len=0))
print(*sys.modules)
"""
    assert not SLOW_TO_IMPORT & set(run(code))


def test_names_that_are_loaded_later_are_there():
    words = run(
        "import s2o_compile as s; before = set(dir(s)); "
        "import s2o_compile.aot.export, s2o_compile.aot.package, s2o_compile.quality.evaluate; "
        "from s2o_compile import export, package, evaluate, calibrate, Package, Evaluation; "
        "print(*sorted(before & set(s.__all__)), '|', export.__module__, package.__module__, type(export).__name__, "
        "s.export is export, callable(evaluate), callable(calibrate))"
    )
    cut = words.index("|")
    assert words[:cut] == sorted(s2o_compile.__all__)
    assert words[cut + 1 :] == ["s2o_compile.aot.export", "s2o_compile.aot.package", "function", "True", "True", "True"]


def test_no_name_is_invented():
    assert set(LAZY) == set(s2o_compile._LOADED_ON_FIRST_USE) <= set(s2o_compile.__all__)
    with pytest.raises(AttributeError, match="module 's2o_compile' has no attribute 'exprot'"):
        _ = s2o_compile.exprot


@pytest.mark.parametrize(
    ("version", "warned"),
    [
        ("2.16.0", 1),
        pytest.param("3.0.0a1+cu999", 1, marks=pytest.mark.slow),
        pytest.param("2.10.2", 1, marks=pytest.mark.slow),
        ("2.15.7+cpu", 0),
    ],
)
def test_an_untested_torch_warns_once_and_works(version, warned):
    """Under `-W error` this warning would stop the import, so that a program can refuse an untested torch."""
    words = run(
        f"""
import warnings, torch
torch.__version__ = torch.torch_version.TorchVersion({version!r})
with warnings.catch_warnings(record=True) as found:
    warnings.simplefilter("always")
    import s2o_compile
    import s2o_compile.backend
ours = [x for x in found if issubclass(x.category, s2o_compile.UntestedTorchWarning)]
assert all("expected torch 2.11 to 2.15, got {version}" in str(x.message) for x in ours)
q, k, v = torch.randn(3, 1, 2, 256, 16).unbind(0)
exact = s2o_compile.S2OConfig(tau=0.0, min_seq_len=0)
expected = torch.nn.functional.scaled_dot_product_attention(q, k, v)
torch.testing.assert_close(s2o_compile.attention(q, k, v, config=exact), expected)
print(len(ours), issubclass(s2o_compile.UntestedTorchWarning, UserWarning))
"""
    )
    assert words == [str(warned), "True"]
