"""How vLLM finds the plugin, and what single heads mean under tensor parallelism."""

import copy
import pickle
import tomllib
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from s2o_compile import OptionError, S2OConfig
from s2o_compile.vllm import builder as builders
from s2o_compile.vllm import plugin
from tests.helpers import stub_vllm
from tests.helpers.stub_vllm import config_of

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
SITES = ("model.layers.0.self_attn", "model.layers.1.self_attn")


@pytest.fixture(autouse=True)
def fresh():
    for cached in (plugin.server_config, builders.counters):
        cached.cache_clear()
    yield
    for cached in (plugin.server_config, builders.counters):
        cached.cache_clear()


@pytest.mark.parametrize("group", ["vllm.general_plugins", "vllm_omni.sparse_attn", "sglang.srt.plugins"])
def test_entry_points_name_functions(group):
    module, _, name = PROJECT["entry-points"][group]["s2o"].partition(":")
    assert callable(getattr(import_module(module), name))


def test_registering_twice_is_registering_once(monkeypatch):
    stub = stub_vllm.install(monkeypatch)
    plugin.register()
    plugin.register()
    assert stub.registry.__members__["S2O"].value == plugin.CUDA
    assert stub.registry.overrides == {"CPU_ATTN": plugin.CPU}
    for path in (plugin.CUDA, plugin.CPU):
        module, _, name = path.rpartition(".")
        assert getattr(import_module(module), name).full_cls_name() == (module, name)


def test_a_spawned_process_reads_the_name_before_it_loads_plugins(monkeypatch):
    stub_vllm.install(monkeypatch)
    pickled = pickle.dumps({"backend": plugin.member()})
    stub = stub_vllm.install(monkeypatch)  # another process: nothing is registered there
    assert "S2O" not in stub.registry.__members__
    assert pickle.loads(pickled)["backend"] is stub.registry.__members__["S2O"]
    assert copy.deepcopy(plugin.member()) is plugin.member()


def test_a_bad_variable_ends_the_start(monkeypatch):
    stub_vllm.install(monkeypatch)
    monkeypatch.setenv("S2O_TAU", "half")
    with pytest.raises(OptionError, match=r"S2O_TAU: expected a number, got 'half'\. Write S2O_TAU=0\.05"):
        plugin.register()


def bound(monkeypatch, config, rank, ranks, *, heads=2, kv_heads=1, all_kv_heads=2):
    """The configurations of two layers on one rank, and the log."""
    stub = stub_vllm.install(monkeypatch, rank=rank, ranks=ranks)
    from s2o_compile.vllm.cuda import S2OImpl

    monkeypatch.setattr(builders, "server_config", lambda: config)
    layers = {
        f"{site}.attn": SimpleNamespace(impl=S2OImpl(heads, 32, 1.0, kv_heads, None, None, "auto")) for site in SITES
    }
    from s2o_compile.vllm.cuda import S2OMetadataBuilder

    S2OMetadataBuilder(None, [*layers], config_of(layers, kv_heads=all_kv_heads), torch.device("cpu"))
    return [layer.impl.s2o_site.config for layer in layers.values()], stub.log.lines


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_takes_the_settings_of_its_own_heads(monkeypatch, rank):
    config = S2OConfig(error=0.05, site_tau={SITES[0]: (0.1, 0.2, 0.3, 0.4)}, dense_heads={SITES[1]: (1,)})
    first, second = bound(monkeypatch, config, rank, 2)[0]
    assert first.site_tau == {SITES[0]: ((0.1, 0.2), (0.3, 0.4))[rank]}
    assert second.dense_heads == ({}, {SITES[1]: (0,)})[rank]
    assert first.error == second.error == 0.05


def test_ranks_that_share_a_key_value_head_share_its_mark(monkeypatch):
    config = S2OConfig(dense_heads={SITES[0]: (1,)})
    marks = [bound(monkeypatch, config, rank, 4, heads=1)[0][0].dense_heads for rank in range(4)]
    assert marks == [{}, {}, {SITES[0]: (0,)}, {SITES[0]: (0,)}]


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (S2OConfig(site_tau={SITES[0]: (0.1, 0.2)}), r"expected 4 numbers.*got 2\. Calibrate"),
        (S2OConfig(tau=(0.1, 0.2, 0.3)), r"every site|expected 4 numbers.*got 3"),
        (S2OConfig(dense_heads={SITES[1]: (2,)}), r"expected key/value heads below 2, got 2"),
    ],
    ids=["site-tau", "tau", "dense-heads"],
)
def test_settings_of_another_model_end_the_start(monkeypatch, config, said):
    with pytest.raises(OptionError, match=said):
        bound(monkeypatch, config, 0, 2)


def test_a_site_that_no_layer_has_is_named(monkeypatch):
    config = S2OConfig(dense_heads={"model.layers.7.self_attn": (0,)})
    lines = bound(monkeypatch, config, 0, 1)[1]
    assert any("dense_heads: unknown site 'model.layers.7.self_attn'" in line for line in lines)
