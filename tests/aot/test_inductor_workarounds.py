"""Workarounds for Inductor: what it does inside the block, that it is undone behind it, and which torch it is for."""

from types import SimpleNamespace

import pytest
import torch
from torch import fx
from torch._higher_order_ops import triton_kernel_wrap
from torch._inductor.codegen.common import SizeArg
from torch._inductor.codegen.triton_utils import signature_of
from torch._inductor.codegen.wrapper import PythonWrapperCodegen
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime import triton_heuristics
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from s2o_compile import PackageError
from s2o_compile.aot import inductor_workarounds as inductor
from s2o_compile.kernels.support import torch_inductor
from tests.conftest import PACKAGED

triton = pytest.importorskip("triton")
pytestmark = PACKAGED


def test_a_branch_and_its_graph_have_one_numbering_of_sizes():
    length = ShapeEnv().create_unbacked_symint().node.expr
    with inductor.inductor_workarounds():
        graph = GraphLowering(fx.symbolic_trace(torch.nn.Identity()), shape_env=ShapeEnv())
        branch = graph.make_subgraph(graph.module, [], "branch").make_subgraph(graph.module, [], "inner")
    inner, outer = (
        branch.sizevars.lookup_precomputed_size(2 * length),
        graph.sizevars.lookup_precomputed_size(3 * length),
    )
    assert inner != outer
    assert graph.sizevars.remove_precomputed_replacements(inner + outer) == 5 * length


def test_kernels_keep_the_limit_of_their_registers():
    limited, free = (triton.Config({}, num_warps=8, maxnreg=limit) for limit in (128, None))
    stub = SimpleNamespace(device_props=SimpleNamespace(type="cuda"))
    meta = {"num_warps": 8, "num_stages": 2, "debug": False}
    with inductor.inductor_workarounds():
        read = triton_heuristics.config_from_dict(triton_heuristics.config_to_dict(limited))
        assert triton_heuristics.CachingAutotuner._create_compile_options(stub, read, meta)["maxnreg"] == 128
        assert "maxnreg" not in triton_heuristics.config_to_dict(free)
        assert "maxnreg" not in triton_heuristics.CachingAutotuner._create_compile_options(stub, free, meta)
        assert torch._inductor.config.compile_threads == 1
    assert triton_heuristics.config_to_dict.__module__ == triton_heuristics.__name__


def test_kernels_take_numbers_in_single_precision(monkeypatch):
    def define(_wrapper):
        return signature_of(SizeArg("scale", 0.5), size_dtype=None)

    monkeypatch.setattr(PythonWrapperCodegen, "define_user_defined_triton_kernel", define)
    with inductor.inductor_workarounds():
        assert PythonWrapperCodegen.define_user_defined_triton_kernel(None) == "fp32"


def test_a_kernel_is_analysed_once_for_its_kinds_of_arguments(monkeypatch):
    (analysis,) = (name for name in torch_inductor.ANALYSES if hasattr(triton_kernel_wrap, name))
    seen = []
    monkeypatch.setattr(triton_kernel_wrap, analysis, lambda kernel, given, tma: seen.append(given) or len(seen))
    shapes = ShapeEnv()
    kernel = triton.jit(_copy_kernel)
    one = {"source": torch.zeros(2), "n": shapes.create_unbacked_symint(), "BLOCK": 64}
    others = [
        one | {"source": torch.zeros(2, dtype=torch.int8)},
        one | {"n": 1},
        one | {"n": None},
        one | {"BLOCK": 128},
    ]
    with inductor.inductor_workarounds():
        analyse = getattr(triton_kernel_wrap, analysis)
        assert analyse(kernel, one, {}) == 1
        again = one | {"source": torch.zeros(7), "n": shapes.create_unbacked_symint()}
        configured = triton.autotune([triton.Config({}, num_warps=8)], key=[])(kernel)
        assert analyse(configured, again, {}) == 1
        assert [analyse(kernel, other, {}) for other in others] == [2, 3, 4, 5]
        assert analyse(triton.jit(_other_kernel), one, {}) == 6
        assert analyse(triton.autotune([triton.Config({"BLOCK": 32})], key=[])(kernel), one, {}) == 7
    assert getattr(triton_kernel_wrap, analysis) is not analyse
    assert len(seen) == 7


def test_memory_is_not_reused():
    with inductor.inductor_workarounds():
        assert not torch._inductor.config.allow_buffer_reuse
    assert torch._inductor.config.allow_buffer_reuse


def test_every_workaround_names_its_bug_its_versions_and_its_issue():
    bugs = {workaround.bug: workaround for workaround in inductor.WORKAROUNDS}
    assert len(bugs) == 6
    for workaround in bugs.values():
        assert (2, 11) <= workaround.first <= workaround.last
        upstream = workaround.upstream
        assert upstream == inductor.NOT_FILED or upstream.startswith("https://github.com/pytorch/pytorch/")


@pytest.mark.parametrize("version", ["2.10.1", "2.14.0a0+git1234"])
def test_a_torch_outside_the_tested_range_is_refused(version, monkeypatch):
    """By its range, not by the first of the names that it lacks."""
    monkeypatch.setattr(torch, "__version__", version)
    monkeypatch.setattr(inductor, "require", lambda _: pytest.fail("names were looked for first"))
    with (
        pytest.raises(PackageError, match=r"expected torch 2\.11 to 2\.13.*got torch 2\.1[04].*Install a torch"),
        inductor.inductor_workarounds(),
    ):
        pass


def _copy_kernel(source, n, BLOCK):
    """Never runs."""


def _other_kernel(source, n, BLOCK):
    """Never runs."""
