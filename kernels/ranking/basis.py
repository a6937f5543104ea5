"""The directions of a head that a ranking keeps: q . k as a product of fewer numbers, in any basis of q and k alike.

    q . k  ~  (q A) . (k B),     A, B [D, R],     C_q = E[q q'],     C_k = Cov[k]

Both factors are least squares over sampled queries and keys: A = C_k B (B' C_k B)^-1 is the best for a given B, and
B = C_q A (A' C_q A)^-1 the best for a given A. B starts as the R coordinates with the largest E[q_d^2] Var[k_d]. A mean
key is left out of C_k: it adds the same to all logits of a row.

Coordinates alone depend on the basis. One rotation of q and k changes no logit, but took up to 1.8 times the density at
5 % of error (Gemma-3, heads of 256, 8K).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from s2o_compile.kernels.pages.sizes import Size, at_least

DIM_STRIDE = 8
DIM_SAMPLES = 4096
"""The basis is solved for from every 8th query and key, or from about 4096 of more than 32K."""

RIDGE = 5e-4
"""Share of a diagonal that is added to it: few samples leave a matrix singular, and a GPU solves in tf32."""


class Basis(NamedTuple):
    """What projects queries and keys, float32 [B, Hkv, D, R] each; the query heads of a group share one."""

    query: Tensor
    key: Tensor


class FewKeys(NamedTuple):
    """The basis of a call, and its keys in few dimensions.

    Attributes:
        basis: Of all key/value heads.
        keys: [B, Hkv, Nk, R], as the ranking of an implementation compares them.
    """

    basis: Basis
    keys: Tensor

    def of_heads(self, heads: slice) -> FewKeys:
        """Those of some key/value heads."""
        return FewKeys(Basis(*(x[:, heads] for x in self.basis)), self.keys[:, heads])


def dim_stride(length: Size) -> Size:
    """Distance of the queries or keys that the basis is solved for."""
    return at_least(DIM_STRIDE, length // DIM_SAMPLES)


def half_steps(head_dim: int, count: int) -> int:
    """How often a factor is solved for: not if nearly the whole head is kept, and the oftener the less of it is.

    Density at 5 % of error after a rotation, over that before it: 62 of 64 dimensions 0.98 to 1.00 without a step
    (SmolLM2), 126 of 256 1.01 to 1.02 after two (Gemma-3), 30 of 64 1.01 to 1.06 after two and 1.01 to 1.02 after four,
    15 of 64 1.03 to 1.04 after four (SmolLM2; all at 8K).
    """
    if count + 2 >= head_dim:
        return 0
    return 2 if count >= 64 and count + 2 >= head_dim // 2 else 4


def choose_basis(query: Tensor, key: Tensor, count: int, key_mask: Tensor | None = None) -> Basis:
    """The basis of ``count`` directions of queries [B, Hq, Nq, D] and keys [B, Hkv, Nk, D].

    Keys that ``key_mask``, bool [B, Nk], hides are left out: what padding holds must not decide how keys are ranked.
    """
    step = dim_stride(key.shape[2])
    sampled = None if key_mask is None else key_mask[:, ::step]
    return solve_basis(query[:, :, :: dim_stride(query.shape[2])], key[:, :, ::step], count, sampled)


def solve_basis(query: Tensor, key: Tensor, count: int, key_mask: Tensor | None = None) -> Basis:
    """`choose_basis` of sampled queries [B, Hq, n, D] and keys [B, Hkv, m, D], and their ``key_mask``, [B, m]."""
    query_moment, key_covariance = second_moments(query, key, key_mask)
    salience = query_moment.diagonal(dim1=-2, dim2=-1) * key_covariance.diagonal(dim1=-2, dim2=-1)
    dims = salience.topk(count, dim=-1).indices
    start = torch.eye(key.shape[3], dtype=torch.float32, device=key.device)[dims].transpose(-1, -2)
    basis = Basis(start, start)
    for _ in range(half_steps(key.shape[3], count) // 2):
        by_query = _best_factor(key_covariance, basis.key)
        basis = Basis(by_query, _best_factor(query_moment, by_query))
    return basis


def second_moments(query: Tensor, key: Tensor, key_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """E[q q'] over the group and Cov[k], float32 [B, Hkv, D, D], each with a mean diagonal of 1.

    Numbers that are not finite count as zero, and a dimension whose power overflows is left out.
    """
    batch, kv_heads, _, head_dim = key.shape
    query, key = (x.float().nan_to_num(0.0, 0.0, 0.0) for x in (query, key))
    query = query.reshape(batch, kv_heads, -1, head_dim)
    if key_mask is None:
        key = key - key.mean(2, keepdim=True)
    else:
        shown = key_mask[:, None, :, None]
        mean = key.masked_fill(~shown, 0.0).sum(2, keepdim=True) / shown.sum(2, keepdim=True).clamp(min=1)
        key = (key - mean).masked_fill(~shown, 0.0)
    return _normal(query.transpose(-1, -2) @ query), _normal(key.transpose(-1, -2) @ key)


def _normal(moment: Tensor) -> Tensor:
    power = moment.diagonal(dim1=-2, dim2=-1)
    kept = power.isfinite()
    mean = torch.where(kept, power, 0.0).mean(-1)[..., None, None]
    whole = kept[..., None] & kept[..., None, :]
    return torch.where(whole, moment, 0.0) / torch.where(mean > 0, mean, 1.0)


def _best_factor(moment: Tensor, other: Tensor) -> Tensor:
    """C X (X' C X)^-1 of a moment C [.., D, D] and the other factor X [.., D, R]."""
    product = moment @ other
    gram = other.transpose(-1, -2) @ product
    power = gram.diagonal(dim1=-2, dim2=-1)
    ridge = RIDGE * (power + power.mean(-1, keepdim=True)) + torch.finfo(gram.dtype).tiny
    # Not by `solve`: traced into a package, it leaves a constant behind that is no input of the call.
    return product @ torch.linalg.inv_ex(gram + torch.diag_embed(ridge)).inverse


def project(x: Tensor, factor: Tensor) -> Tensor:
    """[B, H, N, D] and [B, Hkv, D, R] -> float32 [B, H, N, R], every head of a group by its group's factor.

    Numbers that are not finite become zero: one bad row must not spoil the whole order.
    """
    factor = factor.repeat_interleave(x.shape[1] // factor.shape[1], dim=1)
    return (x.float() @ factor).nan_to_num(0.0, 0.0, 0.0)
