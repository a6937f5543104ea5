"""Every Python snippet of README.md and docs/ runs, in the order of its page."""

import re
import sys
import warnings
import zipfile
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.distributed import device_mesh

import s2o_compile
from s2o_compile import S2OConfig
from s2o_compile.kernels.core import tuned
from s2o_compile.kernels.support import torch_compat, torch_inductor
from s2o_compile.speed import bench, measure
from tests.conftest import quick_rows
from tests.helpers.tiny import Characters

ROOT = Path(__file__).parents[2]
SNIPPET = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
PAGES = {path.name: path for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
PAGES = {name: path for name, path in PAGES.items() if SNIPPET.search(path.read_text())}
NEEDS = {"onnx.md": ("onnxscript",), "transformers.md": ("diffusers",)}
SLOW = {"README.md", "backend.md", "export.md", "how-it-works.md", "reports.md", "wrap.md"}
"""Pages whose snippets compile with Inductor, or audit a whole model."""


def test_every_picture_is_shown_with_a_text_of_its_own():
    """A picture that no page shows is stale before long; its text says to those who do not see it what it means."""
    pages = (ROOT / "README.md", ROOT / "benchmarks" / "README.md", *(ROOT / "docs").glob("*.md"))
    picture = re.compile(r"!\[([^\]]+)\]\((?:\S+/)?([\w-]+\.png)\)")
    shown = {name: text for page in pages for text, name in picture.findall(page.read_text())}
    assert {path.name for path in (ROOT / "docs").glob("*.png")} == set(shown)
    assert all(len(text.split()) >= 6 for text in shown.values()), shown


@pytest.fixture
def short_is_long(monkeypatch, tmp_path):
    """Pages do not say min_seq_len: this machine was tuned to 1024 tokens. Files go to a folder of their own."""
    (tmp_path / "tuned.json").write_text(f'{{"format": {tuned.FORMAT}, "devices": {{"cpu": {{"crossover": 1024}}}}}}')
    monkeypatch.setenv(tuned.FILE_VARIABLE, str(tmp_path / "tuned.json"))
    monkeypatch.chdir(tmp_path)
    tuned.forget()
    yield
    monkeypatch.undo()
    tuned.forget()


@pytest.fixture
def without_tensorrt(monkeypatch):
    """A stand-in that builds no engines."""
    stand_in = ModuleType("torch_tensorrt")
    stand_in.dynamo = SimpleNamespace(compile=lambda program, **settings: program.module())
    monkeypatch.setitem(sys.modules, "torch_tensorrt", stand_in)


@pytest.fixture
def without_packaging(monkeypatch, tmp_path):
    """Programs are decomposed, but nothing is compiled ahead of time: aot/test_package.py does."""
    monkeypatch.chdir(tmp_path)
    written = {}

    def write(program, *, package_path, inductor_configs):
        decomposed = program.run_decompositions({})
        inductor_configs["joint_custom_pre_pass"](decomposed.graph)
        decomposed.graph_module.recompile()
        written[package_path] = decomposed.module()
        zipfile.ZipFile(package_path, "w").close()
        return package_path

    monkeypatch.setattr(torch_inductor, "aoti_compile_and_package", write)
    monkeypatch.setattr(torch._inductor, "aoti_load_package", written.__getitem__)


@pytest.fixture
def one_rank(monkeypatch):
    """A process group of this process alone, on a CPU."""
    start, mesh = dist.init_process_group, device_mesh.init_device_mesh

    def alone(_backend):
        start("gloo", store=dist.HashStore(), rank=0, world_size=1)

    monkeypatch.setattr(dist, "init_process_group", alone)
    monkeypatch.setattr(device_mesh, "init_device_mesh", lambda _device, *sizes, **named: mesh("cpu", *sizes, **named))
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture
def quick_bench(monkeypatch):
    """Nothing is compiled behind the captures, and each way is timed once."""
    monkeypatch.setattr(measure, "CALLS", 1)
    monkeypatch.setitem(bench.WAYS, "compiled", lambda model, _: torch.compile(model, backend="eager"))
    eager = {"inner_backend": "eager"}
    monkeypatch.setitem(bench.WAYS, "s2o", lambda model, config: s2o_compile.optimize(model, replace(config, **eager)))


def names():
    """What pages take for granted."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "max_position_embeddings": 4096}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 1, "attention_bias": True}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads, use_cache=False)).eval()
    model.model.layers[0].self_attn.v_proj.bias.data.fill_(1.0)  # values alike: a few keys keep any budget
    model.generation_config.use_cache = True  # else each token of an answer reads the prompt anew
    texts = torch.randint(1, 97, (2, 1, 2000), generator=torch.Generator().manual_seed(1))
    given = {"model": model, "ids": texts[0], "batches": [texts[0]], "other_batches": [texts[1]]}
    given |= dict(zip("qkv", torch.randn(3, 1, 4, 1200, 16), strict=True))
    given |= {"fast": s2o_compile.optimize(model, S2OConfig(inner_backend="eager"))}
    given |= {"length": 1200, "config": S2OConfig(tau=0.25), "tokenizer": Characters()}
    return given | {"torch": torch, "s2o_compile": s2o_compile, "S2OConfig": S2OConfig}


def diffusion():
    """A diffusion model and its inputs."""
    from tests.public.test_diffusers import flux, inputs

    return {"transformer": flux(), "inputs": inputs()}


@pytest.mark.parametrize("page", quick_rows(PAGES, PAGES.keys() - SLOW))
@pytest.mark.usefixtures(
    "fresh_dynamo", "short_is_long", "without_tensorrt", "without_packaging", "one_rank", "quick_bench"
)
def test_snippets_run(page, capsys):
    for needed in NEEDS.get(page, ()):
        pytest.importorskip(needed)
    if page == "export.md" and torch_compat.torch_release() > torch_compat.LAST_PACKAGED:
        pytest.skip("this torch writes no packages")
    namespace = names() | (diffusion() if page == "transformers.md" else {})
    wants_no_gradients = page in ("onnx.md", "tensorrt.md")
    with warnings.catch_warnings(), torch.no_grad() if wants_no_gradients else nullcontext():
        warnings.simplefilter("ignore")
        for number, snippet in enumerate(SNIPPET.findall(PAGES[page].read_text())):
            exec(compile(snippet, f"{page}, snippet {number + 1}", "exec"), namespace)


def test_the_pages_that_must_have_snippets_have_them():
    wanted = {
        "README.md",
        "backend.md",
        "bench.md",
        "calibrate.md",
        "evaluate.md",
        "export.md",
        "flex.md",
        "how-it-works.md",
        "onnx.md",
        "operator.md",
        "quality.md",
        "reports.md",
        "tensorrt.md",
        "transformers.md",
        "troubleshooting.md",
        "wrap.md",
    }
    assert wanted <= PAGES.keys()
