"""An experiment: the inner loop of the forward kernel in Gluon, warps that load beside warps that multiply (Hopper).

    python benchmarks/gluon_forward.py [--json benchmarks/results/gluon-forward-h200.json]

Every tile of 128 queries visits a list of keys of its segment, as the forward kernel's pass 2 does, with its stop test
after each chunk. In-segment keys, masks and the tail are left out. So this is what a whole kernel could reach, not a
kernel; benchmarks/notes/kernels.md says what became of whole ones. A program has three groups of four warps. The
producer gathers keys and values by ``cp.async``. Two consumers take 64 queries each, in turns with the tensor cores.

Rows: ``stages`` blocks of ``key_block`` keys in shared memory, ``ms`` and ``tflops`` at 128K tokens (32 heads on 8 of
128, 13,312 keys of every list, bfloat16), beside the forward kernel on the same lists. Each is checked first, against
float64 and with lists that stop.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import torch
from calls import milliseconds
from results_file import Rows
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from s2o_compile.kernels.core.call import AttentionCall
from s2o_compile.kernels.core.plan import TILE_LEN, Plan
from s2o_compile.kernels.impl.triton import forward

# Triton 3.6 names two of Gluon's functions otherwise than later ones.
thread_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
gather = async_copy.async_load if hasattr(async_copy, "async_load") else async_copy.async_copy_global_to_shared
LN2 = gl.constexpr(0.6931471805599453)
LOG2E = 1.4426950408889634
ROWS = gl.constexpr(TILE_LEN // 2)

HEADS, KEY_HEADS, DIM, SEGMENT, CHUNK = 32, 8, 128, 1024, 1024
VISITED = 13312
PRODUCER_REGISTERS, CONSUMER_REGISTERS = 72, 216
VARIANTS = ((64, 4), (128, 2), (128, 3))
"""Keys of a block and blocks in shared memory."""


@gluon.jit
def produce(
    key, value, key_index, n_blocks, stride_k, stride_v, pipe, flag, KEY_BLOCK: gl.constexpr, D: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Gather blocks as far ahead as there is room, until there are no more or the consumers have stopped."""
    k_blocks, v_blocks, k_full, k_empty, v_full, v_empty = pipe
    by_row: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    entries = gl.arange(0, KEY_BLOCK, layout=gl.SliceLayout(1, by_row))
    dims = gl.arange(0, D, layout=gl.SliceLayout(0, by_row))
    rows = gl.load(key_index + entries)
    j = 0
    go_on = 1
    while (j < n_blocks) & (go_on == 1):
        stage = j % STAGES
        phase = (j // STAGES) & 1
        following = gl.load(key_index + gl.minimum(j + 1, n_blocks - 1) * KEY_BLOCK + entries)
        mbarrier.wait(k_empty.index(stage), phase ^ 1)
        go_on = 1 - gl.sum(flag.load(gl.BlockedLayout([1], [32], [4], [0])), 0)
        if go_on == 1:
            gather(k_blocks.index(stage), key + (rows * stride_k)[:, None] + dims[None, :])
            async_copy.mbarrier_arrive(k_full.index(stage), increment_count=False)
            mbarrier.wait(v_empty.index(stage), phase ^ 1)
            gather(v_blocks.index(stage), value + (rows * stride_v)[:, None] + dims[None, :])
            async_copy.mbarrier_arrive(v_full.index(stage), increment_count=False)
        rows = following
        j += 1
    async_copy.commit_group()
    async_copy.wait_group(0)


@gluon.jit
def larger_of_both(mine, votes, voted, round, C: gl.constexpr):
    """The larger one of the numbers that the two consumers bring to this round."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    mbarrier.wait(voted.index(1), (round & 1) ^ 1)  # the other one has read the number of the round before
    votes.index(C).store(gl.full([1], 0.0, gl.float32, layout) + mine)
    thread_barrier()
    mbarrier.arrive(voted.index(0), count=1)
    mbarrier.wait(voted.index(0), round & 1)
    other = gl.sum(votes.index(1 - C).load(layout), 0)
    thread_barrier()
    mbarrier.arrive(voted.index(1), count=1)
    return gl.maximum(mine, other)


@gluon.jit
def consume(
    queries, pipe, turn, votes, voted, flag, out, computed, first_row, n_chunks, qk_scale, tau, stride_on,
    C: gl.constexpr, KEY_BLOCK: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, CHUNK_LEN: gl.constexpr,
):  # fmt: skip
    """Attend half C of a tile: products with block j of the keys run beside those with block j - 1 of the values."""
    k_blocks, v_blocks, k_full, k_empty, v_full, v_empty = pipe
    of_products: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEY_BLOCK, 16])
    of_output: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    of_weights: gl.constexpr = gl.DotOperandLayout(0, of_output, 2)
    blocks_of_chunk: gl.constexpr = CHUNK_LEN // KEY_BLOCK
    query = queries.index(C)
    nothing = gl.zeros([ROWS, KEY_BLOCK], gl.float32, of_products)
    acc = gl.zeros([ROWS, D], gl.float32, of_output)
    mbarrier.wait(k_full.index(0), 0)
    fence_async_shared()
    products = warpgroup_mma(query, k_blocks.index(0).permute((1, 0)), nothing, use_acc=False, is_async=True)
    products = warpgroup_mma_wait(0, deps=[products])
    mbarrier.arrive(k_empty.index(0), count=1)
    m = gl.max(products, 1) * qk_scale  # the reference of all blocks, as ``tile.softmax_update`` says of FIXED
    p = gl.exp2(products * qk_scale - m[:, None])
    l = gl.sum(p.reshape([ROWS, KEY_BLOCK // 8, 8]), 1)  # by thread: sums over threads cost shuffles
    weights = gl.convert_layout(p.to(gl.bfloat16), of_weights)
    n_blocks = n_chunks * blocks_of_chunk
    mbarrier.wait(k_full.index(1), 0)
    j = 1
    chunk = 0
    stopped = 0
    while (chunk < n_chunks) & (stopped == 0):
        before = gl.sum(l, 1)
        while j < (chunk + 1) * blocks_of_chunk:
            stage = j % STAGES
            stage_before = (j - 1) % STAGES
            fence_async_shared()
            mbarrier.wait(turn.index(C), (j + C) & 1)
            products = warpgroup_mma(
                query, k_blocks.index(stage).permute((1, 0)), nothing, use_acc=False, is_async=True
            )
            mbarrier.wait(v_full.index(stage_before), ((j - 1) // STAGES) & 1)
            fence_async_shared()
            acc = warpgroup_mma(weights, v_blocks.index(stage_before), acc, is_async=True)
            mbarrier.arrive(turn.index(1 - C), count=1)
            products = warpgroup_mma_wait(1, deps=[products])
            mbarrier.arrive(k_empty.index(stage), count=1)
            p = gl.exp2(products * qk_scale - m[:, None])
            l += gl.sum(p.reshape([ROWS, KEY_BLOCK // 8, 8]), 1)
            j += 1
            # This wait also holds the exponentials where they are: ptxas puts them behind the products otherwise.
            mbarrier.wait(k_full.index(j % STAGES), (j // STAGES) & 1, pred=j < n_blocks)
            following = gl.convert_layout(p.to(gl.bfloat16), of_weights)
            acc, weights = warpgroup_mma_wait(0, deps=[acc, following])
            mbarrier.arrive(v_empty.index(stage_before), count=1)
        chunk += 1
        visited = chunk * CHUNK_LEN
        to_come = gl.log2((n_chunks * CHUNK_LEN).to(gl.float32) / visited) * (LN2 / CHUNK_LEN) * visited
        tail = (1.0 - before / gl.sum(l, 1)) * to_come
        unvisited = larger_of_both(gl.max(tail, 0), votes, voted, chunk - 1, C)
        stopped = ((unvisited < tau) & (chunk > 1)).to(gl.int32)
    last = (j - 1) % STAGES
    mbarrier.wait(v_full.index(last), ((j - 1) // STAGES) & 1)
    fence_async_shared()
    acc = warpgroup_mma(weights, v_blocks.index(last), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=[acc])
    if stopped == 1:  # the producer may wait for a free stage
        flag.store(gl.full([1], 1, gl.int32, gl.BlockedLayout([1], [32], [4], [0])))
        thread_barrier()
        for stage in gl.static_range(STAGES):
            mbarrier.arrive(k_empty.index(stage), count=1)
            mbarrier.arrive(v_empty.index(stage), count=1)
    rows = first_row + C * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, of_output))
    dims = gl.arange(0, D, layout=gl.SliceLayout(0, of_output))
    sums = gl.convert_layout(gl.sum(l, 1), gl.SliceLayout(1, of_output))
    gl.store(out + (rows * stride_on)[:, None] + dims[None, :], (acc / sums[:, None]).to(gl.bfloat16))
    if C == 0:
        gl.store(computed, chunk * CHUNK_LEN)


@gluon.jit
def listed_fwd_kernel(
    query_ptr, key_ptr, value_ptr, key_index_ptr, out_ptr, computed_ptr, stride_qh, stride_qn, stride_kh, stride_kn,
    stride_vh, stride_vn, stride_oh, stride_on, ranking_len, n_segments, n_chunks, qk_scale, tau, GROUP: gl.constexpr,
    SEGMENT_LEN: gl.constexpr, TILE: gl.constexpr, KEY_BLOCK: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
    CHUNK_LEN: gl.constexpr, PRODUCER: gl.constexpr, CONSUMER: gl.constexpr,
):  # fmt: skip
    """One tile of one head over the first n_chunks chunks of its segment's list."""
    tiles = gl.num_programs(0) // GROUP
    tile = tiles - 1 - gl.program_id(0) // GROUP
    kv = gl.program_id(1)
    h = kv * GROUP + gl.program_id(0) % GROUP
    swizzled: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    barrier: gl.constexpr = mbarrier.MBarrierLayout()
    queries = gl.allocate_shared_memory(gl.bfloat16, [2, ROWS, D], swizzled)
    k_blocks = gl.allocate_shared_memory(gl.bfloat16, [STAGES, KEY_BLOCK, D], swizzled)
    v_blocks = gl.allocate_shared_memory(gl.bfloat16, [STAGES, KEY_BLOCK, D], swizzled)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    turn = gl.allocate_shared_memory(gl.int64, [2, 1], barrier)
    voted = gl.allocate_shared_memory(gl.int64, [2, 1], barrier)
    votes = gl.allocate_shared_memory(gl.float32, [2, 1], plain)
    flag = gl.allocate_shared_memory(gl.int32, [1], plain)
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=128)  # each thread of the producer
        mbarrier.init(v_full.index(stage), count=128)
        mbarrier.init(k_empty.index(stage), count=2)  # both consumers
        mbarrier.init(v_empty.index(stage), count=2)
    for half in gl.static_range(2):
        mbarrier.init(turn.index(half), count=1)
        mbarrier.init(voted.index(half), count=2)
    flag.store(gl.full([1], 0, gl.int32, gl.BlockedLayout([1], [32], [4], [0])))
    by_row: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    rows = tile * TILE + gl.arange(0, ROWS, layout=gl.SliceLayout(1, by_row))
    dims = gl.arange(0, D, layout=gl.SliceLayout(0, by_row))
    for half in gl.static_range(2):
        pointers = query_ptr + h * stride_qh + ((rows + half * ROWS) * stride_qn)[:, None] + dims[None, :]
        queries.index(half).store(gl.load(pointers))
    fence_async_shared()
    thread_barrier()
    key_index = key_index_ptr + (kv * n_segments + tile * TILE // SEGMENT_LEN) * ranking_len
    out = out_ptr + h * stride_oh
    computed = computed_ptr + h * tiles + tile
    pipe = (k_blocks, v_blocks, k_full, k_empty, v_full, v_empty)
    gl.warp_specialize(
        [
            (consume, (
                queries, pipe, turn, votes, voted, flag, out, computed, tile * TILE, n_chunks, qk_scale, tau, stride_on,
                0, KEY_BLOCK, D, STAGES, CHUNK_LEN,
            )),
            (consume, (
                queries, pipe, turn, votes, voted, flag, out, computed, tile * TILE, n_chunks, qk_scale, tau, stride_on,
                1, KEY_BLOCK, D, STAGES, CHUNK_LEN,
            )),
            (produce, (
                key_ptr + kv * stride_kh, value_ptr + kv * stride_vh, key_index, n_chunks * (CHUNK_LEN // KEY_BLOCK),
                stride_kn, stride_vn, pipe, flag, KEY_BLOCK, D, STAGES,
            )),
        ],
        [4, 4],
        [CONSUMER, PRODUCER],
    )  # fmt: skip


def attend(
    inputs: tuple[Tensor, Tensor, Tensor], key_index: Tensor, tau: float, chunk: int, key_block: int, stages: int
) -> tuple[Tensor, Tensor]:
    """Output [Hq, N, D], and int32 [Hq, tiles], the keys visited; lists int32 [Hkv, segments, L], all of L chunks."""
    query, key, value = inputs
    heads, length, dim = query.shape
    out = torch.empty_like(query)
    computed = query.new_empty(heads, length // TILE_LEN, dtype=torch.int32)
    group = heads // key.shape[0]
    listed_fwd_kernel[length // TILE_LEN * group, key.shape[0]](
        query, key, value, key_index, out, computed, *query.stride()[:2], *key.stride()[:2], *value.stride()[:2],
        *out.stride()[:2], key_index.shape[2], key_index.shape[1], key_index.shape[2] // chunk, dim**-0.5 * LOG2E, tau,
        GROUP=group, SEGMENT_LEN=SEGMENT, TILE=TILE_LEN, KEY_BLOCK=key_block, D=dim, STAGES=stages, CHUNK_LEN=chunk,
        PRODUCER=PRODUCER_REGISTERS, CONSUMER=CONSUMER_REGISTERS, num_warps=4,
    )  # fmt: skip
    return out, computed


def make(length: int, heads: int, key_heads: int, visited: int) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """Random query, key and value [H, N, D], and lists of keys in random order [Hkv, segments, visited]."""
    drawn = [torch.randn(h, length, DIM, device="cuda", dtype=torch.bfloat16) for h in (heads, key_heads, key_heads)]
    lists = [torch.randperm(length, device="cuda")[:visited].int() for _ in range(key_heads * length // SEGMENT)]
    return (drawn[0], drawn[1], drawn[2]), torch.stack(lists).unflatten(0, (key_heads, -1)).contiguous()


def error(inputs: tuple[Tensor, Tensor, Tensor], key_index: Tensor, tau: float, key_block: int, stages: int) -> float:
    """Relative L2 difference to float64 over the keys visited, in the worst tile; chunks of 512 keys."""
    query, key, value = inputs
    out, computed = attend(inputs, key_index, tau, 512, key_block, stages)
    worst = 0.0
    for head in range(query.shape[0]):
        kv = head * key.shape[0] // query.shape[0]
        for tile in range(query.shape[1] // TILE_LEN):
            keys = key_index[kv, tile * TILE_LEN // SEGMENT, : computed[head, tile]].long()
            rows = slice(tile * TILE_LEN, (tile + 1) * TILE_LEN)
            logits = query[head, rows].double() @ key[kv, keys].double().T * DIM**-0.5
            exact = logits.softmax(-1) @ value[kv, keys].double()
            worst = max(worst, ((out[head, rows] - exact).norm() / exact.norm()).item())
    return worst


def bench(variant: tuple[int, int] | None, inputs: tuple[Tensor, Tensor, Tensor], lists: Tensor) -> dict[str, object]:
    """Time and rate of a variant, None for the forward kernel, which computes in-segment keys, too."""
    if variant is None:
        segments = lists.shape[1]
        plan = Plan(
            segment_len=SEGMENT, chunk_len=CHUNK, key_index=lists[None],
            prefix_count=torch.full((1, segments), lists.shape[2], dtype=torch.int32, device="cuda"),
            tail_value=torch.zeros(1, KEY_HEADS, segments, DIM, device="cuda"),
        )  # fmt: skip
        call = AttentionCall.of(*(x[None] for x in inputs), causal=True)
        run = partial(forward.attend, call, plan, 1e-9)
        computed = run().computed
    else:
        run = partial(attend, inputs, lists, 1e-9, CHUNK, *variant)
        computed = run()[1]
    ms = milliseconds(run)
    return {"ms": round(ms, 2), "tflops": round(4 * TILE_LEN * DIM * computed.double().sum().item() / ms / 1e9)}


@torch.no_grad()
def main() -> None:
    """Check every variant, then time each beside the forward kernel."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="where the rows go")
    torch.manual_seed(0)
    rows = Rows(parser.parse_args().json, keys=VISITED)
    small = make(2048, 8, 2, 2048)
    for variant in VARIANTS:
        named = {"key_block": variant[0], "stages": variant[1]}
        for tau in (0.0, 5.0):
            rows.measure("check", {**named, "tau": tau}, lambda v=variant, t=tau: {"error": error(*small, t, *v)})
    inputs, lists = make(131072, HEADS, KEY_HEADS, VISITED)
    for variant in (None, *VARIANTS, None):
        named = {"kernel": "forward"} if variant is None else {"key_block": variant[0], "stages": variant[1]}
        rows.measure("time", named, partial(bench, variant, inputs, lists))


if __name__ == "__main__":
    main()
