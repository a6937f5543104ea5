"""S2O in front of a metadata builder of vLLM: divides batches on the host, and says once what runs sparse."""

from __future__ import annotations

import dataclasses
from collections import Counter
from functools import cache
from typing import Any

import torch

from s2o_compile.config import S2OConfig, unknown_name
from s2o_compile.kernels.core.head_shards import WHOLE, HeadShard
from s2o_compile.kernels.core.plan import TILE_LEN
from s2o_compile.kernels.core.tuned import LONG, shortest_sparse, why_never
from s2o_compile.serving.batch import Batch
from s2o_compile.serving.counters import Counters
from s2o_compile.serving.heads import for_rank, has_heads
from s2o_compile.vllm.implementation import Division, Site, SparsePrefill
from s2o_compile.vllm.plugin import server_config


class SparseBuilder:
    """Stands before a metadata builder of vLLM's in the bases of a class."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:  # noqa: ANN401 (vLLM's own)
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)  # pyright: ignore[reportCallIssue]
        config, layers = server_config(), vllm_config.compilation_config.static_forward_context
        attentions = {name: layer for name, layer in layers.items() if hasattr(layer, "impl")}
        bind(attentions, config, vllm_config.model_config)
        self._device, self._dtype = device, vllm_config.model_config.dtype
        self._shortest = shortest_sparse(config.min_seq_len, device, self._dtype)
        # Builders that vLLM derives from this one (local attention, static sinks) change the requests on the way.
        self._plain = type(self).__module__.startswith("s2o_compile.")
        own = (attentions[name].impl for name in layer_names if name in attentions)
        self._wanted = self._plain and any(isinstance(x, SparsePrefill) and not x.dense_reason for x in own)
        never = why_never(LONG, config.min_seq_len, device, self._dtype)
        say(attentions, config, self._shortest, never, vllm_config.model_config.model)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:  # noqa: ANN401
        """The parent's metadata, with a `Division` as ``s2o`` if any request's prefill is long."""
        counters().flush()
        metadata = super().build(common_prefix_len, common_attn_metadata, fast_build)  # pyright: ignore[reportAttributeAccessIssue]
        batch = self._divide(common_attn_metadata)
        metadata.s2o = None if batch is None else self._division(batch, common_attn_metadata)
        return metadata

    def update_block_table(self, metadata: Any, blk_table: torch.Tensor, slot_mapping: torch.Tensor) -> Any:  # noqa: ANN401
        """The parent's copy with other blocks; the metadata of the other requests changes with it."""
        update = super().update_block_table  # pyright: ignore[reportAttributeAccessIssue]
        changed, division = update(metadata, blk_table, slot_mapping), metadata.s2o
        if division is not None and division.other_metadata is not None:
            rows, requests = division.other_rows, division.other_requests
            others = update(division.other_metadata, blk_table[requests], slot_mapping[rows])
            changed.s2o = dataclasses.replace(division, other_metadata=others)
        return changed

    def _divide(self, common: Any) -> Batch | None:  # noqa: ANN401
        """The batch, if any of its requests runs sparse."""
        special = (getattr(common, name, None) for name in ("mm_req_doc_ranges", "rswa_prefix_lens"))
        short = common.max_query_len < TILE_LEN or common.max_seq_len < self._shortest
        if not self._wanted or short or common.causal is not True or any(x is not None for x in special):
            return None
        bound = common.seq_lens_cpu_upper_bound  # exact for requests that are prefilling
        seq_lens = (common.seq_lens if bound is None else bound).tolist()
        batch = Batch.divide(common.query_start_loc_cpu.tolist(), seq_lens, self._shortest, self._device, self._dtype)
        if common.is_prefilling is not None:
            prefilling = common.is_prefilling.tolist()
            batch = dataclasses.replace(batch, sparse=[at for at in batch.sparse if prefilling[at]])
        return batch if batch.sparse else None

    def _division(self, batch: Batch, common: Any) -> Division:  # noqa: ANN401
        device, others = common.seq_lens.device, batch.others
        other_requests = torch.tensor(others, dtype=torch.int64, device=device)
        other_rows, starts = batch.rows_of(others, device), batch.starts_of(others)
        metadata = None
        if others:
            lens = [batch.seq_lens[at] for at in others]
            on_host = torch.tensor(starts, dtype=torch.int32)
            metadata = super().build(  # pyright: ignore[reportAttributeAccessIssue]
                0,
                type(common)(
                    query_start_loc=on_host.to(device),
                    query_start_loc_cpu=on_host,
                    seq_lens=common.seq_lens[other_requests],
                    num_reqs=len(others),
                    num_actual_tokens=starts[-1],
                    max_query_len=max(map(batch.n_queries, others)),
                    max_seq_len=max(lens),
                    block_table_tensor=common.block_table_tensor[other_requests],
                    slot_mapping=common.slot_mapping[other_rows],
                    causal=True,
                    seq_lens_cpu_upper_bound=torch.tensor(lens, dtype=torch.int32),
                ),
                True,  # a schedule made ahead would overwrite that of the whole batch
            )
        return Division(
            requests=torch.tensor(batch.sparse, dtype=torch.int64, device=device),
            rows=batch.rows_of(batch.sparse, device),
            starts=batch.starts_of(batch.sparse),
            seq_lens=batch.sparse_seq_lens,
            other_requests=other_requests,
            other_rows=other_rows,
            other_metadata=metadata,
            n_others=starts[-1],
        )


def bind(attentions: dict[str, Any], config: S2OConfig, model_config: Any) -> None:  # noqa: ANN401
    """Tell every implementation its layer's name, and the settings of the heads that this rank holds."""
    rank = _rank() if has_heads(config) else WHOLE
    for number, (name, layer) in enumerate(attentions.items()):
        impl = layer.impl
        if not isinstance(impl, SparsePrefill) or impl.s2o_site is not None:
            continue
        site, own = site_of(name), config
        if has_heads(config) and not impl.dense_reason:
            kv_heads = model_config.get_total_num_kv_heads()
            own = for_rank(config, site, impl.num_heads, impl.num_kv_heads, kv_heads, rank)  # pyright: ignore[reportAttributeAccessIssue]
        impl.s2o_site = Site(number=number, name=site, config=own, counters=counters())


def say(attentions: dict[str, Any], config: S2OConfig, shortest: int, never: str, model: str) -> None:
    """One line for each model in vLLM's log: what runs sparse, and why the rest does not."""
    from vllm.logger import init_logger

    logger = init_logger("vllm.s2o")
    impls = [layer.impl for layer in attentions.values()]
    if not any(isinstance(impl, SparsePrefill) for impl in impls):
        return
    reasons = Counter(
        impl.dense_reason if isinstance(impl, SparsePrefill) else f"another backend ({type(impl).__name__})"
        for impl in impls
    )
    sparse = reasons.pop("", 0)
    line = f"S2O: {sparse} of {len(impls)} attention layers of {model} run prefills of {shortest} keys or more sparse"
    line += f" ({config.quality}); decode, shorter requests and fewer than {TILE_LEN} queries are dense"
    dense = "".join(f"; {count} dense for {reason}" for reason, count in reasons.items())
    logger.info_once(f"S2O: no attention layer of {model} runs sparse: {never}" if never else line + dense)
    names = {site_of(name) for name in attentions}
    for field in ("dense_heads", "site_tau"):
        for site in getattr(config, field):
            if site not in names:
                logger.warning_once(f"S2O: {field}: {unknown_name('site', site, sorted(names))}")


def site_of(layer_name: str) -> str:
    """The module that holds vLLM's layer, which is the attention of the model as others write it."""
    return layer_name.removesuffix(".attn")


@cache
def counters() -> Counters:
    """The counters of this process, in vLLM's log."""
    from vllm.logger import init_logger

    return Counters(init_logger("vllm.s2o").info)


def _rank() -> HeadShard:
    from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size

    return HeadShard(get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size())
