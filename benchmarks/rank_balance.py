"""How evenly turns of the zigzag share out the computed pairs of SmolLM2-135M on real text: ranks are simulated.

Tiles of a context parallel call are those of one device, so one device's tiles say what every layout gives each rank.

python benchmarks/rank_balance.py --tokens 16384 [--segment-len 128] [--text FILE] [--json FILE]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import results_file
import torch
from torch import Tensor

import s2o_compile
from s2o_compile import S2OConfig
from s2o_compile.cli.demo import MODEL, build_prompt, load_model
from s2o_compile.kernels.core.plan import TILE_LEN
from s2o_compile.kernels.sequence.layout import SWEEPS, Layout

RANKS = (2, 4, 8)


@torch.no_grad()
def tiles(tokens: int, segment_len: int, tau: float, device: str, text: Path | None = None) -> Tensor:
    """Computed pairs of each tile by layer, float64 [layers, tiles], summed over heads; of a text, or of the demo."""
    model, tokenizer = load_model(tokens, device)
    if text is None:
        ids = build_prompt(tokenizer, tokens).to(device)
    else:
        ids = tokenizer(text.read_text(), return_tensors="pt").input_ids[:, :tokens].to(device)
        if ids.shape[1] < tokens:
            raise SystemExit(f"--text: expected {tokens} tokens, got {ids.shape[1]}. Give a longer file.")
    config = S2OConfig(tau=tau, min_seq_len=2048, segment_len=segment_len, inner_backend="eager")
    with s2o_compile.record() as recording:
        s2o_compile.optimize(model.model, config)(ids, use_cache=False)
    print(f"density {recording.report.density:.3f}")
    rows = [min(TILE_LEN, tokens - first) for first in range(0, tokens, TILE_LEN)]
    computed = [call.computed.double().sum((0, 1)).cpu() for call in recording.calls if call.computed is not None]
    return torch.stack(computed) * torch.tensor(rows)


def imbalance(pairs: Tensor, layout: Layout) -> Tensor:
    """Max over mean of the ranks' pairs, for each row of [.., tiles]."""
    shares = [
        sum(pairs[..., piece.start // TILE_LEN : -(-piece.stop // TILE_LEN)].sum(-1) for piece in pieces)
        for pieces in layout.pieces
    ]
    found = torch.stack([torch.as_tensor(share) for share in shares])
    return found.amax(0) / found.mean(0)


def main() -> None:
    """Run and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--segment-len", type=int, default=128)
    parser.add_argument("--tau", type=float, default=0.5)
    parser.add_argument("--text", type=Path, help="a file of text; without, the demo's prompt")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    pairs = tiles(args.tokens, args.segment_len, args.tau, args.device, args.text)
    rows: list[dict[str, object]] = []
    for ranks in RANKS:
        for turns in SWEEPS:
            if args.tokens < 2 * ranks * turns * args.segment_len:
                continue
            layout = Layout.turns(args.tokens, ranks, args.segment_len, turns)
            layers = imbalance(pairs, layout)
            rows.append(
                {
                    "ranks": ranks,
                    "turns": turns,
                    "whole model": round(imbalance(pairs.sum(0), layout).item(), 3),
                    "mean layer": round(layers.mean().item(), 3),
                    "worst layer": round(layers.max().item(), 3),
                }
            )
            print(rows[-1], flush=True)
    if args.json:
        about = {"model": MODEL, "tokens": args.tokens, "segment_len": args.segment_len, "tau": args.tau}
        about |= {} if args.text is None else {"text": args.text.name}
        results_file.write(args.json, rows, **about)


if __name__ == "__main__":
    main()
