"""What an error budget costs and whether it holds: SmolLM2 calibrated on some texts, measured on others.

    python benchmarks/budget.py [--tokens 16384 65536] [--list-per head] [--segment-len 512]
                                [--json benchmarks/results/budget-h100.json]

Texts: Python's language reference (prose), the sources of its standard library, and those of torch.nn. Up to 32K tokens
the model is calibrated on the first prose and library code and measured on later prose; at 64K, where the prose is too
short for both, it is calibrated on code alone. torch.nn is a text of a kind that was calibrated on, but never seen.

    curve         error of an attention (all heads), mean, median and largest of the layers, and density, at each tau
    budget kept   every layer's error over the error asked for, on a text never calibrated on, under exact inputs;
                  "kept" is the share of layers within [0.4, 1.25] of what was asked
    model         ``evaluate``: loss, agreement, KL and needles, of fixed taus and of calibrated budgets

"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from calls import DEVICE, ON_GPU
from results_file import Rows
from torch import Tensor

import s2o_compile
from s2o_compile import S2OConfig
from s2o_compile.api import watched
from s2o_compile.capture.compiled_copy import compiled_copy
from s2o_compile.cli.demo import MODEL, document, load_model
from s2o_compile.kernels.core.options import RANKING_PER
from s2o_compile.kernels.observe import ObservedCall, Observer, observe_attention
from s2o_compile.quality.calibrate import AIM, TAUS, CurveMeter, budgeted

BUDGETS = (0.01, 0.02, 0.05, 0.1)
KEPT = (0.4, 1.25)
Text = dict[str, Tensor]


def sources(folder: Path, pattern: str) -> str:
    """The text of all Python files of a folder, by name."""
    return "\n".join(file.read_text(errors="replace") for file in sorted(folder.glob(pattern)))


def texts(tokenizer: Callable[..., dict[str, list[int]]], tokens: int) -> tuple[Text, Text]:
    """Texts [1, tokens] to calibrate on, and to measure on."""
    letters = 8 * tokens  # more than enough: a token has three to four
    found = {
        "prose": document(),
        "library": sources(Path(argparse.__file__).parent, "*.py")[:letters],
        "torch.nn": sources(Path(torch.__file__).parent / "nn", "**/*.py")[:letters],
    }
    ids = {name: torch.tensor([tokenizer(text, verbose=False)["input_ids"]]) for name, text in found.items()}
    first = {name: some[:, :tokens].to(DEVICE) for name, some in ids.items()}
    if 3 * tokens <= ids["prose"].shape[1]:
        later = ids["prose"][:, 2 * tokens : 3 * tokens].to(DEVICE)
        return {name: first[name] for name in ("prose", "library")}, {"prose": later, "torch.nn": first["torch.nn"]}
    return {name: first[name] for name in ("library", "torch.nn")}, {"prose": first["prose"]}


@torch.no_grad()
def read(model: torch.nn.Module, some: Text, config: S2OConfig, observer: Observer) -> None:
    """Let the model read texts through S2O, with an observer of its attentions."""
    with watched(config) as watch, observe_attention(observer):
        sparse = compiled_copy(model, watch.backend)
        for ids in some.values():
            sparse(ids, use_cache=False, logits_to_keep=1)


def curve(meter: CurveMeter, place: int) -> dict[str, object]:
    """Errors and density of all layers at one of TAUS."""
    errors = [site.sums.errors()[place] for site in meter.sites.values()]
    densities = [site.sums.densities()[place].mean().item() for site in meter.sites.values()]
    return {
        "density": round(statistics.mean(densities), 4),
        "mean": round(statistics.mean(errors), 4),
        "median": round(statistics.median(errors), 4),
        "largest": round(max(errors), 4),
    }


def kept(model: torch.nn.Module, text: Tensor, config: S2OConfig) -> dict[str, object]:
    """Every layer's error over the budget, each on the inputs that it has in the dense model."""
    ratios, densities = [], []

    def measure(call: ObservedCall) -> Tensor:
        exact = call.exact()
        difference = (call.result.output.float() - exact.float()).square().sum() / exact.float().square().sum()
        ratios.append(difference.sqrt().item() / (config.error or 1.0))
        densities.append(call.densities(call.result).mean().item())
        return exact

    read(model, {"text": text}, config, measure)
    return {
        "density": round(statistics.mean(densities), 4),
        "kept": round(sum(KEPT[0] <= ratio <= KEPT[1] for ratio in ratios) / len(ratios), 3),
        "not above": round(sum(ratio <= KEPT[1] for ratio in ratios) / len(ratios), 3),
        "least": round(min(ratios), 2),
        "median": round(statistics.median(ratios), 2),
        "largest": round(max(ratios), 2),
    }


def evaluated(model: torch.nn.Module, text: Tensor, config: S2OConfig) -> dict[str, object]:
    """What `evaluate` says."""
    found = s2o_compile.evaluate(model, text, config)
    assert found.needles is not None
    return {
        "density": round(found.density, 4),
        "error": round(found.error, 4),
        "loss_dense": round(found.loss_dense, 4),
        "loss_difference": round(found.loss_difference, 4),
        "top1_agreement": round(found.top1_agreement, 4),
        "kl": round(found.kl, 5),
        "planted_dense": round(found.needles.loss_dense, 3),
        "planted_s2o": round(found.needles.loss_s2o, 3),
    }


def bench_length(tokens: int, base: S2OConfig, rows: Rows, budgets: tuple[float, ...], taus: tuple[float, ...]) -> None:
    """All rows of a length."""
    model, tokenizer = load_model(tokens, DEVICE)
    known, unknown = texts(tokenizer, tokens)
    base = dataclasses.replace(base, min_seq_len=min(1024, tokens))
    lists = {"lists": base.ranking_per} | ({"S": base.segment_len} if base.segment_len else {})
    configs = {}
    if budgets:
        meter = CurveMeter()
        read(model, known, base, meter)
        for place, tau in enumerate(TAUS):
            rows.measure("curve", {"tokens": tokens, **lists, "tau": tau}, functools.partial(curve, meter, place))
        configs = {error: budgeted(base, meter, error).config for error in budgets}
    for (name, text), (error, config) in ((t, c) for t in unknown.items() for c in configs.items()):
        measure = functools.partial(kept, model, text, config)
        what = {"tokens": tokens, **lists, "text": name, "error": error}
        rows.measure("budget kept", what, measure)
    prose = unknown["prose"]
    chosen = {f"tau {tau:g}": dataclasses.replace(base, tau=tau, error=None) for tau in taus}
    chosen |= {f"error {error:g}, calibrated": config for error, config in configs.items()}
    for name, config in chosen.items():
        measure = functools.partial(evaluated, model, prose, config)
        rows.measure("model", {"tokens": tokens, **lists, "quality": name}, measure)


def main() -> None:
    """Run and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 8192, 16384, 32768, 65536])
    parser.add_argument("--calibrated", type=int, nargs="*", default=[16384, 65536], help="lengths with budgets")
    parser.add_argument("--list-per", default="group", choices=RANKING_PER)
    parser.add_argument("--segment-len", type=int, help="queries of one list; chosen by length if not given")
    parser.add_argument("--taus", type=float, nargs="+", help="fixed taus that are evaluated")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = Rows(args.json, model=MODEL, dtype="bfloat16" if ON_GPU else "float32", aim=AIM)
    for tokens in args.tokens:
        full = tokens in args.calibrated
        taus = args.taus or ((0.25, 0.5, 1.0) if full else (0.5,))
        base = S2OConfig(ranking_per=args.ranking_per, segment_len=args.segment_len)
        bench_length(tokens, base, rows, BUDGETS if full else (), tuple(taus))


if __name__ == "__main__":
    main()
