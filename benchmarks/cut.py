"""Cuts the lists of a plan to a density by a kernel, so that calls whose launches are known can be cut, too."""

import dataclasses

import torch
import triton
import triton.language as tl

from s2o_compile.cli.tune import kept_share
from s2o_compile.kernels.core.plan import Plan
from s2o_compile.kernels.impl.triton.tile import launch

BLOCK = 128


@triton.jit
def cut_kernel(count_ptr, cut_ptr, counts, share, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """Write the part of each count that `cut_to_density` keeps."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    count = tl.load(count_ptr + place, mask=place < counts, other=0)
    kept = tl.floor(count.to(tl.float32) * (share / CHUNK) + 0.5).to(tl.int32) * CHUNK
    tl.store(cut_ptr + place, tl.minimum(kept, count), mask=place < counts)


def by_kernel(plan: Plan, density: float, length: int, *, causal: bool = True) -> Plan:
    """`cut_to_density` by a launch."""
    count = torch.empty_like(plan.prefix_count)
    share = kept_share(plan, density, length, causal=causal)
    grid = (triton.cdiv(count.numel(), BLOCK),)
    launch(cut_kernel, grid, plan.prefix_count, count, count.numel(), share, CHUNK=plan.chunk_len, BLOCK=BLOCK)
    return dataclasses.replace(plan, prefix_count=count)
