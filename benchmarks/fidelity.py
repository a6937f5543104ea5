"""What a ranking is worth: density against error on a trained model's own queries, keys and values.

    python benchmarks/fidelity.py [--tokens 16384 65536] [--layers 2] [--json benchmarks/results/fidelity-h100.json]

SmolLM2-135M-Instruct reads the demo's prompt with exact attention; queries, keys and values of every ``--layers``-th
layer are kept. Then the operator runs on them at every tau. Error is the relative L2 error of a head's output against
SDPA, density the share of query-key pairs computed; both are means over heads and layers. "at 2 %" is the density at
which the mean error is 2 %, interpolated between taus in logarithms, and "by head" the mean of what every head needs by
itself, as a calibration would set it.
"""

from __future__ import annotations

import argparse
import itertools
import math
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from calls import DEVICE, ON_GPU
from results_file import Rows
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import s2o_compile
from s2o_compile import S2OConfig
from s2o_compile.demo import MODEL, build_prompt, load_model
from s2o_compile.kernels import operator, slices, torch_forward, triton_forward
from s2o_compile.kernels.definition import Result
from s2o_compile.kernels.mask import AttentionMask
from s2o_compile.kernels.options import OperatorOptions
from s2o_compile.kernels.plan import TILE_LEN, n_tiles

TAUS = (0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.5, 2.5, 4.0)
ERRORS = (0.02, 0.05, 0.1)
CAUSAL = AttentionMask(causal=True)

Captured = list[tuple[Tensor, Tensor, Tensor]]


@torch.no_grad()
def capture(tokens: int, every: int) -> Captured:
    """Query, key and value of every ``every``-th layer, under exact attention."""
    model, tokenizer = load_model(tokens, DEVICE)
    ids = build_prompt(tokenizer, tokens).to(DEVICE)
    found, number = [], itertools.count()

    def exact(query: Tensor, key: Tensor, value: Tensor, *_: object, scale: float, **__: object) -> Result:
        if next(number) % every == 0:
            found.append(tuple(x.contiguous() for x in (query, key, value)))
        output = torch.empty_like(query)
        output.copy_(scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True))
        computed = torch.zeros(*query.shape[:2], n_tiles(query.shape[2]), dtype=torch.int32, device=query.device)
        return Result(output, output.new_zeros(query.shape[:3], dtype=torch.float32), computed)

    with patch.object(operator.slices, "attend", exact):
        s2o_compile.optimize(model, S2OConfig(min_seq_len=0, inner_backend="eager"))(ids, logits_to_keep=1)
    return found


def curve(captured: Captured, ranking: str, segment_len: int | None) -> tuple[Tensor, Tensor]:
    """Error and density, both [taus, layers * heads]."""
    executor = triton_forward if ON_GPU else torch_forward
    errors, densities = [], []
    for query, key, value in captured:
        scale, n = query.shape[3] ** -0.5, query.shape[2]
        exact = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True).float()
        power, area = exact.square().sum((0, 2, 3)), CAUSAL.area(1, n, n).item()
        for tau in TAUS:
            options = OperatorOptions(tau=tau, ranking=ranking, segment_len=segment_len)
            result = slices.attend(
                query, key, value, CAUSAL, scale=scale, softcap=None, options=options, executor=executor,
                natural=operator.triton_natural if ON_GPU else operator.natural_forward,
            )  # fmt: skip
            errors.append(((result.output.float() - exact).square().sum((0, 2, 3)) / power).sqrt())
            densities.append(result.computed.double().sum((0, 2)) * TILE_LEN / area)
    shape = len(captured), len(TAUS), -1
    found = [torch.stack(x).view(shape).transpose(0, 1).flatten(1).double().cpu() for x in (errors, densities)]
    return found[0], found[1]


def density_at(error: float, errors: list[float], densities: list[float]) -> float:
    """Density at an error, between taus in logarithms; at the nearest tau beyond them."""
    for (low, here), (high, there) in itertools.pairwise(zip(errors, densities, strict=True)):
        if low <= error <= high:
            share = math.log(error / low) / max(math.log(high / low), 1e-9)
            return math.exp(math.log(here) * (1 - share) + math.log(there) * share)
    return densities[-1] if error > errors[-1] else densities[0]


def densities_at(captured: Captured, ranking: str, segment_len: int) -> dict[str, object]:
    """One row: densities at ERRORS, and what the default tau gives."""
    errors, densities = curve(captured, ranking, segment_len)
    means = errors.mean(1).tolist(), densities.mean(1).tolist()
    heads = [(x.tolist(), y.tolist()) for x, y in zip(errors.T, densities.T, strict=True)]
    found: dict[str, object] = {}
    for error in ERRORS:
        by_head = [density_at(error, *head) for head in heads]
        found[f"at {error:.0%}"] = round(density_at(error, *means), 4)
        found[f"at {error:.0%} by head"] = round(sum(by_head) / len(by_head), 4)
    default = TAUS.index(OperatorOptions().tau)
    return found | {"default tau error": round(means[0][default], 4), "density": round(means[1][default], 4)}


def main() -> None:
    """Run and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[16384, 65536])
    parser.add_argument("--layers", type=int, default=2, help="one of so many layers is measured")
    parser.add_argument("--rankings", nargs="+", default=["per_query", "mean_query"])
    parser.add_argument("--segments", type=int, nargs="+", default=[256, 512, 1024])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = Rows(args.json, model=MODEL, layers=f"one of {args.layers}", taus=TAUS)
    for tokens in args.tokens:
        captured = capture(tokens, args.layers)
        for ranking, segment_len in itertools.product(args.rankings, args.segments):
            measure = partial(densities_at, captured, ranking, segment_len)
            rows.measure("density at error", {"tokens": tokens, "ranking": ranking, "S": segment_len}, measure)


if __name__ == "__main__":
    main()
