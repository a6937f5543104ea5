"""Pages and tables that are written from files: what stands there is what the files say."""

import re

import pytest

from benchmarks import measured, models_page, speed_page, table
from s2o_compile.kernels.core import tuned
from tests.helpers.imports import ROOT

RENEW = "run `make figures`"


@pytest.mark.parametrize("page", speed_page.MARKS, ids=lambda page: page.parent.name + "/" + page.name)
def test_the_tables_of_a_page_are_those_of_the_files(page):
    assert page.read_text() == speed_page.with_tables(page), RENEW


def test_the_page_of_speed_is_that_of_the_files():
    assert speed_page.PAGE.read_text() == speed_page.page(), RENEW


def test_the_page_of_models_is_that_of_the_zoo():
    assert models_page.PAGE.read_text() == models_page.page(), RENEW


@pytest.mark.parametrize("page", sorted(table.NOTES.glob("*.md")), ids=lambda page: page.name)
def test_the_tables_of_the_notes_are_those_of_the_files(page):
    assert page.read_text() == table.with_tables(page.read_text()), RENEW


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "bert", "whisper", "vit"])
def test_well_known_models_have_a_line(name):
    assert f"| `{name}" in models_page.page()


def test_a_model_without_proofs_says_why():
    (line,) = re.findall(r"^\| `bloom` .*$", models_page.page(), re.MULTILINE)
    assert "none: 0 of 2" in line
    assert "position biases" in line


def test_the_newest_device_stands_on_the_page(tmp_path, monkeypatch):
    monkeypatch.setattr(measured, "RESULTS", tmp_path)
    (tmp_path / "attention-h100.json").touch()
    assert measured.newest("attention").name == "attention-h100.json"
    (tmp_path / "attention-h200.json").touch()
    assert measured.newest("attention").name == "attention-h200.json"


def test_the_front_page_is_short():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) < 120


def test_the_front_page_counts_models_and_names_the_version_as_they_are():
    text = (ROOT / "README.md").read_text()
    everything, of, some = re.search(r"\*\*(\d+) of (\d+) .* replaced, (\d+) some", models_page.page()).groups()
    assert f"Of {of} tried architectures, most of them of transformers, {everything} have all" in text
    assert f"and {some} some." in text
    version = re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    assert f"s2o_compile-{version}-py3-none-any.whl" in text


def test_the_front_page_says_where_sparse_attention_begins():
    text = (ROOT / "README.md").read_text()
    pattern = r"^\| prompts have (\d+) tokens or more on a GPU \((\d+) on an H200\), (\d+) or more on a CPU"
    gpu, h200, cpu = map(int, re.search(pattern, text, re.MULTILINE).groups())
    assert h200 == tuned.BUILT_IN["NVIDIA H200"].crossover
    assert gpu == tuned.UNKNOWN_CROSSOVER == tuned.BUILT_IN["NVIDIA H100"].crossover
    assert cpu == tuned.BUILT_IN["cpu in C++"].crossover


def test_the_table_of_the_front_page_has_a_gpu_and_a_cpu():
    """Rows of 8K, 32K and 128K tokens on a GPU, of 8K on a CPU, each with its baseline; figures stand nowhere else."""
    text = (ROOT / "README.md").read_text()
    table_of_speed = speed_page.readme_table()
    for length, where in (("128K", r"H\d00"), ("32K", r"H\d00"), ("8K", r"H\d00"), ("8K", "CPU cores")):
        assert re.search(
            rf"^\| one attention²?, {length} tokens, [^|]*{where}[^|]*\| SDPA \|", table_of_speed, re.MULTILINE
        )
    assert "`torch.compile`, flash kernel" in table_of_speed
    assert not re.findall(r"\d m?s\b|\d seconds", text.replace(table_of_speed, ""))


def test_every_figure_of_the_front_page_names_its_file():
    text = (ROOT / "README.md").read_text()
    for path in re.findall(r"\]\((benchmarks/results/[^)]+)\)", text):
        assert (ROOT / path).is_file(), path
    assert "benchmarks/results/" in text
