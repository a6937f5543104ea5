"""What ran sparse in a server: calls, and of a sample of them the density and the measured error."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch

from s2o_compile.kernels.statistics import Call, ModelCall, record_calls, running

SAMPLED = 8
"""One call in so many of each layer is measured. An error costs 64 exact queries a head, 1 % of a call at 8K."""

INTERVAL = 10.0
"""Seconds between two lines in the log, as long as vLLM's own."""


class Counters:
    """Counts sparse calls, and says so in a log; one for each process, which serves one call at a time.

    Reading a density waits for the device: that happens once in `INTERVAL` seconds.
    """

    def __init__(self, say: Callable[[str], None], now: Callable[[], float] = time.monotonic) -> None:
        self._say, self._now = say, now
        self._said_at: float | None = None
        self._calls_of: dict[int, int] = {}
        self._calls = self._queries = self._others = 0
        self._sampled: list[Call] = []

    @contextmanager
    def counting(self, layer: int, n_queries: int, others: int) -> Iterator[None]:
        """Count the call of a layer around the block, if it runs sparse; layers are measured in turn.

        It does not where all heads of the layer are marked dense.

        Args:
            layer: Number of the layer in the model.
            n_queries: Queries that are to run sparse.
            others: Queries of the same pass that run densely.
        """
        turn = self._calls_of[layer] = self._calls_of.get(layer, -1) + 1
        unmeasured = (turn + layer) % SAMPLED or _capturing()
        outer, running.call = running.call, (ran := ModelCall())
        try:
            with nullcontext(()) if unmeasured else record_calls() as calls:
                yield
        finally:
            running.call = outer
        if "s2o" in ran.paths:
            self._calls += 1
            self._queries += n_queries
            self._others += others
            self._sampled += calls

    def flush(self) -> None:
        """Say what was counted since the last line, if that is long enough ago; the first line comes at once."""
        now = self._now()
        if not self._calls or (self._said_at is not None and now - self._said_at < INTERVAL) or _capturing():
            return
        self._say(self._line())
        self._said_at = now
        self._calls = self._queries = self._others = 0
        self._sampled = []

    def _line(self) -> str:
        line = f"S2O: {self._calls} sparse calls, one a layer, of {self._queries / self._calls:.0f} queries"
        if self._others:
            line += f" beside {self._others / self._calls:.0f} dense ones"
        sparse = [call for call in self._sampled if call.path == "s2o"]
        if sparse:
            densities = [call.density for call in sparse]
            errors = [call.error for call in sparse if call.error is not None]
            line += f"; of {len(sparse)} measured calls: density {sum(densities) / len(sparse):.3f}"
            if errors:
                line += f", error {sum(errors) / len(errors):.4f} (largest {max(errors):.4f})"
        return line


def _capturing() -> bool:
    """Whether a CUDA graph is being captured, which must neither wait nor read."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
