"""docs/reference.md, docs/wrap.md and docs/how-it-works.md: every public name, every option, and a graph as it is."""

import dataclasses
import importlib
import re

import pytest
import torch

import s2o_compile
from s2o_compile import S2OConfig
from s2o_compile.kernels.support.torch_compat import torch_release
from tests.helpers.imports import ROOT

DOCS = ROOT / "docs"
ENTRIES = re.findall(r"^::: (\S+)$", (DOCS / "reference.md").read_text(), re.MULTILINE)
ELSEWHERE = {
    "s2o_compile.distributed": ["Layout", "ShardedSequence", "context_parallel", "gather_report", "shard_sequence"],
    "s2o_compile.kernels.observe": ["ObservedCall", "observe_attention"],
    "s2o_compile.onnx": ["dense"],
    "s2o_compile.tensorrt": ["compile"],
}


def test_every_public_name_is_in_the_reference():
    assert {f"s2o_compile.{name}" for name in s2o_compile.__all__} <= set(ENTRIES)


@pytest.mark.parametrize("module", ELSEWHERE)
def test_names_of_other_modules_are_in_the_reference(module):
    public = getattr(importlib.import_module(module), "__all__", ELSEWHERE[module])
    assert {f"{module}.{name}" for name in public} <= set(ENTRIES)


def test_every_error_and_warning_is_in_the_reference():
    from s2o_compile import errors

    kinds = [name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)]
    assert {f"s2o_compile.{name}" for name in kinds} <= set(ENTRIES)


@pytest.mark.parametrize("entry", [entry for entry in ENTRIES if entry.count(".") == 1])
def test_an_entry_exists_and_has_a_docstring(entry):
    assert getattr(s2o_compile, entry.partition(".")[2]).__doc__


def test_every_option_has_a_row_and_a_docstring():
    table = (DOCS / "wrap.md").read_text()
    for field in dataclasses.fields(S2OConfig):
        assert f"| `{field.name}` |" in table
        assert f"{field.name}: " in S2OConfig.__doc__


@pytest.mark.skipif(torch_release() < (2, 13), reason="the page shows the graph of a newer torch")
@pytest.mark.usefixtures("fresh_dynamo")
def test_how_it_works_shows_the_graph_as_the_pass_writes_it(tmp_path, monkeypatch):
    page = (DOCS / "how-it-works.md").read_text()
    (snippet,) = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    monkeypatch.setenv("S2O_DUMP", str(tmp_path))
    source = tmp_path / "page.py"  # a file, so that the dump can show its lines
    source.write_text(snippet)
    exec(compile(snippet, str(source), "exec"), {"torch": torch})
    for when in ("before", "after"):
        (path,) = tmp_path.glob(f"*_rewrite_{when}.txt")
        for line in path.read_text().splitlines():
            shown = re.sub(r"# File: .*? code: ", "# ", line).strip()
            assert not shown or f"    {shown}\n" in page, f"{when}: {shown}"
