"""The backend "S2O" on a CPU, to try and test it: CPU_ATTN's cache and kernels, with long prefills by S2O."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)

from s2o_compile.vllm.builder import SparseBuilder
from s2o_compile.vllm.cpu_cache import CacheOrder
from s2o_compile.vllm.implementation import SparsePrefill
from s2o_compile.vllm.plugin import NAME


class S2OCPUImpl(SparsePrefill, CPUAttentionBackendImpl):
    """CPU_ATTN with sparse long prefills."""

    def s2o_pages(self, layer: Any, kv_cache: Tensor, block_table: Tensor, seq_lens: list[int]) -> Any:  # noqa: ANN401
        """The sequences' pages as keys and values (K, V), each [blocks, block, Hkv, D], and their block table."""
        size = kv_cache.shape[2]
        used = -(-max(seq_lens) // size)
        blocks = block_table[:, :used]
        pages = CacheOrder.of(layer.isa, kv_cache).unpacked(kv_cache[blocks.flatten().long()])
        return pages, torch.arange(blocks.numel(), dtype=torch.int32).view(blocks.shape)


class S2OCPUMetadataBuilder(SparseBuilder, CPUAttentionMetadataBuilder):
    """CPU_ATTN's builder that divides batches."""


class S2OCPUBackend(CPUAttentionBackend):
    """Stands in CPU_ATTN's place in vLLM's registry, and is CPU_ATTN unless "S2O" was asked for."""

    @staticmethod
    def get_impl_cls() -> type[CPUAttentionBackendImpl]:
        """The implementation of a layer; vLLM asks while it makes one."""
        wanted = get_current_vllm_config().attention_config.backend
        return S2OCPUImpl if wanted is not None and wanted.name == NAME else CPUAttentionBackendImpl

    @staticmethod
    def get_builder_cls() -> type[S2OCPUMetadataBuilder]:
        """The builder of a group of layers; it divides nothing where no layer is sparse."""
        return S2OCPUMetadataBuilder
