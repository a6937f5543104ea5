"""Every architecture that can be built tiny, through the pass at tau=0: what ran, what was found, how far it is off.

    python -m benchmarks.zoo                              # all of it: docs/zoo.csv and docs/zoo.md
    python -m benchmarks.zoo --only llama,bert --csv some.csv

Each job is one architecture with one attention implementation, in a process of its own with a time limit, so that a
crash or a hang costs that job only. Rows are written as they come; ``--resume`` skips jobs that the file already has.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import itertools
import multiprocessing
import time
import warnings
from collections.abc import Iterable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path

import torch
import transformers
from torch import nn

from benchmarks import zoo_elsewhere, zoo_transformers
from benchmarks.zoo_measure import Row, as_dict, describe, measure
from benchmarks.zoo_page import write_page

DOCS = Path(__file__).parent.parent / "docs"
TIME_LIMIT = 240
ELSEWHERE = "elsewhere"
KINDS = ("causal LM", "encoder", "encoder-decoder", "vision", "speech", "vision-language", "other")
Job = tuple[str, str, str]  # kind, architecture, implementation


def jobs(only: Iterable[str] = ()) -> list[Job]:
    """Models from elsewhere, then SDPA of all architectures by kind, then the other implementations."""
    wanted = set(only)
    found: list[Job] = [(ELSEWHERE, name, "") for name in zoo_elsewhere.MODELS]
    by_kind = sorted(zoo_transformers.architectures().items(), key=lambda item: KINDS.index(item[1][0]))
    for implementation in zoo_transformers.IMPLEMENTATIONS:
        for name, (kind, _) in by_kind:
            if zoo_transformers.supports(name, implementation):
                found.append((kind, name, implementation))
    return [job for job in found if not wanted or job[1] in wanted]


def run_job(job: Job) -> Iterator[Row]:
    """The rows of one job, in this process."""
    kind, name, implementation = job
    row = Row(kind=kind, architecture=name, implementation=implementation)
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


def run_all(todo: Iterable[Job], workers: int, limit: float = TIME_LIMIT, *, plain: bool = False) -> Iterator[Row]:
    """The rows of all jobs, as they come; a job that dies or takes too long yields a row that says so."""
    context = multiprocessing.get_context("fork")  # transformers and Dynamo are imported once
    torch.compile(nn.Linear(1, 1), backend="eager")(torch.ones(1, 1))
    torch._dynamo.reset()
    waiting, running = iter(todo), {}
    while True:
        for job in itertools.islice(waiting, workers - len(running)):
            receive, send = context.Pipe(duplex=False)
            process = context.Process(target=_work, args=(job, send, plain))
            process.start()
            send.close()
            running[receive] = (job, process, time.monotonic() + limit)
        if not running:
            return
        for receive in wait(list(running), timeout=1.0):
            try:
                yield receive.recv()  # pyright: ignore[reportAttributeAccessIssue]
            except EOFError:
                job, process, _ = running.pop(receive)
                process.join()
                if process.exitcode:
                    yield _failed(job, f"the process ended with exit code {process.exitcode}")
        for receive, (job, process, deadline) in list(running.items()):
            if time.monotonic() > deadline:
                process.kill()
                process.join()
                del running[receive]
                yield _failed(job, f"stopped after {limit:.0f} seconds")


def _failed(job: Job, note: str) -> Row:
    return Row(*job[:2], implementation=job[2], status="error", note=note)


def read(path: Path) -> list[Row]:
    """The rows of a CSV file."""
    kinds = {field.name: str(field.type) for field in dataclasses.fields(Row)}
    parse = {"int": int, "float": float, "str": str, "float | None": lambda text: float(text) if text else None}
    with path.open(newline="") as file:
        return [Row(**{name: parse[kinds[name]](text) for name, text in line.items()}) for line in csv.DictReader(file)]


def main() -> None:
    """Run the zoo and write its file and its page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, default=DOCS / "zoo.csv", help="where the rows go; the page lies beside it")
    parser.add_argument("--only", default="", help="names of architectures, with commas between them")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--plain", action="store_true", help="the case without a mask only")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no job after this time")
    parser.add_argument("--resume", action="store_true", help="keep the rows of the file and skip their jobs")
    options = parser.parse_args()
    todo = jobs(filter(None, options.only.split(",")))
    rows = read(options.csv) if options.resume and options.csv.exists() else []
    done = {(row.kind, row.architecture, row.implementation) for row in rows}
    todo = [job for job in todo if job not in done]
    options.csv.parent.mkdir(parents=True, exist_ok=True)
    with options.csv.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in dataclasses.fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(map(as_dict, rows))
        end = time.monotonic() + 60 * options.minutes
        started = itertools.takewhile(lambda _: time.monotonic() < end, todo)
        for row in run_all(started, options.workers, plain=options.plain):
            rows.append(row)
            writer.writerow(as_dict(row))
            file.flush()
            print(f"{row.status:12} {row.architecture} {row.implementation} {row.case} {row.note}", flush=True)
    rows.sort(key=lambda row: (row.kind, row.architecture, row.implementation, row.case))
    with options.csv.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in dataclasses.fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(map(as_dict, rows))
    seen = {(row.kind, row.architecture, row.implementation) for row in rows}
    write_page(options.csv.with_suffix(".md"), rows, not_started=sum(job not in seen for job in todo))


if __name__ == "__main__":
    main()
