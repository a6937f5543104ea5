"""``s2o evaluate --tasks``."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from s2o_compile.cli.loading import check_reads
from s2o_compile.cli.models import full_name
from s2o_compile.cli.options import Console, Table, choose_device, load, read_file, show, show_steps
from s2o_compile.config import S2OConfig
from s2o_compile.errors import OptionError
from s2o_compile.quality.tasks.evaluate import evaluate_tasks
from s2o_compile.quality.tasks.samples import TASKS
from s2o_compile.quality.tasks.scores import HEADER, TaskScores


def choose_lengths(lengths: list[int] | None, tokens: int, *, tasks: bool, curve: bool) -> list[int]:
    """The lengths asked for, or --tokens with its half and its quarter.

    Raises:
        OptionError: --lengths without --tasks, or --tasks with an option that it does not know.
    """
    if lengths and not tasks:
        raise OptionError("--lengths: expected --tasks beside it, got none. Add --tasks, or give --tokens instead.")
    if tasks and curve:
        raise OptionError("--tasks: expected no --curve beside it, got one. Run s2o evaluate twice.")
    return sorted(lengths or {max(1, tokens // part) for part in (4, 2, 1)})


def run_tasks(
    model: str, lengths: list[int], text: Path | None, config: S2OConfig, device: str, json_file: Path | None
) -> None:
    """Let a model solve the tasks, print a table, and write JSON where it is wanted."""
    filler = None if text is None else read_file("--text", text)
    with show_steps(Console(stderr=True)) as step:
        device = choose_device(device)
        with step("loading the model"):
            loaded, tokenizer = load(model, max(lengths), device)
        step.expect(len(TASKS) * len(lengths))
        check_reads(loaded, torch.zeros(1, max(lengths), dtype=torch.int64, device=device))
        found = evaluate_tasks(loaded, tokenizer, lengths, config, text=filler, progress=step)
    found = dataclasses.replace(found, model=full_name(model))
    show(json_file, found.to_json, lambda console: _print_scores(console, found))


def _print_scores(console: Console, found: TaskScores) -> None:
    title = f"{found.model}, {found.device}, {found.config.quality}, {found.scores[0].samples} questions each"
    table = Table(*HEADER, title=title)
    before = ""
    for task, *cells in found.rows():
        if before not in ("", task):
            table.add_section()
        table.add_row("" if task == before else task, *cells)
        before = task
    console.print(table)
