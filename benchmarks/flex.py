"""FlexAttention beside our Triton forward: one causal attention.

    python benchmarks/flex.py [--lengths 8192 65536] [--json benchmarks/results/flex-h100.json]

    dense flash      SDPA's flash kernel
    dense flex       flex_attention, compiled, under a causal block mask
    triton           our forward, keys ranked anew in every call
    flex             the same through implementation="flex", keys ranked anew in every call
    triton, flex (plan)   over a plan made before; flex also places its blocks and gathers keys and values

    ALiBi            flex_attention with a score_mod in a compiled model, dense and made sparse in its graph

B=1, Hq=32, Hkv=8, D=128, bf16, topical input (``calls.make_inputs``). Every sparse row is checked at tau=0 against SDPA
first, and says its relative error. ``--scale 16`` divides all lengths by 16, and runs on a CPU without Triton.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import calls
import torch
from calls import DEVICE, Inputs, make_inputs, milliseconds
from results_file import Rows
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

import s2o_compile
from s2o_compile import S2OConfig, backend
from s2o_compile.kernels.statistics import record_calls


def dense_flex(inputs: Inputs) -> Callable[[], Tensor]:
    """Compiled FlexAttention under a causal mask, its blocks made beforehand."""
    torch.compiler.reset()  # a second length would be compiled for lengths in general
    blocks = causal_blocks(inputs[0].shape[2])
    return partial(torch.compile(flex_attention), *inputs, block_mask=blocks, enable_gqa=True)


def sparse(inputs: Inputs, implementation: str, tau: float, *, planned: bool) -> Callable[[], Tensor]:
    """One of our forwards, checked to be exact at tau=0."""
    config = S2OConfig(implementation=implementation, tau=tau, min_seq_len=0)
    plan = s2o_compile.plan(*inputs, causal=True, config=config) if planned else None
    exact = scaled_dot_product_attention(*inputs, is_causal=True, enable_gqa=True)
    nothing_left = S2OConfig(implementation=implementation, tau=0.0, min_seq_len=0)
    ours = s2o_compile.attention(*inputs, causal=True, config=nothing_left, plan=plan)
    error = ((ours - exact).float().norm() / exact.float().norm()).item()
    if error > 1e-2:
        raise SystemExit(f"{implementation}: wrong at tau=0, relative error {error:.3g}; nothing is timed")
    return partial(s2o_compile.attention, *inputs, causal=True, config=config, plan=plan)


def causal_blocks(length: int) -> BlockMask:
    """A causal block mask, made pair by pair: to compile it for 16384 tokens alone takes four minutes."""

    def causal(_b: Tensor, _h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return j <= i

    return create_block_mask(causal, None, None, length, length, device=DEVICE)


def bench_alibi(inputs: Inputs, tau: float, rows: Rows) -> None:
    """The same call with position biases that no kernel of ours knows."""
    length, heads = inputs[0].shape[2], inputs[0].shape[1]
    slopes = torch.tensor([2.0 ** (-8.0 * (h + 1) / heads) for h in range(heads)], device=DEVICE)
    torch.compiler.reset()
    blocks = causal_blocks(length)

    def alibi(score: Tensor, _b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score - slopes[h] * (i - j).abs()

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return flex_attention(query, key, value, score_mod=alibi, block_mask=blocks, enable_gqa=True)

    dense = torch.compile(attend)
    options: dict[str, Any] = {"s2o.min_seq_len": 0, "s2o.tau": tau}
    sparse = torch.compile(attend, backend=backend.s2o, options=options)
    exact = dense(*inputs)
    for name, call in {"dense": dense, "sparse": sparse}.items():

        def measure(call: Callable[..., Tensor] = call) -> dict[str, object]:
            error = ((call(*inputs) - exact).float().norm() / exact.float().norm()).item()
            return {"ms": round(milliseconds(partial(call, *inputs)), 3), "error": round(error, 4)}

        rows.measure("ALiBi", {"N": length, "what": name}, measure)


def bench_length(length: int, tau: float, rows: Rows) -> None:
    """All rows of one length."""
    shape = (32, 8, 128) if DEVICE == "cuda" else (4, 2, 32)
    inputs = make_inputs("topical", length, *shape)
    exact = scaled_dot_product_attention(*inputs, is_causal=True, enable_gqa=True)
    flash = calls.sdpa_calls(*inputs)
    candidates: dict[str, Callable[[], Callable[[], Tensor]]] = {
        **{f"dense, {name}": (lambda call=call: call) for name, call in flash.items()},
        "dense flex": partial(dense_flex, inputs),
    }
    for planned in (False, True):
        for implementation in ("triton", "flex") if DEVICE == "cuda" else ("torch", "flex"):
            name = f"{implementation} (plan)" if planned else implementation
            candidates[name] = partial(sparse, inputs, implementation, tau, planned=planned)
    for name, make in candidates.items():

        def measure(make: Callable[[], Callable[[], Tensor]] = make) -> dict[str, object]:
            call = make()
            with record_calls() as recorded:
                output = call()
            error = ((output - exact).float().norm() / exact.float().norm()).item()
            density = recorded[-1].density if recorded else 1.0
            return {"ms": round(milliseconds(call), 3), "density": round(density, 3), "error": round(error, 4)}

        rows.measure("forward", {"N": length, "what": name}, measure)
    bench_alibi(inputs, tau, rows)


def main() -> None:
    """Run and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 16384, 32768, 65536])
    parser.add_argument("--tau", type=float, default=0.5)
    parser.add_argument("--scale", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = Rows(args.json)
    with torch.no_grad():
        for length in args.lengths:
            bench_length(length // args.scale, args.tau, rows)


if __name__ == "__main__":
    main()
