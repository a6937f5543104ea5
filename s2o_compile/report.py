"""What became of every attention in a model, as values and as a table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

from s2o_compile.kernels.statistics import Call
from s2o_compile.passes.site import SiteRecord


@dataclass(frozen=True, kw_only=True)
class Site(SiteRecord):
    """One attention: what the compiler did with it, and what the operator did at run time.

    Attributes:
        path: "s2o", "window" (exact sliding window) or "dense", as it ran; empty if it did not run or was left alone.
        density: Computed query-key pairs over those a dense kernel computes, mean over calls; None if not rewritten.
    """

    path: str = ""
    density: float | None = None


@dataclass(frozen=True, kw_only=True)
class Report:
    """Result of ``s2o_compile.explain``.

    Attributes:
        sites: Every attention found, in graph order.
        graphs: Number of graphs that the model was captured in.
        graph_breaks: Why the capture was interrupted, one text each; empty for a whole graph.
    """

    sites: tuple[Site, ...]
    graphs: int
    graph_breaks: tuple[str, ...] = ()

    @property
    def rewritten(self) -> int:
        """Number of sites rewritten."""
        return sum(site.rewritten for site in self.sites)

    @property
    def density(self) -> float | None:
        """Mean density of the rewritten sites that ran; None if there is none."""
        values = [site.density for site in self.sites if site.density is not None]
        return sum(values) / len(values) if values else None

    def __str__(self) -> str:
        if not self.sites:
            return "\n".join(
                [
                    "NO ATTENTION FOUND: nothing was rewritten, the model runs as before.",
                    f"Looked at {self.graphs} captured graph(s) for scaled_dot_product_attention calls. A model with "
                    'hand-written or "eager" attention is not seen: choose attn_implementation="sdpa" where it exists.',
                    *self._breaks(),
                ]
            )
        header = ("site", "query", "key", "mask", "result", "density")
        rows = [header, *(_row(site) for site in self.sites)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines.insert(1, "  ".join("-" * width for width in widths))
        found, rewritten = len(self.sites), self.rewritten
        summary = f"{found} attention sites found, {rewritten} rewritten, {found - rewritten} left dense"
        if self.density is not None:
            summary += f"; mean density {self.density:.3f}"
        return "\n".join([*lines, summary, *self._breaks()])

    def _breaks(self) -> list[str]:
        if not self.graph_breaks:
            return []
        return [f"captured in {self.graphs} graphs; breaks:", *(f"  - {reason}" for reason in self.graph_breaks)]


def _row(site: Site) -> tuple[str, ...]:
    result = {"": "rewritten", "s2o": "rewritten", "window": "rewritten", "dense": "rewritten, ran dense (short)"}
    return (
        site.name,
        "x".join(site.query_shape),
        "x".join(site.key_shape),
        site.mask or "-",
        result[site.path] if site.rewritten else f"dense: {site.reason}",
        "-" if site.density is None else f"{site.density:.3f}",
    )


def join_calls(records: Iterable[SiteRecord], calls: Sequence[Call]) -> tuple[Site, ...]:
    """Records of the compiler and calls of the operator, matched by site name."""
    sites = []
    for record in records:
        own = [call for call in calls if record.rewritten and call.site == record.name]
        density = sum(call.density for call in own) / len(own) if own else None
        sites.append(Site(**asdict(record), path=own[-1].path if own else "", density=density))
    return tuple(sites)
