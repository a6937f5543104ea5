"""How near rankings are to exact ones, and what a rotation of queries and keys costs: density of trained layers.

    python benchmarks/exact_rankings.py [--models gemma3] [--tokens 8192]
                                        [--json benchmarks/results/exact-rankings-cpu.json]

A row a layer without a window, with the density at which its error (relative L2, all heads) is ``--error``:

    ours       the operator's rankings
    rotated    the same after one random rotation of queries and keys, which changes no logit
    exact      keys ordered by the true softmax of all queries of a segment, in all dimensions, summed; a ranking is
               shared by a segment and a group, as ours are
"""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from calls import DEVICE
from fidelity import capture, density_at
from results_file import Rows
from torch import Tensor

from s2o_compile.cli.models import KNOWN
from s2o_compile.kernels import planner, schedule
from s2o_compile.kernels.core.call import AttentionCall
from s2o_compile.kernels.core.options import OperatorOptions
from s2o_compile.kernels.core.plan import n_segments
from s2o_compile.kernels.dispatch import EXACT, choose_implementation
from s2o_compile.kernels.statistics import pairs_by_head

TAUS = (0.06, 0.12, 0.25, 0.5, 1.0, 2.0)
SEGMENT_LEN = 512
EVERY = {"gemma3": 1, "smollm2": 5}
"""Of the layers without a window, every so manieth is measured."""

Layer = tuple[Tensor, Tensor, Tensor, Tensor]
"""Query, key, value and exact output."""


def exact_scores(call: AttentionCall) -> Tensor:
    """Logarithms of the true softmax, summed over the queries of a segment and group: [B, Hkv, P, Nk]."""
    (batch, _, length, head_dim), kv_heads = call.query.shape, call.key.shape[1]
    segments = n_segments(length, SEGMENT_LEN)
    scores = call.query.new_full((batch, kv_heads, segments, length), -torch.inf, dtype=torch.float32)
    query = call.query.view(batch, kv_heads, call.group, length, head_dim)
    for segment in range(segments):
        start, stop = segment * SEGMENT_LEN, min((segment + 1) * SEGMENT_LEN, length)
        for head in range(kv_heads):
            logits = query[:, head, :, start:stop].float() @ call.key[:, head, None, :stop].float().mT * call.scale
            hidden = torch.arange(stop, device=DEVICE) > torch.arange(start, stop, device=DEVICE)[:, None]
            weights = logits.masked_fill_(hidden, -torch.inf).softmax(-1)
            scores[:, head, segment, :stop] = weights.sum((1, 2)).log()
    return scores


def density_of(layer: Layer, how: str, turn: Tensor, error: float) -> float:
    """Density at an error of one layer, by one of the three rankings."""
    query, key, value, exact = layer
    if how == "rotated":
        query, key = ((x.float() @ turn).to(x.dtype) for x in (query, key))
    call = AttentionCall.of(query, key, value, causal=True)
    implementation = choose_implementation("auto", query)
    prepared = {}
    if how == "exact":
        scores = exact_scores(call)
        prepared = {"per_query": lambda *_: lambda _part, heads: scores[:, heads]}
    errors, densities = [], []
    for tau in TAUS:
        options = OperatorOptions(tau=tau, segment_len=SEGMENT_LEN)
        with ExitStack() as stack:
            for functions in (planner.PREPARE, planner.PREPARE_BY_CPP, planner.PREPARE_BY_TRITON):
                stack.enter_context(patch.dict(functions, prepared))
            result = schedule.attend(call, options, implementation, EXACT[implementation])
        errors.append(((result.output - exact).float().norm() / exact.float().norm()).item())
        length = query.shape[2]
        area = call.mask.area(len(query), length, length).sum()
        densities.append((pairs_by_head(result.computed, length).sum(0).cpu() / area).mean().item())
    return density_at(error, errors, densities)


def compared(layer: Layer, turn: Tensor, error: float) -> dict[str, float]:
    """One row."""
    ours, rotated, exact = (density_of(layer, how, turn, error) for how in ("ours", "rotated", "exact"))
    found = {"ours": ours, "rotated": rotated, "exact": exact}
    return {name: round(x, 4) for name, x in (found | {"over exact": ours / exact, "turned": rotated / ours}).items()}


@torch.no_grad()
def main() -> None:
    """Run and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=tuple(KNOWN), default=["gemma3", "smollm2"])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--error", type=float, default=0.05)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = Rows(args.json, error=args.error)
    for model in args.models:
        layers = capture(model, args.tokens, EVERY[model])
        generator = torch.Generator().manual_seed(1)
        head_dim = layers[0][0].shape[3]
        turn = torch.linalg.qr(torch.randn(head_dim, head_dim, generator=generator))[0].to(DEVICE)
        for number, layer in enumerate(layers):
            what = {"model": model, "tokens": args.tokens, "layer": number * EVERY[model]}
            rows.measure("density at error", what, partial(compared, layer, turn, args.error))


if __name__ == "__main__":
    main()
