"""What sparse attention costs at every site: density and error, measured on calls while they run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from s2o_compile.kernels.core.plan import TILE_LEN, n_tiles
from s2o_compile.kernels.core.result import Result
from s2o_compile.kernels.exact.dense_heads import whole_tiles
from s2o_compile.kernels.observe import ObservedCall


@dataclass(frozen=True, kw_only=True)
class TauPoint:
    """Density (mean over heads) and error of a site at another tau, on the inputs that the site really had."""

    tau: float
    density: float
    error: float


@dataclass(frozen=True, kw_only=True)
class SiteQuality:
    """One attention, over all of its calls.

    An error is the relative L2 error of the attention output, S2O's against exact attention on the same inputs: the
    norm of the difference over the norm of the exact output. ``error`` is that of all heads and rows together, which
    ``S2OConfig(error=...)`` and `calibrate` are about.

    Attributes:
        name: Module path of the attention, "" for calls of ``s2o_compile.attention``.
        head_density: Computed over visible query-key pairs by query head, all passes counted.
        error: Error of the whole output.
        head_error: Error of every query head, all of its rows together.
        worst_tile: Largest error of a head's tile: 128 neighbouring queries.
        worst_row: Largest error of a head's row: one query.
        tile_keys: Keys computed by the queries of a tile, mean over heads and calls, by place of the tile.
        tile_visible: Keys that a dense kernel computes there.
        curve: Density and error at the other taus that were asked for.
    """

    name: str
    head_density: tuple[float, ...]
    error: float
    head_error: tuple[float, ...]
    worst_tile: float
    worst_row: float
    tile_keys: tuple[float, ...]
    tile_visible: tuple[float, ...]
    curve: tuple[TauPoint, ...] = ()

    @property
    def density(self) -> float:
        """Mean over heads."""
        return sum(self.head_density) / len(self.head_density)

    @property
    def worst_head(self) -> float:
        """Largest error of a head."""
        return max(self.head_error)


class SiteMeter:
    """An observer (``kernels/observation.py``) that measures every call and changes none.

    Args:
        taus: Other taus at which every call is run once more.
    """

    def __init__(self, taus: Sequence[float] = ()) -> None:
        self._taus = tuple(taus)
        self._sums: dict[str, list[_Sums]] = {}

    def __call__(self, call: ObservedCall) -> None:
        """Measure one call."""
        sums = self._sums.setdefault(call.site, [_Sums() for _ in range(1 + len(self._taus))])
        exact = call.with_sinks(call.exact())
        sums[0].add(call, call.result, exact)
        for other, tau in zip(sums[1:], self._taus, strict=True):
            other.add(call, call.run(tau=tau), exact)

    @property
    def seen(self) -> bool:
        """Whether there was any call."""
        return bool(self._sums)

    def sites(self) -> tuple[SiteQuality, ...]:
        """Every site seen so far, in the order of their first calls. Waits for the device."""
        return tuple(
            SiteQuality(
                name=name,
                head_density=tuple(own.densities()),
                error=own.error(),
                head_error=tuple(own.errors()),
                worst_tile=float(own.worst_tile),
                worst_row=float(own.worst_row),
                tile_keys=tuple(round(keys, 1) for keys in (own.tile_keys / own.tile_calls).tolist()),
                tile_visible=tuple(round(keys, 1) for keys in (own.tile_visible / own.tile_calls).tolist()),
                curve=tuple(
                    TauPoint(tau=tau, density=_mean(other.densities()), error=other.error())
                    for tau, other in zip(self._taus, others, strict=True)
                ),
            )
            for name, (own, *others) in self._sums.items()
        )


def _nothing() -> Tensor:
    return torch.zeros((), dtype=torch.float64)


@dataclass
class _Sums:
    """Sums over the calls of a site, kept where the calls ran: by head [Hq], or by place of the tile [tiles]."""

    difference: Tensor = field(default_factory=_nothing)
    power: Tensor = field(default_factory=_nothing)
    density: Tensor = field(default_factory=_nothing)
    area: float = 0.0
    worst_tile: Tensor = field(default_factory=_nothing)
    worst_row: Tensor = field(default_factory=_nothing)
    tile_keys: Tensor = field(default_factory=_nothing)
    tile_visible: Tensor = field(default_factory=_nothing)
    tile_calls: Tensor = field(default_factory=_nothing)

    def add(self, call: ObservedCall, result: Result, exact: Tensor) -> None:
        """Take in one result of a call; the exact output has its sinks."""
        batch, _, n_queries, _ = call.query.shape
        output = call.with_sinks(result.output, result.lse)
        rows = [_squares(output[:, head], exact[:, head]) for head in range(exact.shape[1])]
        difference, power = (torch.stack(part, 1) for part in zip(*rows, strict=True))  # [B, Hq, Nq]
        self.worst_row = _largest(self.worst_row, difference, power)
        self.worst_tile = _largest(self.worst_tile, _by_tile(difference), _by_tile(power))
        self.difference = difference.sum((0, 2)) + self.difference.to(difference.device)
        self.power = power.sum((0, 2)) + self.power.to(power.device)
        area = call.mask.area(batch, n_queries, call.key.shape[2]).sum().item()
        self.density = call.densities(result) * area + self.density.to(difference.device)
        self.area += area
        visible = whole_tiles(call).double()
        self.tile_keys = _add_at_front(self.tile_keys, result.computed.double().mean((0, 1)))
        self.tile_visible = _add_at_front(self.tile_visible, visible)
        self.tile_calls = _add_at_front(self.tile_calls, torch.ones_like(visible))

    def error(self) -> float:
        """Error of all heads together."""
        return float(_ratio(self.difference.sum(), self.power.sum()))

    def errors(self) -> list[float]:
        """Error of every head."""
        return _ratio(self.difference, self.power).tolist()

    def densities(self) -> list[float]:
        """Density of every head."""
        return (self.density / max(self.area, 1.0)).tolist()


def _squares(output: Tensor, exact: Tensor) -> tuple[Tensor, Tensor]:
    """Squared norms float64 [B, Nq] of difference and exact output [B, Nq, Dv]; a head at a time, to save memory."""
    output, exact = output.float(), exact.float()
    return (output - exact).square().sum(-1).double(), exact.square().sum(-1).double()


def _by_tile(rows: Tensor) -> Tensor:
    """Sums [B, Hq, tiles] over the rows [B, Hq, Nq] of every tile."""
    missing = n_tiles(rows.shape[2]) * TILE_LEN - rows.shape[2]
    return torch.nn.functional.pad(rows, (0, missing)).unflatten(2, (-1, TILE_LEN)).sum(-1)


def _ratio(difference: Tensor, power: Tensor) -> Tensor:
    """Relative errors out of squares; zero where both are, as in rows that see no key."""
    return torch.where(difference == 0, 0.0, difference / power).sqrt()


def _largest(before: Tensor, difference: Tensor, power: Tensor) -> Tensor:
    return torch.maximum(before.to(power.device), _ratio(difference, power).max())


def _add_at_front(total: Tensor, part: Tensor) -> Tensor:
    """The sum of two vectors of any lengths, the shorter one followed by zeros."""
    longest = max(total.numel(), len(part))
    pad = torch.nn.functional.pad
    return pad(total.reshape(-1).to(part.device), (0, longest - total.numel())) + pad(part, (0, longest - len(part)))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
