"""The command line: ``s2o demo``, ``explain``, ``calibrate``, ``evaluate``, ``plot`` and ``tune``.

Needs the extra named cli.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import asdict
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Annotated

import torch

from s2o_compile.api import explain as explain_model
from s2o_compile.cli import tune as tuning
from s2o_compile.cli.calibrate import calibrate
from s2o_compile.cli.demo import QUESTION, DemoResult
from s2o_compile.cli.demo import run as run_demo
from s2o_compile.cli.evaluate import RenamedOptions, evaluate, plot
from s2o_compile.cli.loading import check_reads
from s2o_compile.cli.options import (
    MODEL_HELP,
    BarColumn,
    Console,
    Device,
    Progress,
    SpinnerColumn,
    Table,
    Tau,
    TextColumn,
    TimeElapsedColumn,
    choose_config,
    choose_device,
    load,
    show_steps,
    typer,
)
from s2o_compile.config import S2OConfig
from s2o_compile.errors import OptionError, S2OError
from s2o_compile.kernels.core import tuned
from s2o_compile.report import Report

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
app.command()(calibrate)
app.command(cls=RenamedOptions)(evaluate)
app.command()(plot)


@app.command()
def demo(
    tokens: Annotated[int, typer.Option(help="Length of the prompt in tokens.", min=512)] = 8192,
    tau: Tau = None,
    device: Device = "",
    inner_backend: Annotated[
        str, typer.Option(help='Compiler of the rewritten graph: "eager" (none, as on the dense side) or "inductor".')
    ] = "eager",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Read a long document with SmolLM2, densely and through S2O, and compare."""
    device = choose_device(device)
    config = choose_config(tau, min_seq_len=min(tokens, 2048), inner_backend=inner_backend)
    console = Console(stderr=as_json)
    with show_steps(console) as step:
        result = run_demo(tokens=tokens, device=device, config=config, step=step)
    if as_json:
        print(json.dumps(result.figures))
    else:
        _print_demo(console, result, config)


@app.command()
def explain(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    tokens: Annotated[int, typer.Option(help="Length of the random prompt in tokens.", min=2)] = 512,
    batch: Annotated[int, typer.Option(help="Prompts.", min=1)] = 1,
    random_weights: Annotated[bool, typer.Option(help="Build from the configuration alone, no weights.")] = False,
    tau: Tau = None,
    device: Device = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """List every attention of a causal language model: rewritten, or left dense and why."""
    device = choose_device(device)
    config = choose_config(tau, min_seq_len=0)
    loaded, _ = load(model, tokens, device, random_weights=random_weights)
    ids = torch.randint(0, loaded.config.get_text_config().vocab_size, (batch, tokens), device=device)
    check_reads(loaded, ids)
    with torch.no_grad():
        report = explain_model(loaded, ids, config=config)
    if as_json:
        fields = ("graphs", "graph_breaks", "pass_seconds", "unknown_sites", "audit_error")
        listed = {"sites": [asdict(site) for site in report.sites], "not_found": [x.name for x in report.not_found]}
        print(json.dumps(listed | {name: getattr(report, name) for name in fields}))
    else:
        _print_report(Console(), report)


@app.command()
def tune(
    head_dim: Annotated[list[int] | None, typer.Option(help="Head dims to tune; give it again for more.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help='"bfloat16", "float16", "float32"; may be repeated.')] = None,
    lengths: Annotated[list[int] | None, typer.Option(help="Lengths to look for the crossover; repeat it.")] = None,
    heads: Annotated[int, typer.Option(help="Query heads.", min=1)] = 32,
    kv_heads: Annotated[int, typer.Option(help="Key/value heads.", min=1)] = 8,
    output: Annotated[Path | None, typer.Option(help="File to write; by default the one that is read.")] = None,
) -> None:
    """Time kernel configurations and the crossover length on this device, and write them for the operator to read."""
    on_gpu = torch.cuda.is_available()
    device, path = torch.device("cuda" if on_gpu else "cpu"), output or _user_file()
    names = dtype or (["bfloat16"] if on_gpu else ["float32", "bfloat16"])
    unknown = [name for name in names if name not in tuned.DTYPES]
    if unknown:
        raise OptionError(f'--dtype: expected "bfloat16", "float16" or "float32", got {unknown[0]!r}.')
    if heads % kv_heads:
        raise OptionError(f"--heads: expected a multiple of the {kv_heads} key/value heads, got {heads}.")
    dims, tested = head_dim or [128], sorted(set(lengths or [2048, 4096, 8192, 16384, 32768][: 5 if on_gpu else 4]))
    if tested[0] < 256 or any(dim not in tuned.HEAD_DIMS for dim in dims):
        wanted = f"head dims out of {tuned.HEAD_DIMS} and lengths >= 256"
        raise OptionError(f"tune: expected {wanted}, got {dims} and {tested}.")
    tuning.try_target(path)
    console, launches = Console(), {}
    shapes = {
        (dim, name): tuning.Shape(heads=heads, kv_heads=kv_heads, head_dim=dim, dtype=tuned.DTYPES[name], device=device)
        for dim in dims
        for name in names
    }
    if not on_gpu:
        console.print(
            "Kernel configurations: expected a CUDA device, got none, so there are none to time. The crossover of the "
            "torch implementation is measured."
        )
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    with Progress(SpinnerColumn(), *columns, console=console) as progress:
        for (dim, name), shape in shapes.items() if on_gpu else ():
            tried, timings = tuning.candidates(), []
            swept = tuning.sweep(shape, tested[-1], tried)
            for timing in progress.track(swept, len(tried), description=f"{dim} {name}: configurations"):
                timings.append(timing)
                # A line each: compiling takes seconds a configuration, and a bar does not show in a log.
                found = timing.failed or f"{timing.gathered_ms:.3f} and {timing.natural_ms:.3f} ms"
                progress.console.print(f"{timing.launch}: {found}", highlight=False, soft_wrap=True)
            launches[dim, name] = tuning.best(timings)
            _print_launches(console, f"{dim} {name}, {tested[-1]} tokens", timings[0], launches[dim, name])
        compared = {}
        for name in names:
            place = dims[0], name
            with tuning.launched(launches[place].launch) if on_gpu else nullcontext():
                steps = progress.track(tested, description=f"{name}: crossover")
                compared[name] = [tuning.compare(shapes[place], length) for length in steps]
    found = {name: tuning.crossover(rows) for name, rows in compared.items()}
    tuning.write(path, device, crossovers={name: x for name, x in found.items() if x is not None}, launches=launches)
    for name, rows in compared.items():
        table = Table("tokens", "dense ms", "backend", "S2O ms", title=name)
        for row in rows:
            table.add_row(str(row.length), f"{row.dense_ms:.3f}", row.backend, f"{row.s2o_ms:.3f}")
        console.print(table)
        console.print(_crossover_says(found[name], tested[-1]), soft_wrap=True)
    console.print(f"Written to {path}", soft_wrap=True)


def _crossover_says(found: int | None, longest: int) -> str:
    if found is None:
        return f"S2O lost at {longest} tokens: the crossover stays as it was. Give longer --lengths to find it."
    if found == tuned.NEVER:
        return f'S2O lost at {longest} tokens: with min_seq_len "auto" every length runs dense.'
    return f"S2O runs from {found} tokens on."


def _user_file() -> Path:
    try:
        return tuned.user_file()
    except RuntimeError as error:  # nobody's home
        raise OptionError(f"--output: expected a file to write, got none ({error}). Name one.") from error


def _print_launches(console: Console, title: str, present: tuning.Timing, winner: tuning.Timing) -> None:
    table = Table("", "key block", "warps", "stages", "maxnreg", "gathered ms", "natural ms", title=title)
    for name, timing in (("present", present), ("fastest", winner)):
        launch = timing.launch
        figures = launch.key_block, launch.num_warps, launch.stages, launch.maxnreg or "-"
        times = (timing.failed, "") if timing.failed else (f"{timing.gathered_ms:.3f}", f"{timing.natural_ms:.3f}")
        table.add_row(name, *map(str, figures), *times)
    console.print(table)


def main() -> None:
    """Entry point: errors of this project end with one line and status 2, as wrong usage does; Ctrl-C with 130."""
    try:
        app()
    except S2OError as error:
        print("s2o:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def _range(values: Iterable[float | None], form: str) -> str:
    """The least and the largest of the values that are known, or the one text that both have."""
    known = [value for value in values if value is not None]
    ends = [form.format(end(known)) for end in (min, max)] if known else ["-"]
    return " … ".join(dict.fromkeys(ends))


def _print_report(console: Console, report: Report) -> None:
    """The sites as a table; runs of layers that fared alike share a row."""
    if not report.sites:
        console.print(str(report), style="bold red")
        return
    table = Table()
    for name in ("sites", "count", "query", "key", "mask", "result", "density", "error (sampled)"):
        table.add_column(name, overflow="fold")
    same = attrgetter("rewritten", "reason", "mask", "query_shape", "key_shape", "dense_heads", "unheld_error")
    for _, run in groupby(report.sites, same):
        site, *others = run
        label = f"{site.name} … {others[-1].name}" if others else site.name
        density = _range((x.density for x in (site, *others)), "{:.3f}")
        error = _range((x.error for x in (site, *others)), "{:.1%}")
        dense = "dense: " if site.found else ""
        result = f"[green]rewritten{site.marks}" if site.rewritten else f"[red]{dense}{site.reason}"
        shapes = ("x".join(shape) for shape in (site.query_shape, site.key_shape))
        table.add_row(label, str(1 + len(others)), *shapes, site.mask or "-", result, density, error)
    console.print(table)
    console.print(str(report).split("\n", len(report.sites) + 2)[-1])


def _print_demo(console: Console, result: DemoResult, config: S2OConfig) -> None:
    figures = result.figures
    console.print()
    _print_report(console, result.report)
    title = f"{figures['model']}, {figures['tokens']} tokens, {figures['device']}, {config.quality}"
    table = Table("", "dense", "S2O", title=title)
    table.add_row("loss per token", f"{figures['loss_dense']:.4f}", f"{figures['loss_s2o']:.4f}")
    table.add_row("top-1 agreement", "", f"{figures['top1_agreement']:.4f}")
    speedup = float(figures["seconds_dense"]) / float(figures["seconds_s2o"])
    sparse = f"{figures['seconds_s2o']:.2f}  ({speedup:.2f}x)"
    table.add_row("seconds of the prefill", f"{figures['seconds_dense']:.2f}", sparse)
    table.add_row("seconds to compile, once", "", f"{result.compile_seconds:.1f} ({config.inner_backend})")
    console.print(table)
    console.print(f"[bold]Q:[/bold] {QUESTION}\n[bold]A:[/bold] {result.answer}")
