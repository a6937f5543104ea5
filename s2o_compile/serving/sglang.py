"""S2O as an attention backend of SGLang 0.5.23: ``--attention-backend s2o``, or ``--prefill-attention-backend s2o``.

SGLang finds `register` by the entry point group ``sglang.srt.plugins``. The backend is one of SGLang's own, named by
``S2O_SGLANG_DENSE`` ("fa3", "triton", ...), whose long prefills are sparse.
"""

from __future__ import annotations

import logging
import os
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor

from s2o_compile.config import S2OConfig, unknown_name
from s2o_compile.errors import ImplementationUnavailableError, OptionError
from s2o_compile.kernels.core.head_shards import HeadShard
from s2o_compile.kernels.core.plan import TILE_LEN
from s2o_compile.kernels.core.tuned import LONG, shortest_sparse, why_never
from s2o_compile.serving.batch import Batch
from s2o_compile.serving.counters import Counters
from s2o_compile.serving.heads import for_rank, has_heads
from s2o_compile.serving.options import config_from_environment
from s2o_compile.varlen import attention_paged

NAME = "s2o"
DENSE = "S2O_SGLANG_DENSE"
"""Environment variable with the name of the backend that runs everything else; by default "triton"."""

logger = logging.getLogger(__name__)


def register() -> None:
    """Makes the backend known; every process does it, some several times.

    Raises:
        OptionError: An environment variable has a value that it cannot take.
    """
    from sglang.srt import server_args
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS, register_attention_backend

    config_from_environment()
    if NAME not in ATTENTION_BACKENDS:
        register_attention_backend(NAME)(create)
    if NAME not in server_args.ATTENTION_BACKEND_CHOICES:
        server_args.add_attention_backend_choices([NAME])


def create(runner: Any) -> Any:  # noqa: ANN401 (SGLang's)
    """The dense backend of a model runner, whose long prefills become sparse.

    Raises:
        OptionError: ``S2O_SGLANG_DENSE`` names no backend.
        ImplementationUnavailableError: The model has latent attention (MLA), its cache is spread over ranks, or the
            numbers of its tokens are no places in the cache.
    """
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
    from sglang.srt.runtime_context import get_parallel

    dense = os.environ.get(DENSE) or "triton"
    if dense == NAME or dense not in ATTENTION_BACKENDS:
        raise OptionError(f"{DENSE}: {unknown_name('backend', dense, sorted({*ATTENTION_BACKENDS} - {NAME}))}")
    ranks, unified = get_parallel(), runner.kv_index_translator.is_translating
    spread = max(ranks.attn_cp_size, ranks.attn_dcp_size) > 1
    reasons = ("MLA", runner.use_mla_backend), ("context parallelism", spread), ("--enable-unified-memory", unified)
    for name, refused in reasons:
        if refused:
            raise ImplementationUnavailableError(
                f"SGLang's backend {NAME!r}: expected keys and values of all tokens in this rank's cache, got {name}. "
                f"Choose --attention-backend {dense}."
            )
    backend = ATTENTION_BACKENDS[dense](runner)
    # The instance stays SGLang's own, with its graphs, metadata and decode; only its prefill is ours.
    backend.__class__ = type(f"S2O{type(backend).__name__}", (SparseExtend, type(backend)), {})
    backend.s2o_prepare(runner, dense)
    return backend


class SparseExtend:
    """Stands before the class of a dense backend of SGLang."""

    def s2o_prepare(self, runner: Any, dense: str) -> None:  # noqa: ANN401 (SGLang's)
        """Keep what the runner knows."""
        self._config, self._runner, self._dense = config_from_environment(), runner, dense
        self._sites: dict[int, S2OConfig] = {}
        self._said: set[str] = set()

    def forward_extend(
        self, q: Tensor, k: Tensor | None, v: Tensor | None, layer: Any, forward_batch: Any,  # noqa: ANN401 (SGLang's)
        save_kv_cache: bool = True, **kwargs: Any,  # noqa: ANN401 (SGLang's)
    ) -> Tensor:  # fmt: skip
        """Attention of a batch that extends its requests; sparse if any request's prefill is long.

        Args:
            q: [tokens, Hq * D].
            k: [tokens, Hkv, D], for the cache; None if the layer reads that of another.
            v: [tokens, Hkv, D].
            layer: SGLang's RadixAttention.
            forward_batch: SGLang's batch.
            save_kv_cache: Whether keys and values are to be written to the cache.
            **kwargs: ``sinks``; anything else is the dense backend's.
        """
        reason = why_dense(layer, forward_batch, len(q), kwargs) or self._cache_reason(layer, q)
        self._say(layer, reason, q)
        batch = None if reason else self._divide(forward_batch, q)
        if batch is None:
            return super().forward_extend(  # pyright: ignore[reportAttributeAccessIssue]
                q, k, v, layer, forward_batch, save_kv_cache=save_kv_cache, **kwargs
            )
        pool = self._runner.token_to_kv_pool
        if save_kv_cache and k is not None:
            pool.set_kv_buffer(layer, forward_batch.out_cache_loc, k, v)
        # A token is a page: the table of SGLang's tokens is read as it is, whatever --page-size says.
        cache = tuple(x[:, None] for x in pool.get_kv_buffer(layer.layer_id))
        table = self._runner.req_to_token_pool.req_to_token[forward_batch.req_pool_indices, : max(batch.seq_lens)]
        others = batch.starts_of(batch.others)[-1]
        with counters().counting(layer.layer_id, batch.starts[-1] - others, others):
            output = attention_paged(
                q.view(-1, layer.tp_q_head_num, layer.qk_head_dim), cache, table, batch.starts, batch.seq_lens,
                scale=layer.scaling, softcap=layer.logit_cap or None, sinks=kwargs.get("sinks"),
                config=self._config_of(layer), site=site_of(layer),
            )  # fmt: skip
        counters().flush()
        return cast(Tensor, output).reshape(q.shape[0], -1)

    def _divide(self, forward_batch: Any, q: Tensor) -> Batch | None:  # noqa: ANN401 (SGLang's)
        """The batch, if any of its requests runs sparse."""
        extended, cached = forward_batch.extend_seq_lens_cpu, forward_batch.extend_prefix_lens_cpu
        starts = [0]
        for queries in extended:
            starts.append(starts[-1] + int(queries))
        seq_lens = [int(keys) + int(queries) for keys, queries in zip(cached, extended, strict=True)]
        batch = Batch.divide(starts, seq_lens, self._config.min_seq_len, q.device, q.dtype)
        return batch if batch.sparse else None

    def _cache_reason(self, layer: Any, q: Tensor) -> str:  # noqa: ANN401 (SGLang's)
        key = self._runner.token_to_kv_pool.get_key_buffer(layer.layer_id)
        if key.dim() != 3:
            return f"a cache of {key.dim()} dimensions, not [tokens, heads, D]"
        return "" if key.dtype is q.dtype else f"a cache of {key.dtype} beside queries of {q.dtype}"

    def _config_of(self, layer: Any) -> S2OConfig:  # noqa: ANN401 (SGLang's)
        if not has_heads(self._config):
            return self._config
        if layer.layer_id not in self._sites:
            from sglang.srt.runtime_context import get_parallel

            rank = HeadShard(get_parallel().attn_tp_rank, get_parallel().attn_tp_size)
            kv_heads = self._runner.model_config.get_total_num_kv_heads()
            self._sites[layer.layer_id] = for_rank(
                self._config, site_of(layer), layer.tp_q_head_num, layer.tp_k_head_num, kv_heads, rank
            )
        return self._sites[layer.layer_id]

    def _say(self, layer: Any, reason: str, q: Tensor) -> None:  # noqa: ANN401 (SGLang's)
        """Say once from which length on prefills run sparse, and of each reason which layer it was first found at.

        Lengths depend on dtype and device, which the first prefill brings.
        """
        if reason in self._said:
            return
        self._said.add(reason)
        given = self._config.min_seq_len, q.device, q.dtype
        never = why_never(LONG, *given)
        if reason:
            logger.info("S2O: layer %s and others like it run by %s: %s", layer.layer_id, self._dense, reason)
        elif never:
            logger.info("S2O: no prefill runs sparse: %s; all runs by %s", never, self._dense)
        else:
            logger.info(
                "S2O: prefills of %s keys or more run sparse (%s); all else runs by %s",
                max(shortest_sparse(*given), TILE_LEN), self._config.quality, self._dense,
            )  # fmt: skip


def why_dense(layer: Any, forward_batch: Any, n_queries: int, kwargs: dict[str, Any]) -> str:  # noqa: ANN401 (SGLang's)
    """Why a call cannot run sparse whatever its lengths are; empty if it can."""
    others = sorted(name for name, value in kwargs.items() if name != "sinks" and value is not None)
    mode, kind = forward_batch.forward_mode.name, getattr(layer.attn_type, "value", layer.attn_type)
    window = layer.sliding_window_size
    reasons = {
        f"{kind} attention": kind != "decoder",
        "cross attention": layer.is_cross_attention,
        f"a sliding window of {window} tokens, which is short anyway": window is not None and window >= 0,
        "local attention in chunks": layer.use_irope,
        f"a softcap by {layer.logit_capping_method}": bool(layer.logit_cap) and layer.logit_capping_method != "tanh",
        "temperatures by position": layer.xai_temperature_len > 0,
        f"heads of {layer.qk_head_dim} beside values of {layer.v_head_dim}": layer.qk_head_dim != layer.v_head_dim,
        f"the arguments {', '.join(others)}": bool(others),
        f"the mode {mode}": mode not in ("EXTEND", "MIXED"),
        "lengths that the host does not know": None
        in (forward_batch.extend_seq_lens_cpu, forward_batch.extend_prefix_lens_cpu),
        "queries of no request": sum(forward_batch.extend_seq_lens_cpu or ()) != n_queries,
        "speculative decoding": forward_batch.spec_info is not None,
        "a log-sum-exp": bool(forward_batch.mha_return_lse),
        "a mask of its own": forward_batch.cross_attention_custom_mask is not None,
        "a CUDA graph": torch.cuda.is_available() and torch.cuda.is_current_stream_capturing(),
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


def site_of(layer: Any) -> str:  # noqa: ANN401 (SGLang's)
    """The attention as `s2o_compile.explain` names it in most models: a layer of SGLang knows its number alone."""
    return f"model.layers.{layer.layer_id}.self_attn"


@cache
def counters() -> Counters:
    """The counters of this process, in SGLang's log."""
    return Counters(logger.info)
