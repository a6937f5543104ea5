"""What a ranking is worth: density against error on a trained model's own queries, keys and values.

    python benchmarks/fidelity.py [--only "density at error"] [--model gemma3] [--tokens 16384 65536] [--layers 2]
                                  [--json benchmarks/results/fidelity-h100.json]

SmolLM2-135M-Instruct reads the demo's prompt with exact attention, or Gemma-3-270M the text of that prompt. Queries,
keys, values and outputs of every ``--layers``-th layer without a window are kept. Then the operator runs on them at all
of TAUS. Error is the relative L2 error of a head's output against SDPA, density the share of query-key pairs computed.
Both are means over heads and layers.

    density at error    "at 2 %" is the density at which the mean error is 2 %, interpolated between taus in logarithms,
                        and "by head" the mean of what every head needs by itself, as a calibration would set it
    PBS-Attn            the same of the paper's rival (``pbs_attention.py``), its threshold in tau's place
    FlashPrefill        the same of its block rule (``flash_prefill.py``), with and without its correction
    against PBS-Attn    at a density of PBS-Attn, the MSE of both, and the density at which S2O has that MSE; where S2O
                        at its sparsest has less, that density, and the ratio is a lower bound. MSE is relative to the
                        exact output's power: the square of a head's error, mean over heads and layers
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from unittest.mock import patch

import torch
from calls import CAUSAL, DEVICE
from flash_prefill import flash_prefill
from pbs_attention import pbs_attention
from results_file import Rows
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import s2o_compile
from s2o_compile import S2OConfig
from s2o_compile.cli.demo import build_prompt, document
from s2o_compile.cli.models import KNOWN, load_model
from s2o_compile.kernels import dispatch as operator
from s2o_compile.kernels import schedule
from s2o_compile.kernels.core.call import AttentionCall
from s2o_compile.kernels.core.options import RANKING_PER, OperatorOptions
from s2o_compile.kernels.core.plan import n_tiles
from s2o_compile.kernels.core.result import Result
from s2o_compile.kernels.statistics import pairs_by_head

TAUS = (0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.5, 2.5, 4.0, 8.0, 16.0)
THRESHOLDS = (0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
SCORE_THRESHOLDS = (0.0, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0, 10.0, 15.0, 25.0)
"""Of FlashPrefill, in units of a logit."""
ERRORS = (0.02, 0.05, 0.1)
DENSITIES = (0.25, 0.1)
SECTIONS = ("density at error", "PBS-Attn", "FlashPrefill", "against PBS-Attn")

Captured = list[tuple[Tensor, Tensor, Tensor, Tensor]]
Attend = Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
"""Output [B, Hq, N, Dv] and density [Hq] of query, key, value and a setting."""

Curve = tuple[Tensor, Tensor]
"""Error and density, both float64 [settings, layers * heads]."""


@torch.no_grad()
def capture(name: str, tokens: int, every: int) -> Captured:
    """Query, key, value and exact output of every ``every``-th layer without a window."""
    model, tokenizer = load_model(tokens, DEVICE, name)
    ids = build_prompt(tokenizer, tokens)
    if name != "smollm2":  # another template of chats
        ids = torch.tensor([tokenizer(document(), verbose=False).input_ids[:tokens]])
    ids = ids.to(DEVICE)
    found, number = [], itertools.count()

    def exact(call: AttentionCall, *_: object) -> Result:
        (query, key, value), scale = call.tensors, call.scale
        output = torch.empty_like(query)
        output.copy_(scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True))
        if next(number) % every == 0:
            found.append(tuple(x.contiguous() for x in (query, key, value, output)))
        computed = torch.zeros(*query.shape[:2], n_tiles(query.shape[2]), dtype=torch.int32, device=query.device)
        return Result(output, output.new_zeros(query.shape[:3], dtype=torch.float32), computed)

    with patch.object(schedule, "attend", exact):
        s2o_compile.optimize(model, S2OConfig(min_seq_len=0, inner_backend="eager"))(ids, logits_to_keep=1)
    return found


def s2o_attention(
    query: Tensor, key: Tensor, value: Tensor, tau: float, *, ranking: str, ranking_per: str, segment_len: int
) -> tuple[Tensor, Tensor]:
    """The operator, as ``Attend``."""
    call = AttentionCall.of(query, key, value, causal=True)
    options = OperatorOptions(tau=tau, ranking=ranking, ranking_per=ranking_per, segment_len=segment_len)
    implementation = operator.choose_implementation("auto", query)
    result = schedule.attend(call, options, implementation, operator.EXACT[implementation])
    n = query.shape[2]
    return result.output, pairs_by_head(result.computed, n).sum(0).cpu() / CAUSAL.area(len(query), n, n).sum()


def pbs(query: Tensor, key: Tensor, value: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """PBS-Attn, as ``Attend``."""
    return pbs_attention(query, key, value, threshold=threshold)


def curve(captured: Captured, attend: Attend, settings: Sequence[float]) -> Curve:
    """Error and density at every setting."""
    errors, densities = [], []
    for setting, (query, key, value, exact) in itertools.product(settings, captured):
        output, density = attend(query, key, value, setting)
        lost, power = (x.square().sum((0, 2, 3)) for x in (output.float() - exact.float(), exact.float()))
        errors.append((lost / power).sqrt().double().cpu())
        densities.append(density)
    return torch.stack(errors).view(len(settings), -1), torch.stack(densities).view(len(settings), -1)


def read_off(at: float, xs: Sequence[float], ys: Sequence[float]) -> float:
    """Where a curve is at x = ``at``, between settings in logarithms.

    Raises:
        ValueError: The curve does not reach so far.
    """
    for (low, here), (high, there) in itertools.pairwise(sorted(zip(xs, ys, strict=True))):
        if low <= at <= high:
            share = math.log(at / low) / max(math.log(high / low), 1e-9)
            return math.exp(math.log(here) * (1 - share) + math.log(there) * share)
    raise ValueError(f"expected {min(xs):.3g} to {max(xs):.3g}, which was measured, got {at:.3g}. Extend the settings.")


def density_at(error: float, errors: Sequence[float], densities: Sequence[float]) -> float:
    """Density at an error; that of the nearest setting beyond them."""
    return read_off(min(max(error, min(errors)), max(errors)), errors, densities)


def densities_at(measured: Callable[[], Curve]) -> dict[str, float]:
    """One row: densities at ERRORS."""
    errors, densities = measured()
    means = errors.mean(1).tolist(), densities.mean(1).tolist()
    heads = [(x.tolist(), y.tolist()) for x, y in zip(errors.T, densities.T, strict=True)]
    found = {}
    for error in ERRORS:
        by_head = [density_at(error, *head) for head in heads]
        found[f"at {error:.0%}"] = round(density_at(error, *means), 4)
        found[f"at {error:.0%} by head"] = round(sum(by_head) / len(by_head), 4)
    return found


def default_tau(measured: Callable[[], Curve]) -> dict[str, float]:
    """What the default tau gives."""
    default = TAUS.index(OperatorOptions().tau)
    error, density = (x[default].mean().item() for x in measured())
    return {"default tau error": round(error, 4), "density": round(density, 4)}


def compare(theirs: Curve, ours: Curve, density: float) -> dict[str, float]:
    """One row: MSE of both at a density, and the density at which ours is theirs."""
    their_mse, our_mse = (errors.square().mean(1).tolist() for errors, _ in (theirs, ours))
    their_density, our_density = (densities.mean(1).tolist() for _, densities in (theirs, ours))
    mse, ours_there = read_off(density, their_density, their_mse), read_off(density, our_density, our_mse)
    enough = read_off(min(mse, max(our_mse)), our_mse, our_density)
    found = {
        "PBS-Attn MSE": mse,
        "S2O MSE": ours_there,
        "MSE ratio": mse / ours_there,
        "S2O density": enough,
        "density ratio": density / enough,
    }
    return {name: float(f"{value:.4g}") for name, value in found.items()}


def measure_length(captured: Captured, rows: Rows, tokens: int, args: argparse.Namespace) -> None:
    """The rows of one length; a curve is measured once, when the first row asks for it."""
    theirs = cache(partial(curve, captured, pbs, THRESHOLDS))
    if "PBS-Attn" in args.only:
        rows.measure("PBS-Attn", {"tokens": tokens}, partial(densities_at, theirs))
    for corrected in (True, False) if "FlashPrefill" in args.only else ():

        def by_blocks(*given: Tensor | float, corrected: bool = corrected) -> tuple[Tensor, Tensor]:
            return flash_prefill(*given[:3], threshold=given[3], corrected=corrected)  # pyright: ignore

        measured = partial(curve, captured, by_blocks, SCORE_THRESHOLDS)
        rows.measure("FlashPrefill", {"tokens": tokens, "corrected": corrected}, partial(densities_at, measured))
    for ranking, ranking_per, segment_len in itertools.product(args.rankings, args.lists, args.segments):
        attend = partial(s2o_attention, ranking=ranking, ranking_per=ranking_per, segment_len=segment_len)
        ours = cache(partial(curve, captured, attend, TAUS))
        what: Mapping[str, object] = {"tokens": tokens, "ranking": ranking, "lists": ranking_per, "S": segment_len}
        if "density at error" in args.only:
            rows.measure("density at error", what, lambda ours=ours: densities_at(ours) | default_tau(ours))
        for density in DENSITIES if "against PBS-Attn" in args.only else ():
            row = {**what, "PBS-Attn density": density}
            rows.measure("against PBS-Attn", row, lambda ours=ours, at=density: compare(theirs(), ours(), at))


def main() -> None:
    """Run and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS, help="sections to run")
    parser.add_argument("--model", choices=tuple(KNOWN), default="smollm2")
    parser.add_argument("--tokens", type=int, nargs="+", default=[16384, 65536])
    parser.add_argument("--layers", type=int, default=2, help="one of so many layers is measured")
    parser.add_argument("--rankings", nargs="+", default=["per_query", "mean_query"])
    parser.add_argument("--lists", nargs="+", default=RANKING_PER, help="whether heads of a group share a list")
    parser.add_argument("--segments", type=int, nargs="+", default=[256, 512, 1024])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = Rows(
        args.json, model=KNOWN[args.model].name, layers=f"one of {args.layers}", taus=TAUS, thresholds=THRESHOLDS
    )
    for tokens in args.tokens:
        measure_length(capture(args.model, tokens, args.layers), rows, tokens, args)


if __name__ == "__main__":
    main()
