"""The part of SGLang 0.5.23 that the plugin meets, written anew: registry, runner, pools, batch, layer, ranks.

PyPI's wheel was read for it, in ``sglang/srt``: ``plugins``, ``arg_groups/choices.py``, ``runtime_context.py``,
``layers/radix_attention.py``, ``layers/attention/{attention_registry,base_attn_backend,triton_backend}.py``,
``mem_cache/{memory_pool,kv_index_translator}.py`` and ``model_executor/{forward_batch_info,model_runner}.py``.
"""

import sys
from enum import Enum, IntEnum, auto
from types import ModuleType, SimpleNamespace

import torch

from s2o_compile.kernels.core.mask import AttentionMask
from tests.conftest import Inputs, softmax_attention
from tests.helpers.served import HEADS, KV_HEADS


class AttentionType(Enum):
    DECODER = "decoder"
    DECODER_BIDIRECTIONAL = "decoder_bidirectional"
    ENCODER_ONLY = "encoder_only"


class ForwardMode(IntEnum):
    EXTEND = auto()
    DECODE = auto()
    MIXED = auto()
    IDLE = auto()
    TARGET_VERIFY = auto()


class AttentionBackend:
    """SGLang's base, as far as this goes."""

    def init_forward_metadata(self, forward_batch):
        raise NotImplementedError

    def forward(self, q, k, v, layer, forward_batch, save_kv_cache=True, **kwargs):
        if forward_batch.forward_mode is ForwardMode.IDLE:
            return q.new_empty(len(q), layer.tp_q_head_num * layer.v_head_dim)
        decodes = forward_batch.forward_mode is ForwardMode.DECODE
        extend_or_decode = self.forward_decode if decodes else self.forward_extend
        return extend_or_decode(q, k, v, layer, forward_batch, save_kv_cache=save_kv_cache, **kwargs)

    def get_cuda_graph_seq_len_fill_value(self):
        raise NotImplementedError


class DenseBackend(AttentionBackend):
    """A backend that computes one request after the other."""

    def __init__(self, runner):
        self.runner, self.calls = runner, []

    def init_forward_metadata(self, forward_batch):
        self.forward_metadata = forward_batch

    def get_cuda_graph_seq_len_fill_value(self):
        return 1

    def forward_extend(
        self, q, k, v, layer, forward_batch, save_kv_cache=True, sinks=None, score_mod=None, aux_tensors=None
    ):
        pool, queries = self.runner.token_to_kv_pool, forward_batch.extend_seq_lens_cpu
        if save_kv_cache:
            pool.set_kv_buffer(layer, forward_batch.out_cache_loc, k, v)
        self.calls.append(list(queries))
        key, value = pool.get_kv_buffer(layer.layer_id)
        output, first = torch.empty_like(q).view(-1, layer.tp_q_head_num, layer.qk_head_dim), 0
        for row, cached, n in zip(
            forward_batch.req_pool_indices, forward_batch.extend_prefix_lens_cpu, queries, strict=True
        ):
            tokens = self.runner.req_to_token_pool.req_to_token[row, : cached + n].long()
            one = q.view_as(output)[first : first + n].transpose(0, 1)[None]
            own = [x[tokens].transpose(0, 1)[None] for x in (key, value)]
            window = None if layer.sliding_window_size < 0 else layer.sliding_window_size + 1
            mask = AttentionMask(causal=True, offset=cached, window=window)
            inputs = Inputs(one, *own, mask, layer.scaling, layer.logit_cap or None, sinks)
            output[first : first + n] = softmax_attention(inputs, q.dtype)[0][0].transpose(0, 1)
            first += n
        return output.view_as(q)

    def forward_decode(self, q, k, v, layer, forward_batch, save_kv_cache=True):
        self.calls.append("decode")
        return torch.empty_like(q)


class Pool:
    """Keys and values by token, [tokens, Hkv, D]."""

    def __init__(self, key, value):
        self.buffers = key, value

    def get_kv_buffer(self, layer_id):
        return self.buffers

    def get_key_buffer(self, layer_id):
        return self.buffers[0]

    def set_kv_buffer(self, layer, loc_info, cache_k, cache_v, k_scale=None, v_scale=None):
        for buffer, rows in zip(self.buffers, (cache_k, cache_v), strict=True):
            buffer[loc_info] = rows


def layer_of(served, **changes):
    """A RadixAttention."""
    fields = {
        "tp_q_head_num": HEADS,
        "tp_k_head_num": KV_HEADS,
        "qk_head_dim": served.head_dim,
        "v_head_dim": served.head_dim,
        "scaling": served.inputs[0].scale,
        "layer_id": 0,
        "logit_cap": served.inputs[0].softcap or 0.0,
        "sliding_window_size": -1,
        "is_cross_attention": False,
        "use_irope": False,
        "attn_type": AttentionType.DECODER,
        "logit_capping_method": "tanh",
        "xai_temperature_len": -1,
    }
    return SimpleNamespace(**fields | changes)


def runner_and_batch(served, *, page_size, mode=ForwardMode.EXTEND):
    """A model runner whose cache lacks what the batch brings, and the batch."""
    rows = [x.flatten(0, 1).clone() for x in served.pages]
    longest = max(served.seq_lens)
    position = torch.arange(longest)
    own = served.block_table.long()[:, position // served.block] * served.block + position % served.block
    requests = torch.randperm(len(served.lengths) + 2)[: len(served.lengths)]
    table = torch.full((len(served.lengths) + 2, longest + 9), 10**6, dtype=torch.int32)  # never in the cache
    for request, tokens, keys in zip(requests, own, served.seq_lens, strict=True):
        table[request, :keys] = tokens[:keys].int()
    new = [own[at, keys - queries : keys] for at, (queries, keys) in enumerate(served.lengths)]
    locations = torch.cat(new)
    for buffer in rows:
        buffer[locations] = torch.nan
    runner = SimpleNamespace(
        token_to_kv_pool=Pool(*rows),
        req_to_token_pool=SimpleNamespace(req_to_token=table),
        model_config=SimpleNamespace(num_attention_heads=HEADS, get_total_num_kv_heads=lambda: KV_HEADS),
        page_size=page_size,
        use_mla_backend=False,
        kv_index_translator=SimpleNamespace(is_translating=False),
    )
    batch = SimpleNamespace(
        forward_mode=mode,
        req_pool_indices=requests,
        out_cache_loc=locations,
        extend_seq_lens_cpu=[queries for queries, _ in served.lengths],
        extend_prefix_lens_cpu=[keys - queries for queries, keys in served.lengths],
        spec_info=None,
        mha_return_lse=False,
        cross_attention_custom_mask=None,
    )
    return runner, batch


def install(monkeypatch):
    """Put the modules in place for one test; answers the registry, the list of choices, and the ranks."""
    ranks = SimpleNamespace(attn_tp_rank=0, attn_tp_size=1, attn_cp_size=1, attn_dcp_size=1)
    backends, choices = {"triton": DenseBackend, "fa3": DenseBackend}, ["triton", "fa3"]

    def register_attention_backend(name):
        def decorate(create):
            backends[name] = create
            return create

        return decorate

    parts = {
        "sglang": {},
        "sglang.srt": {},
        "sglang.srt.server_args": {
            "ATTENTION_BACKEND_CHOICES": choices,
            "add_attention_backend_choices": choices.extend,
        },
        "sglang.srt.runtime_context": {"get_parallel": lambda: ranks},
        "sglang.srt.layers": {},
        "sglang.srt.layers.attention": {},
        "sglang.srt.layers.attention.attention_registry": {
            "ATTENTION_BACKENDS": backends,
            "register_attention_backend": register_attention_backend,
        },
    }
    for name, attributes in parts.items():
        module = ModuleType(name)
        vars(module).update(attributes)
        monkeypatch.setitem(sys.modules, name, module)
        parent, _, own = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], own, module)
    return backends, choices, ranks
