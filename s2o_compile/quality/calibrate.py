"""``calibrate``: finds the taus that keep an error budget on the user's own model and text."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor, nn

from s2o_compile.api import watched
from s2o_compile.capture.compiled_copy import compiled_copy
from s2o_compile.config import S2OConfig, check_error, config_or_default
from s2o_compile.errors import EvaluationError
from s2o_compile.kernels.observe import ObservedCall, observe_attention
from s2o_compile.kernels.support.torch_compat import dtype_of
from s2o_compile.quality.batches import Batch, Progress, check_lengths, check_model, nothing_sparse, token_batches
from s2o_compile.quality.head_curves import DENSE_FROM, Choice, HeadCurves
from s2o_compile.quality.logits import LogitsReader

TAUS = (0.02, 0.05, 0.12, 0.25, 0.5, 1.0, 2.0, 3.0, 4.0, 5.0)
"""The taus at which every head is measured."""

AIM = 0.85
"""Share of the budget that is used up on the given batches, so that other text keeps the budget, too."""

LEAST_ERROR = 1e-4
"""The least budget that can be measured. Below it only exact attention helps."""


class CurveMeter:
    """An observer that measures every head at every tau and passes the exact output on.

    So every attention is measured on its inputs in the dense model, and errors do not add up over layers. Calls without
    a site, of ``s2o_compile.attention``, bring their own configuration and run as they are.

    Args:
        taus: Ascending, positive.
    """

    def __init__(self, taus: Sequence[float] = TAUS) -> None:
        self._taus = taus
        self.sites: dict[str, HeadCurves] = {}

    def __call__(self, call: ObservedCall) -> Tensor | None:
        """Measure one call."""
        if not call.site:
            return None
        exact = call.exact()
        self.sites.setdefault(call.site, HeadCurves(self._taus, call.key.shape[1])).add(call, exact)
        return exact


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What calibration found.

    Attributes:
        config: The configuration that keeps the budget.
        choices: By site, what was chosen for it and what that costs on the given batches.
    """

    config: S2OConfig
    choices: Mapping[str, Choice]

    @property
    def sparse(self) -> int:
        """Attentions of which some head runs sparse."""
        return sum(choice.density < 1.0 for choice in self.choices.values())

    @property
    def density(self) -> float:
        """Mean over attentions; heads that run dense count 1."""
        return fmean(choice.density for choice in self.choices.values())

    @property
    def time(self) -> float:
        """Time of all attentions over that of dense ones, by ``head_curves.RATE``."""
        return fmean(choice.time for choice in self.choices.values())


def calibrate(
    model: nn.Module,
    batches: Batch | Iterable[Batch],
    error: float = 0.02,
    *,
    config: S2OConfig | None = None,
    progress: Progress | None = None,
) -> S2OConfig:
    """Measure every head of a model on the user's own text, and return the configuration that keeps an error budget.

    The error of an attention is the relative L2 error of its output, all heads and rows together: the norm of the
    difference to exact attention over the norm of the exact output. Every head is measured at ten taus. For each
    attention, the taus are chosen that keep 85 % of the budget at the least density (``head_curves.py``). Heads that
    would stay nearly dense are marked dense. Sinks are part of the output. A handful of prompts is enough. They should
    come from the model's real use and be about as long, because the error at a tau depends on the length.

    Each batch is read once. Every attention runs exactly, which is passed on, and ten times sparse. Nothing is compiled
    behind the passes. Dynamo is reset: code compiled before is compiled anew at its next call.

    Args:
        model: In eval mode, not compiled. It is called as by `s2o_compile.evaluate`.
        batches: Batches as for `s2o_compile.evaluate`.
        error: The budget, from 0.0001 to 1. ``S2OConfig(error=0.0)``, which is exact, needs no calibration.
        config: Ranking, lengths and the like, which are kept; None for the defaults. Its ``tau``, ``error``,
            ``site_tau`` and ``dense_heads`` are replaced.
        progress: Called with the name of every step; returns a context manager around it.

    Returns:
        The configuration with ``error``, ``site_tau`` and ``dense_heads``, for `optimize`, `to_json`, and
        ``s2o evaluate --config``.

    Raises:
        OptionError: No such budget, or the configuration is no S2OConfig.
        EvaluationError: Nothing would run sparse, or the model or a batch cannot be used.
    """
    return calibration(model, batches, error, config=config, progress=progress).config


@torch.no_grad()
def calibration(
    model: nn.Module,
    batches: Batch | Iterable[Batch],
    error: float,
    *,
    config: S2OConfig | None,
    progress: Progress | None,
) -> Calibration:
    """`calibrate`, and what its configuration costs."""
    check_error("calibrate: error", error, least=LEAST_ERROR)
    unset = {"tau": None, "error": None, "site_tau": {}, "dense_heads": {}}
    config = dataclasses.replace(config_or_default(config, "calibrate"), **unset)
    progress = progress or nullcontext
    check_model("calibrate", model)
    checked = token_batches("calibrate", model, batches)
    check_lengths("calibrate", checked, config, dtype_of(model))
    meter = CurveMeter()
    with watched(config) as watch, LogitsReader("calibrate", model, checked[0]) as reader:
        sparse_model = compiled_copy(model, watch.backend)
        for place, batch in enumerate(checked):
            with progress(f"batch {place + 1} of {len(checked)}"), observe_attention(meter):
                reader.run(sparse_model, batch)
        if not meter.sites:
            raise nothing_sparse("calibrate", watch.recording.report)
    found = budgeted(config, meter, error)
    if not found.sparse:
        raise _all_dense(meter, error)
    return found


def budgeted(config: S2OConfig, meter: CurveMeter, error: float) -> Calibration:
    """The configuration that keeps a budget at every site of a meter."""
    chosen = {site: curves.choose(AIM * error) for site, curves in meter.sites.items()}
    config = dataclasses.replace(
        config,
        tau=None,
        error=error,
        site_tau={site: choice.tau for site, choice in chosen.items()},
        dense_heads={site: choice.dense_heads for site, choice in chosen.items()},
    )
    return Calibration(config=config, choices=chosen)


def _all_dense(meter: CurveMeter, error: float) -> EvaluationError:
    """The error to raise where every head would run dense: the batches are too short, or the budget is too small."""
    loosest = [(curves.sums.densities()[-1].mean().item(), curves.sums.errors()[-1]) for curves in meter.sites.values()]
    density, least_error = (fmean(values) for values in zip(*loosest, strict=True))
    remedy = "Give a larger error." if density < DENSE_FROM else "Give longer batches."
    return EvaluationError(
        f"calibrate: expected some heads to run sparse within an error of {error:.2%}, got none of {len(loosest)} "
        f"attentions. At the loosest tau, {TAUS[-1]:g}, they still compute {density:.0%} of the pairs and err "
        f"{least_error:.1%}; from {DENSE_FROM:.0%} on a head is marked dense. {remedy}"
    )
