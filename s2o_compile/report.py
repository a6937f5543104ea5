"""The report: the result for every attention in a model, as values and as a table; the status of a running model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

from s2o_compile.kernels.statistics import Call
from s2o_compile.kernels.support.errors import warn
from s2o_compile.passes.site import SiteRecord


@dataclass(frozen=True, kw_only=True)
class Site(SiteRecord):
    """One attention: the compiler's result for it, and the operator's path at run time.

    Attributes:
        path: "s2o", "window" (exact sliding window), "dense", or "masked" (dense, under a mask that was read and is no
            other), as it ran; empty if it did not run or was left alone.
        density: Computed query-key pairs over those a dense kernel computes, mean over calls; None if not rewritten.
        error: Relative L2 error of the output, before the layer's projection, measured on 64 sampled queries of each
            head while it ran; mean over calls, None where it did not run sparse.
        found: False for an attention that ran uncompiled and that the pass saw in no captured graph.
        never: Why it ran dense although long: dense is faster at any length, or its scale ranks nothing; else empty.
    """

    path: str = ""
    density: float | None = None
    error: float | None = None
    found: bool = True
    never: str = ""

    @property
    def marks(self) -> str:
        """Which heads were marked dense, and a ceiling that is not held, to be put behind "rewritten"."""
        marks = f", kv heads {' '.join(map(str, self.dense_heads))} dense" if self.dense_heads else ""
        return marks + ("" if self.unheld_error is None else f", error {self.unheld_error:g} not held (FlexAttention)")

    @property
    def result(self) -> str:
        """What became of it, in words."""
        if not self.rewritten:
            return f"dense: {self.reason}" if self.found else self.reason
        return f"rewritten{self.ran}{self.marks}"

    @property
    def ran(self) -> str:
        """That the operator ran dense, and why, to be put behind "rewritten"; empty where it did not."""
        whys = {"dense": self.never or "short", "masked": "its mask"}
        return f", ran dense ({whys[self.path]})" if self.path in whys else ""


@dataclass(frozen=True, kw_only=True)
class Report:
    """Result of ``s2o_compile.explain``.

    Attributes:
        sites: Every attention found, in graph order; then those that ran and were not found.
        graphs: Number of graphs that the model was captured in.
        graph_breaks: Why the capture was interrupted, one text each; empty for a whole graph.
        pass_seconds: Time of all passes over all graphs.
        compile_seconds: Time of the compilation that they were part of, capture included; None where nothing was
            compiled behind them, as in ``explain``.
        unknown_sites: Names in ``dense_heads`` or ``site_tau`` that none of the captured attentions has.
        audit_error: Why the attentions that ran could not be counted; empty where they were, or in a ``record()``.
        rank_pairs: Computed query-key pairs of each rank, mean over heads, of ``distributed.gather_report``; empty
            for the report of one process.
        called: Attentions that ran the operator and were not rewritten meanwhile, by name: of a model that was compiled
            before, or that calls it itself (``s2o_compile.attention``, transformers' "s2o").
    """

    sites: tuple[Site, ...]
    graphs: int
    graph_breaks: tuple[str, ...] = ()
    pass_seconds: float = 0.0
    compile_seconds: float | None = None
    unknown_sites: tuple[str, ...] = ()
    audit_error: str = ""
    rank_pairs: tuple[float, ...] = ()
    called: tuple[Site, ...] = ()

    @property
    def imbalance(self) -> float | None:
        """Computed pairs of the rank that has the most, over the mean of all ranks; None for one process."""
        total = sum(self.rank_pairs)
        return max(self.rank_pairs) * len(self.rank_pairs) / total if total else None

    @property
    def census_error(self) -> str:
        """The old name of ``audit_error``."""
        warn("Report.census_error is now called audit_error.", DeprecationWarning)
        return self.audit_error

    @property
    def not_found(self) -> tuple[Site, ...]:
        """Attentions that ran, and that the pass did not see."""
        return tuple(site for site in self.sites if not site.found)

    @property
    def rewritten(self) -> int:
        """Number of sites rewritten."""
        return sum(site.rewritten for site in self.sites)

    @property
    def density(self) -> float | None:
        """Mean density of the rewritten sites that ran; None if there is none."""
        return mean(site.density for site in self.sites)

    @property
    def error(self) -> float | None:
        """Mean sampled error of the sites that ran sparse; None if there is none."""
        return mean(site.error for site in self.sites)

    def __str__(self) -> str:
        if not self.sites and not self.called:
            lines = [
                "NO ATTENTION FOUND: nothing was rewritten, the model runs as before.",
                f"Looked at {self.graphs} captured graph(s) for fused and hand-written attention. If the model has "
                'any, choose scaled_dot_product_attention (in transformers attn_implementation="sdpa").',
            ]
        else:
            header = ("site", "query", "key", "mask", "result", "density", "error (sampled)")
            rows = [_row(site, site.result) for site in self.sites]
            rows += [_row(site, f"called{site.ran}{site.marks}") for site in self.called]
            lines = table(header, rows)
            missed, rewritten = len(self.not_found), self.rewritten
            found = len(self.sites) - missed
            measured = "" if self.density is None else f"; mean density {self.density:.3f}"
            measured += "" if self.error is None else f", mean error {self.error:.1%} (sampled)"
            lines.append(
                f"{found} attention sites found, {rewritten} rewritten, {found - rewritten} left dense{measured}"
            )
            if missed:
                lines.append(f"NOT FOUND: {missed} more ran that the pass did not see, and stay as they were")
            if self.called:
                lines.append(
                    f"CALLED: {len(self.called)} more ran S2O's operator, and were not rewritten here: they were "
                    "compiled before, or call it themselves"
                )
        lines += _listed(
            "NO SUCH SITE: no attention captured has these names of the configuration, so they change nothing:",
            self.unknown_sites,
        )
        if self.audit_error:
            lines.append(f"not checked for attentions that were not found: {self.audit_error}")
        if self.imbalance is not None:
            each = ", ".join(f"{pairs:.3g}" for pairs in self.rank_pairs)
            lines.append(f"computed pairs by rank: {each}; max over mean {self.imbalance:.3f}")
        unproven = Counter(site.unproven for site in self.sites if site.unproven)
        reasons = [f"{count} x {reason}" for reason, count in unproven.most_common()]
        lines += _listed("masks read at run time, because they could not be proven:", reasons)
        lines += _listed(f"captured in {self.graphs} graphs; breaks:", self.graph_breaks)
        if self.graphs:
            share = ""
            if self.compile_seconds:
                share = f", {self.pass_seconds / self.compile_seconds:.1%} of {self.compile_seconds:.1f} s of compiling"
            lines.append(f"passes: {1e3 * self.pass_seconds:.1f} ms{share}")
        return "\n".join(lines)


@dataclass(frozen=True, kw_only=True)
class Status:
    """What ran in the calls of an optimized model; of ``s2o_compile.status`` and ``Recording.status``.

    Attributes:
        calls: Calls of the model, and of its parts where a method other than forward calls them.
        graphs: Graphs that were captured in them.
        rewritten: Attentions in these graphs that were rewritten.
        left_dense: How many were not, by reason.
        paths: How often the operator took a path: "s2o" and "window" are sparse, "dense" is for short lengths and heads
            marked dense, "masked" is dense under a mask that was read and is no other. CUDA graphs replay without the
            operator, so their calls are counted while they are recorded.
        never: How often long attention was dense, as no length is faster sparse or its scale ranks nothing, by reason.
        graph_breaks: Why torch interrupted the capture at first calls. The counters are the process's: another thread
            that compiled meanwhile may have caused some.
        uncompiled: Names of modules that Python ran in some call, "" for the model itself, without a graph in or below
            them. Attention in these ran dense.
        uncompiled_calls: Calls in which no graph ran at all.
    """

    calls: int
    graphs: int
    rewritten: int
    left_dense: dict[str, int]
    paths: dict[str, int]
    never: dict[str, int]
    graph_breaks: tuple[str, ...]
    uncompiled: tuple[str, ...]
    uncompiled_calls: int = 0

    @property
    def sparse(self) -> int:
        """Attentions that ran sparse."""
        return self.paths.get("s2o", 0) + self.paths.get("window", 0)

    def __str__(self) -> str:
        left = sum(self.left_dense.values())
        result = "SPARSE" if self.sparse else "NOTHING RAN SPARSE"
        uncompiled = f", uncompiled calls: {self.uncompiled_calls}" if self.uncompiled_calls else ""
        lines = [
            f"{result} (calls: {self.calls}, graphs: {self.graphs}{uncompiled})",
            f"attentions in the graphs: {self.rewritten} rewritten, {left} left dense",
            f"rewritten attentions ran: {self.sparse} sparse, {self.paths.get('dense', 0)} dense (short, or marked), "
            f"{self.paths.get('masked', 0)} dense (their masks)",
        ]
        if not self.calls:
            lines.append("never called: call the model that optimize returned, not the original")
        lines += _listed("dense at any length:", [f"{count} x {reason}" for reason, count in self.never.items()])
        lines += _listed("left dense:", [f"{count} x {reason}" for reason, count in self.left_dense.items()])
        lines += _listed("graph breaks:", self.graph_breaks)
        lines += _listed("ran uncompiled, in no graph:", [name or "the model itself" for name in self.uncompiled])
        return "\n".join(lines)


def _listed(title: str, entries: Sequence[str]) -> list[str]:
    return [title, *(f"  - {entry}" for entry in entries)] if entries else []


def mean(values: Iterable[float | None]) -> float | None:
    """The mean of the values that are known; None if there are none."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def table(header: tuple[str, ...], body: Sequence[tuple[str, ...]]) -> list[str]:
    """Lines of a table."""
    rows = [header, *body]
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return [lines[0], "  ".join("-" * width for width in widths), *lines[1:]]


def shortened(text: str, width: int) -> str:
    """A text of at most ``width`` characters, cut in its middle: the end of a module path says most."""
    if len(text) <= width:
        return text
    start = width // 6
    return f"{text[:start]}…{text[start + 1 - width :]}"


def _row(site: Site, result: str) -> tuple[str, ...]:
    density = "-" if site.density is None else f"{site.density:.3f}"
    error = "-" if site.error is None else f"{site.error:.1%}"
    shapes = "x".join(site.query_shape), "x".join(site.key_shape)
    return (site.name or "-", *shapes, site.mask or "-", result, density, error)


def join_calls(records: Iterable[SiteRecord], calls: Sequence[Call]) -> tuple[Site, ...]:
    """Records of the compiler and calls of the operator, matched by site name, and by lengths where graphs share it."""
    sites, records = [], list(records)
    by_name: dict[str, list[SiteRecord]] = {}
    for record in records:
        by_name.setdefault(record.name, []).append(record)
    for record in records:
        named = (call for call in calls if record.rewritten and call.site == record.name)
        own = [call for call in named if any(owner is record for owner in _owners(call, by_name[record.name]))]
        pairs = sum(call.area.sum().item() for call in own)  # packed documents are calls of their own, some short
        density = sum(call.density * call.area.sum().item() for call in own) / max(pairs, 1.0) if own else None
        error = mean(call.error for call in own)
        fields = asdict(record)
        if record.unproven and own and own[-1].path != "dense":
            fields["mask"] = f"{own[-1].mask or 'another mask'} ({record.mask})"
        longest = max(reversed(own), key=lambda call: call.n_keys, default=None)
        path = "" if longest is None else longest.path
        unheld = [call.unheld_error for call in own if call.unheld_error is not None]
        fields["unheld_error"] = record.unheld_error if not unheld else unheld[-1]
        never = "" if longest is None else longest.never
        sites.append(Site(**fields, path=path, density=density, error=error, never=never))
    return tuple(sites)


def _owners(call: Call, records: Sequence[SiteRecord]) -> Sequence[SiteRecord]:
    """Of the records of one name, those that a call may be of: of its lengths, else of any length, else all."""
    lengths = {id(record): (*record.query_shape[-2:-1], *record.key_shape[-2:-1]) for record in records}
    fixed = [x for x in records if lengths[id(x)] == (str(call.n_queries), str(call.n_keys))]
    return fixed or [x for x in records if not all(map(str.isdigit, lengths[id(x)]))] or records


def called_elsewhere(records: Iterable[SiteRecord], calls: Sequence[Call]) -> tuple[Site, ...]:
    """The calls of the operator that are of none of these records, joined by their names."""
    known = {record.name for record in records if record.rewritten}
    others = {call.site: call for call in calls if call.site not in known}  # the last one of each
    return join_calls(
        [
            SiteRecord(name=name, rewritten=True, mask=last.mask, query_shape=(str(last.n_queries),),
                       key_shape=(str(last.n_keys),))
            for name, last in others.items()
        ],
        calls,
    )  # fmt: skip
