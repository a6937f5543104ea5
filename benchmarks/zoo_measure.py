"""One model in one case: what ran, what the pass made of it, and how far off its output at ``tau=0`` is."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import zoo_masks
from s2o_compile import Report, S2OConfig
from s2o_compile.api import watched
from s2o_compile.capture import audit as audit
from s2o_compile.capture.compiled_copy import compiled_copy
from s2o_compile.kernels.support.torch_compat import tree_flatten, tree_leaves, tree_unflatten
from s2o_compile.passes.site import SiteRecord

EXACT = S2OConfig(
    tau=0.0,
    min_seq_len=0,
    inner_backend="eager",
    assume_block_masks=True,  # transformers makes them by create_block_mask, behind a graph break
    check_assumptions=True,
)
NEW_TOKENS = 2
TOLERANCE = 1e-5
"""Relative L2 distance of outputs in float32 from which they differ: what one layer may make, for two and more."""


@dataclass
class Row:
    """One line of docs/zoo.csv; counts are of attention calls (``ran``) and sites of captured graphs (the others)."""

    kind: str
    architecture: str
    model: str = ""
    implementation: str = ""
    case: str = ""
    status: str = "ok"  # "ok", "differs", "error", "cannot build", "part" (of a model, and none itself)
    ran: int = 0
    found: int = 0
    rewritten: int = 0
    read: int = 0  # of the rewritten: sites whose mask is read at run time
    left: int = 0
    not_found: int = 0
    masks: str = ""
    expressible: int = 0  # calls that ran with a causal, sliding, padded, bidirectional or cross mask: see zoo_masks
    expressible_rewritten: int = 0
    contradictions: int = 0  # calls rewritten whose mask, by value, is none of these
    seen_masks: str = ""  # of all calls that ran, by value
    missed_reasons: str = ""  # of expressible calls that were not rewritten
    left_reasons: str = ""
    not_found_kinds: str = ""
    graphs: int = 0
    graph_breaks: int = 0
    error: float | None = None
    control: float | None = None  # the same without the pass, measured where the output differs
    rounding: float | None = None  # the original in float32 against itself in float64, measured where it differs
    seconds: float = 0.0
    note: str = ""


@dataclass(frozen=True)
class Subject:
    """A model with inputs, ready to run.

    Attributes:
        model: In eval mode.
        inputs: Keyword arguments; ``args`` are positional ones.
        keep: bool [B, N], False where an output position is padding and so means nothing; None without padding.
        generate: Whether ``generate(**inputs)`` is the call.
    """

    model: nn.Module
    inputs: dict[str, Any] = field(default_factory=dict)
    args: tuple[Any, ...] = ()
    keep: Tensor | None = None
    generate: bool = False
    note: str = ""


def stir(model: nn.Module) -> None:
    """Noise for parameters that are one number everywhere: a learned bias of zeros could be lost without a trace."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and parameter.numel() > 1 and parameter.min() == parameter.max():
                parameter += 0.02 * torch.randn(parameter.shape, generator=generator)


def measure(subject: Subject, row: Row) -> Row:
    """Fill in what running one subject shows; errors become the row's."""
    start = time.perf_counter()
    try:
        with torch.no_grad():
            _measure(subject, row)
    except Exception as error:  # any model may fail in any way, and the next one must still run
        row.status, row.note = "error", describe(error)
    row.seconds = round(time.perf_counter() - start, 2)
    return row


class SubjectError(Exception):
    """An error that is not the pass's: the message says whose."""


def describe(error: BaseException) -> str:
    """An exception in one line."""
    if isinstance(error, SubjectError):
        return str(error)
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}"


def _measure(subject: Subject, row: Row) -> None:
    row.model, row.note = type(subject.model).__name__, subject.note
    try:
        expected = _call(subject, subject.model)
    except Exception as error:
        raise SubjectError(f"the original raises it: {describe(error)}") from error
    with watched(EXACT) as watch:
        ran = audit.take(
            subject.model.generate if subject.generate else subject.model,
            subject.args,
            _options(subject),
            zoo_masks.MaskCounter,
        )
        actual = _compiled(subject, watch.backend)
    _fill(row, watch.report(ran), len(ran))
    _judge(row, watch.joined(ran), {call.site for call in watch.recording.calls if call.path == "masked"})
    row.error = distance(actual, expected, subject.keep)
    if row.error > (0 if subject.generate else TOLERANCE):
        row.status = "differs"
        torch.compiler.reset()
        row.control = distance(_call(subject, compiled_copy(subject.model, "eager")), expected, subject.keep)
        torch.compiler.reset()
        row.rounding = _rounding(subject, expected)


def _compiled(subject: Subject, backend: Any) -> object:  # noqa: ANN401 (a backend)
    """The output through the pass; an error that plain torch.compile raises as well says so."""
    try:
        return _call(subject, compiled_copy(subject.model, backend))
    except Exception as error:
        torch.compiler.reset()
        try:
            _call(subject, compiled_copy(subject.model, "eager"))
        except Exception as control:
            if type(control) is type(error):
                raise SubjectError(f"plain torch.compile raises it, too: {describe(error)}") from error
        raise


def _rounding(subject: Subject, expected: object) -> float | None:
    """How far the original in float32 is from itself in float64; None where it does not run in float64."""
    given, form = tree_flatten((subject.args, subject.inputs))
    given = [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in given]
    args, inputs = tree_unflatten(given, form)
    wide = dataclasses.replace(subject, args=args, inputs=inputs)
    try:
        return distance(_call(wide, copy.deepcopy(subject.model).double()), expected, subject.keep)
    except Exception:  # a buffer made in float32 on the way, most often
        return None


def _options(subject: Subject) -> dict[str, Any]:
    if not subject.generate:
        return subject.inputs
    lengths = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
    return {**subject.inputs, **lengths, "do_sample": False}


def _call(subject: Subject, model: nn.Module) -> object:
    torch.manual_seed(0)
    args, inputs = copy.deepcopy((subject.args, _options(subject)))
    return model.generate(*args, **inputs) if subject.generate else model(*args, **inputs)  # pyright: ignore


def _fill(row: Row, report: Report, ran: int) -> None:
    found = [site for site in report.sites if site.found]
    row.ran, row.found, row.rewritten = ran, len(found), report.rewritten
    row.left, row.not_found = len(found) - report.rewritten, len(report.not_found)
    row.read = sum(bool(site.unproven) for site in found)
    row.masks = _ranked(site.mask for site in found if site.rewritten)
    row.left_reasons = _ranked(site.reason for site in found if not site.rewritten)
    row.not_found_kinds = _ranked(
        site.reason.removeprefix("not found: ").partition(" ran ")[0] for site in report.not_found
    )
    row.graphs, row.graph_breaks = report.graphs, len(report.graph_breaks)


def _judge(row: Row, calls: Sequence[tuple[audit.Ran, SiteRecord | None]], masked: set[str]) -> None:
    """Count expressible calls; ``masked`` names the sites whose masks were read, and taken for no known mask."""
    judged = [(call, site) for call, site in calls if zoo_masks.expressible(call, site)]
    missed = [
        (call, site)
        for call, site in judged
        if site is None or not site.rewritten or (site.unproven and site.name in masked)
    ]
    row.expressible, row.expressible_rewritten = len(judged), len(judged) - len(missed)
    row.contradictions = sum(zoo_masks.contradicts(*pair) for pair in calls)
    row.seen_masks = _ranked(call.mask for call, _ in calls)
    row.missed_reasons = _ranked(
        f"not found: {call.kind}" if site is None else site.reason or "read, and taken for no known mask"
        for call, site in missed
    )


def _ranked(texts: Any) -> str:  # noqa: ANN401 (an iterable of texts)
    return "; ".join(f"{count} x {text}" for text, count in Counter(texts).most_common())


def distance(actual: object, expected: object, keep: Tensor | None) -> float:
    """Largest relative L2 distance of the tensors of two outputs; infinite where they are not even alike.

    Caches are left out: with padding they hold rows that mean nothing, and what matters of them is in the output.
    """
    ours, theirs = _tensors(actual), _tensors(expected)
    if [x.shape for x in ours] != [x.shape for x in theirs]:
        return float("inf")
    return max((_relative(a, b, keep) for a, b in zip(ours, theirs, strict=True)), default=0.0)


def _tensors(output: object) -> list[Tensor]:
    if isinstance(output, dict):
        hidden = ("past_key_values", "cache", "mems", "state", "attentions", "hidden_states")
        output = {name: value for name, value in output.items() if not any(word in name for word in hidden)}
    return [x for x in tree_leaves(output) if isinstance(x, Tensor)]


def _relative(actual: Tensor, expected: Tensor, keep: Tensor | None) -> float:
    if keep is not None and expected.shape[:2] == keep.shape:
        actual, expected = actual[keep], expected[keep]
    if not expected.is_floating_point():
        return 0.0 if torch.equal(actual, expected) else float("inf")
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    difference = (actual.double() - expected.double()).masked_fill(same, 0.0)
    norm = expected.double()[expected.isfinite()].norm()
    error = difference.norm() / norm.clamp_min(1e-30)
    return float("inf") if error.isnan() else error.item()


def as_dict(row: Row) -> dict[str, object]:
    """A row for the CSV file."""
    return asdict(row)
