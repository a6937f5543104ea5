"""Time packed sequences, keys in pages and prefill in chunks: as servers call attention, on CUDA.

    python benchmarks/serving.py [--only unread shared] [--json benchmarks/results/serving-h200.json]

Hq=32, Hkv=8, D=128, bfloat16, causal, topical inputs (``attention.py``), tau 0.5. At tau=0 each way is compared with
SDPA first, and no time is reported if it is further from float64 than twice what SDPA is. The rows:

    packed     8 sequences of 16K tokens, 64 of 2K, and 1 of 128K, beside FlashAttention-3's varlen function where its
               wheel is installed (``fa3_fwd``), and torch's ``varlen_attn``
    paged      the 128K in pages of 1, 16 and 256 tokens beside the same call without pages
    unread     the packed sequences with lengths on the device, as a CUDA graph records them: with bounds that fit, and
               without any
    shared     ``s2o::packed_attention`` of 64 x 2K, 256 x 512, 1 x 16K and 100 x 300 tokens, and of 256 and 64 unequal
               short documents, by the most tokens of neighbours that share a dense call (``packed.TOGETHER``)
    chunked    the 128K in pages of 16: whole, and in chunks of 8192 and 16384 queries with a PrefillCache and without
               one; and FlashAttention-3 in the same chunks. ``times_whole`` is the time of all chunks over that of one
               call

Medians in milliseconds (``calls.milliseconds``). All chunks of a prefill are one call here.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from pathlib import Path
from unittest.mock import patch

import results_file
import torch
from calls import DEVICE, DTYPE, make_inputs, milliseconds
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from s2o_compile import PrefillCache, S2OConfig, attention_paged, attention_varlen
from s2o_compile.kernels.calls import packed
from s2o_compile.kernels.statistics import record_calls

SHAPE = (32, 8, 128)
SECTIONS = ("packed", "paged", "unread", "shared", "chunked")
LIMITS = (1, 512, 2048, 8192)
"""Tokens of neighbouring documents that share a call; with 1 each is alone, but for neighbours of one length."""
Packed = tuple[Tensor, Tensor, Tensor]


def packed_inputs(length: int) -> Packed:
    """Query [T, Hq, D], key and value [T, Hkv, D] of one topical text; sequences are cut from it."""
    query, key, value = (x[0].transpose(0, 1).contiguous() for x in make_inputs("topical", length, *SHAPE))
    return query, key, value


def starts_of(lengths: list[int]) -> Tensor:
    """Cumulative lengths, int32 on the CPU."""
    return torch.tensor([0, *lengths]).cumsum(0).int()


def in_pages(key: Tensor, value: Tensor, page_len: int) -> tuple[Tensor, Tensor]:
    """A cache [pages, Hkv, page_len, 2 D] of one sequence in shuffled pages, and its table."""
    pages = -(-len(key) // page_len)
    cache = torch.zeros(pages, SHAPE[1], page_len, 2 * SHAPE[2], device=DEVICE, dtype=DTYPE)
    table = torch.randperm(pages, generator=torch.Generator().manual_seed(0))
    joined = torch.cat([key, value], -1).unflatten(0, (pages, page_len)).transpose(1, 2)
    cache[table.to(DEVICE)] = joined
    return cache, table.int()[None].to(DEVICE)


def by_sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention of one sequence."""
    query, key, value = (x.transpose(0, 1)[None] for x in (query, key, value))
    output = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    return output[0].transpose(0, 1)


def check_exact() -> float:
    """Largest error of every way at tau=0 relative to SDPA's own, both against float64, on short sequences."""
    lengths, config = [1500, 3, 2500, 93], S2OConfig(tau=0.0, min_seq_len=1024)
    starts = starts_of(lengths)
    query, key, value = packed_inputs(int(starts[-1]))

    def dense(*tensors: Tensor) -> Tensor:
        return torch.cat([by_sdpa(*(x[a:b] for x in tensors)) for a, b in pairwise(starts.tolist())])

    exact = dense(query.double(), key.double(), value.double())
    limit = (dense(query, key, value) - exact).abs().max().item()
    ours = [attention_varlen(query, key, value, starts, starts, config=config)]
    cache, table = in_pages(key, value, 16)
    whole = by_sdpa(query.double(), key.double(), value.double())
    errors = [(x - exact).abs().max().item() for x in ours]
    for chunks in (None, PrefillCache()):
        output = prefill(query, cache, table, 1024, config, chunks)
        errors.append((output - whole).abs().max().item())
    ratio = max(errors) / limit
    if not ratio < 2:
        raise RuntimeError(f"S2O at tau=0 is {ratio:.1f}x further from float64 than SDPA: no time is reported")
    return ratio


def prefill(
    query: Tensor, cache: Tensor, table: Tensor, chunk: int, config: S2OConfig, kept: PrefillCache | None
) -> Tensor:
    """All chunks of one prefill."""
    output = torch.empty_like(query)
    if kept is not None:
        kept.clear()
    for start in range(0, len(query), chunk):
        stop = min(start + chunk, len(query))
        arguments = cache, table, [0, stop - start], [stop]
        attention_paged(query[start:stop], *arguments, out=output[start:stop], config=config, chunks=kept)
    return output


def rivals(query: Tensor, key: Tensor, value: Tensor, starts: Tensor) -> dict[str, Callable[[], object]]:
    """Dense attention over packed sequences, as far as it is installed."""
    found: dict[str, Callable[[], object]] = {}
    on_device, longest = starts.to(DEVICE), int(starts.diff().max())
    try:
        import fa3_fwd_interface as fa3

        found["FlashAttention-3 varlen"] = partial(
            fa3.flash_attn_varlen_func, query, key, value, on_device, on_device, longest, longest, causal=True
        )
    except ImportError:
        print("fa3_fwd is not installed: no FlashAttention-3")
    try:
        from torch.nn.attention.varlen import varlen_attn

        spread = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
        tensors = query, *spread  # older versions know no groups
        found["torch varlen_attn"] = partial(
            varlen_attn, *tensors, on_device, on_device, longest, longest, window_size=(-1, 0)
        )
    except ImportError:
        print("this torch has no varlen_attn")
    return found


def sparse_row(call: Callable[[], Tensor], exact: Tensor | None = None) -> Mapping[str, object]:
    """Time, density and, beside an exact output, the relative error of a call of ours."""
    with record_calls() as recorded:
        output = call()
    pairs = [(c.density * c.area.sum().item(), c.area.sum().item()) for c in recorded]
    row: dict[str, object] = {"density": round(sum(a for a, _ in pairs) / sum(b for _, b in pairs), 4)}
    if exact is not None:
        row["error"] = round(((output - exact).float().norm() / exact.float().norm()).item(), 4)
    return {"ms": round(milliseconds(call), 3), **row}


def timed_row(call: Callable[[], object]) -> Mapping[str, object]:
    """Time of a call alone."""
    return {"ms": round(milliseconds(call), 3)}


def main() -> None:
    """Run and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=131072)
    parser.add_argument("--chunks", type=int, nargs="+", default=[8192, 16384])
    parser.add_argument("--tau", type=float, default=S2OConfig().tau)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/serving.py: expected a CUDA device, got none. It times GPU kernels.")
    with torch.inference_mode():
        measure(args)


def measure(args: argparse.Namespace) -> None:
    """All rows; what fails says so in its row."""
    print(f"at tau=0 at most {check_exact():.2f} times as far from float64 as SDPA", flush=True)
    rows = results_file.Rows(args.json, shape=SHAPE, dtype="bfloat16")
    config, length = S2OConfig(tau=args.tau), args.length
    query, key, value = packed_inputs(length)
    exact = by_sdpa(query, key, value)
    if "unread" in args.only:
        measure_unread(rows, (query, key, value), config)
    if "shared" in args.only:
        measure_shared(rows, config)
    for count in (length // 2048, 8, 1) if "packed" in args.only else ():
        starts = starts_of([length // count] * count)
        what = {"sequences": count, "tokens": length // count}
        for name, call in rivals(query, key, value, starts).items():
            rows.measure("packed", {"what": name, **what}, partial(timed_row, call))
        ours = partial(attention_varlen, query, key, value, starts, starts, config=config)
        rows.measure("packed", {"what": "S2O", **what}, partial(sparse_row, ours, exact if count == 1 else None))
    for page_len in (1, 16, 256) if "paged" in args.only else ():
        cache, table = in_pages(key, value, page_len)
        whole = partial(attention_paged, query, cache, table, [0, length], [length], config=config)
        rows.measure("paged", {"what": f"S2O, pages of {page_len}"}, partial(sparse_row, whole, exact))
    if "chunked" in args.only:
        measure_chunked(rows, (query, key, value), exact, args.chunks, config)


def measure_chunked(
    rows: results_file.Rows, tensors: Packed, exact: Tensor, chunks: list[int], config: S2OConfig
) -> None:
    """One call over everything, then all chunks of a prefill."""
    query, key, value = tensors
    cache, table = in_pages(key, value, 16)
    whole: dict[str, float] = {}
    for chunk in (len(query), *chunks):
        for name, kept in (("S2O", None), ("S2O with a PrefillCache", PrefillCache())):
            if kept is None or chunk < len(query):
                call = partial(prefill, query, cache, table, chunk, config, kept)
                row = partial(beside_whole, whole, "S2O", partial(sparse_row, call, exact))
                rows.measure("chunked", {"what": name, "queries": chunk}, row)
        for name, call in chunked_rivals(query, key, value, chunk).items():
            row = partial(beside_whole, whole, name, partial(timed_row, call))
            rows.measure("chunked", {"what": name, "queries": chunk}, row)


def beside_whole(whole: dict[str, float], name: str, row: Callable[[], Mapping[str, object]]) -> Mapping[str, object]:
    """A row with its time over the first one's of this name, which is a single call."""
    measured = row()
    ms = float(str(measured["ms"]))
    return {**measured, "times_whole": round(ms / whole.setdefault(name, ms), 3)}


def measure_unread(rows: results_file.Rows, tensors: Packed, config: S2OConfig) -> None:
    """Lengths on the device, replayed as a graph, beside lengths on the host."""
    length = len(tensors[0])
    for count in (length // 2048, 8, 1):
        starts, longest = starts_of([length // count] * count), length // count
        on_device, what = starts.to(DEVICE), {"sequences": count, "tokens": longest}
        host = partial(attention_varlen, *tensors, starts, starts, config=config)
        rows.measure("unread", {"what": "lengths of the host", **what}, partial(timed_row, host))
        for name, bounds in (("lengths of the device", (longest, longest)), ("the same without bounds", ())):
            call = partial(attention_varlen, *tensors, on_device, on_device, *bounds, config=config)
            rows.measure("unread", {"what": name, **what}, partial(graph_row, call))


def graph_row(call: Callable[[], Tensor]) -> Mapping[str, object]:
    """Time of a call as a CUDA graph replays it."""
    call()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return {"ms": round(milliseconds(graph.replay), 3)}


def measure_shared(rows: results_file.Rows, config: S2OConfig) -> None:
    """Documents of a graph, by the limit of neighbours that share a dense call."""
    unequal = [300 + 7 * (i * 37 % 61) for i in range(256)]
    packings = {
        "64 x 2048": [2048] * 64,
        "256 x 512": [512] * 256,
        "1 x 16384 and 100 x 300": [16384, *[300] * 100],
        "256 of 300 to 720": unequal,
        "64 of 1500 to 2760": [1500 + 3 * n for n in unequal[:64]],
        "1 x 16384 and 100 of 100 to 240": [16384, *[n // 3 for n in unequal[:100]]],
    }
    for name, lengths in packings.items():
        query, key, value = make_inputs("topical", sum(lengths), *SHAPE)
        ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None].to(DEVICE)
        options = config.operator_options("")
        for limit in LIMITS:
            call = partial(torch.ops.s2o.packed_attention, query, key, value, ids, causal=True, **options)
            with patch.object(packed, "TOGETHER", limit):
                rows.measure("shared", {"documents": name, "together": limit}, partial(timed_row, call))


def chunked_rivals(query: Tensor, key: Tensor, value: Tensor, chunk: int) -> dict[str, Callable[[], object]]:
    """FlashAttention-3 over the same chunks, of keys without pages."""
    try:
        import fa3_fwd_interface as fa3
    except ImportError:
        return {}

    def run() -> None:
        for start in range(0, len(query), chunk):
            stop = min(start + chunk, len(query))
            tensors = query[start:stop], key[:stop], value[:stop]
            fa3.flash_attn_func(*(x[None] for x in tensors), causal=True)

    return {"FlashAttention-3": run}


if __name__ == "__main__":
    main()
