"""Names of torch that are not public: in one file, all there in a torch that was tested, none needed by the import."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from s2o_compile.kernels.support import torch_compat
from s2o_compile.kernels.support.torch_compat import NAMES, Missing, MissingTorchNameError

ROOT = Path(__file__).parents[3]
HOME = "torch_compat.py"
FOLDERS = ("kernels", "passes")
"""``s2o_compile`` itself still names some, inside functions."""
# Public for all purposes: documented, or torch's own examples call them.
PUBLIC = ("torch._check", "torch._assert_async", "torch.ops.")
PRIVATE = re.compile(r"torch(\.\w+)*\.(_[a-z]\w*|_C)\b|torch\.fx\.experimental")


def dotted(node):
    """``torch.a.b`` of an attribute, or an empty text."""
    if isinstance(node, ast.Attribute):
        holder = dotted(node.value)
        return f"{holder}.{node.attr}" if holder else ""
    return node.id if isinstance(node, ast.Name) else ""


def private_names(path, *, imported_only=False):
    tree = ast.parse(path.read_text())
    for node in tree.body if imported_only else ast.walk(tree):
        found = []
        if isinstance(node, ast.Attribute):
            found = [dotted(node)]
        elif isinstance(node, ast.ImportFrom):
            found = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        yield from (name for name in found if PRIVATE.match(name) and not name.startswith(PUBLIC))


@pytest.mark.parametrize("folder", FOLDERS)
def test_private_names_stand_in_one_file(folder):
    found = {p.name: names for p in (ROOT / folder).rglob("*.py") if p.name != HOME and (names := {*private_names(p)})}
    assert not found


def test_the_import_needs_no_private_name():
    """``s2o_compile`` may use some inside functions; modules that import one are loaded where their feature is used."""
    loaded_later = {
        "aot/inductor_workarounds.py",
        "aot/lower_ops.py",
        "transformers/lazy_mask.py",
        "transformers/mask_functions.py",
    }
    home = ROOT / "s2o_compile"
    sources = [p for p in home.rglob("*.py") if p.relative_to(home).parts[0] not in FOLDERS]
    found = {str(p.relative_to(home)) for p in sources if {*private_names(p, imported_only=True)}}
    assert found == loaded_later
    code = "import sys, s2o_compile; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    modules = done.stdout.split()
    assert "s2o_compile.aot.package" in modules
    assert not [name for name in loaded_later if "s2o_compile." + name.removesuffix(".py").replace("/", ".") in modules]


def test_the_canary_every_name_is_there():
    """Fails with a list on a torch that lacks some of them."""
    gone = {path: feature for path, feature in NAMES.items() if torch_compat._find(path) is None}
    if torch.__version__ < "2.13":  # vmap's functions moved
        gone = {path: feature for path, feature in gone.items() if "_functorch" not in path}
    assert not gone


def test_a_name_that_is_gone_is_named_where_it_is_used():
    with pytest.raises(MissingTorchNameError, match=r"packages: expected a torch with torch\._x\.y, got torch"):
        Missing("torch._x.y", "packages")()
    assert torch_compat._find("torch._x.y") is None
    assert torch_compat._find("torch.nn.functional.softmax") is torch.nn.functional.softmax
    with pytest.raises(MissingTorchNameError, match="packages"):
        torch_compat._later("torch._x.y", "packages")(1)
    del NAMES["torch._x.y"]


@pytest.fixture(scope="module")
def problems():
    """What fails without each of the names, tried in processes of their own."""
    script = ROOT / "tests" / "helpers" / "torch_without.py"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True, cwd=ROOT)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_the_package_works_without_any_one_of_them(problems):
    """The import, the operator, gradients and compiled attentions: only the feature that is named may be missing."""
    assert set(problems) == set(NAMES)
    assert not {path: problem for path, problem in problems.items() if problem}
