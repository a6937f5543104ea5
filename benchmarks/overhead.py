"""What a call of the operator costs where it wins nothing: short lengths, CUDA graphs, inputs that never stop early.

    python benchmarks/overhead.py [--only short graphs] [--json benchmarks/results/overhead-h100.json]

    short         default configuration, N up to the dispatch length: GPU time by CUDA graphs, host time by issuing
                  calls without waiting; against SDPA's own choice and against its fastest backend
    host          sparse calls with their launches prepared and without: host time, GPU time, the same bits
    compiled      host and GPU time of one attention in a compiled graph of 32, dense and through backend="s2o"
    graphs        the same with mode="reduce-overhead", where the host does nothing
    same bits     the same input twice gives the same bits
    dense heads   half of the heads marked dense, the others at a density of 0.1, against both halves by themselves
    worst case    random input above the dispatch length at a tau of 1e-9, so that nothing stops early, against the
                  fastest backend

Times in microseconds, medians; of the last two sections in milliseconds. ``--scale 64`` divides the lengths of the long
sections, to try the script out on a CPU.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import calls
import torch
import triton
from calls import ON_GPU, Inputs, check_exact, make_inputs, milliseconds
from results_file import Rows
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import s2o_compile
from s2o_compile import S2OConfig
from s2o_compile.backend import s2o
from s2o_compile.kernels import dispatch as operator
from s2o_compile.kernels import prepared
from s2o_compile.kernels.core.options import OperatorOptions
from s2o_compile.kernels.core.tuned import crossover
from s2o_compile.kernels.statistics import record_calls

CHAIN = 32
"""Attentions of a compiled graph, as many as a model has layers: what entering the graph costs is shared by them."""

ISSUED = 50
"""Calls issued without waiting: few enough for the queue of launches to take them all."""

SPARSE_ISSUED = 8
"""The same for sparse calls, which make up to 100 launches each."""

HEADS = (32, 8, 128)
"""Hq, Hkv, D."""

SPARSE = {
    "default": S2OConfig(min_seq_len=1),
    "tau 0.5": S2OConfig(tau=0.5, min_seq_len=1),
    "error 0.05": S2OConfig(error=0.05, min_seq_len=1),
}
"""Whose calls the section "host" makes."""

NEVER = 1e-9
"""A tau at which the stop rule is tested and never holds."""

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def dense(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """SDPA, the backend its own choice."""
    return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


def sparse(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The operator in its default configuration."""
    output = s2o_compile.attention(query, key, value, causal=True)
    assert isinstance(output, Tensor)
    return output


def host_microseconds(call: Callable[[], object], calls_in_one: int = 1, issued: int = ISSUED) -> float:
    """Time the host spends on a call, the device's work left to run by itself."""
    issued = max(issued // calls_in_one, 5)
    times = []
    call()
    for _ in range(9):
        calls.synchronize()
        start = time.perf_counter()
        for _ in range(issued):
            call()
        times.append((time.perf_counter() - start) / issued / calls_in_one)
    calls.synchronize()
    return statistics.median(times) * 1e6


def gpu_microseconds(call: Callable[[], object]) -> float:
    """Time the device spends on a call: replayed from a CUDA graph, so the host takes no part."""
    if not ON_GPU:
        return milliseconds(call) * 1e3
    call()  # compiles what has to be compiled
    return triton.testing.do_bench_cudagraph(call, return_mode="median") * 1e3


def short_row(length: int) -> dict[str, object]:
    """The default configuration, which is dense at this length."""
    inputs = make_inputs("random", length, *HEADS)
    rival, fastest = calls.fastest(calls.sdpa_calls(*inputs), gpu_microseconds)
    gpu = {name: gpu_microseconds(partial(f, *inputs)) for name, f in (("SDPA", dense), ("S2O", sparse))}
    host = {name: host_microseconds(partial(f, *inputs)) for name, f in (("SDPA", dense), ("S2O", sparse))}
    return {
        "host_SDPA": round(host["SDPA"], 1),
        "host_S2O": round(host["S2O"], 1),
        "host_more": round(host["S2O"] - host["SDPA"], 1),
        "gpu_SDPA": round(gpu["SDPA"], 1),
        "gpu_fastest": round(fastest, 1),
        "fastest": rival,
        "gpu_S2O": round(gpu["S2O"], 1),
        "over_SDPA": round(gpu["S2O"] / gpu["SDPA"], 3),
        "over_fastest": round(gpu["S2O"] / fastest, 3),
    }


def host_row(length: int, config: S2OConfig) -> dict[str, object]:
    """A sparse call whose launches are prepared, and the same call as its first of a kind runs."""
    inputs = make_inputs("topical", length, *HEADS)
    call = partial(s2o_compile.attention, *inputs, causal=True, config=config)
    kept, prepared.KEPT = prepared.KEPT, 0
    first, plain = call(), host_microseconds(call, issued=SPARSE_ISSUED)
    prepared.KEPT = kept
    for _ in range(3):
        same = torch.equal(first.view(torch.uint8), call().view(torch.uint8))  # pyright: ignore
    host = host_microseconds(call, issued=SPARSE_ISSUED)
    launches = prepared.newest()
    counts = {} if launches is None else {"launches": launches.count, "workspace_MiB": round(launches.size / 2**20, 1)}
    return {
        "host_plain": round(plain, 1),
        "host_prepared": round(host, 1),
        "gpu": round(gpu_microseconds(call), 1),
        "whole": round(milliseconds(call) * 1e3, 1),
        "same_bits": same,
        **counts,
    }


def chain(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """CHAIN attentions, each on the output of the one before."""
    for _ in range(CHAIN):
        query = dense(query, key, value)
    return query


def compiled_row(length: int, mode: str | None) -> dict[str, object]:
    """One attention of a compiled chain, dense and rewritten to the operator in its default configuration."""
    inputs = make_inputs("random", length, *HEADS)
    found = {}
    expected = chain(*inputs)
    for name, backend in (("dense", None), ("S2O", partial(s2o, mode=mode))):
        torch.compiler.reset()
        function = torch.compile(chain, mode=mode) if backend is None else torch.compile(chain, backend=backend)
        with record_calls() as recorded:
            for _ in range(3):  # CUDA graphs record at the second call and replay from then on
                output = function(*inputs).clone()
        if not torch.allclose(output, expected, rtol=2e-2, atol=2e-2):
            raise RuntimeError(f"{name}: the compiled chain differs from the plain one")
        if (name == "S2O") != bool(recorded):
            raise RuntimeError(f"{name}: {len(recorded)} calls of the operator in the compiled chain")
        call = partial(function, *inputs)
        found[f"host_{name}"] = round(host_microseconds(call, CHAIN), 2)
        found[f"whole_{name}"] = round(milliseconds(call) * 1e3 / CHAIN, 2)
    found["host_more"] = round(found["host_S2O"] - found["host_dense"], 2)
    found["over_dense"] = round(found["whole_S2O"] / found["whole_dense"], 3)
    return found


def same_bits_row(inputs_of: Callable[[], Inputs], options: dict[str, Any]) -> dict[str, object]:
    """Two calls on the same input, other memory handed out and filled between them."""
    inputs = inputs_of()
    first = calls.run(inputs, **options)
    noise = torch.randn_like(first)
    second = calls.run(inputs, **options)
    del noise
    return {"same_bits": torch.equal(first.view(torch.uint8), second.view(torch.uint8))}


def dense_heads_row(length: int) -> dict[str, object]:
    """A call with half of its heads marked, and what its halves take by themselves."""
    query, key, value = make_inputs("topical", length, *HEADS)
    half = HEADS[1] // 2
    rows = HEADS[0] // 2
    marked, others = ((query[:, q], key[:, k], value[:, k]) for q, k in _halves(rows, half))
    options = OperatorOptions(min_seq_len=0)
    whole = calls.call_of((query, key, value)).but(dense_heads=range(half))
    call = partial(operator.run, whole, options)
    with calls.held_density(0.1, length):
        torch.testing.assert_close(call()[0][:, :rows], dense(*marked))
        together = milliseconds(call)
        sparse_ms = milliseconds(partial(calls.run, others))
    dense_ms = milliseconds(partial(dense, *marked))
    return {
        "together_ms": round(together, 3),
        "marked_alone_ms": round(dense_ms, 3),
        "others_alone_ms": round(sparse_ms, 3),
        "over_the_sum": round(together / (dense_ms + sparse_ms), 3),
        "over_their_share": round((together - sparse_ms) / dense_ms, 3),
    }


def _halves(rows: int, half: int) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """Query and key/value heads of the first half, and of the second."""
    return (slice(rows), slice(half)), (slice(rows, None), slice(half, None))


def worst_row(length: int, ranking: str) -> dict[str, object]:
    """Random input and a tau that no tile reaches."""
    inputs = make_inputs("random", length, *HEADS)
    check_exact(inputs)
    rival, fastest = calls.fastest(calls.sdpa_calls(*inputs))
    call = partial(calls.run, inputs, ranking=ranking, tau=NEVER)
    with record_calls() as recorded:
        call()
    s2o_ms = milliseconds(call)
    return {
        "density": round(recorded[0].density, 3),
        "rival": rival,
        "rival_ms": round(fastest, 3),
        "s2o_ms": round(s2o_ms, 3),
        "over_fastest": round(s2o_ms / fastest, 3),
    }


@torch.no_grad()
def main() -> None:
    """Run and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ("short", "host", "compiled", "graphs", "same bits", "dense heads", "worst case")
    dispatch = crossover(torch.device("cuda" if ON_GPU else "cpu"), torch.bfloat16)
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="sections to run")
    parser.add_argument(
        "--short",
        type=int,
        nargs="+",
        default=[16, 100, 128, 512, 1024, 2048, 4096, 8192, dispatch - 128],
        help="lengths below the dispatch length",
    )
    host_lengths = [2048, 8192, 16384, 32768]
    parser.add_argument("--host", type=int, nargs="+", default=host_lengths, help="lengths of prepared calls")
    parser.add_argument("--compiled", type=int, nargs="+", default=[16, 2048], help="lengths in a compiled graph")
    parser.add_argument("--scale", type=int, default=1, help="divisor of the lengths in the last three sections")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    about = {"heads": HEADS[0], "kv_heads": HEADS[1], "head_dim": HEADS[2], "dispatch_length": dispatch}
    rows = Rows(args.json, **about, config=S2OConfig().operator_options())
    if "short" in args.only:
        for length in args.short:
            rows.measure("short", {"N": length}, partial(short_row, length))
    for length in args.host if "host" in args.only else ():
        for name, config in SPARSE.items():
            rows.measure("host", {"N": length, "config": name}, partial(host_row, length, config))
    for section, mode in (("compiled", None), ("graphs", "reduce-overhead")):
        for length in args.compiled if section in args.only else ():
            rows.measure(section, {"N": length}, partial(compiled_row, length, mode))
    if "same bits" in args.only:
        shapes = ((4096, 32, 8, 128, 1), (3000, 9, 3, 64, 2), (32768, 32, 8, 128, 1), (131072, 32, 8, 128, 1))
        for length, *shape in shapes:
            for options in ({}, {"ranking": "mean_query"}) + (({"tau": 0.0},) if length < 32768 else ()):
                what = {"N": length // args.scale, "Hq": shape[0], "Hkv": shape[1], "D": shape[2], "B": shape[3]}
                inputs_of = partial(make_inputs, "topical", length // args.scale, *shape)
                given = ", ".join(f"{name}={value}" for name, value in options.items()) or "default"
                rows.measure("same bits", {**what, "config": given}, partial(same_bits_row, inputs_of, options))
    if "dense heads" in args.only:
        for length in (16384, 32768, 131072):
            rows.measure("dense heads", {"N": length // args.scale}, partial(dense_heads_row, length // args.scale))
    if "worst case" in args.only:
        for length in (16384, 32768, 65536, 131072):
            for ranking in ("per_query", "mean_query"):
                what = {"N": length // args.scale, "ranking": ranking}
                rows.measure("worst case", what, partial(worst_row, length // args.scale, ranking))


if __name__ == "__main__":
    main()
