"""Time one attention call: dense SDPA backends, FlashAttention-3 where installed, and S2O.

    python benchmarks/attention.py [--lengths 4096 131072] [--json benchmarks/results/attention.json]

Shapes B=1, Hq=32, Hkv=8, D=128, bf16, causal, unless told otherwise. Every S2O row is checked first: at tau=0 (nothing
stops) against SDPA in the same run. Inputs are synthetic; what they can and cannot show:

    fixed density   lists cut to a share of the prefix, nothing stops: the speed of the kernel, whatever the model
    position order  every key in its place, as windows and dense heads take it: no ranking, no gathering
    topical, tau    tokens come in runs of one topic and look for their topic: early stopping as it runs in practice
    topical, default  the same under the default's ceiling of the error, which is measured in every call
    random, tau     Gaussian noise, on which little can be left out
    never stops     the same at a tau of 1e-9: everything is ranked, tested and walked to the end, the worst case

Medians in milliseconds (``calls.milliseconds``); TFLOP/s count the computed area only (4 D flops a pair).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import calls
import results_file
import torch
from calls import CAUSAL, check_exact, held_density, make_inputs, milliseconds
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from s2o_compile import S2OConfig
from s2o_compile.cli.tune import cut_to_density
from s2o_compile.kernels.core.call import AttentionCall
from s2o_compile.kernels.core.options import OperatorOptions
from s2o_compile.kernels.core.plan import TILE_LEN, ScoreKeys, default_segment_len
from s2o_compile.kernels.dispatch import run
from s2o_compile.kernels.impl.triton import exact as triton_exact
from s2o_compile.kernels.impl.triton import forward as triton_forward
from s2o_compile.kernels.impl.triton import order as triton_order
from s2o_compile.kernels.planner import PREPARE_BY_TRITON, build_plan
from s2o_compile.kernels.statistics import record_calls


def dense_rivals(query: Tensor, key: Tensor, value: Tensor) -> dict[str, Callable[[], Tensor]]:
    """The dense backends that run here."""
    rivals = calls.sdpa_calls(query, key, value)
    try:
        import fa3_fwd_interface as fa3
    except ImportError:
        return rivals

    def flash3() -> Tensor:
        out = fa3.flash_attn_func(*(x.transpose(1, 2) for x in (query, key, value)), causal=True)
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    return rivals | {"FlashAttention-3": flash3}


def score_all(prepare: Callable[..., ScoreKeys], call: AttentionCall, segment_len: int) -> Tensor:
    """Scores of a whole call, all heads at once."""
    return prepare(call, segment_len, call.group)(call, slice(None))


def order_all(scores: Tensor, key: Tensor, value: Tensor, segment_len: int) -> tuple[Tensor, Tensor]:
    """Lists of a whole call, all heads at once."""
    non_finite = triton_order.find_non_finite(key, value)
    return triton_order.order_keys(scores, non_finite, CAUSAL, n_queries=key.shape[2], segment_len=segment_len)


def bench_length(length: int, args: argparse.Namespace) -> list[dict[str, object]]:
    """All rows of one length."""
    shape = (args.heads, args.kv_heads, args.head_dim)
    rows: list[dict[str, object]] = []

    def row(name: str, ms: float, density: float, **more: object) -> None:
        flops = 4 * args.head_dim * args.heads * density * length * (length + 1) / 2
        rows.append({"length": length, "what": name, "ms": ms, "tflops": flops / ms / 1e9, "density": density} | more)
        print(
            f"{length:7d}  {name:38s} {ms:9.3f} ms {rows[-1]['tflops']:6.0f} TFLOP/s  density {density:.3f} {more}",
            flush=True,
        )

    query, key, value = make_inputs("topical", length, *shape)
    check_exact((query, key, value))
    for name, call in dense_rivals(query, key, value).items():
        row(name, milliseconds(call), 1.0)

    whole = AttentionCall(query=query, key=key, value=value, mask=CAUSAL, scale=args.head_dim**-0.5)
    for density in args.densities:
        full = build_plan(whole, OperatorOptions(), "triton")
        plan = cut_to_density(full, density, length)
        result = triton_forward.attend(whole, plan, 0.0)
        area = CAUSAL.area(1, length, length).item()
        real = (result.computed.double().sum() * TILE_LEN / args.heads / area).item()
        ms = milliseconds(partial(triton_forward.attend, whole, plan, 0.0))
        row(f"S2O forward, density {density}", ms, real)
        del full, plan, result
    row("S2O forward, position order", milliseconds(partial(triton_exact.attend_exact, whole)), 1.0)
    segment_len = default_segment_len(length)
    scores = torch.empty(0)
    for ranking, prepare in PREPARE_BY_TRITON.items():
        score = partial(score_all, prepare, whole, segment_len)
        scores = score()
        row(f"S2O index work: score, {ranking}", milliseconds(score), 0.0)
    row("S2O index work: order", milliseconds(partial(order_all, scores, key, value, segment_len)), 0.0)
    del scores
    held = [(density, "per_query") for density in args.densities] + [(0.1, "mean_query")]
    for density, ranking in held:
        with held_density(density, length):
            with record_calls() as recorded:
                calls.run((query, key, value), ranking=ranking)
            ms = milliseconds(partial(calls.run, (query, key, value), ranking=ranking))
        row(f"S2O whole op, held density {density}, {ranking}", ms, recorded[0].density)
    free = {"ranking": "per_query", "error": None}
    for kind, tau, given in (
        ("topical", args.tau, free),
        ("topical", args.tau, free | {"ranking": "mean_query"}),
        ("topical", S2OConfig().tau, free | {"error": S2OConfig().error}),
        ("random", args.tau, free),
        ("never stops", 1e-9, free),
    ):
        query, key, value = make_inputs(kind, length, *shape)
        name = f"tau {tau}, {given['ranking']}" if given["error"] is None else "default"
        options = OperatorOptions(tau=tau, min_seq_len=0, **given)
        whole = partial(run, calls.call_of((query, key, value)), options)

        with record_calls() as recorded:
            ours, _ = whole()
        torch.cuda.synchronize()
        dense = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        error = ((ours - dense).float().norm() / dense.float().norm()).item()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        whole()
        extra = torch.cuda.max_memory_allocated() - before - query.numel() * query.element_size()
        extra /= 2 * key.numel() * key.element_size()
        row(
            f"S2O whole op, {kind}, {name}",
            milliseconds(whole),
            recorded[0].density,
            relative_error=round(error, 5),
            extra_memory_over_kv=round(extra, 3),
        )
    return rows


def main() -> None:
    """Run and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 16384, 32768, 65536, 131072])
    parser.add_argument("--densities", type=float, nargs="+", default=[0.05, 0.1, 0.2])
    parser.add_argument("--tau", type=float, default=OperatorOptions().tau)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/attention.py: expected a CUDA device, got none. It times GPU kernels.")
    rows = [row for length in args.lengths for row in bench_length(length, args)]
    if args.json:
        shape = {"batch": 1, "heads": args.heads, "kv_heads": args.kv_heads, "head_dim": args.head_dim}
        results_file.write(args.json, rows, shape=shape, dtype="bfloat16")


if __name__ == "__main__":
    main()
