"""Compiled kernels that are launched directly: as triton itself launches them, and not where that is not known."""

import inspect
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("triton")

import triton
from triton.compiler import CompiledKernel
from triton.runtime import JITFunction

from s2o_compile.kernels.impl.triton import direct


def test_triton_launches_a_compiled_kernel_as_we_do():
    assert direct.is_tested(), f"look at JITFunction.run of triton {triton.__version__}, then widen the tested range"
    run = " ".join(inspect.getsource(JITFunction.run).split())
    ours = "kernel.run(grid_0, grid_1, grid_2, stream, kernel.function, kernel.packed_metadata, launch_metadata,"
    assert ours in run
    assert "knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook, *bound_args.values())" in run
    assert isinstance(CompiledKernel.run, property)
    assert all(f"self.{name}" in inspect.getsource(CompiledKernel) for name in ("function", "packed_metadata"))


def test_every_launch_can_be_written_down():
    """A launch by ``kernel[grid](...)`` would run on stand-ins without memory."""
    sources = {path.name: path.read_text() for path in Path(direct.__file__).parent.glob("*.py")}
    assert len(sources) > 10
    launches = re.compile(r"\w*kernel\[.*\]\(")
    assert {name for name, text in sources.items() if launches.search(text)} == {"direct.py", "listing.py", "tile.py"}


def test_all_arguments_are_handed_over():
    made = []
    compiled = SimpleNamespace(run=lambda *given: made.append(given), function=7, packed_metadata="m")
    launch = direct.launcher(compiled, (3, 2))
    launch(99, [1, 2.0, True])
    assert made == [(3, 2, 1, 99, 7, "m", None, None, None, 1, 2.0, True)]


@pytest.mark.parametrize("scratch", [0, 8])
def test_a_kernel_of_triton_3_6_without_scratch_is_launched_by_its_c_function(scratch, monkeypatch):
    made = []
    monkeypatch.setattr(triton, "__version__", "3.6.0")

    class Run(SimpleNamespace):
        def __call__(self, *given):
            made.append(("python", *given))

    run = Run(global_scratch_size=scratch, profile_scratch_size=0, launch_cooperative_grid=False, launch_pdl=True)
    run.launch = lambda *given: made.append(given)
    direct.launcher(SimpleNamespace(run=run, function=7, packed_metadata="m"), (3,))(99, [1, 2.0])
    bare = (3, 1, 1, 99, 7, False, True, None, None, "m", None, None, None, 1, 2.0)
    assert made == [bare if scratch == 0 else ("python", 3, 1, 1, 99, 7, "m", None, None, None, 1, 2.0)]


@pytest.mark.skipif(not triton.__version__.startswith("3.6."), reason="of triton 3.6")
def test_the_c_function_of_triton_3_6_takes_these_arguments():
    from triton.backends.nvidia.driver import CudaLauncher

    source = " ".join(inspect.getsource(CudaLauncher.__call__).split())
    ours = "self.launch(gridX, gridY, gridZ, stream, function, self.launch_cooperative_grid, self.launch_pdl,"
    assert f"{ours} global_scratch, profile_scratch, *args)" in source


@pytest.mark.parametrize("version", ["3.5.1", "3.10.0", "4.0"])
def test_a_triton_that_is_not_known_launches_by_itself(version, monkeypatch):
    monkeypatch.setattr(triton, "__version__", version)
    compiled = SimpleNamespace(run=print, function=7, packed_metadata="m")
    assert direct.launcher(compiled, (1,)) is None


@pytest.mark.parametrize("missing", ["run", "function", "packed_metadata"])
def test_a_kernel_without_one_of_its_parts_is_launched_by_triton(missing):
    compiled = SimpleNamespace(run=print, function=7, packed_metadata="m")
    delattr(compiled, missing)
    assert direct.launcher(compiled, (1,)) is None
    assert direct.launcher(None, (1,)) is None  # interpreted


def test_a_profiler_of_launches_is_heard(monkeypatch):
    assert not direct.hooked()
    monkeypatch.setattr(triton.knobs.runtime, "launch_enter_hook", lambda _: None)
    assert direct.hooked()
