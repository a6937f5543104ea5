"""Wheel and sdist: every module once, in its room, and all of them import from where the wheel was installed."""

import subprocess
import sys
import tarfile
import zipfile

import pytest

from s2o_compile.kernels.support import cpp_library
from tests.helpers.imports import ROOT, module_name, product, short


def built(out, *kinds, source=ROOT):
    command = [sys.executable, "-m", "build", "--no-isolation", *kinds, "--outdir", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    return built(tmp_path_factory.mktemp("dist"))


def installed(path):
    """Where a file of the product stands in a distribution: layers lie inside the package."""
    return short(path) if short(path).startswith("s2o_compile/") else f"s2o_compile/{short(path)}"


def test_wheel_holds_every_module_once(distributions):
    (wheel,) = distributions.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    python = [name for name in names if name.endswith(".py")]
    assert sorted(python) == sorted(map(installed, product()))
    assert "s2o_compile/py.typed" in names
    assert {f"s2o_compile/kernels/impl/cpp/{path.name}" for path in cpp_library.SOURCES} <= {*names}
    assert {name.split("/")[0] for name in names} == {
        "s2o_compile",
        next(n for n in names if "dist-info" in n).split("/")[0],
    }


def test_sdist_holds_the_sources(distributions):
    (sdist,) = distributions.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[-1] for name in archive.getnames()}
    assert {*map(installed, product())} <= names
    assert {"LICENSE", "README.md", "pyproject.toml"} <= names
    assert {f"s2o_compile/kernels/impl/cpp/{path.name}" for path in cpp_library.SOURCES} <= names


IMPORT_ALL = """
import importlib, sys
where, *names = sys.argv[1:]
sys.path.insert(0, where)
for name in names:
    module = importlib.import_module(name)
    assert module.__file__.startswith(where), module.__file__
print(len(names))
"""


@pytest.mark.slow
def test_every_module_imports_from_an_installed_wheel(distributions, tmp_path):
    (wheel,) = distributions.glob("*.whl")
    where = tmp_path / "installed"
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", str(where), str(wheel)]
    subprocess.run(pip, check=True, capture_output=True)
    # Those of the plugin import vllm; `make vllm` imports them.
    paths = [path for path in product() if path.name != "__main__.py" and path.parent.name != "vllm"]
    names = [module_name(path) for path in paths]
    command = [sys.executable, "-W", "ignore", "-I", "-c", IMPORT_ALL, str(where), *names]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == len(names) > 100


@pytest.mark.slow
def test_the_sdist_builds_a_wheel(distributions, tmp_path):
    (sdist,) = distributions.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (wheel,) = built(tmp_path / "dist", "--wheel", source=tmp_path / sdist.name.removesuffix(".tar.gz")).glob("*.whl")
    (ours,) = distributions.glob("*.whl")
    assert sorted(zipfile.ZipFile(wheel).namelist()) == sorted(zipfile.ZipFile(ours).namelist())


def test_hugging_face_kernels_is_not_shadowed():
    code = "import importlib.util as u; s = u.find_spec('kernels'); print(s.origin if s else None)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert "__init__" not in out or str(ROOT) not in out
