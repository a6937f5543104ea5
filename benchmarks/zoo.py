"""Every architecture that can be built tiny, through the pass at tau=0: what ran, what was found, how far it is off.

    python -m benchmarks.zoo                              # all of it: docs/zoo.csv and docs/zoo.md
    python -m benchmarks.zoo --only llama,bert --csv some.csv
    python -m benchmarks.zoo --workers 16 --minutes 8 --resume --csv a.csv   # again and again, until nothing is left
    python -m benchmarks.zoo --shard 1/4 --csv a.csv                         # a quarter of the jobs, always the same
    python -m benchmarks.zoo --merge a.csv b.csv                             # several files into one; runs nothing

Each job is one architecture with one attention implementation, in a process of its own with a time limit, so that a
crash or a hang costs that job only. Long jobs, by the last whole run, come first. A job's rows are written when it is
done, so a run can be stopped at any time; ``--resume`` skips the jobs that the file already has. All is on the CPU.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import itertools
import multiprocessing
import os
import time
import warnings
from collections.abc import Iterable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path

import torch
import transformers
from torch import nn

from benchmarks import models_page, zoo_elsewhere, zoo_transformers
from benchmarks.zoo_measure import Row, as_dict, describe, measure
from benchmarks.zoo_page import write_page

DOCS = Path(__file__).parent.parent / "docs"
TIME_LIMIT = 240
ELSEWHERE, PART = "elsewhere", "part"
Job = tuple[str, str, str]  # kind, architecture, implementation


def jobs(only: Iterable[str] = ()) -> list[Job]:
    """Every job, the longest of the last whole run first; jobs that it had not come before them."""
    wanted = set(only)
    found: list[Job] = [(ELSEWHERE, name, "") for name in zoo_elsewhere.MODELS]
    found += [(PART, name, "") for name in zoo_transformers.parts()]
    for implementation in zoo_transformers.IMPLEMENTATIONS:
        for name, (kind, _) in sorted(zoo_transformers.architectures().items()):
            if (not wanted or name in wanted) and zoo_transformers.supports(name, implementation):
                found.append((kind, name, implementation))
    seconds = _seconds(DOCS / "zoo.csv")
    found.sort(key=lambda job: -seconds.get(job[1:], float("inf")))
    return [job for job in found if not wanted or job[1] in wanted]


def _seconds(path: Path) -> dict[tuple[str, str], float]:
    """What each job took, by architecture and implementation."""
    taken: dict[tuple[str, str], float] = {}
    for row in read(path) if path.exists() else ():
        job = row.architecture, row.implementation
        taken[job] = taken.get(job, 0.0) + row.seconds
    return taken


def run_job(job: Job) -> Iterator[Row]:
    """The rows of one job, in this process."""
    kind, name, implementation = job
    row = Row(kind=kind, architecture=name, implementation=implementation)
    if kind == PART:
        yield dataclasses.replace(row, status=PART, note="no Auto class knows its configuration")
        return
    try:
        cases = (
            iter([("no mask", zoo_elsewhere.build(name))])
            if kind == ELSEWHERE
            else zoo_transformers.subjects(name, implementation)
        )
        for case, subject in cases:
            yield measure(subject, dataclasses.replace(row, case=case))
    except zoo_transformers.CannotBuildError as error:
        yield dataclasses.replace(row, status="cannot build", note=str(error))


def _work(job: Job, results: Connection, plain: bool) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    try:
        for row in run_job(job):
            results.send(row)
            if plain:
                break
    except Exception as error:  # the row says it; the zoo goes on
        results.send(Row(*job[:2], implementation=job[2], status="error", note=describe(error)))
    results.close()


def run_all(
    todo: Iterable[Job], workers: int, limit: float = TIME_LIMIT, *, plain: bool = False
) -> Iterator[list[Row]]:
    """The rows of each job, as jobs end; one that dies or takes too long ends with a row that says so."""
    context = multiprocessing.get_context("fork")  # transformers and Dynamo are imported once
    torch.compile(nn.Linear(1, 1), backend="eager")(torch.ones(1, 1))
    torch.compiler.reset()
    waiting, running = iter(todo), {}
    while True:
        for job in itertools.islice(waiting, workers - len(running)):
            receive, send = context.Pipe(duplex=False)
            process = context.Process(target=_work, args=(job, send, plain))
            process.start()
            send.close()
            running[receive] = (job, process, time.monotonic() + limit, [])
        if not running:
            return
        for receive in wait(list(running), timeout=1.0):
            try:
                running[receive][-1].append(receive.recv())  # pyright: ignore[reportAttributeAccessIssue]
            except EOFError:
                job, process, _, rows = running.pop(receive)
                process.join()
                if process.exitcode:
                    rows.append(_failed(job, f"the process ended with exit code {process.exitcode}"))
                yield rows
        for receive, (job, process, deadline, rows) in list(running.items()):
            if time.monotonic() > deadline:
                process.kill()
                process.join()
                del running[receive]
                yield [*rows, _failed(job, f"stopped after {limit:.0f} seconds")]


def _failed(job: Job, note: str) -> Row:
    return Row(*job[:2], implementation=job[2], status="error", note=note)


def read(path: Path) -> list[Row]:
    """The rows of a CSV file."""
    kinds = {field.name: str(field.type) for field in dataclasses.fields(Row)}
    parse = {"int": int, "float": float, "str": str, "float | None": lambda text: float(text) if text else None}
    with path.open(newline="") as file:
        return [Row(**{name: parse[kinds[name]](text) for name, text in line.items()}) for line in csv.DictReader(file)]


def write(path: Path, rows: Iterable[Row]) -> None:
    """Rows to a CSV file, in an order of their own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in dataclasses.fields(Row)], lineterminator="\n")
        writer.writeheader()
        ordered = sorted(rows, key=lambda row: (row.kind, row.architecture, row.implementation, row.case))
        writer.writerows(map(as_dict, ordered))


def merged(files: Iterable[Path]) -> list[Row]:
    """The rows of several files; of a job that is in many, those of the last."""
    by_job: dict[Job, list[Row]] = {}
    for path in files:
        own: dict[Job, list[Row]] = {}
        for row in read(path):
            own.setdefault(_job(row), []).append(row)
        by_job |= own
    return [row for rows in by_job.values() for row in rows]


def _job(row: Row) -> Job:
    return row.kind, row.architecture, row.implementation


def _shard(text: str) -> tuple[int, int]:
    number, _, count = text.partition("/")
    if not (number.isdigit() and count.isdigit() and 1 <= int(number) <= int(count)):
        raise argparse.ArgumentTypeError(f"expected a shard such as 1/4, got {text}")
    return int(number), int(count)


def main() -> None:
    """Run the zoo and write its file and its page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, default=DOCS / "zoo.csv", help="where the rows go; the page lies beside it")
    parser.add_argument("--only", default="", help="names of architectures, with commas between them")
    parser.add_argument("--implementation", default="", help="attention implementations, with commas between them")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--plain", action="store_true", help="the case without a mask only")
    parser.add_argument("--shard", type=_shard, default=(1, 1), help="i/n: each n-th job, from the i-th on")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no job after this time")
    parser.add_argument("--resume", action="store_true", help="keep the rows of the file and skip their jobs")
    parser.add_argument(
        "--merge", type=Path, nargs="+", metavar="CSV", help="write one file from these and run nothing"
    )
    options = parser.parse_args()
    if options.merge:
        rows, todo = merged(options.merge), []
    else:
        rows, todo = _run(options)
    write(options.csv, rows)
    write_page(options.csv.with_suffix(".md"), rows, not_started=len(todo))
    if options.csv.resolve() == models_page.CSV:
        models_page.write()


def _run(options: argparse.Namespace) -> tuple[list[Row], list[Job]]:
    """All rows, and the jobs that a time limit cut off."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a forked job cannot use CUDA, and must not ask for its state
    number, count = options.shard
    rows = read(options.csv) if options.resume and options.csv.exists() else []
    done = set(map(_job, rows))
    chosen = jobs(filter(None, options.only.split(",")))
    if options.implementation:
        chosen = [job for job in chosen if job[2] in options.implementation.split(",")]
    todo = [job for job in chosen[number - 1 :: count] if job not in done]
    end = time.monotonic() + 60 * options.minutes
    started = itertools.takewhile(lambda _: time.monotonic() < end, todo)
    write(options.csv, rows)
    with options.csv.open("a", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in dataclasses.fields(Row)], lineterminator="\n")
        for own in run_all(started, options.workers, plain=options.plain):
            rows += own
            writer.writerows(map(as_dict, own))
            file.flush()
            for row in own:
                print(f"{row.status:12} {row.architecture} {row.implementation} {row.case} {row.note}", flush=True)
    done = set(map(_job, rows))
    return rows, [job for job in todo if job not in done]


if __name__ == "__main__":
    main()
