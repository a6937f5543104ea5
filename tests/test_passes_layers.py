"""Imports inside passes/ point down: pipeline -> frontends -> masks -> graph."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "passes"
PASSES = "s2o_compile.passes."


def modules(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("s2o_compile.passes"):
            yield from (f"{node.module}.{alias.name}".removeprefix(PASSES) for alias in node.names)


@pytest.mark.parametrize(
    ("room", "below"),
    [("graph", ("graph",)), ("masks", ("masks", "graph")), ("frontends", ("frontends", "masks", "graph", "site"))],
)
def test_a_room_imports_nothing_from_above(room, below):
    files = sorted((ROOT / room).rglob("*.py"))
    assert files
    above = {path.name: up for path in files if (up := [m for m in modules(path) if m.split(".")[0] not in below])}
    assert not above
