"""The part of vLLM 0.32 that the plugin meets, written anew: same names, signatures and metadata.

Its attention is the plain formula, one request after the other, and it notes the query lengths of every call.
`tests/vllm/test_real.py` compares it with the real classes, where vLLM is installed.
"""

import copy
import itertools
import sys
from dataclasses import dataclass, replace
from enum import Enum
from types import ModuleType, SimpleNamespace

import torch

from s2o_compile.kernels.core.mask import AttentionMask
from tests.conftest import Inputs, softmax_attention


class AttentionCGSupport(Enum):
    ALWAYS = 3
    UNIFORM_BATCH = 2
    UNIFORM_SINGLE_TOKEN_DECODE = 1
    NEVER = 0


@dataclass
class CommonAttentionMetadata:
    query_start_loc: torch.Tensor
    query_start_loc_cpu: torch.Tensor
    seq_lens: torch.Tensor
    num_reqs: int
    num_actual_tokens: int
    max_query_len: int
    max_seq_len: int
    block_table_tensor: torch.Tensor
    slot_mapping: torch.Tensor
    causal: bool | torch.Tensor = True
    is_prefilling: torch.Tensor | None = None
    seq_lens_cpu_upper_bound: torch.Tensor | None = None
    mm_req_doc_ranges: dict | None = None
    rswa_prefix_lens: torch.Tensor | None = None


@dataclass
class Metadata:
    num_actual_tokens: int
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    slot_mapping: torch.Tensor
    scheduler_metadata: torch.Tensor | None
    causal: bool | torch.Tensor


class AttentionBackend:
    @classmethod
    def full_cls_name(cls):
        return cls.__module__, cls.__qualname__


class Builder:
    supports_update_block_table = True

    def __init__(self, kv_cache_spec, layer_names, vllm_config, device):
        self.layer_names, self.vllm_config, self.device = layer_names, vllm_config, device
        self.schedule = torch.zeros(1)

    @classmethod
    def get_cudagraph_support(cls, vllm_config, kv_cache_spec):
        return AttentionCGSupport.ALWAYS

    def build(self, common_prefix_len, common_attn_metadata, fast_build=False):
        common = common_attn_metadata
        if not fast_build:  # the real one keeps one buffer, too
            self.schedule.fill_(common.num_reqs)
        return Metadata(
            num_actual_tokens=common.num_actual_tokens,
            query_start_loc=common.query_start_loc,
            seq_lens=common.seq_lens,
            block_table=common.block_table_tensor,
            slot_mapping=common.slot_mapping,
            scheduler_metadata=None if fast_build else self.schedule,
            causal=common.causal,
        )

    def update_block_table(self, metadata, blk_table, slot_mapping):
        changed = copy.copy(metadata)
        changed.block_table, changed.slot_mapping = blk_table, slot_mapping
        return changed


class Impl:
    dcp_world_size = pcp_world_size = 1

    def __init__(
        self,
        num_heads,
        head_size,
        scale,
        num_kv_heads,
        alibi_slopes,
        sliding_window,
        kv_cache_dtype,
        logits_soft_cap=None,
        attn_type="decoder",
        kv_sharing_target_layer_name=None,
        sinks=None,
    ):
        self.num_heads, self.head_size, self.num_kv_heads = num_heads, head_size, num_kv_heads
        self.scale, self.logits_soft_cap, self.sinks = scale, logits_soft_cap or 0, sinks
        self.window = sliding_window
        self.calls = []

    def keys_and_values(self, layer, kv_cache):
        pages = kv_cache.transpose(1, 2)
        return pages[..., : self.head_size], pages[..., self.head_size :]

    def forward(
        self,
        layer,
        query,
        key,
        value,
        kv_cache,
        attn_metadata,
        output,
        output_scale=None,
        output_block_scale=None,
    ):
        if attn_metadata is None:
            return output.fill_(0)
        starts, lens = attn_metadata.query_start_loc.tolist(), attn_metadata.seq_lens.tolist()
        self.calls.append([end - first for first, end in itertools.pairwise(starts)])
        pages = self.keys_and_values(layer, kv_cache)
        for at, n_keys in enumerate(lens):
            first, end = starts[at], starts[at + 1]
            block = pages[0].shape[1]
            used = attn_metadata.block_table[at, : -(-n_keys // block)].long()
            own = [x[used].flatten(0, 1)[:n_keys].transpose(0, 1)[None] for x in pages]
            mask = AttentionMask(causal=True, offset=n_keys - (end - first), window=self.window)
            inputs = Inputs(
                query[first:end].transpose(0, 1)[None], *own, mask, self.scale, self.logits_soft_cap or None, self.sinks
            )
            output[first:end] = softmax_attention(inputs, query.dtype)[0][0].transpose(0, 1)
        return output


class CPUImpl(Impl):
    """Its pages hold their numbers backwards, keys and values in an order of their own."""

    def keys_and_values(self, layer, kv_cache):
        blocks, heads, block, both = kv_cache.shape
        halves = kv_cache.reshape(blocks, heads, 2, -1).unbind(2)
        shape = (blocks, heads, block, both // 2)
        return [
            (x.flip(-1) if turned else x).view(shape).transpose(1, 2) for x, turned in zip(halves, (1, 0), strict=True)
        ]


def cpu_attn_reshape_and_cache(key, value, key_cache, value_cache, slot_mapping, isa, **others):
    """Write keys and values [tokens, Hkv, D] into their pages [blocks, Hkv, block, D]."""
    block = key_cache.shape[2]
    for cache, rows, turned in ((key_cache, key, True), (value_cache, value, False)):
        for row, slot in zip(rows, slot_mapping.tolist(), strict=True):
            for head in range(cache.shape[1]):
                page = cache[slot // block, head].view(-1)
                places = torch.arange(row.shape[-1]) + slot % block * row.shape[-1]
                page[len(page) - 1 - places if turned else places] = row[head]


class Log:
    """Collects lines; ``info_once`` and ``warning_once`` drop those that were said before."""

    def __init__(self):
        self.lines = []

    def info(self, line, *arguments):
        self.lines.append(line % arguments if arguments else line)

    def info_once(self, line, *arguments, scope="local"):
        if line not in self.lines:
            self.info(line, *arguments)

    warning_once = info_once


class AttentionBackendEnum(Enum):
    FLASH_ATTN = "vllm.v1.attention.backends.flash_attn.FlashAttentionBackend"
    CPU_ATTN = "vllm.v1.attention.backends.cpu_attn.CPUAttentionBackend"


def new_registry():
    """An enumeration that grows at run time, as vLLM's does."""
    registry = Enum("AttentionBackendEnum", {x.name: x.value for x in AttentionBackendEnum}, module=__name__)

    def register(name, value):
        if name in registry._member_map_:
            raise ValueError(f"Backend {name} already exists")
        member = object.__new__(registry)
        member._name_, member._value_ = name, value
        registry._member_map_[name] = registry._value2member_map_[value] = member
        registry._member_names_.append(name)
        return member

    registry.register, registry.overrides = staticmethod(register), {}
    return registry


def install(monkeypatch, *, rank=0, ranks=1, wanted=None):
    """Put the modules in place for one test; answers the log, the registry and the current configuration."""
    log, registry = Log(), new_registry()
    config = SimpleNamespace(attention_config=SimpleNamespace(backend=wanted))
    parts = {
        "vllm": {},
        "vllm._custom_ops": {"cpu_attn_reshape_and_cache": cpu_attn_reshape_and_cache},
        "vllm.config": {"get_current_vllm_config": lambda: config},
        "vllm.distributed": {
            "get_tensor_model_parallel_rank": lambda: rank,
            "get_tensor_model_parallel_world_size": lambda: ranks,
        },
        "vllm.logger": {"init_logger": lambda name: log},
        "vllm.v1": {},
        "vllm.v1.attention": {},
        "vllm.v1.attention.backend": {
            "AttentionCGSupport": AttentionCGSupport,
            "CommonAttentionMetadata": CommonAttentionMetadata,
        },
        "vllm.v1.attention.backends": {},
        "vllm.v1.attention.backends.registry": {
            "AttentionBackendEnum": registry,
            "register_backend": lambda backend, path: registry.overrides.update({backend.name: path}),
        },
        "vllm.v1.attention.backends.flash_attn": {
            "FlashAttentionBackend": AttentionBackend,
            "FlashAttentionImpl": Impl,
            "FlashAttentionMetadataBuilder": Builder,
        },
        "vllm.v1.attention.backends.cpu_attn": {
            "CPUAttentionBackend": AttentionBackend,
            "CPUAttentionBackendImpl": CPUImpl,
            "CPUAttentionMetadataBuilder": Builder,
        },
    }
    for name, attributes in parts.items():
        module = ModuleType(name)
        vars(module).update(attributes)
        monkeypatch.setitem(sys.modules, name, module)
        parent, _, own = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], own, module)
    for name in ("cuda", "cpu"):
        monkeypatch.setitem(sys.modules, f"s2o_compile.vllm.{name}", None)  # so that its end forgets the module
        del sys.modules[f"s2o_compile.vllm.{name}"]
    return SimpleNamespace(log=log, registry=registry, config=config)


def common_of(served, *, prefilling=None, **changes):
    """The metadata that vLLM's runner makes of a batch."""
    starts = torch.tensor(served.starts, dtype=torch.int32)
    lens = torch.tensor(served.seq_lens, dtype=torch.int32)
    queries = (starts[1:] - starts[:-1]).tolist()
    common = CommonAttentionMetadata(
        query_start_loc=starts.to(served.device),
        query_start_loc_cpu=starts,
        seq_lens=lens.to(served.device),
        num_reqs=len(served.lengths),
        num_actual_tokens=served.starts[-1],
        max_query_len=max(queries),
        max_seq_len=max(served.seq_lens),
        block_table_tensor=served.block_table,
        slot_mapping=torch.arange(served.starts[-1], device=served.device),
        is_prefilling=None if prefilling is None else torch.tensor(prefilling),
        seq_lens_cpu_upper_bound=lens,
    )
    return replace(common, **changes)


def config_of(layers, *, kv_heads=2):
    """A configuration of vLLM with these layers, by name."""
    return SimpleNamespace(
        compilation_config=SimpleNamespace(static_forward_context=layers),
        model_config=SimpleNamespace(model="some/model", dtype=torch.float32, get_total_num_kv_heads=lambda: kv_heads),
    )
