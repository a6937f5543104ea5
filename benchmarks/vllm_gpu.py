"""Time a prompt's prefill in chunks by the implementation for vLLM, over FLASH_ATTN's cache, beside FlashAttention-3.

PYTHONPATH=. python benchmarks/vllm_gpu.py --json benchmarks/results/vllm-gpu-h200.json

No server runs and no vLLM is needed: pages and metadata are made by hand. Shapes B=1, Hq=32, Hkv=8, D=128, bf16, and
synthetic input with topics, as in ``benchmarks/attention.py``. A chunk's row is one call of one layer. FlashAttention-3
attends to the same pages, where ``fa3_fwd_interface`` is installed. One call over the whole prompt, without pages,
stands beside the sum of the chunks.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import calls
import torch
from calls import make_inputs, milliseconds
from results_file import Rows
from torch import Tensor

import s2o_compile
from s2o_compile import S2OConfig
from s2o_compile.serving.counters import Counters
from s2o_compile.vllm.implementation import Division, Site, SparsePrefill

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128


class Parent:
    """Where vLLM's implementation stands; no call here is its."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass


class Implementation(SparsePrefill, Parent):
    """Long prefills by S2O."""


def paged(key: Tensor, value: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """A cache [blocks, Hkv, block, 2 D] in a random order of blocks, and the block table [1, blocks]."""
    pages = torch.cat([key, value], -1)[0].unflatten(1, (-1, block)).transpose(0, 1)
    table = torch.randperm(len(pages), device=key.device)
    cache = torch.empty_like(pages, memory_format=torch.contiguous_format)
    cache[table] = pages
    return cache, table[None].int()


def metadata_of(first: int, end: int, table: Tensor) -> Any:  # noqa: ANN401 (as vLLM's)
    """The metadata of a batch with one chunk, all of it sparse."""
    none = torch.empty(0, dtype=torch.int64, device=table.device)
    division = Division(
        requests=torch.zeros(1, dtype=torch.int64, device=table.device),
        rows=slice(0, end - first),
        starts=[0, end - first],
        seq_lens=[end],
        other_requests=none,
        other_rows=slice(0, 0),
        other_metadata=None,
        n_others=0,
    )
    return SimpleNamespace(block_table=table, s2o=division)


def flash3(query: Tensor, cache: Tensor, table: Tensor, end: int) -> Tensor:
    """FlashAttention-3 of one chunk over the same pages."""
    import fa3_fwd_interface as fa3

    key, value = cache.transpose(1, 2).split(HEAD_DIM, dim=-1)
    lens = torch.tensor([end], dtype=torch.int32, device=query.device)
    return fa3.flash_attn_with_kvcache(query[None], key, value, cache_seqlens=lens, page_table=table, causal=True)


def main() -> None:
    """Run and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=131072)
    parser.add_argument("--chunk", type=int, default=8192)
    parser.add_argument("--block", type=int, default=16)
    parser.add_argument("--tau", type=float, default=0.5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    config = S2OConfig(tau=args.tau, min_seq_len=0)
    impl = Implementation(HEADS, HEAD_DIM, HEAD_DIM**-0.5, KV_HEADS, None, None, "auto")
    impl.s2o_site = Site(number=1, name="", config=config, counters=Counters(print))
    query, key, value = make_inputs("topical", args.tokens, HEADS, KV_HEADS, HEAD_DIM)
    cache, table = paged(key, value, args.block)
    packed = query[0].transpose(0, 1).contiguous()
    output = torch.empty_like(packed)
    rows = Rows(args.json, chunk=args.chunk, block=args.block, tau=args.tau, tokens=args.tokens)
    for first in range(0, args.tokens, args.chunk):
        end = min(first + args.chunk, args.tokens)
        own = packed[first:end]
        attend = partial(impl.forward, None, own, own, own, cache, metadata_of(first, end, table), output[first:end])
        what = {"queries": end - first, "keys": end}
        rows.measure("S2O over pages", what, lambda attend=attend: {"ms": milliseconds(attend)})
        rival = partial(flash3, own, cache, table, end)
        rows.measure("FlashAttention-3 over pages", what, lambda rival=rival: {"ms": milliseconds(rival)})
    whole = partial(s2o_compile.attention, query, key, value, causal=True, config=config)
    rows.measure("S2O, whole", {"queries": args.tokens, "keys": args.tokens}, lambda: {"ms": milliseconds(whole)})
    rivals = calls.sdpa_calls(query, key, value)
    for name, rival in rivals.items():
        rows.measure(name, {"queries": args.tokens}, lambda rival=rival: {"ms": milliseconds(rival)})
    for section in ("S2O over pages", "FlashAttention-3 over pages"):
        times = [row["ms"] for row in rows if row["section"] == section and "ms" in row]
        if times:
            rows.measure(f"{section}, all chunks", {"chunks": len(times)}, lambda times=times: {"ms": sum(times)})


if __name__ == "__main__":
    with torch.inference_mode():
        main()
