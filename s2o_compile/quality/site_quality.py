"""Density and error of sparse attention at every site, measured on calls while they run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain

import torch
from torch import Tensor

from s2o_compile.kernels.core.plan import TILE_LEN, n_tiles
from s2o_compile.kernels.exact.dense_heads import whole_tiles
from s2o_compile.kernels.exact.sampled import relative_error
from s2o_compile.kernels.observe import ObservedCall
from s2o_compile.quality.error_sums import ErrorSums


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
    norm of the difference over the norm of the exact output. ``error`` is that of all heads and rows together, as for
    ``S2OConfig(error=...)`` and `calibrate`.

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
    """An observer (``kernels/observe.py``) that measures every call at its own tau and at others, and changes none."""

    def __init__(self, taus: Sequence[float] = ()) -> None:
        self._taus = tuple(taus)
        self._sums: dict[str, tuple[ErrorSums, _Tiles]] = {}

    def __call__(self, call: ObservedCall) -> None:
        """Measure one call."""
        sums, tiles = self._sums.setdefault(call.site, (ErrorSums(), _Tiles()))
        results = chain((call.result,), (call.run(tau=tau) for tau in self._taus))
        tiles.add(call, *sums.add(call, results, call.with_sinks(call.exact())))

    @property
    def seen(self) -> bool:
        """Whether there was any call."""
        return bool(self._sums)

    def sites(self) -> tuple[SiteQuality, ...]:
        """Every site seen so far, in the order of their first calls. Waits for the device."""
        return tuple(self._site(name, *sums) for name, sums in self._sums.items())

    def _site(self, name: str, sums: ErrorSums, tiles: _Tiles) -> SiteQuality:
        errors, densities = sums.errors(), sums.densities().tolist()
        others = zip(self._taus, densities[1:], errors[1:], strict=True)
        return SiteQuality(
            name=name,
            head_density=tuple(densities[0]),
            error=errors[0],
            head_error=tuple(sums.head_errors()[0].tolist()),
            worst_tile=float(tiles.worst_tile),
            worst_row=float(tiles.worst_row),
            tile_keys=tuple(round(keys, 1) for keys in (tiles.keys / tiles.calls).tolist()),
            tile_visible=tuple(round(keys, 1) for keys in (tiles.visible / tiles.calls).tolist()),
            curve=tuple(TauPoint(tau=tau, density=_mean(density), error=error) for tau, density, error in others),
        )


def _zero() -> Tensor:
    return torch.zeros((), dtype=torch.float64)


@dataclass
class _Tiles:
    """The worst tile and row of a site, and sums over its calls by place of the tile [tiles]."""

    worst_tile: Tensor = field(default_factory=_zero)
    worst_row: Tensor = field(default_factory=_zero)
    keys: Tensor = field(default_factory=_zero)
    visible: Tensor = field(default_factory=_zero)
    calls: Tensor = field(default_factory=_zero)

    def add(self, call: ObservedCall, difference: Tensor, power: Tensor) -> None:
        """Add one call, by the squared norms [B, Hq, Nq] of its rows."""
        self.worst_row = _largest(self.worst_row, difference, power)
        self.worst_tile = _largest(self.worst_tile, _by_tile(difference), _by_tile(power))
        visible = whole_tiles(call).double()
        self.keys = _add_at_front(self.keys, call.result.computed.double().mean((0, 1)))
        self.visible = _add_at_front(self.visible, visible)
        self.calls = _add_at_front(self.calls, torch.ones_like(visible))


def _by_tile(rows: Tensor) -> Tensor:
    """Sums [B, Hq, tiles] over the rows [B, Hq, Nq] of every tile."""
    missing = n_tiles(rows.shape[2]) * TILE_LEN - rows.shape[2]
    return torch.nn.functional.pad(rows, (0, missing)).unflatten(2, (-1, TILE_LEN)).sum(-1)


def _largest(before: Tensor, difference: Tensor, power: Tensor) -> Tensor:
    return torch.maximum(before.to(power.device), relative_error(difference, power).max())


def _add_at_front(total: Tensor, part: Tensor) -> Tensor:
    """The sum of two vectors of any lengths, the shorter one followed by zeros."""
    longest = max(total.numel(), len(part))
    pad = torch.nn.functional.pad
    return pad(total.reshape(-1).to(part.device), (0, longest - total.numel())) + pad(part, (0, longest - len(part)))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
