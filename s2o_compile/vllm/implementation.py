"""S2O in front of an attention implementation of vLLM: long prefills are sparse, everything else is the parent's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor

from s2o_compile.config import S2OConfig
from s2o_compile.kernels.core.validation import MAX_HEAD_DIM
from s2o_compile.serving.counters import Counters
from s2o_compile.varlen import attention_paged

PLAIN_CACHES = ("auto", "float16", "bfloat16", "float32")
"""Cache dtypes whose numbers are keys and values as they are."""


@dataclass(frozen=True, kw_only=True)
class Division:
    """What of a batch is sparse, on the device; `SparseBuilder` attaches it to the parent's metadata as ``s2o``.

    Attributes:
        requests: int64 [S], the sparse requests.
        rows: Their queries among the batch's: a slice, or int64 [T].
        starts: Where each of them begins among these queries, and how many these are.
        seq_lens: Keys of each.
        other_requests: int64, all other requests.
        other_rows: The queries of the other requests.
        other_metadata: The parent's metadata over the other requests alone; None if there is none.
        n_others: Queries of the other requests.
    """

    requests: Tensor
    rows: Tensor | slice
    starts: list[int]
    seq_lens: list[int]
    other_requests: Tensor
    other_rows: Tensor | slice
    other_metadata: Any
    n_others: int


@dataclass(frozen=True, kw_only=True)
class Site:
    """What `SparseBuilder` tells an implementation about its layer.

    Attributes:
        number: Of the layer in the model.
        name: As `s2o_compile.explain` names it.
        config: With the settings of the heads that are here.
        counters: Where calls are counted.
    """

    number: int
    name: str
    config: S2OConfig
    counters: Counters


class SparsePrefill:
    """Stands before an implementation of vLLM's in the bases of a class.

    Attributes:
        dense_reason: Why the layer never runs sparse; empty if it does.
        s2o_site: The layer, once a builder has seen it.
    """

    def __init__(
        self, num_heads: int, head_size: int, scale: float, num_kv_heads: int, alibi_slopes: list[float] | None,
        sliding_window: int | None, kv_cache_dtype: str, logits_soft_cap: float | None = None,
        attn_type: str = "decoder", kv_sharing_target_layer_name: str | None = None, **others: Any,  # noqa: ANN401
    ) -> None:  # fmt: skip
        given = (num_heads, head_size, scale, num_kv_heads, alibi_slopes, sliding_window, kv_cache_dtype)
        rest = (logits_soft_cap, attn_type, kv_sharing_target_layer_name)
        super().__init__(*given, *rest, **others)  # pyright: ignore[reportCallIssue]
        self._scale, self._softcap = float(scale), logits_soft_cap or None
        self._sinks = others.get("sinks")
        self.s2o_site: Site | None = None
        self.dense_reason = self._why_dense(attn_type, alibi_slopes, sliding_window, kv_cache_dtype, head_size, others)

    def _why_dense(
        self, attn_type: str, alibi_slopes: list[float] | None, sliding_window: int | None, kv_cache_dtype: str,
        head_size: int, others: dict[str, Any],
    ) -> str:  # fmt: skip
        unknown = sorted(name for name, value in others.items() if name != "sinks" and value is not None)
        ranks = max(getattr(self, f"{kind}_world_size", 1) for kind in ("dcp", "pcp"))
        reasons = {
            f"{getattr(attn_type, 'value', attn_type)} attention": attn_type != "decoder",
            "ALiBi": alibi_slopes is not None,
            f"a sliding window of {sliding_window} tokens, which is short anyway": sliding_window is not None,
            f"a cache of {kv_cache_dtype}": kv_cache_dtype not in PLAIN_CACHES,
            f"a head dim of {head_size}, above {MAX_HEAD_DIM}": head_size > MAX_HEAD_DIM,
            "keys that are spread over ranks (context parallelism)": ranks > 1,
            f"the arguments {', '.join(unknown)}": bool(unknown),
        }
        return next((reason for reason, holds in reasons.items() if holds), "")

    def s2o_pages(self, layer: Any, kv_cache: Tensor, block_table: Tensor, seq_lens: list[int]) -> Any:  # noqa: ANN401
        """The cache and the block table as `attention_paged` takes them."""
        return kv_cache, block_table

    def forward(
        self, layer: Any, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor, attn_metadata: Any,  # noqa: ANN401
        output: Tensor, output_scale: Tensor | None = None, output_block_scale: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Attention of a batch: its long prefills by S2O, the other requests by the parent.

        Args:
            layer: The layer.
            query: [tokens, Hq, D].
            key: [tokens, Hkv, D], in the cache already.
            value: [tokens, Hkv, D], in the cache already.
            kv_cache: The layer's cache.
            attn_metadata: The parent's metadata, with a `Division` if anything is sparse.
            output: [tokens, Hq, D], gets the result.
            output_scale: Of quantized outputs, which are the parent's.
            output_block_scale: Of quantized outputs, which are the parent's.
        """
        division: Division | None = getattr(attn_metadata, "s2o", None)
        site, scales = self.s2o_site, (output_scale, output_block_scale)
        if division is None or site is None or self.dense_reason or scales != (None, None):
            return super().forward(  # pyright: ignore[reportAttributeAccessIssue]
                layer, query, key, value, kv_cache, attn_metadata, output, *scales
            )
        if division.other_metadata is not None:
            rows = division.other_rows
            others = output[rows]  # a view of a slice, else a copy
            super().forward(  # pyright: ignore[reportAttributeAccessIssue]
                layer, query[rows], *(x if x is None else x[rows] for x in (key, value)), kv_cache,
                division.other_metadata, others,
            )  # fmt: skip
            if isinstance(rows, Tensor):
                output[rows] = others
        with site.counters.counting(site.number, division.starts[-1], division.n_others):
            self._attend(layer, query, kv_cache, attn_metadata.block_table, output, division, site)
        return output

    def _attend(
        self, layer: Any, query: Tensor, kv_cache: Tensor, block_table: Tensor, output: Tensor, division: Division,  # noqa: ANN401
        site: Site,
    ) -> None:  # fmt: skip
        rows = division.rows
        cache, table = self.s2o_pages(layer, kv_cache, block_table[division.requests], division.seq_lens)
        attended = attention_paged(
            query[rows], cache, table, division.starts, division.seq_lens, scale=self._scale, softcap=self._softcap,
            sinks=self._sinks, out=output[rows] if isinstance(rows, slice) else None, config=site.config,
            site=site.name,
        )  # fmt: skip
        if isinstance(rows, Tensor):
            output[rows] = cast(Tensor, attended)
