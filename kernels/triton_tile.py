"""Pieces that the Triton kernels share: row loads, the online softmax, and launch configurations."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def load_rows(base, rows, stride, HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """Rows of a [N, HEAD_DIM] matrix by index, [rows, BLOCK_DIM], zero beyond HEAD_DIM. 64-bit offsets: N may be long."""
    dims = tl.arange(0, BLOCK_DIM)
    pointers = base + rows.to(tl.int64)[:, None] * stride + dims[None, :]
    if HEAD_DIM == BLOCK_DIM:
        return tl.load(pointers)
    return tl.load(pointers, mask=dims[None, :] < HEAD_DIM, other=0.0)


@triton.jit
def online_softmax_update(m, l, acc, logits, value, PRECISION: tl.constexpr):
    """Fold logits [M, C] (base 2, hidden = -inf) and value [C, D] into m, l [M] and acc [M, D]."""
    m_new = tl.maximum(m, tl.max(logits, 1))
    finite = tl.where(m_new == -float("inf"), 0.0, m_new)  # a row that has seen nothing keeps weight zero, not NaN
    weight = tl.math.exp2(logits - finite[:, None])
    decay = tl.math.exp2(m - finite)
    l = l * decay + tl.sum(weight, 1)
    acc = tl.dot(weight.to(value.dtype), value, acc * decay[:, None], input_precision=PRECISION)
    return m_new, l, acc


@triton.jit
def store_tile(
    out, lse, m, l, acc, rows, present, stride, HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr
):
    """Write acc / l (zeros where l is 0) to rows of out and the natural log-sum-exp to lse."""
    dims = tl.arange(0, BLOCK_DIM)
    result = acc / tl.where(l == 0.0, 1.0, l)[:, None]
    pointers = out + rows.to(tl.int64)[:, None] * stride + dims[None, :]
    tl.store(pointers, result.to(out.dtype.element_ty), mask=present[:, None] & (dims[None, :] < HEAD_DIM))
    tl.store(lse + rows, (m + tl.math.log2(l)) * LN2, mask=present)


def launch_config(head_dim: int, dtype: torch.dtype) -> dict[str, int | str]:
    """Block sizes by head dim and dtype. Fixed, never tuned at run time: a tuner would time made-up indices.

    Measured on an H100 (benchmarks/README.md): 64 keys, 4 warps, 2 stages is best up to head_dim 128.
    """
    block_dim = max(16, triton.next_power_of_2(head_dim))
    if dtype == torch.float32:  # exact products run off the tensor cores: small blocks keep the registers
        return {
            "BLOCK_DIM": block_dim,
            "KEY_BLOCK": 32 if block_dim <= 128 else 16,
            "PRECISION": "ieee",
            "num_warps": 8,
            "STAGES": 1,
        }
    return {
        "BLOCK_DIM": block_dim,
        "KEY_BLOCK": 64,
        "PRECISION": "tf32",
        "num_warps": 4 if block_dim <= 128 else 8,
        "STAGES": 2,
    }
