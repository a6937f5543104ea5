"""Type hints as a user's checker sees them: a small program against the installed wheel, strict."""

import json
import shutil
import site
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.imports import ROOT

CLIENT = Path(__file__).parent / "client.py"


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """An environment that holds a copy of the package, as a wheel would, and all else from this one."""
    where = tmp_path_factory.mktemp("typing")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(where / "venv")], check=True)
    (packages,) = (where / "venv").glob("lib/python*/site-packages")
    shutil.copytree(ROOT / "s2o_compile", packages / "s2o_compile", ignore=shutil.ignore_patterns("__pycache__"))
    (packages / "others.pth").write_text("\n".join(site.getsitepackages()))
    shutil.copy(CLIENT, where)
    return where


def checked(command, where):
    done = subprocess.run([str(part) for part in command], cwd=where, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_pyright_strict_knows_every_type(installed):
    pytest.importorskip("pyright")
    (installed / "pyrightconfig.json").write_text(json.dumps({"include": ["client.py"], "strict": ["client.py"]}))
    checked(
        [sys.executable, "-m", "pyright", "--pythonpath", installed / "venv/bin/python", "-p", installed], installed
    )


@pytest.mark.slow
def test_mypy_strict_knows_every_type(installed):
    pytest.importorskip("mypy")
    python = installed / "venv/bin/python"
    checked([sys.executable, "-m", "mypy", "--strict", "--python-executable", python, "client.py"], installed)
