"""The backend "S2O" on CUDA: FLASH_ATTN's cache and kernels, with long prefills by S2O."""

from __future__ import annotations

from typing import Any

from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
)

from s2o_compile.vllm.builder import SparseBuilder
from s2o_compile.vllm.implementation import SparsePrefill


class S2OImpl(SparsePrefill, FlashAttentionImpl):
    """FLASH_ATTN with sparse long prefills; the cache is [blocks, Hkv, block, 2 D], K before V."""


class S2OMetadataBuilder(SparseBuilder, FlashAttentionMetadataBuilder):
    """FLASH_ATTN's builder that divides batches."""

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:  # noqa: ANN401
        """Whole graphs hold decode alone: a prefill is divided on the host, which no graph records."""
        own = super().get_cudagraph_support(vllm_config, kv_cache_spec)
        return min(own, AttentionCGSupport.UNIFORM_BATCH, key=lambda support: support.value)


class S2OBackend(FlashAttentionBackend):
    """What ``--attention-backend S2O`` names."""

    @staticmethod
    def get_name() -> str:
        """The name in vLLM's registry."""
        return "S2O"

    @staticmethod
    def get_impl_cls() -> type[S2OImpl]:
        """The implementation of a layer."""
        return S2OImpl

    @staticmethod
    def get_builder_cls() -> type[S2OMetadataBuilder]:
        """The builder of a group of layers."""
        return S2OMetadataBuilder

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        """A ranking depends on how a prompt was cut into chunks."""
        return False

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        """Batches are divided by the lengths on the host."""
        return False
