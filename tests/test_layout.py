"""The layout that packaging rests on: symlinked packages, no __init__.py, imports in one direction, wheel and sdist."""

import ast
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = ("kernels", "passes")


@pytest.mark.parametrize("name", LAYERS)
def test_package_is_a_relative_symlink(name):
    link = ROOT / "s2o_compile" / name
    assert link.is_symlink()
    assert os.readlink(link) == f"../{name}"


@pytest.mark.parametrize("name", LAYERS)
def test_no_init_file(name):
    assert not (ROOT / name / "__init__.py").exists(), f"a regular top-level package {name!r} shadows other projects'"


def imported_modules(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def sources(folder):
    return sorted((ROOT / folder).glob("*.py"))


@pytest.mark.parametrize(
    ("folder", "allowed"),
    [("kernels", ("s2o_compile.kernels",)), ("passes", ("s2o_compile.kernels", "s2o_compile.passes"))],
)
def test_imports_point_one_way(folder, allowed):
    assert sources(folder)
    for path in sources(folder):
        for module in imported_modules(path):
            if module == "s2o_compile" or module.startswith("s2o_compile."):
                assert module.startswith(allowed), f"{path.name} imports {module}"


@pytest.mark.parametrize("folder", ["s2o_compile", "kernels", "passes", "tests", "examples", "benchmarks"])
def test_never_imported_by_the_short_name(folder):
    for path in sources(folder):
        for module in imported_modules(path):
            assert module.split(".")[0] not in LAYERS, f"{path.name} imports {module}: operators would register twice"


@pytest.mark.parametrize("folder", ["s2o_compile", "kernels", "passes"])
def test_files_hold_one_idea(folder):
    long = {path.name: n for path in sources(folder) if (n := len(path.read_text().splitlines())) > 400}
    assert not long


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_wheel_holds_every_module_once(distributions):
    (wheel,) = distributions.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    expected = {f"s2o_compile/{folder}/{path.name}" for folder in LAYERS for path in sources(folder)}
    expected |= {f"s2o_compile/{path.name}" for path in sources("s2o_compile")} | {"s2o_compile/py.typed"}
    assert expected <= set(names)
    assert {name.split("/")[0] for name in names} == {
        "s2o_compile",
        next(n for n in names if "dist-info" in n).split("/")[0],
    }


def test_sdist_holds_the_sources(distributions):
    (sdist,) = distributions.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[-1] for name in archive.getnames()}
    for folder in LAYERS:
        assert {f"s2o_compile/{folder}/{path.name}" for path in sources(folder)} <= names
    assert {"LICENSE", "README.md", "pyproject.toml"} <= names


def test_hugging_face_kernels_is_not_shadowed():
    code = "import importlib.util as u; s = u.find_spec('kernels'); print(s.origin if s else None)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert "__init__" not in out or str(ROOT) not in out
