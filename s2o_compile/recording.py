"""Records compilations and calls: the source of every report."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from s2o_compile.kernels.statistics import Call, record_calls
from s2o_compile.kernels.support.scopes import Scopes
from s2o_compile.kernels.support.torch_compile import compile_seconds, graph_breaks
from s2o_compile.passes.site import SiteRecord
from s2o_compile.report import Report, join_calls


@dataclass
class Recording:
    """Everything that the backend compiled and the operator ran inside a ``with record()`` block.

    ``compile_seconds`` is known after the block. ``step_seconds`` holds the time of every pass by its name. ``marked``
    holds the site names that the configuration speaks of, in their order.
    """

    graphs: list[tuple[SiteRecord, ...]] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    step_seconds: dict[str, float] = field(default_factory=dict)
    compile_seconds: float = 0.0
    graph_breaks: tuple[str, ...] = ()
    marked: dict[str, None] = field(default_factory=dict)

    @property
    def pass_seconds(self) -> float:
        """Time of all passes over all graphs."""
        return sum(self.step_seconds.values())

    @property
    def report(self) -> Report:
        """The sites compiled so far with the densities measured so far. Waits for the device."""
        records = [record for graph in self.graphs for record in graph]
        return Report(
            sites=join_calls(records, self.calls),
            graphs=len(self.graphs),
            graph_breaks=self.graph_breaks,
            pass_seconds=self.pass_seconds,
            compile_seconds=self.compile_seconds or None,
            unknown_sites=tuple(name for name in self.marked if all(name != record.name for record in records)),
        )


_open: Scopes[Recording] = Scopes("s2o_open_recordings")


@contextmanager
def record() -> Iterator[Recording]:
    """Record compilations and calls of this thread or asyncio task, for a report of a real run.

    Code compiled before the block is not compiled again, so its sites are not listed: open the block before the first
    call of an optimized model. Other threads are not recorded, even those started inside the block, unless they run in
    a copy of its context: ``executor.submit(contextvars.copy_context().run, model, x)``. ``graph_breaks`` and
    ``compile_seconds`` are Dynamo's counts of the whole process.
    """
    recording = Recording()
    before, seconds = graph_breaks(), compile_seconds()
    try:
        with _open.holding(recording), record_calls() as calls:
            recording.calls = calls
            yield recording
    finally:
        recording.compile_seconds = compile_seconds() - seconds
        after = graph_breaks().items()
        recording.graph_breaks = tuple(reason for reason, count in after if count > before.get(reason, 0))


def notify(records: Sequence[SiteRecord], step_seconds: Mapping[str, float], marked: Iterable[str]) -> None:
    """Tell this thread's recordings about a graph that was compiled, and of which sites the configuration speaks."""
    for recording in _open.held():
        recording.graphs.append(tuple(records))
        for step, seconds in step_seconds.items():
            recording.step_seconds[step] = recording.step_seconds.get(step, 0.0) + seconds
        recording.marked |= dict.fromkeys(marked)
