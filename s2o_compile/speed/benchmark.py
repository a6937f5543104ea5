"""The result of a benchmark: its figures, their JSON, a table to read, and the verdict."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from s2o_compile.config import S2OConfig
from s2o_compile.report import table
from s2o_compile.speed.measure import Timing

FORMAT = 1

PLAIN, COMPILED, S2O = "plain PyTorch", "torch.compile", "S2O"
NAMES = {"plain": PLAIN, "compiled": COMPILED, "s2o": S2O}
"""Names of the ways by the fields of `Row`."""

EQUAL = 1.03
"""Ratios nearer to 1 than this count as equal: a machine repeats itself no better."""

HEADER = ("tokens", "way", "seconds", "S2O is", "compile s", "peak GiB", "density", "error", "loss")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One input, three ways.

    Attributes:
        tokens: Its length: ids of a text, else the most keys of an attention; 0 if nobody knows.
        plain: The model as it is.
        compiled: The model under ``torch.compile``.
        s2o: The result of `s2o_compile.optimize`.
        sparse: Attentions that ran sparse, or inside a window alone.
        sites: Attentions that were found.
        density: Computed query-key pairs over visible ones, mean over sparse attentions but for
            windows, which are exact; None if there are none.
        error: Relative L2 error of their outputs, on sampled queries; mean over them.
        loss_dense: Mean next-token loss of the model as it is; None if it predicts no next token.
        loss_s2o: The same through S2O.
        reasons: Why attentions stayed dense, or why a figure is missing.
    """

    tokens: int
    plain: Timing
    compiled: Timing
    s2o: Timing
    sparse: int = 0
    sites: int = 0
    density: float | None = None
    error: float | None = None
    loss_dense: float | None = None
    loss_s2o: float | None = None
    reasons: tuple[str, ...] = ()

    @property
    def loss_difference(self) -> float | None:
        """Loss that S2O adds."""
        return None if self.loss_s2o is None or self.loss_dense is None else self.loss_s2o - self.loss_dense

    @property
    def speedup(self) -> float | None:
        """How many times as fast S2O is as plain PyTorch; None if one of them failed."""
        return _ratio(self.plain, self.s2o)

    @property
    def speedup_over_compiled(self) -> float | None:
        """How many times as fast S2O is as ``torch.compile``; None if one of them failed."""
        return _ratio(self.compiled, self.s2o)

    @property
    def gain(self) -> float | None:
        """How many times as fast S2O is as the faster of the two others; None if it failed, or both of them did."""
        return min((x for x in (self.speedup, self.speedup_over_compiled) if x is not None), default=None)

    @property
    def rival(self) -> str:
        """The faster of the two others."""
        return PLAIN if self.gain == self.speedup else COMPILED


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """Plain PyTorch, ``torch.compile`` and S2O on a model's inputs.

    Attributes:
        model: Name of the model.
        device: Where it ran.
        dtype: Of its parameters.
        config: How attention was made sparse.
        rows: One for each input, the shortest first.
        notes: What a reader of the figures must know, such as that the token ids are random.
    """

    model: str
    device: str
    dtype: str
    config: S2OConfig
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = field(default=())

    @property
    def title(self) -> str:
        """Model, device, dtype and quality."""
        return ", ".join(filter(None, (self.model, self.device, self.dtype, self.config.quality)))

    @property
    def verdict(self) -> str:
        """Whether to use S2O for this model on this device, from which length on, and what it costs, in a sentence."""
        ran = [row for row in self.rows if row.s2o.seconds is not None]
        if not ran:
            return f"No verdict: S2O did not run ({self.rows[0].s2o.failure})."
        sparse = [row for row in ran if row.sparse]
        if not sparse:
            reasons = "; ".join(dict.fromkeys(reason for row in ran for reason in row.reasons))
            return f"S2O changes nothing here: no attention ran sparse ({reasons or 'none was found'})."
        won = _won(sparse)
        if won:
            longest = won[-1]
            says = f"Use it from {won[0].tokens} tokens on: "
            if longest.gain is None:
                says += f"at {longest.tokens} tokens it ran where both others failed"
            else:
                says += f"at {longest.tokens} tokens it is {longest.gain:.2f} times as fast as {longest.rival}"
        else:
            longest = sparse[-1]
            assert longest.gain is not None  # or it would have won
            less = "no faster than" if longest.gain > 1 / EQUAL else f"{1 / longest.gain:.2f} times as slow as"
            says = f"Do not use it up to {longest.tokens} tokens: there it is {less} {longest.rival}"
        return f"{says}; {_costs(longest)}."

    def to_json(self) -> str:
        """JSON text of all figures, the ratios and the verdict with them."""
        rows = [asdict(row) | {name: getattr(row, name) for name in _DERIVED} for row in self.rows]
        fields = asdict(self) | {"rows": rows, "verdict": self.verdict}
        return json.dumps({"format": FORMAT} | fields, default=dict)

    def lines(self) -> list[tuple[str, ...]]:
        """The cells of the table, three lines a row, under HEADER."""
        return [line for row in self.rows for line in _lines(row)]

    def remarks(self) -> list[str]:
        """Failures, reasons for dense attention, and notes: one line each."""
        failed = [
            f"{way} at {row.tokens} tokens failed: {timing.failure}"
            for row in self.rows
            for way, timing in _ways(row)
            if timing.failure
        ]
        reasons = [f"at {row.tokens} tokens: {reason}" for row in self.rows for reason in row.reasons]
        return [*failed, *reasons, *self.notes]

    def __str__(self) -> str:
        return "\n".join([self.title, *table(HEADER, self.lines()), *self.remarks(), self.verdict])


_DERIVED = ("speedup", "speedup_over_compiled", "loss_difference")


def _ratio(other: Timing, own: Timing) -> float | None:
    return None if other.seconds is None or not own.seconds else other.seconds / own.seconds


def _won(rows: Sequence[Row]) -> list[Row]:
    """The longest run of rows at the long end in which S2O won, or alone could run."""
    won: list[Row] = []
    for row in reversed(rows):
        if row.gain is not None and row.gain < EQUAL:
            break
        won.insert(0, row)
    return won


def _costs(row: Row) -> str:
    found = [] if row.error is None else [f"error {row.error:.1%} (sampled)"]
    if row.loss_difference is not None:
        found.append(f"loss {row.loss_difference:+.4f}")
    return ", ".join(found) or "its error was not measured"


def _ways(row: Row) -> tuple[tuple[str, Timing], ...]:
    return tuple((name, getattr(row, field)) for field, name in NAMES.items())


def _lines(row: Row) -> list[tuple[str, ...]]:
    ratios = {PLAIN: row.speedup, COMPILED: row.speedup_over_compiled}
    lines = []
    for way, timing in _ways(row):
        quality: tuple[str, ...] = ("", "", _number(row.loss_dense, "{:.4f}") if way == PLAIN else "")
        if way == S2O:
            difference = _number(row.loss_difference, "{:+.4f}")
            quality = (_number(row.density, "{:.3f}"), _number(row.error, "{:.1%}"), difference)
        lines.append(
            (
                str(row.tokens) if way == PLAIN else "",
                way,
                "failed" if timing.seconds is None else f"{timing.seconds:.3f}",
                _number(ratios.get(way), "{:.2f}x"),
                _number(timing.compile_seconds, "{:.1f}") if way != PLAIN else "",
                _number(None if timing.peak_bytes is None else timing.peak_bytes / 2**30, "{:.2f}"),
                *quality,
            )
        )
    return lines


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)
