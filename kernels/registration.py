"""``s2o::attention``: the operator as one opaque node that torch.compile keeps whole.

Opaque on purpose: which path runs (S2O, sliding window, dense) is decided from lengths inside, so a graph needs no
guard and no recompilation. Inference only: the public function and the graph pass send anything that wants gradients
to dense SDPA.
"""

from __future__ import annotations

import torch
from torch import Tensor

from s2o_compile.kernels.layout import empty_output
from s2o_compile.kernels.mask import AttentionMask
from s2o_compile.kernels.operator import run
from s2o_compile.kernels.options import OperatorOptions

_DEFAULT = OperatorOptions()


@torch.library.custom_op("s2o::attention", mutates_args=())
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None = None,
    *,
    causal: bool = False,
    causal_offset: int | None = None,
    window: int | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    tau: float = _DEFAULT.tau,
    min_seq_len: int = _DEFAULT.min_seq_len,
    segment_len: int | None = _DEFAULT.segment_len,
    ranking: str = _DEFAULT.ranking,
    query_order: str = _DEFAULT.query_order,
    implementation: str = _DEFAULT.implementation,
    site: str = "",
) -> tuple[Tensor, Tensor]:
    """Sparse attention by ranked keys and early stop; see ``s2o_compile.attention`` for the arguments.

    Returns:
        Output [B, Hq, Nq, D] with SDPA's layout, and the log-sum-exp float32 [B, Hq, Nq], empty unless asked for.
    """
    options = OperatorOptions(
        tau=tau,
        min_seq_len=min_seq_len,
        segment_len=segment_len,
        ranking=ranking,
        query_order=query_order,
        implementation=implementation,
    )
    offset = key.shape[-2] - query.shape[-2] if causal_offset is None else causal_offset
    mask = AttentionMask(causal=causal, offset=offset if causal else 0, window=window, key_mask=key_mask)
    output, lse = run(query, key, value, mask, scale=scale, return_lse=return_lse, options=options, site=site)
    return output, query.new_empty(0, dtype=torch.float32) if lse is None else lse


@attention.register_fake
def _(query: Tensor, *_: object, return_lse: bool = False, **__: object) -> tuple[Tensor, Tensor]:
    shape = query.shape[:3] if return_lse else (0,)
    return empty_output(query), query.new_empty(shape, dtype=torch.float32)
