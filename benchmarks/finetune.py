"""Fine-tune SmolLM2 densely and through S2OConfig(training="sparse"), from the same weights over the same text.

    python benchmarks/finetune.py [--tokens 8192] [--steps 50] [--json benchmarks/results/finetune-h100.json]

Each step reads one window of the demo's document. The loss of the sparse run must follow the dense one's within 2 %, as
a mean over the last ten steps. Needs a GPU: FlexAttention has no backward on a CPU.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import results_file
import torch
from torch import Tensor, nn

import s2o_compile
from s2o_compile import S2OConfig
from s2o_compile.cli.demo import document, load_model

FOLLOWS = 0.02
LAST = 10
NAME = "s2o_finetune"


def attend_with(config: S2OConfig) -> Callable[..., tuple[Tensor, None]]:
    """An attention function as transformers calls it, causal, without padding."""

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, _mask: Tensor | None, **options: object
    ) -> tuple[Tensor, None]:
        scale = options.get("scaling")
        assert scale is None or isinstance(scale, float)
        output = s2o_compile.attention(query, key, value, causal=True, scale=scale, config=config)
        assert isinstance(output, Tensor)
        return output.transpose(1, 2), None

    return attend


def train(config: S2OConfig, tokens: int, steps: int, device: str) -> tuple[list[float], float]:
    """Losses of all steps, and the seconds of a step once everything is compiled."""
    from transformers import AttentionInterface

    torch.manual_seed(0)
    model, tokenizer = load_model(tokens, device)
    AttentionInterface.register(NAME, attend_with(config))
    model.set_attn_implementation(NAME)
    model.train()
    ids = torch.tensor(tokenizer(document(), verbose=False).input_ids, device=device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    losses, seconds = [], []
    for step in range(steps):
        first = step * tokens % max(len(ids) - tokens, 1)
        window = ids[None, first : first + tokens]
        start = time.perf_counter()
        loss = model(input_ids=window, labels=window, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        seconds.append(time.perf_counter() - start)
        print(f"{config.training:6s}  step {step:3d}  loss {losses[-1]:.4f}  {seconds[-1]:.2f} s", flush=True)
    return losses, sorted(seconds)[len(seconds) // 2]


def main() -> None:
    """Run and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--tau", type=float, default=0.5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows: list[dict[str, object]] = []
    means = {}
    for training in ("dense", "sparse"):
        config = S2OConfig(training=training, tau=args.tau, min_seq_len=0)
        losses, seconds = train(config, args.tokens, args.steps, args.device)
        means[training] = sum(losses[-LAST:]) / len(losses[-LAST:])
        rows.append(
            {"training": training, "tokens": args.tokens, "tau": args.tau, "losses": losses, "seconds": seconds}
        )
    difference = means["sparse"] / means["dense"] - 1
    print(f"dense {means['dense']:.4f}, sparse {means['sparse']:.4f}: {100 * difference:+.2f} %", flush=True)
    if args.json:
        results_file.write(args.json, rows, relative_difference=difference)
    if abs(difference) > FOLLOWS:
        raise SystemExit(f"the sparse loss is {100 * difference:+.2f} % off, expected at most {100 * FOLLOWS:.0f} %")


if __name__ == "__main__":
    main()
