"""What the passes add to torch.compile: SmolLM2-135M, and a Llama of 32 layers with random weights.

python benchmarks/compile_time.py [--models smollm2 llama] [--hidden 256] [--json benchmarks/results/compile-time.json]

torch.compile's own time is Dynamo's: capture, AOTAutograd, Inductor and the compilers behind it, of one forward without
gradients. Cold: nothing in Inductor's caches. Warm: everything, which is the least that a compilation can take.
"""

from __future__ import annotations

import argparse
import gc
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import results_file
import torch
from torch import Tensor, nn

import s2o_compile
from s2o_compile import S2OConfig
from s2o_compile.cli.demo import MODEL, build_prompt, load_model

TOKENS, LAYERS, LLAMA_HIDDEN = 512, 32, 4096
BAR = 0.02


@contextmanager
def fresh_cache() -> Iterator[None]:
    """Inside, Inductor and triton have empty caches."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        named = {"TORCHINDUCTOR_CACHE_DIR": folder, "TRITON_CACHE_DIR": f"{folder}/triton"}
        with mock.patch.dict(os.environ, named):
            torch.compiler.reset()
            yield


def smollm2(device: str) -> tuple[nn.Module, Tensor]:
    """The trained model with a prompt of real text, int64 [1, N]."""
    model, tokenizer = load_model(TOKENS, device)
    return model, build_prompt(tokenizer, TOKENS).to(device)


def llama(device: str, hidden: int) -> tuple[nn.Module, Tensor]:
    """Llama-3.1-8B's shape at ``hidden`` 4096; narrower ones keep its layers, groups of heads and ratio of widths."""
    from transformers import LlamaConfig, LlamaForCausalLM

    head_dim = 128 if hidden >= 2048 else 32
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 7 // 2,
        num_hidden_layers=LAYERS,
        num_attention_heads=hidden // head_dim,
        num_key_value_heads=max(hidden // head_dim // 4, 1),
        head_dim=head_dim,
        vocab_size=128256 if hidden == LLAMA_HIDDEN else 4096,
        max_position_embeddings=131072,
    )
    with torch.device(device):
        model = LlamaForCausalLM(config).eval()
    ids = torch.randint(0, config.vocab_size, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    return model.to(torch.bfloat16 if device == "cuda" else torch.float32), ids.to(device)


@torch.no_grad()
def bench(name: str, model: Any, ids: Tensor) -> list[dict[str, object]]:  # noqa: ANN401 (a transformers model)
    """A row for cold and one for warm caches; torch.compile's own time is what is left of the same compilation."""
    rows = []
    with fresh_cache():
        for cache in ("cold", "warm"):
            torch.compiler.reset()
            gc.collect()
            # What a site runs at this length does not matter: the passes have the same work.
            compiled = s2o_compile.optimize(model, S2OConfig())
            with s2o_compile.record() as recording:
                compiled(ids, use_cache=False)
            passes, whole = recording.pass_seconds, recording.compile_seconds
            row = {
                "model": name,
                "cache": cache,
                "sites": recording.report.rewritten,
                "torch_compile_seconds": round(whole - passes, 2),
                "pass_seconds": round(passes, 4),
                "share": round(passes / (whole - passes), 5),
            }
            rows.append(row)
            print(row, flush=True)
    return rows


def main() -> None:
    """Run and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--models", nargs="+", choices=("smollm2", "llama"), default=["smollm2", "llama"])
    parser.add_argument("--device", default=device)
    parser.add_argument("--hidden", type=int, default=LLAMA_HIDDEN if device == "cuda" else 256)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = []
    if "smollm2" in args.models:
        rows += bench(MODEL, *smollm2(args.device))
    if "llama" in args.models:
        rows += bench(f"Llama, {LAYERS} layers, hidden {args.hidden}", *llama(args.device, args.hidden))
    if args.json:
        results_file.write(args.json, rows, tokens=TOKENS, dtype="bfloat16" if args.device == "cuda" else "float32")
    late = [row for row in rows if row["cache"] == "cold" and row["share"] >= BAR]  # pyright: ignore
    if late:
        raise SystemExit(
            f"the passes take {late[0]['share']:.1%} of torch.compile's own time, expected under {BAR:.0%}"
        )


if __name__ == "__main__":
    main()
