"""The stub is what vLLM is, and the plugin fits the real classes; only where vLLM is installed (`make vllm`)."""

import dataclasses
import inspect
import pickle
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from tests.helpers import stub_vllm

pytest.importorskip("vllm", reason="needs vLLM: make vllm")


@pytest.fixture(scope="module")
def real():
    from vllm import _custom_ops
    from vllm.v1.attention import backend
    from vllm.v1.attention.backends import cpu_attn, flash_attn, registry

    return SimpleNamespace(
        ops=_custom_ops, backend=backend, cpu_attn=cpu_attn, flash_attn=flash_attn, registry=registry
    )


def names(function):
    return [name for name, x in inspect.signature(function).parameters.items() if x.kind is not x.VAR_KEYWORD]


@pytest.mark.parametrize("kind", ["flash_attn.FlashAttention", "cpu_attn.CPUAttentionBackend"])
def test_implementations_take_the_same_arguments(real, kind):
    module, _, name = kind.partition(".")
    impl = getattr(getattr(real, module), f"{name}Impl")
    for method in ("__init__", "forward"):
        assert names(getattr(stub_vllm.Impl, method)) == names(getattr(impl, method))


def test_builders_take_the_same_arguments(real):
    for builder in (real.flash_attn.FlashAttentionMetadataBuilder, real.cpu_attn.CPUAttentionMetadataBuilder):
        for method in ("__init__", "build", "update_block_table", "get_cudagraph_support"):
            assert names(getattr(stub_vllm.Builder, method)) == names(getattr(builder, method))


def test_metadata_has_the_same_fields(real):
    fields = {field.name: field for field in dataclasses.fields(real.backend.CommonAttentionMetadata)}
    for field in dataclasses.fields(stub_vllm.CommonAttentionMetadata):
        required = fields[field.name].default is dataclasses.MISSING
        assert required == (field.default is dataclasses.MISSING), field.name
    required = [name for name, field in fields.items() if field.default is dataclasses.MISSING]
    assert required == [x.name for x in dataclasses.fields(stub_vllm.CommonAttentionMetadata)][: len(required)]
    levels = {level.name: level.value for level in real.backend.AttentionCGSupport}
    assert levels == {level.name: level.value for level in stub_vllm.AttentionCGSupport}


def test_backends_are_subclasses_that_vllm_finds(real):
    from s2o_compile.vllm import plugin

    plugin.register()
    plugin.register()
    backend = real.registry.AttentionBackendEnum["S2O"].get_class()
    assert issubclass(backend, real.flash_attn.FlashAttentionBackend)
    assert issubclass(backend.get_impl_cls(), real.flash_attn.FlashAttentionImpl)
    assert issubclass(backend.get_builder_cls(), real.flash_attn.FlashAttentionMetadataBuilder)
    assert backend.get_builder_cls().get_cudagraph_support(None, None).value <= 2
    on_cpu = real.registry.AttentionBackendEnum.CPU_ATTN.get_class()
    assert issubclass(on_cpu, real.cpu_attn.CPUAttentionBackend)


def test_a_spawned_process_reads_the_name():
    from s2o_compile.vllm import plugin

    pickled = pickle.dumps(plugin.member())
    code = f"import pickle; print(pickle.loads({pickled!r}).name)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == "S2O"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("isa", ["vec", "vec16", "amx"])
def test_the_order_of_a_page_is_learned(real, isa, dtype):
    from s2o_compile.vllm.cpu_cache import CacheOrder

    if isa == "amx" and (dtype is not torch.bfloat16 or not torch.cpu._is_amx_tile_supported()):
        pytest.skip("AMX takes bfloat16, where a CPU has it")
    blocks, heads, size, dim = 5, 3, 64, 64
    cache = torch.zeros(blocks, heads, size, 2 * dim, dtype=dtype)
    key, value = (torch.randn(blocks * size, heads, dim).to(dtype) for _ in range(2))
    halves = cache.view(blocks, heads, 2 * size, dim).chunk(2, dim=2)
    real.ops.cpu_attn_reshape_and_cache(key, value, *halves, torch.arange(blocks * size), isa)
    for rows, pages in zip((key, value), CacheOrder.of(isa, cache).unpacked(cache), strict=True):
        assert torch.equal(pages.flatten(0, 1), rows)
