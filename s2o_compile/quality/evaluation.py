"""The result of an evaluation: figures, their JSON, and a table to read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from s2o_compile.config import S2OConfig
from s2o_compile.errors import OptionError
from s2o_compile.kernels.support.arguments import as_integer, as_numbers, shown
from s2o_compile.kernels.support.errors import warn
from s2o_compile.kernels.support.json_text import parse_json
from s2o_compile.kernels.support.old_names import current_names
from s2o_compile.quality.from_json import as_type
from s2o_compile.quality.needles import NeedleRecall
from s2o_compile.quality.site_quality import SiteQuality
from s2o_compile.report import shortened, table

FORMAT = 1

LOSS_HOLDS = 0.01
"""Nats a token that plain text may lose under a verdict that quality holds."""

RECALL_HOLDS = 0.95
"""Share of its recall that a model must keep under such a verdict."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Dense against S2O on a model and its tokens. Losses and divergences are in nats a token.

    Attributes:
        model: Name of the model.
        device: Where it ran.
        config: How attention was made sparse.
        lengths: Tokens of every sequence of the batches.
        tokens: Predicted tokens behind the means.
        loss_dense: Mean next-token loss of the model as it is.
        loss_s2o: The same through S2O.
        top1_agreement: Share of the tokens whose best prediction is the same.
        kl: Mean Kullback-Leibler divergence, dense || S2O.
        sites: Every attention that ran sparse.
        exact_sites: Every other attention that the compiler found, and why it was not sparse.
        needles: Loss on needles; None if there were none.
        dtype: Of the model's parameters; empty in files that older versions wrote.
    """

    model: str
    device: str
    config: S2OConfig
    lengths: tuple[int, ...]
    tokens: int
    loss_dense: float
    loss_s2o: float
    top1_agreement: float
    kl: float
    sites: tuple[SiteQuality, ...]
    exact_sites: Mapping[str, str]
    needles: NeedleRecall | None = None
    dtype: str = ""

    @property
    def planted(self) -> NeedleRecall | None:
        """The old name of ``needles``."""
        warn("Evaluation.planted is now called needles.", DeprecationWarning)
        return self.needles

    @property
    def loss_difference(self) -> float:
        """Loss that S2O adds."""
        return self.loss_s2o - self.loss_dense

    @property
    def density(self) -> float:
        """Mean over sites."""
        return sum(site.density for site in self.sites) / len(self.sites)

    @property
    def error(self) -> float:
        """Mean over sites, each of all heads together."""
        return sum(site.error for site in self.sites) / len(self.sites)

    @property
    def title(self) -> str:
        """Model, tokens, quality, device and dtype."""
        lengths = " + ".join(map(str, dict.fromkeys(self.lengths)))
        shortest = self.config.min_seq_len
        return ", ".join(
            [self.model, f"{lengths} tokens", self.config.quality, f"min_seq_len {shortest}", self.device]
            + ([self.dtype] if self.dtype else [])
        )

    @property
    def verdict(self) -> str:
        """Whether quality holds, in a sentence."""
        text_holds = self.loss_difference <= LOSS_HOLDS
        kept = None if self.needles is None else self.needles.kept
        recalls = kept is None or kept >= RECALL_HOLDS
        remedy = " Lower tau, or give a smaller error."
        says, remedy = {
            (True, True): ("Quality holds", ""),
            (True, False): ("Plain text holds, far tokens suffer", remedy),
            (False, True): ("Plain text suffers", remedy),
            (False, False): ("Quality suffers", remedy),
        }[text_holds, recalls]
        recall = "" if kept is None else f"; {kept:.0%} of the recall of needles is kept"
        return (
            f"{says}: the loss of plain text changes by {self.loss_difference:+.4f}, {1 - self.top1_agreement:.1%} of "
            f"the best next tokens change{recall}.{remedy}"
        )

    def to_json(self) -> str:
        """JSON text that ``from_json`` reads back to an equal evaluation."""
        return json.dumps({"format": FORMAT} | asdict(self), default=dict)

    @classmethod
    def from_json(cls, text: str | bytes) -> Evaluation:
        """Evaluation from the text of ``to_json``; OptionError for any other text."""
        try:
            found: Evaluation = as_type(cls, _fields(text), "evaluation")
            _check(found)
        except ValueError as error:  # the configuration's OptionError is one
            raise OptionError(
                f"evaluation: expected the JSON of `s2o evaluate --json` in format {FORMAT}, got {error}. Evaluate "
                "again and give the new file."
            ) from error
        return found

    def __str__(self) -> str:
        return self.text()

    def text(self, width: int | None = None) -> str:
        """A table and its summary. Lines of the table fit a width, if one is given: names are cut in their middle."""
        header = ("site", "density", "error", "worst head", "worst tile", "worst row")
        rows = [_row(site) for site in self.sites]
        if width is not None:
            others = sum(2 + max(len(row[column]) for row in (header, *rows)) for column in range(1, len(header)))
            rows = [(shortened(row[0], max(width - others, len(header[0]))), *row[1:]) for row in rows]
        count, found = len(self.sites), len(self.sites) + len(self.exact_sites)
        lines = [
            self.title,
            *table(header, rows),
            f"{count} of {found} attention sites ran sparse; mean density {self.density:.3f}, "
            f"mean error {self.error:.2%}",
            *(f"  - {name}: {reason}" for name, reason in self.exact_sites.items()),
            f"next token, {self.tokens} of them: loss {self.loss_dense:.4f} dense, {self.loss_s2o:.4f} S2O "
            f"({self.loss_difference:+.4f}); same best {self.top1_agreement:.1%}; KL {self.kl:.2g}",
        ]
        budget = self.config.error
        if budget is not None and self.sites:
            kept = sum(site.error <= budget for site in self.sites)
            largest = max(site.error for site in self.sites)
            lines.append(f"error budget {budget:.2%}: kept at {kept} of {count} sites, largest error {largest:.2%}")
        if self.needles is not None:
            recall = self.needles
            lines.append(
                f"{recall.count} needles of {recall.length} tokens: loss on their repeats {recall.loss_dense:.3f} "
                f"dense, {recall.loss_s2o:.3f} S2O ({recall.loss_s2o - recall.loss_dense:+.3f}); "
                f"{recall.loss_first:.3f} where they stand first"
            )
        return "\n".join([*lines, self.verdict])


def _row(site: SiteQuality) -> tuple[str, ...]:
    errors = (site.error, site.worst_head, site.worst_tile, site.worst_row)
    return (site.name or "s2o_compile.attention", f"{site.density:.3f}", *(f"{error:.2%}" for error in errors))


def _fields(text: str | bytes) -> dict[str, object]:
    fields = parse_json(text)
    if not isinstance(fields, dict) or as_integer(fields.pop("format", None)) != FORMAT:
        raise ValueError(shown(text))
    if "planted" in fields:
        fields = current_names(fields, {"planted": "needles"}, {})
        recall = fields["needles"]
        if isinstance(recall, dict):
            old = {"strings": "count", "string_len": "length"}
            fields["needles"] = {old.get(name, name): value for name, value in recall.items()}
    return fields


def _check(evaluation: Evaluation) -> None:
    """Raise ValueError if nothing was measured, lengths do not match, or a count is not finite.

    Losses and errors may be NaN, because a model's output may.
    """
    if not evaluation.sites or not evaluation.lengths:
        raise ValueError(f"{len(evaluation.sites)} sites and {len(evaluation.lengths)} lengths")
    for site in evaluation.sites:
        for names in (("head_density", "head_error"), ("tile_keys", "tile_visible")):
            first, second = (len(getattr(site, name)) for name in names)
            if not first == second > 0:
                raise ValueError(f"{first} {names[0]} beside {second} {names[1]} of the site {shown(site.name)}")
        for name in ("head_density", "tile_keys", "tile_visible"):
            if as_numbers(getattr(site, name)) is None:
                raise ValueError(f"{shown(getattr(site, name))} as {name} of the site {shown(site.name)}")
        if len(site.curve) != len(evaluation.sites[0].curve):
            raise ValueError(f"another number of taus at the site {shown(site.name)} than at the first")
