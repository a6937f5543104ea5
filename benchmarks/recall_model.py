"""Train a small decoder that recalls single far keys, and judge what sparse attention costs it.

    python benchmarks/recall_model.py [--minutes 5] [--seed 0] [--lengths 8192 16384 32768] [--taus 0.25 1]
                                      [--save FILE | --load FILE] [--json benchmarks/results/recall-h200.json]
    python benchmarks/recall_model.py --tiny --device cpu --minutes 3 --lengths 128 2048   # a trial, on two cores

Heads of 128 in groups of four, queries and keys normalised, RoPE, SwiGLU, tied embeddings: as modern models are built.
Weights are made anew from the seed and are never committed. How many steps fit depends on the machine, so they differ.
Training begins with short rows that are full of answers, where attention learns to look up, and takes longer ones as it
succeeds (`recall_data.py` makes them). It ends soon after every length recalls ``--target``, or with its time.

    training   at every stage's end and at the end of all: recall at the lengths trained on
    recall     share of answers whose best prediction is right, 64 pairs a sequence: dense, and through ``optimize``
    copying    the same of eight strings of 16 symbols

Rows give loss on text, too, and by S2O density, error of an attention (mean over layers, and the worst), and the recall
lost. S2O is forced at lengths that its default runs dense.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from recall_data import PAIR, Batch, Source, library_text
from recall_decoder import TINY, Decoder, Settings, answer
from recall_training import FACTS, Training
from results_file import Rows
from torch import nn

import s2o_compile
from s2o_compile import S2OConfig
from s2o_compile.kernels.observe import observe_attention
from s2o_compile.quality.site_quality import SiteMeter

COPIED, COPIES = 16, 8
"""Symbols of a string that is copied when a model is judged, and such strings of a sequence."""

Reading = dict[str, float]


@torch.no_grad()
def read(model: nn.Module, batches: Sequence[Batch]) -> Reading:
    """Answers, recall and loss on text over batches."""
    answered = [dataclasses.asdict(answer(model, batch)) for batch in batches]
    sums = {name: sum(one[name].item() for one in answered) for name in answered[0]}
    recall, text_loss = sums["right"] / sums["answers"], sums["text_loss"] / max(1, sums["texts"])
    return {"answers": sums["answers"], "recall": recall, "text loss": text_loss}


def sparse(fast: nn.Module, batches: Sequence[Batch], dense: Reading) -> dict[str, object]:
    """The same through S2O, with what it computed and how far it was from exact attention on the same inputs.

    Raises:
        RuntimeError: No attention ran sparse.
    """
    meter = SiteMeter()
    with observe_attention(meter):
        found = read(fast, batches)
    if not (sites := meter.sites()):
        raise RuntimeError("expected attention that runs sparse, got none. Lower min_seq_len.")
    errors = [site.error for site in sites]
    return rounded(found) | {
        "lost": round(dense["recall"] - found["recall"], 4),
        "density": round(statistics.mean(site.density for site in sites), 4),
        "error": round(statistics.mean(errors), 4),
        "worst layer": round(max(errors), 4),
    }


def rounded(numbers: Reading) -> dict[str, object]:
    """To four digits."""
    return {name: round(number, 4) for name, number in numbers.items()}


def judge(
    model: nn.Module, source: Source, length: int, sequences: int, configs: dict[str, S2OConfig], rows: Rows
) -> None:
    """All rows of a length."""
    tasks, dense = {}, {}
    for task, string, count in (("recall", PAIR, FACTS), ("copying", COPIED, COPIES)):
        tasks[task] = [source.far(1, length, count=count, string=string) for _ in range(sequences)]
        dense[task] = read(model, tasks[task])
        rows.measure(task, {"tokens": length, "quality": "dense"}, partial(rounded, dense[task]))
    for name, config in configs.items():
        torch.compiler.reset()
        fast = s2o_compile.optimize(model, config)
        for task, batches in tasks.items():
            rows.measure(task, {"tokens": length, "quality": name}, partial(sparse, fast, batches, dense[task]))


def main() -> None:
    """Train or load, judge, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5.0, help="at most, for training")
    parser.add_argument("--target", type=float, default=0.98, help="recall at every length that ends training early")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 16384, 32768])
    parser.add_argument("--taus", type=float, nargs="*", default=[0.25, 1.0], help="beside the default's")
    parser.add_argument("--sequences", type=int, default=32, help="judged at each length")
    parser.add_argument("--tiny", action="store_true", help="a model that two cores train in minutes, for a trial")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument("--save", type=Path, help="write the weights")
    weights.add_argument("--load", type=Path, help="judge these weights, without training")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.tiny:
        torch.set_num_threads(1)  # matrices this small would only wait for a second thread
    settings, lengths = TINY if args.tiny else Settings(), sorted(args.lengths)
    dtype = torch.bfloat16 if args.device.startswith("cuda") else torch.float32
    model = Decoder(settings, dtype)
    parameters = sum(weight.numel() for weight in model.parameters())
    about = {"model": f"{parameters / 1e6:.1f} million parameters", "settings": dataclasses.asdict(settings)}
    rows = Rows(args.json, dtype=str(dtype).removeprefix("torch."), **about)
    known, unknown = library_text(args.device)
    if args.load:
        state = torch.load(args.load, map_location="cpu", weights_only=True)
    else:
        training = Training(settings, lengths, known, seed=args.seed)
        training.run(args.minutes, args.target, rows)
        state = training.model.state_dict()
        if args.save:
            args.save.parent.mkdir(parents=True, exist_ok=True)
            torch.save(state, args.save)
    model.load_state_dict(state)
    model = model.to(args.device, dtype).eval()
    source = Source(settings.vocabulary, unknown, seed=args.seed + 2)
    # Short lengths are forced; nothing is compiled behind the passes, so that only attention differs.
    base = S2OConfig(min_seq_len=1, inner_backend="eager")
    configs = {"default": base} | {f"tau {tau:g}": dataclasses.replace(base, tau=tau, error=None) for tau in args.taus}
    for length in lengths:
        judge(model, source, length, args.sequences, configs, rows)


if __name__ == "__main__":
    main()
