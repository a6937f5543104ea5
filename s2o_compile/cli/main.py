"""The command line ``s2o``: every command, and how it ends.

Needs the extra named cli.
"""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import torch

from s2o_compile.cli import tune as tuning
from s2o_compile.cli.about import versions
from s2o_compile.cli.bench import bench
from s2o_compile.cli.calibrate import calibrate
from s2o_compile.cli.demo import QUESTION, DemoResult
from s2o_compile.cli.demo import run as run_demo
from s2o_compile.cli.doctor import doctor
from s2o_compile.cli.evaluate import RenamedOptions, evaluate, plot
from s2o_compile.cli.explain import explain, print_report
from s2o_compile.cli.options import (
    STANDARD_OUTPUT,
    BarColumn,
    Command,
    Console,
    Device,
    Json,
    Progress,
    SpinnerColumn,
    Table,
    Tau,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    check_json,
    choose_config,
    choose_device,
    show,
    show_steps,
    typer,
)
from s2o_compile.config import S2OConfig
from s2o_compile.errors import OptionError, S2OError
from s2o_compile.kernels.core import tuned
from s2o_compile.speed.measure import cause, is_out_of_memory

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (bench, doctor, explain, calibrate, plot):
    app.command(cls=Command)(command)
app.command(cls=RenamedOptions)(evaluate)


def _print_version(asked: bool) -> None:
    if asked:
        found = versions()
        print(", ".join(f"{name} {found[name]}" for name in ("s2o-compile", "torch", "triton") if name in found))
        raise typer.Exit


@app.callback()
def s2o(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Make the attention of long prompts sparse, see what it gains and what it costs. Begin with: s2o doctor."""


@app.command(cls=Command)
def demo(
    tokens: Annotated[int, typer.Option(help="Length of the prompt in tokens.", min=512)] = 8192,
    tau: Tau = None,
    device: Device = "",
    inner_backend: Annotated[
        str, typer.Option(help='Compiler of the rewritten graph: "eager" (none, as on the dense side) or "inductor".')
    ] = "eager",
    json_file: Json = None,
) -> None:
    """Read a long document with SmolLM2, densely and through S2O, and compare."""
    check_json(json_file)
    device = choose_device(device)
    config = choose_config(tau, min_seq_len=min(tokens, 2048), inner_backend=inner_backend)
    with show_steps(Console(stderr=True)) as step:
        result = run_demo(tokens=tokens, device=device, config=config, step=step)
    show(json_file, lambda: json.dumps(result.figures), lambda console: _print_demo(console, result, config))


@app.command(cls=Command)
def tune(
    head_dim: Annotated[list[int] | None, typer.Option(help="Head dims to tune; give it again for more.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help='"bfloat16", "float16", "float32"; may be repeated.')] = None,
    lengths: Annotated[list[int] | None, typer.Option(help="Lengths to look for the crossover; repeat it.")] = None,
    heads: Annotated[int, typer.Option(help="Query heads.", min=1)] = 32,
    kv_heads: Annotated[int, typer.Option(help="Key/value heads.", min=1)] = 8,
    output: Annotated[Path | None, typer.Option(help="File to write; by default the one that is read.")] = None,
    json_file: Json = None,
) -> None:
    """Time kernel configurations and the crossover length on this device, and write them for the operator to read."""
    check_json(json_file)
    on_gpu = torch.cuda.is_available()
    device, path = torch.device("cuda" if on_gpu else "cpu"), output or _user_file()
    names = dtype or (["bfloat16"] if on_gpu else ["float32", "bfloat16"])
    if unknown := [name for name in names if name not in tuned.DTYPES]:
        raise OptionError(f'--dtype: expected "bfloat16", "float16" or "float32", got {unknown[0]!r}.')
    if heads % kv_heads:
        raise OptionError(f"--heads: expected a multiple of the {kv_heads} key/value heads, got {heads}.")
    dims, tested = head_dim or [128], sorted(set(lengths or [2048, 4096, 8192, 16384, 32768][: 5 if on_gpu else 4]))
    if tested[0] < 256 or any(dim not in tuned.HEAD_DIMS for dim in dims):
        wanted = f"head dims out of {tuned.HEAD_DIMS} and lengths >= 256"
        raise OptionError(f"tune: expected {wanted}, got {dims} and {tested}.")
    tuning.try_target(path)
    console, launches = Console(stderr=json_file == STANDARD_OUTPUT), {}
    shapes = {
        (dim, name): tuning.Shape(heads=heads, kv_heads=kv_heads, head_dim=dim, dtype=tuned.DTYPES[name], device=device)
        for dim in dims
        for name in names
    }
    if not on_gpu:
        console.print(
            "Kernel configurations: expected a CUDA device, got none, so there are none to time. The crossover of the "
            "CPU is measured."
        )
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    with Progress(SpinnerColumn(), *columns, console=console) as progress:
        for (dim, name), shape in shapes.items() if on_gpu else ():
            tried, timings = tuning.candidates(), []
            compiling = progress.add_task(f"{dim} {name}: compiling {len(tried)} configurations", total=None)
            tuning.compile_ahead(shape, tested[-1], tried)
            progress.remove_task(compiling)
            swept = tuning.sweep(shape, tested[-1], tried)
            for timing in progress.track(swept, len(tried), description=f"{dim} {name}: configurations"):
                timings.append(timing)
                # A line each: compiling takes seconds a configuration, and a bar does not show in a log.
                found = timing.failed or f"{timing.gathered_ms:.3f} and {timing.exact_ms:.3f} ms"
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
    entry = tuning.write(
        path, device, crossovers={name: x for name, x in found.items() if x is not None}, launches=launches
    )
    for name, rows in compared.items():
        table = Table("tokens", "dense ms", "backend", "S2O ms", title=name)
        for row in rows:
            table.add_row(str(row.length), f"{row.dense_ms:.3f}", row.backend, f"{row.s2o_ms:.3f}")
        console.print(table)
        console.print(_crossover_says(found[name], tested[-1]), soft_wrap=True)
    console.print(f"Written to {path}", soft_wrap=True)
    show(json_file, lambda: json.dumps(entry), lambda _: None)


def _crossover_says(found: int | None, longest: int) -> str:
    if found is None:
        return f"S2O did not pay at {longest} tokens: the crossover stays as it was. Give longer --lengths to find it."
    if found == tuned.NEVER:
        return f'S2O lost at {longest} tokens: with min_seq_len "auto" every length runs dense.'
    return f"S2O runs from {found} tokens on."


def _user_file() -> Path:
    try:
        return tuned.user_file()
    except RuntimeError as error:  # nobody's home
        raise OptionError(f"--output: expected a file to write, got none ({error}). Name one.") from error


def _print_launches(console: Console, title: str, present: tuning.Timing, winner: tuning.Timing) -> None:
    table = Table("", "key block", "warps", "stages", "maxnreg", "gathered ms", "exact ms", title=title)
    for name, timing in (("present", present), ("fastest", winner)):
        launch = timing.launch
        figures = launch.key_block, launch.num_warps, launch.stages, launch.maxnreg or "-"
        times = (timing.failed, "") if timing.failed else (f"{timing.gathered_ms:.3f}", f"{timing.exact_ms:.3f}")
        table.add_row(name, *map(str, figures), *times)
    console.print(table)


def main() -> None:
    """Entry point: errors of this project end with one line and status 2, as wrong usage does; Ctrl-C with 130."""
    try:
        app()
    except S2OError as error:
        _end(str(error))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        _end(f"expected enough memory, got {cause(error)}. Choose fewer --tokens, or another --device.")
    except BrokenPipeError:  # whoever read the output has left, such as `head`
        sys.stdout = None
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


def _end(message: str) -> None:
    print("s2o:", " ".join(message.split()), file=sys.stderr)
    sys.exit(2)


def _print_demo(console: Console, result: DemoResult, config: S2OConfig) -> None:
    figures = result.figures
    console.print()
    print_report(console, result.report)
    title = f"{figures['model']}, {figures['tokens']} tokens, {figures['device']}, {config.quality}"
    table = Table("", "dense", "S2O", title=title)
    table.add_row("loss per token", f"{figures['loss_dense']:.4f}", f"{figures['loss_s2o']:.4f}")
    table.add_row("top-1 agreement", "", f"{figures['top1_agreement']:.4f}")
    speedup = float(figures["seconds_dense"]) / float(figures["seconds_s2o"])
    sparse = f"{figures['seconds_s2o']:.2f}  ({speedup:.2f}x)"
    table.add_row("seconds of the prefill", f"{figures['seconds_dense']:.2f}", sparse)
    table.add_row("seconds to compile, once", "", f"{result.compile_seconds:.1f} ({config.inner_backend})")
    console.print(table)
    console.print(f"[bold]Question:[/bold] {QUESTION}")
    for name, answer in (("dense", result.answer_dense), ("S2O", result.answer)):
        console.print(f"{name}: {answer}", highlight=False, markup=False)
