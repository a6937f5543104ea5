"""The operator over shapes and masks, each against the fastest dense rival in the same run.

    python benchmarks/shapes.py [--only length batch] [--json benchmarks/results/shapes-h100.json]

    length     growth with N
    batch      1 to 8 prompts
    groups     Hq / Hkv = 1, 4, 8
    mask       non-causal
    head dim   64 (32/8 heads, and SmolLM2's 9/3), 96, 128 and 256
    window     sliding window, exact, against compiled FlexAttention with a sliding block mask
    ranking    per_query and mean_query at the greatest length
    padding    left-padded batch, against SDPA with the mask it then needs

Outside ``window`` the density is held (``calls.held_density``): lists are cut and nothing stops, so that shapes compare
whatever their input. Dense is the faster of SDPA's flash and cuDNN. Before a row is timed the operator at tau=0 is
checked against float64. Milliseconds; TFLOP/s are the forward kernel's, of the computed area. ``--scale 16`` divides
all lengths by 16, to try the script out on a CPU.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import calls
import torch
from calls import CAUSAL, DEVICE, Inputs, check_exact, make_inputs, milliseconds
from results_file import Rows
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from s2o_compile.kernels.core.mask import AttentionMask

K = 1024
PREFIX = 2048
"""Tokens of the check at tau=0: its float64 logits fit for every batch here."""

Row = tuple[dict[str, object], Callable[[], dict[str, object]]]


def held_row(
    length: int,
    density: float,
    *,
    batch: int = 1,
    heads: int = 32,
    kv_heads: int = 8,
    head_dim: int = 128,
    causal: bool = True,
    ranking: str = "per_query",
) -> Row:
    """The operator at a held density against SDPA."""

    def measure() -> dict[str, object]:
        inputs = make_inputs("topical", length, heads, kv_heads, head_dim, batch)
        mask = CAUSAL if causal else AttentionMask()
        check_exact(inputs, mask, prefix=PREFIX)
        rival, dense_ms = calls.fastest(calls.sdpa_calls(*inputs, causal=causal))
        held = calls.time_held(inputs, density, mask, ranking=ranking)
        return {"rival": rival, "rival_ms": round(dense_ms, 3), **held, "speedup": round(dense_ms / held["s2o_ms"], 2)}

    what: dict[str, object] = {"N": length, "B": batch, "Hq": heads, "Hkv": kv_heads, "D": head_dim}
    return {**what, "mask": "causal" if causal else "none", "ranking": ranking}, measure


def window_row(length: int, window: int, heads: int = 32, kv_heads: int = 8, head_dim: int = 128) -> Row:
    """The sliding window against compiled FlexAttention."""

    def measure() -> dict[str, object]:
        inputs = make_inputs("topical", length, heads, kv_heads, head_dim)
        check_exact(inputs, AttentionMask(causal=True, window=PREFIX // 4), prefix=PREFIX)
        ours = partial(calls.run, inputs, AttentionMask(causal=True, window=window))
        flex = flex_sliding(inputs, window)
        theirs = flex()
        difference = ((ours() - theirs).float().norm() / theirs.float().norm()).item()
        flex_ms, s2o_ms = milliseconds(flex), milliseconds(ours)
        return {
            "rival": "FlexAttention, compiled",
            "rival_ms": round(flex_ms, 3),
            "s2o_ms": round(s2o_ms, 3),
            "speedup": round(flex_ms / s2o_ms, 2),
            "relative_difference": round(difference, 5),
        }

    what: dict[str, object] = {"N": length, "B": 1, "Hq": heads, "Hkv": kv_heads, "D": head_dim}
    return {**what, "mask": f"window {window}"}, measure


def flex_sliding(inputs: Inputs, window: int) -> Callable[[], Tensor]:
    """Compiled FlexAttention under a sliding window, its blocks made beforehand."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def visible(_b: Tensor, _h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & (j > i - window)

    torch.compiler.reset()  # a second length would be compiled for lengths in general
    length = inputs[0].shape[2]
    blocks = torch.compile(create_block_mask)(visible, None, None, length, length, device=DEVICE)
    return partial(torch.compile(flex_attention), *inputs, block_mask=blocks, enable_gqa=True)


def left_padding(length: int, batch: int) -> Tensor:
    """Bool [B, N], True for a token: prompts of N, 7/8 N, 6/8 N, ... tokens, padded on the left."""
    missing = torch.arange(batch, device=DEVICE) * length // 8
    return torch.arange(length, device=DEVICE) >= missing[:, None]


def padding_row(
    length: int, density: float, batch: int = 4, heads: int = 32, kv_heads: int = 8, head_dim: int = 128
) -> Row:
    """A left-padded batch against SDPA with its [B, 1, N, N] mask, key and value repeated, as transformers calls it."""

    def measure() -> dict[str, object]:
        inputs = make_inputs("topical", length, heads, kv_heads, head_dim, batch)
        prefix = min(PREFIX, length)
        check_exact(inputs, AttentionMask(causal=True, key_mask=left_padding(prefix, batch)), prefix=prefix)
        mask = AttentionMask(causal=True, key_mask=left_padding(length, batch))
        seen = mask.visible_pairs(length, length, inputs[0].device)
        query, key, value = inputs[0], *(x.repeat_interleave(heads // kv_heads, dim=1) for x in inputs[1:])
        dense_ms = milliseconds(partial(scaled_dot_product_attention, query, key, value, attn_mask=seen))
        del seen, key, value
        held = calls.time_held(inputs, density, mask)
        return {
            "rival": "SDPA with the mask",
            "rival_ms": round(dense_ms, 3),
            **held,
            "speedup": round(dense_ms / held["s2o_ms"], 2),
        }

    what: dict[str, object] = {"N": length, "B": batch, "Hq": heads, "Hkv": kv_heads, "D": head_dim}
    return {**what, "mask": "causal, padding"}, measure


def sections(density: float, scale: int) -> dict[str, list[Row]]:
    """The rows of each section, all lengths divided by ``scale``."""
    held = partial(held_row, density=density)
    short, middle, long = 32 * K // scale, 64 * K // scale, 128 * K // scale
    head_dims = ((32, 8, 64), (9, 3, 64), (32, 8, 96), (32, 8, 128), (16, 4, 256))
    return {
        "length": [held(n * K // scale) for n in (4, 8, 16, 32, 64, 128, 256, 512)],
        "batch": [held(short, batch=batch) for batch in (1, 2, 4, 8)],
        "groups": [held(middle, kv_heads=kv_heads) for kv_heads in (32, 8, 4)],
        "mask": [held(short, causal=causal) for causal in (True, False)],
        "head dim": [held(middle, heads=h, kv_heads=kv, head_dim=d) for h, kv, d in head_dims],
        "window": [window_row(n, 4 * K // scale) for n in (short, long)],
        "ranking": [held(long, ranking=ranking) for ranking in ("per_query", "mean_query")],
        "padding": [padding_row(16 * K // scale, density)],
    }


@torch.no_grad()
def main() -> None:
    """Run and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = list(sections(0.1, 1))
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="sections to run")
    parser.add_argument("--density", type=float, default=0.1)
    parser.add_argument("--scale", type=int, default=1, help="divisor of all lengths")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = Rows(args.json, density_held=args.density, dtype=str(calls.DTYPE).removeprefix("torch."))
    for section, members in sections(args.density, args.scale).items():
        for what, measure in members if section in args.only else ():
            rows.measure(section, what, measure)


if __name__ == "__main__":
    main()
