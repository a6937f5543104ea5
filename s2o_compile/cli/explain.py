"""``s2o explain``."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import asdict
from itertools import groupby
from operator import attrgetter
from typing import Annotated

import torch

from s2o_compile.api import explain as explain_model
from s2o_compile.cli.demo import seconds_to_read
from s2o_compile.cli.made_inputs import longest_text, make_inputs
from s2o_compile.cli.options import (
    MODEL_HELP,
    ConfigFile,
    Console,
    Device,
    Error,
    Json,
    Table,
    Tau,
    Text,
    check_json,
    check_random_weights,
    choose_config,
    choose_device,
    load_any,
    show,
    show_steps,
    typer,
)
from s2o_compile.config import S2OConfig
from s2o_compile.kernels.core.plan import TILE_LEN
from s2o_compile.kernels.core.tuned import NEVER, shortest_sparse
from s2o_compile.kernels.support.arguments import shown
from s2o_compile.kernels.support.torch_compat import dtype_of
from s2o_compile.report import Report, Site, shortened

TOKENS = 512
"""Tokens of a text by default."""

COLUMNS = "sites", "length", "mask", "result", "density", "error"
NARROWED = "result", "mask", "sites", "error", "density"
"""Columns that give up width in a narrow terminal, the first one first. All but the names wrap, between words."""

SHORTEST_NAME = 20
"""Characters of a name that are shown at least."""

GAP = 2
"""Blanks behind a column."""


def explain(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    tokens: Annotated[
        int | None, typer.Option(help=f"Length of the random prompt; {TOKENS} by default.", min=2)
    ] = None,
    batch: Annotated[int, typer.Option(help="Prompts.", min=1)] = 1,
    random_weights: Annotated[bool, typer.Option(help="Build from the configuration alone, no weights.")] = False,
    min_seq_len: Annotated[
        int | None, typer.Option(help="Run sparse from this length on; 0 for every one. Default: the library's.", min=0)
    ] = None,
    tau: Tau = None,
    error: Error = None,
    config_file: ConfigFile = None,
    device: Device = "",
    json_file: Json = None,
) -> None:
    """List every attention of a model of transformers: rewritten or not and why, sparse or dense at this length."""
    check_json(json_file)
    check_random_weights(model, random_weights=random_weights)
    with show_steps(Console(stderr=True)) as step:
        device = choose_device(device)
        config = choose_config(tau, config_file, error)
        config = config if min_seq_len is None else dataclasses.replace(config, min_seq_len=min_seq_len)
        with step("loading the model"):
            loaded, _ = load_any(model, tokens or TOKENS, device, random_weights=random_weights)
            made = make_inputs(
                f"model {shown(model)}", loaded, tokens or min(TOKENS, longest_text(loaded) or TOKENS), batch
            )
        if made.inputs.keys() == {"input_ids"}:
            step.expect(1, 2 * seconds_to_read(loaded, made.inputs["input_ids"]))
        with step("running it, as it is and compiled"), torch.no_grad():
            report = explain_model(loaded, **made.inputs, config=config)  # pyright: ignore[reportArgumentType]
    readable = longest_text(loaded) or NEVER if made.inputs.keys() == {"input_ids"} else 0
    remark = _why_dense(report, config, torch.device(device), dtype_of(loaded), readable)

    def to_json() -> str:
        fields = ("graphs", "graph_breaks", "pass_seconds", "unknown_sites", "audit_error")
        listed = {"sites": [asdict(site) for site in report.sites], "not_found": [x.name for x in report.not_found]}
        inputs = {name: list(x.shape) for name, x in made.inputs.items()}
        figures = {name: getattr(report, name) for name in fields}
        return json.dumps({"model": model, "inputs": inputs} | listed | figures | {"remark": remark})

    def print_it(console: Console) -> None:
        console.print(f"{type(loaded).__name__}, {made.text}, {config.quality}", highlight=False, markup=False)
        print_report(console, report)
        if remark:
            console.print(remark, style="bold", highlight=False, markup=False)

    show(json_file, to_json, print_it)


def _why_dense(report: Report, config: S2OConfig, device: torch.device, dtype: torch.dtype, readable: int) -> str:
    """Why rewritten attentions ran dense at this length, and how to see them sparse; empty if none did.

    Args:
        report: What ran.
        config: Its settings.
        device: The model's.
        dtype: The model's.
        readable: Longest text that the model reads; 0 if --tokens does not set the length of its attentions.
    """
    short = [site for site in report.sites if site.rewritten and site.path == "dense"]
    keys = [int(length) for site in short for length in site.key_shape[2:3] if length.isdecimal()]
    if not keys:
        return ""
    automatic = config.min_seq_len == "auto"
    shortest = max(TILE_LEN, shortest_sparse(config.min_seq_len, device, dtype))
    says = f"{len(short)} of {report.rewritten} rewritten attentions ran dense: they have up to {max(keys)} keys, and "
    if max(keys) >= shortest:
        return f"{says}fewer than {TILE_LEN} queries, or all of their heads are marked dense."
    if shortest >= NEVER:
        return f"{says}dense attention is faster here at any length. --min-seq-len 0 makes them sparse all the same."
    tokens = f"--tokens {shortest} shows them sparse" if readable >= shortest else ""
    if max(keys) < TILE_LEN:
        return f"{says}S2O needs at least {TILE_LEN} queries.{tokens and f' {tokens}.'}"
    says += f"S2O begins at {shortest} (min_seq_len{' of this device' if automatic else ''})."
    return f"{says} {tokens and f'{tokens}, '}--min-seq-len 0 makes them sparse at this length."


def _range(values: Iterable[float | None], form: str) -> str:
    """The least and the largest of the values that are known, or the one text that both have."""
    known = [value for value in values if value is not None]
    ends = [form.format(end(known)) for end in (min, max)] if known else ["-"]
    return " … ".join(dict.fromkeys(ends))


def _range_of_names(names: list[str]) -> str:
    """The first and the last of some names with what they share written once: ``model.layers.0…29.self_attn``."""
    first, last = names[0].split("."), names[-1].split(".")
    apart = [at for at, (one, other) in enumerate(zip(first, last, strict=False)) if one != other]
    if len(first) != len(last) or len(apart) != 1:
        return names[0] if first == last else f"{names[0]} … {names[-1]}"
    first[apart[0]] += f"…{last[apart[0]]}"
    return ".".join(first)


def _length(site: Site) -> str:
    """Keys of an attention, and its queries if there are others."""
    queries, keys = (shape[2] if len(shape) > 2 else "x".join(shape) for shape in (site.query_shape, site.key_shape))
    return keys if queries == keys else f"{queries}x{keys}"


def _widths(rows: list[tuple[str, ...]], room: int) -> dict[str, int]:
    """Widths of the columns, narrowed until they fit into so many characters, while no word is cut."""
    columns = dict(zip(COLUMNS, zip(COLUMNS, *rows, strict=True), strict=True))
    widths = {name: max(map(len, cells)) for name, cells in columns.items()}
    excess = sum(widths.values()) + GAP * len(COLUMNS) - room
    for name in NARROWED:
        longest_word = max(len(word) for cell in columns[name] for word in cell.split())
        spare = widths[name] - (min(SHORTEST_NAME, widths[name]) if name == "sites" else longest_word)
        narrowed = min(max(excess, 0), spare)
        widths[name] -= narrowed
        excess -= narrowed
    return widths


def print_report(console: Console, report: Report) -> None:
    """The sites as a table; runs of layers that fared alike share a row."""
    if not report.sites:
        console.print(str(report), style="bold red")
        return
    rows, colours, reasons = [], [], []
    alike = "rewritten", "reason", "mask", "query_shape", "key_shape", "dense_heads", "unheld_error", "path", "found"
    same = attrgetter(*alike)
    for _, run in groupby(report.sites, same):
        site, *others = run
        density = _range((x.density for x in (site, *others) if x.path != "dense"), "{:.3f}")
        error = _range((x.error for x in (site, *others)), "{:.1%}")
        result, colour = site.result, "yellow" if site.path in ("dense", "masked") else "green"
        if not site.rewritten:  # a long text, which would make the column narrow
            reasons += [] if site.reason in reasons else [site.reason]
            result, colour = f"{'dense' if site.found else 'not found'} [{1 + reasons.index(site.reason)}]", "red"
        names = _range_of_names([x.name for x in (site, *others)])
        rows.append((names, _length(site), site.mask or "-", result, density, error))
        colours.append(colour)
    widths = _widths(rows, console.width)
    table = Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0))
    for name in COLUMNS:
        table.add_column(name, width=widths[name])
    for (names, length, mask, result, *figures), colour in zip(rows, colours, strict=True):
        table.add_row(Text(shortened(names, widths["sites"])), length, Text(mask), Text(result, colour), *figures)
    console.print(table)
    for number, reason in enumerate(reasons, 1):
        console.print(f"[{number}] {reason}", highlight=False, markup=False)
    console.print(str(report).split("\n", len(report.sites) + 2)[-1], highlight=False, markup=False)
