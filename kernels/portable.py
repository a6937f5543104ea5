"""``s2o::attention`` in functions that torch can trace, for programs that leave Python: its portable twin.

A custom operator is Python, which an AOTInductor package does not have. The twin computes the same by torch's own
operators; which path runs is decided by lengths inside the program (``cond``). What the operator chooses by length, and
the shapes of its pieces depend on, is chosen by the longest length that the program accepts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._higher_order_ops.cond import cond_op

from s2o_compile.kernels import portable_walk
from s2o_compile.kernels.dense import dense_attention
from s2o_compile.kernels.layout import memory_order
from s2o_compile.kernels.mask import AttentionMask
from s2o_compile.kernels.options import OperatorOptions
from s2o_compile.kernels.plan import TILE_LEN, default_segment_len

_DEFAULT = OperatorOptions()
UNBOUNDED = 32768
"""The longest length of a program that gives none, in tokens."""


def longest(length: int | torch.SymInt) -> int:
    """The largest value of a length that the program accepts."""
    if isinstance(length, int):
        return length
    upper = length.node.shape_env.bound_sympy(length.node.expr).upper
    return int(upper) if upper.is_Integer else UNBOUNDED


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None = None,
    sinks: Tensor | None = None,
    *,
    causal: bool = False,
    causal_offset: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    tau: float = _DEFAULT.tau,
    min_seq_len: int = 0,
    segment_len: int | None = None,
    head_tau: Sequence[float] | None = None,
    layout: str = "auto",
    **_: object,
) -> tuple[Tensor, Tensor]:
    scale = query.shape[3] ** -0.5 if scale is None else scale
    heads, value_dim = query.shape[1], value.shape[3]
    segment_len = segment_len or default_segment_len(longest(query.shape[2]))
    tau = torch.cat([torch.full((1,), float(t)) for t in (head_tau or [tau] * heads)])

    def mask_of(query, key, key_mask):
        return AttentionMask.aligned(query, key, causal=causal, causal_offset=causal_offset, window=None, attention_chunk=None, key_mask=key_mask)

    order = memory_order(query, value_dim, layout)
    shapes = [x.shape for x in (query, key, value)]

    def opened(tensors):
        return (x.view(shape) for x, shape in zip(tensors, shapes, strict=True))

    def flat(out):  # one dimension has one layout
        return ((out.transpose(1, 2) if order == "BNHD" else out).to(query.dtype).reshape(-1),)

    def sparse(query, key, value, tau, *rest):
        query, key, value = opened((query, key, value))
        mask = mask_of(query, key, rest[0] if key_mask is not None else None)
        out, lse = portable_walk.attend(query.float(), key.float(), value.float(), mask, scale=scale, tau=tau, softcap=softcap, segment_len=segment_len)
        return flat(out)

    def dense(query, key, value, tau, *rest):
        query, key, value = opened((query, key, value))
        mask = mask_of(query, key, rest[0] if key_mask is not None else None)
        return flat(dense_attention(query, key, value, mask, scale=scale))

    # Copies: what a branch is given may share no memory, and query, key and value are often views of one projection.
    tensors = (x.reshape(-1).clone() for x in (query, key, value))
    symbols = {str(size): size for shape in shapes for size in shape if isinstance(size, torch.SymInt)}.values()
    operands = (*tensors, tau, *(() if key_mask is None else (key_mask,)), *symbols)
    enough = torch.sym_min(query.shape[2] - TILE_LEN, key.shape[2] - min_seq_len) >= 0
    (out,) = cond_op(enough, sparse, dense, operands)
    batch, heads, n_queries, _ = query.shape
    if order == "BNHD":
        out = out.view(batch, n_queries, heads, value_dim).transpose(1, 2)
    else:
        out = out.view(batch, heads, n_queries, value_dim)
    return out, query.new_empty(0, dtype=torch.float32)
