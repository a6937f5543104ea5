"""Whether a budget that is measured while it runs holds, what it costs, and how well samples tell the error.

    python benchmarks/enforced.py [--only model quality time] [--json benchmarks/results/enforced-h200.json]
    python benchmarks/enforced.py --only model --models smollm2 --tokens 65536 --every 1 --texts prose library
    python benchmarks/enforced.py --only quality time --configs default tau-0.5    # what the default's ceiling costs

Every layer attends over the inputs that it has in the dense model; of Gemma-3 the global layers. Texts: Python's
language reference (prose), the sources of its standard library and of torch.nn, and prose with needles.

    layer    density and true error (relative L2, all heads) at tau 0.5; the error of its samples over the true one
    samples  the error of so many sampled queries over the true one at tau 0.5 and 0.1, 5 and 95 % of DRAWS draws, and
             the share of the squared error that the worst 1 % of rows hold
    default  the same at the default, which holds an error of 10 % from tau 0.5 on
    budget   the same under error=0.02 and 0.05: true error over the budget, and density over that of the one tau that
             would just meet it, which nobody knows before
    quality  loss, best next token and needles of whole models, dense against sparse, under CONFIGS
    time     milliseconds of a call under CONFIGS on inputs with topics and on noise, which no tau makes sparse, against
             SDPA; "recorded" measures the error, too
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
import statistics
from functools import partial
from pathlib import Path

import calls
import torch
from budget import sources
from calls import DEVICE, make_inputs, milliseconds
from results_file import Rows
from torch import Tensor

import s2o_compile
from s2o_compile import S2OConfig
from s2o_compile.cli.demo import document
from s2o_compile.cli.models import load_model
from s2o_compile.kernels.dispatch import choose_implementation
from s2o_compile.kernels.exact.sampled import relative_error
from s2o_compile.kernels.observe import ObservedCall, observe_attention
from s2o_compile.kernels.schedule import measure_error
from s2o_compile.kernels.statistics import Call, record_calls
from s2o_compile.quality.needles import hide_needles

SECTIONS = ("model", "quality", "time")
TEXTS = ("prose", "library", "torch.nn", "needles")
BUDGETS = (0.02, 0.05)
CONFIGS = {
    "default": S2OConfig(),
    "tau-0.5": S2OConfig(tau=0.5),
    "tau-0.25": S2OConfig(tau=0.25),
    **{f"error-{error:g}": S2OConfig(error=error) for error in (0.1, 0.05, 0.03, 0.02)},
}
"""Quality of whole models and of timed calls."""

TAUS = (0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.5, 2.5, 4.0)
LENGTHS = {"gemma3": (8192, 16384, 32768), "smollm2": (8192, 16384, 65536)}
EVERY = {"gemma3": 1, "smollm2": 5}
"""Of the layers that run sparse, every so manieth is measured."""

SAMPLES, SAMPLED_TAUS, DRAWS = (64, 128, 256, 512, 1024, 2048), (0.5, 0.1), 200
"""Numbers of samples, and the draws of each."""


def texts(tokenizer: object, tokens: int) -> dict[str, Tensor]:
    """Ids [1, tokens] by the name of the text; a text that is too short is left out."""
    letters = 8 * tokens
    found = {
        "prose": document(),
        "library": sources(Path(argparse.__file__).parent, "*.py")[:letters],
        "torch.nn": sources(Path(torch.__file__).parent / "nn", "**/*.py")[:letters],
    }
    ids = {name: torch.tensor([tokenizer(text, verbose=False)["input_ids"]]) for name, text in found.items()}  # pyright: ignore
    ids = {name: some[:, :tokens].to(DEVICE) for name, some in ids.items() if some.shape[1] >= tokens}
    return ids | {"needles": hide_needles(ids["prose"], seed=0).ids} if "prose" in ids else ids


def distance(output: Tensor, exact: Tensor) -> float:
    """Relative L2 error."""
    return ((output - exact).float().norm() / exact.float().norm()).item()


def measured(call: ObservedCall, exact: Tensor, **options: object) -> dict[str, float]:
    """Density and error of a call under some options, and the error that its samples show."""
    result = call.run(**options)
    sampled = relative_error(*measure_error(call, result, choose_implementation("auto", call.query)).sum((1, 2))).item()
    true = distance(result.output, exact)
    density = call.densities(result).mean().item()
    return {"density": round(density, 4), "true": round(true, 5), "sampled_over_true": round(sampled / true, 3)}


def sampled_shares(call: ObservedCall, exact: Tensor, tau: float) -> dict[str, object]:
    """What samples of several numbers show of the true error: one query of each of as many equal parts."""
    output = call.run(tau=tau).output
    off, size = (x.double().square().sum((0, 3)) for x in (output - exact, exact))  # [Hq, Nq]
    n_heads, n_queries = off.shape
    true = (off.sum() / size.sum()).sqrt()
    worst = off.flatten().sort(descending=True).values[: off.numel() // 100].sum() / off.sum()
    found: dict[str, object] = {"true": round(true.item(), 5), "worst_rows": round(worst.item(), 3)}
    generator = torch.Generator(off.device).manual_seed(0)
    heads = torch.arange(n_heads, device=off.device)[:, None]
    for count in SAMPLES:
        first = torch.arange(count, device=off.device) * n_queries // count
        shares = []
        for _ in range(DRAWS):
            part = torch.rand(n_heads, count, generator=generator, device=off.device) * (n_queries // count)
            rows = first + part.long()
            shares.append((off[heads, rows].sum() / size[heads, rows].sum()).sqrt() / true)
        ends = torch.tensor([0.05, 0.95], dtype=true.dtype, device=true.device)
        found[str(count)] = [round(x, 3) for x in torch.stack(shares).quantile(ends).tolist()]
    return found


def least_density(curve: list[dict[str, float]], error: float) -> float:
    """Density at an error, between the points of a curve over falling errors."""
    for worse, better in itertools.pairwise(curve):
        if better["true"] <= error <= worse["true"]:
            share = math.log(error / worse["true"]) / math.log(better["true"] / worse["true"])
            return worse["density"] * (better["density"] / worse["density"]) ** share
    return curve[0]["density"] if curve[0]["true"] < error else math.nan


def measure_layer(rows: Rows, what: dict[str, object], call: ObservedCall) -> Tensor:
    """The rows of one layer; returns its exact output."""
    exact = call.exact()
    curve = [measured(call, exact, tau=tau) for tau in reversed(TAUS)]
    rows.measure("layer", what, lambda: measured(call, exact, tau=0.5))
    rows.measure("default", what, lambda: measured(call, exact, tau=S2OConfig().tau, error=S2OConfig().error))
    for tau in SAMPLED_TAUS:
        rows.measure("samples", {**what, "tau": tau}, lambda tau=tau: sampled_shares(call, exact, tau))

    def budgeted(error: float) -> dict[str, float]:
        found = measured(call, exact, tau=None, error=error)
        least = least_density(curve, error)
        found["true_over_budget"] = round(found["true"] / error, 3)
        if math.isnan(least):  # none of TAUS meets it
            return found
        return found | {"least_density": round(least, 4), "density_over_least": round(found["density"] / least, 3)}

    for error in BUDGETS:
        rows.measure("budget", {**what, "error": error}, lambda error=error: budgeted(error))
    return exact


@torch.no_grad()
def measure_models(
    rows: Rows, models: list[str], lengths: list[int] | None, chosen: list[str], every: int | None
) -> None:
    """The layers of models on texts of several lengths."""
    for model_name in models:
        for tokens in lengths or LENGTHS[model_name]:
            model, tokenizer = load_model(tokens, DEVICE, model_name)
            sparse = s2o_compile.optimize(model, S2OConfig(min_seq_len=2048, inner_backend="eager"))
            for text, ids in texts(tokenizer, tokens).items():
                if text not in chosen:
                    continue
                seen: list[str] = []
                what = {"model": model_name, "tokens": tokens, "text": text}

                def see(call: ObservedCall, seen: list[str] = seen, what: dict[str, object] = what) -> Tensor:
                    seen.append(call.site)
                    if (len(seen) - 1) % (every or EVERY[what["model"]]):
                        return call.exact()
                    return measure_layer(rows, {**what, "site": call.site}, call)

                with observe_attention(see):
                    sparse(ids, use_cache=False, logits_to_keep=1)


def measure_quality(
    rows: Rows, models: list[str], lengths: list[int] | None, chosen: list[str], configs: list[str]
) -> None:
    """Whole models on texts."""
    for model_name in models:
        for tokens in lengths or LENGTHS[model_name][1:]:
            model, tokenizer = load_model(tokens, DEVICE, model_name)
            read = texts(tokenizer, tokens)
            for text, name in itertools.product(chosen, configs):
                config = dataclasses.replace(CONFIGS[name], min_seq_len=2048)
                what = {"model": model_name, "tokens": tokens, "text": text, "config": name}
                rows.measure("quality", what, partial(judged, model, read[text], config))


def judged(model: object, ids: Tensor, config: S2OConfig) -> dict[str, float]:
    """A whole model on a text, dense and sparse; errors are of all heads together, mean over layers and the worst."""
    found = s2o_compile.evaluate(model, ids, config)  # pyright: ignore
    needles = found.needles
    figures = {
        "density": found.density,
        "error": found.error,
        "worst": max(site.error for site in found.sites),
        "loss": found.loss_difference,
        "top1": found.top1_agreement,
        "needles": math.nan if needles is None else needles.loss_s2o - needles.loss_dense,
        "needles_dense": math.nan if needles is None else needles.loss_dense,
    }
    return {name: round(x, 4) for name, x in figures.items()}


@torch.no_grad()
def measure_times(rows: Rows, lengths: list[int], scale: int, configs: list[str]) -> None:
    """Calls of 32 heads over 8 of 128 dimensions."""
    for kind in ("topical", "random"):
        for tokens in lengths:
            inputs = make_inputs(kind, tokens // scale, 32, 8, 128)
            dense = calls.fastest(calls.sdpa_calls(*inputs))[1]

            def timed(name: str, inputs: calls.Inputs = inputs, dense: float = dense) -> dict[str, float]:
                config = dataclasses.replace(CONFIGS[name], min_seq_len=1)

                def call() -> object:
                    return s2o_compile.attention(*inputs, causal=True, config=config)

                def recorded() -> Call:
                    with record_calls() as seen:
                        call()
                    return seen[0]

                found = {"ms": milliseconds(call), "recorded_ms": milliseconds(recorded), "dense_ms": dense}
                return {name: round(x, 3) for name, x in {**found, "density": recorded().density}.items()}

            for name in configs:
                what = {"input": kind, "tokens": tokens // scale, "config": name}
                rows.measure("time", what, lambda name=name, timed=timed: timed(name))


def main() -> None:
    """Run and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--models", nargs="+", choices=tuple(LENGTHS), default=list(LENGTHS))
    parser.add_argument("--tokens", type=int, nargs="+")
    parser.add_argument("--texts", nargs="+", choices=TEXTS, help="by default all, and for quality prose")
    parser.add_argument("--every", type=int, help="measure every so manieth layer")
    parser.add_argument("--configs", nargs="+", choices=tuple(CONFIGS), default=list(CONFIGS))
    parser.add_argument("--call-tokens", type=int, nargs="+", default=[8192, 16384, 32768, 131072])
    parser.add_argument("--scale", type=int, default=1, help="divides the lengths of the timed calls")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = Rows(args.json, dtype="bfloat16" if DEVICE == "cuda" else "float32")
    if "model" in args.only:
        measure_models(rows, args.models, args.tokens, args.texts or list(TEXTS), args.every)
    if "quality" in args.only:
        measure_quality(rows, args.models, args.tokens, args.texts or ["prose"], args.configs)
    if "time" in args.only:
        measure_times(rows, args.call_tokens, args.scale, args.configs)
    budgets = [row for row in rows if row["section"] == "budget" and "failed" not in row]
    if budgets:
        worst = max(row["true_over_budget"] for row in budgets)
        mean = statistics.mean(row["density_over_least"] for row in budgets if "density_over_least" in row)
        print(f"{len(budgets)} budgets: true error at most {worst:.2f} of the budget, density {mean:.2f} of the least")


if __name__ == "__main__":
    main()
