"""The order of numbers in a page of CPU_ATTN's cache, which its kernels pack by instruction set.

vLLM documents no order, so it is learned: a page is written whose numbers are their own positions, digit by digit. It
is read back as it lies in memory.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from s2o_compile.errors import ImplementationUnavailableError

DIGIT = 256
"""Positions are written in digits below this: bfloat16 holds every integer up to it."""


class CacheOrder(NamedTuple):
    """Where the numbers of one head's page lie.

    Attributes:
        key: int64 [block * D], the place in memory of each number of keys [block, D].
        value: The same of values.
    """

    key: Tensor
    value: Tensor

    @staticmethod
    def of(isa: str, kv_cache: Tensor) -> CacheOrder:
        """The order in a cache [blocks, Hkv, block, 2 D] for the kernels of an instruction set."""
        return _learned(isa, kv_cache.shape[2], kv_cache.shape[3] // 2, kv_cache.dtype)

    def unpacked(self, pages: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values, each [blocks, block, Hkv, D], of pages [blocks, Hkv, block, 2 D]."""
        blocks, heads, size, both = pages.shape
        halves = pages.reshape(blocks, heads, 2, size * both // 2).unbind(2)
        shape = (blocks, heads, size, both // 2)
        key, value = (x[..., order].view(shape).transpose(1, 2) for x, order in zip(halves, self, strict=True))
        return key, value


@lru_cache
def _learned(isa: str, size: int, head_dim: int, dtype: torch.dtype) -> CacheOrder:
    from vllm import _custom_ops  # pyright: ignore[reportAttributeAccessIssue]

    numbers = torch.arange(size * head_dim)
    found = torch.zeros(2, size * head_dim, dtype=torch.int64)
    digit = 1
    while digit < size * head_dim:
        page = torch.zeros(1, 1, 2 * size, head_dim, dtype=dtype)
        written = (numbers // digit % DIGIT).view(size, 1, head_dim).to(dtype)
        slots = torch.arange(size)
        _custom_ops.cpu_attn_reshape_and_cache(written, written, *page.chunk(2, dim=2), slots, isa)
        found += page.view(2, -1).long() * digit
        digit *= DIGIT
    places = [torch.empty_like(numbers).scatter_(0, one.clamp(0, len(numbers) - 1), numbers) for one in found]
    if not all(torch.equal(one.sort().values, numbers) for one in found):
        raise ImplementationUnavailableError(
            f"S2O in vLLM on a CPU: expected a cache that holds each number once, got another order for {isa!r}, "
            f"blocks of {size} and a head dim of {head_dim}. Choose another --block-size, or leave out "
            "--attention-backend S2O."
        )
    return CacheOrder(*places)
