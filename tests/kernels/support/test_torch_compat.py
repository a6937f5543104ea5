"""Private names of torch: in three files, all there in a torch that was tested, none needed by the import."""

import ast
import inspect
import json
import os
import re
import subprocess
import sys
import types

import pytest
import torch

from s2o_compile.kernels.support import torch_compat, torch_compile, torch_inductor
from s2o_compile.kernels.support.torch_compat import ATTRIBUTES, NAMES, Missing, MissingTorchNameError
from tests.conftest import PACKAGED
from tests.helpers.imports import ROOT, short, sources, tree

HOMES = ("torch_compat.py", "torch_compile.py", "torch_inductor.py")
FOLDERS = ("kernels", "passes", "s2o_compile", "benchmarks", "examples")
# One of these: functions of vmap and of duals moved, and the analysis of kernels was renamed.
ALTERNATIVES = ("_add_batch_dim", "_remove_batch_dim"), ("_make_dual",), torch_inductor.ANALYSES
# Public for all purposes: documented, or torch's own examples call them.
PUBLIC = ("torch._check", "torch._assert_async", "torch.ops.", "torch._inductor.aoti_load_package")
PRIVATE = re.compile(r"torch(\.\w+)*\._(?!_)\w+|torch\.fx\.experimental")


def names_of_imports(tree):
    """What the names that a file imports stand for: ``F`` for ``torch.nn.functional``."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            found |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.asname: alias.name for alias in node.names if alias.asname}
    return found


def dotted(node, imported):
    """``torch.a.b`` of an attribute, or an empty text."""
    if isinstance(node, ast.Attribute):
        holder = dotted(node.value, imported)
        return f"{holder}.{node.attr}" if holder else ""
    return imported.get(node.id, node.id) if isinstance(node, ast.Name) else ""


def private_names(tree):
    imported = names_of_imports(tree)
    holders = {node.value for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        found = []
        if isinstance(node, ast.Attribute) and node not in holders:
            found = [dotted(node, imported)]
        elif isinstance(node, ast.ImportFrom):
            found = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.Call) and "import_module" in ast.unparse(node.func):
            found = [x.value for x in node.args if isinstance(x, ast.Constant)]
        yield from (name for name in found if PRIVATE.match(name) and not name.startswith(PUBLIC))


@pytest.mark.parametrize(
    "line",
    [
        *("import torch; torch._C", "import torch.nn.functional as F; F._in_projection", "from torch import _VF"),
        *("from torch import nn; nn.Module._call_impl", "from torch.utils import _pytree", "import torch._dynamo as d"),
        *("from torch.nn import functional as g; g._x(1)", "importlib.import_module('torch._inductor.utils')"),
    ],
)
def test_the_rule_sees_every_way_to_name_one(line):
    assert [*private_names(ast.parse(line))]


@pytest.mark.parametrize("line", ["import torch; torch.__version__", "from torch import nn; nn.Module", "x._base"])
def test_the_rule_passes_what_is_public(line):
    assert not [*private_names(ast.parse(line))]


@pytest.mark.parametrize("folder", FOLDERS)
def test_private_names_stand_in_three_files(folder):
    paths = [path for path in sources(folder) if path.name not in HOMES]
    assert len(paths) > 5
    assert not {short(path): names for path in paths if (names := {*private_names(tree(path))})}


def output_graph():
    """One of Dynamo's, while a backend has its graph."""
    found = []

    def backend(gm, _):
        found.append(torch._dynamo.symbolic_convert.InstructionTranslator.current_tx().output)
        return gm.forward

    torch.compile(torch.neg, backend=backend)(torch.ones(1))
    return found[0]


def a_translator():
    """Dynamo's state while it captures a frame."""
    found = []

    def backend(gm, _):
        found.append(torch_compile._translator())
        return gm.forward

    torch.compile(lambda x: x + 1, backend=backend)(torch.zeros(1))
    return found[0]


def exists(path):
    """Whether this torch has a name: an attribute of some objects is asked of one of them."""
    holder, _, name = path.rpartition(".")
    if path not in ATTRIBUTES:
        return torch_compat._find(path) is not None
    instances = {
        "torch.autograd.forward_ad": lambda: torch.autograd.forward_ad,
        "torch.nn.Module": torch.nn.Identity,
        "torch.Tensor": lambda: torch.zeros(1),
        "torch.UntypedStorage": lambda: torch.zeros(1).untyped_storage(),
        "torch.fx.Node": lambda: torch.fx.symbolic_trace(torch.nn.Identity()).graph.output_node(),
        "torch._ops.OpOverload": lambda: torch.ops.aten.add.Tensor,
        "torch._dynamo.output_graph.OutputGraph": output_graph,
        "torch._dynamo.OptimizedModule": lambda: torch.compile(torch.nn.Identity()),
        "torch._dynamo.symbolic_convert.InstructionTranslator": a_translator,
    }
    return hasattr(instances[holder](), name)


def test_the_canary_every_name_is_there():
    """Fails with a list on a torch that lacks some of them."""
    gone = {path: feature for path, feature in NAMES.items() if not exists(path)}
    if torch_compat.torch_release() > torch_compat.LAST_PACKAGED:
        gone = {path: feature for path, feature in gone.items() if feature != "packages"}
    for names in ALTERNATIVES:
        assert [path for path in NAMES if path.endswith(names) and path not in gone]
        gone = {path: feature for path, feature in gone.items() if not path.endswith(names)}
    assert not gone


SIGNATURES = {
    "torch._inductor.graph.SubgraphLowering.__init__": "self parent args kwargs",
    "torch._inductor.runtime.triton_heuristics.config_to_dict": "config",
    "torch._inductor.runtime.triton_heuristics.CachingAutotuner._create_compile_options": "self cfg compile_meta",
    "torch._inductor.codegen.wrapper.PythonWrapperCodegen.define_user_defined_triton_kernel": (
        "self kernel configs kwargs restore_value_args reset_to_zero_args grids epilogue_fusion"
    ),
    "torch._inductor.codegen.cpp_wrapper_cpu.CppWrapperCpu.codegen_conditional": "self conditional",
    "torch._inductor.codegen.cpp_wrapper_cpu.CppWrapperCpu.codegen_subgraph": (
        "self subgraph outer_inputs outer_outputs"
    ),
    f"torch._higher_order_ops.triton_kernel_wrap.{torch_inductor.ANALYSIS}": "kernel kwargs tma_descriptor_metadata",
}
"""Parameters of every function of torch that is patched."""
NEWER = {" epilogue_fusion": (2, 13)}
"""Parameters that came later; a patch passes them on."""


@PACKAGED
@pytest.mark.parametrize("path", SIGNATURES)
def test_the_canary_every_patched_function_has_its_parameters(path):
    expected = SIGNATURES[path]
    for parameter, since in NEWER.items():
        if torch_compat.torch_release() < since:
            expected = expected.removesuffix(parameter)
    assert " ".join(inspect.signature(torch_compat._find(path)).parameters) == expected


def test_every_patched_function_is_in_the_canary():
    source = (ROOT / "s2o_compile" / "aot" / "inductor_workarounds.py").read_text()
    patched = re.findall(r"patch\.object\(([\w.]+), (\"?\w+\"?),", source)
    assert len(patched) == len(SIGNATURES)
    for holder, name in patched:
        name = torch_inductor.ANALYSIS if name == "ANALYSIS" else name.strip('"')
        assert [path for path in SIGNATURES if path.endswith(f"{holder}.{name}")], (holder, name)


def test_a_name_that_is_gone_is_named_where_it_is_used():
    with pytest.raises(MissingTorchNameError, match=r"packages: expected a torch with torch\._x\.y, got torch"):
        Missing("torch._x.y", "packages")()
    assert torch_compat._find("torch._x.y") is None
    assert torch_compat._find("torch.nn.functional.softmax") is torch.nn.functional.softmax
    later = torch_compat._later("torch._x.y", "some feature")
    missing = torch_compat._named("torch._x.y", "some feature")
    uses = (
        lambda: later(1),
        lambda: missing.anything,
        lambda: isinstance(1, missing),
        lambda: types.new_class("Derived", (missing,)),
        lambda: torch_compat.require("some feature"),
    )
    for use in uses:
        with pytest.raises(MissingTorchNameError, match="some feature: expected a torch with"):
            use()
    torch_compat.require("another feature")
    del NAMES["torch._x.y"]
    torch_compat._NEEDED[-2:] = []


@pytest.fixture(scope="module")
def problems():
    """The problem without each of the names, each tried in a process of its own."""
    script = ROOT / "tests" / "helpers" / "torch_without.py"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True, cwd=ROOT)
    return json.loads(done.stdout.splitlines()[-1])


@PACKAGED
@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_the_package_works_without_any_one_of_them(problems):
    """The import, the operator, gradients and compiled attentions. `export` and `package` name what they lack."""
    assert set(problems) == set(NAMES)
    assert not {path: problem for path, problem in problems.items() if problem}
