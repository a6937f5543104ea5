"""STAND-IN, to be deleted: `attention_paged` of the public face takes its place, with the same arguments.

It gathers the pages of each sequence into tensors and attends to them by `torch.ops.s2o.attention`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

import s2o_compile.kernels.ops  # noqa: F401  (defines torch.ops.s2o)
from s2o_compile.config import S2OConfig


def attention_paged(
    query: Tensor, kv_cache: Tensor | tuple[Tensor, Tensor], block_table: Tensor, cu_seqlens_q: Sequence[int],
    seq_lens: Sequence[int], *, causal: bool = True, scale: float | None = None, softcap: float | None = None,
    sinks: Tensor | None = None, config: S2OConfig | None = None, out: Tensor | None = None, site: str = "",
) -> Tensor:  # fmt: skip
    """Attention of packed queries [T, Hq, D] over pages, [T, Hq, Dv]; ``out`` gets it if given."""
    options = (config or S2OConfig()).operator_options(site)
    output = torch.empty_like(query) if out is None else out
    for at, (first, end) in enumerate(itertools.pairwise(cu_seqlens_q)):
        key, value = _gathered(kv_cache, block_table[at], seq_lens[at])
        one = query[first:end].transpose(0, 1)[None]
        attended = torch.ops.s2o.attention(
            one, key, value, None, sinks, causal=causal, scale=scale, softcap=softcap, site=site, **options
        )[0]
        output[first:end] = attended[0].transpose(0, 1)
    return output


def _gathered(kv_cache: Tensor | tuple[Tensor, Tensor], blocks: Tensor, n_keys: int) -> list[Tensor]:
    """Key and value [1, Hkv, n_keys, D] of one sequence."""
    if isinstance(kv_cache, tuple):
        size = kv_cache[0].shape[1]
        used = blocks[: -(-n_keys // size)].long()
        return [x[used].flatten(0, 1)[:n_keys].transpose(0, 1)[None] for x in kv_cache]
    if kv_cache.dim() == 5:
        return _gathered((kv_cache[0], kv_cache[1]), blocks, n_keys)
    pages = kv_cache.transpose(1, 2)
    head_dim = kv_cache.shape[3] // 2
    return _gathered((pages[..., :head_dim], pages[..., head_dim:]), blocks, n_keys)
