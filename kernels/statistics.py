"""Records of the operator's calls for reports: the path that each took, its density, and the model's call around it."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from types import MappingProxyType

from torch import Tensor, nn

from s2o_compile.kernels.core.call import AttentionCall
from s2o_compile.kernels.core.mask import UNKNOWN_MASK
from s2o_compile.kernels.core.plan import TILE_LEN
from s2o_compile.kernels.exact.sampled import relative_error
from s2o_compile.kernels.support.scopes import Scopes


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call of the operator.

    Attributes:
        site: Module path of the attention, "" for eager calls.
        path: "s2o", "window", "dense", or "masked": dense under a mask that was read and is none of the operator's.
        n_queries: Number of queries.
        n_keys: Number of keys.
        computed: int32 [B, Hq, tiles], keys each tile computed, on the device; None where nothing was skipped.
        area: Query-key pairs a dense kernel computes per head, float64 [B].
        mask: The mask as text; empty where it is not known.
        error_sums: float32 [2, B, Hq] of ``exact.sampled.error_sums``, on the device; None if it was not measured.
        unheld_error: The ceiling that the call was given, if its executor measures nothing; None where it was held.
        tile_rows: Queries of each tile, where they are not those of one run of queries; None where they are.
        never: Why a long call was dense, if dense attention is faster at any length (``tuned.why_never``), or if its
            scale ranks nothing; else empty.
    """

    site: str
    path: str
    n_queries: int
    n_keys: int
    computed: Tensor | None
    area: Tensor
    mask: str = ""
    error_sums: Tensor | None = None
    unheld_error: float | None = None
    tile_rows: Sequence[int] | None = None
    never: str = ""

    @property
    def error(self) -> float | None:
        """Relative L2 error of the output on sampled queries, None if it was not measured. Waits for the device."""
        return None if self.error_sums is None else relative_error(*self.error_sums.sum((1, 2))).item()

    @property
    def density(self) -> float:
        """Computed pairs over the pairs a dense kernel computes, all passes counted. Waits for the device."""
        if self.computed is None:
            return 1.0
        pairs = pairs_by_head(self.computed, self.n_queries, self.tile_rows).mean(-1).sum().item()
        return pairs / max(self.area.sum().item(), 1.0)

    @property
    def pairs(self) -> float:
        """Computed query-key pairs, mean over heads. Waits for the device."""
        return self.density * self.area.sum().item()


def pairs_by_head(computed: Tensor, n_queries: int, tile_rows: Sequence[int] | None = None) -> Tensor:
    """Query-key pairs float64 [B, Hq] from the keys that each tile computed, int32 [B, Hq, tiles]."""
    tile_rows = tile_rows or [min(TILE_LEN, n_queries - first) for first in range(0, n_queries, TILE_LEN)]
    return (computed.double() * computed.new_tensor(tile_rows).double()).sum(-1)


class ModelCall:
    """A call that came into an optimized model from outside.

    Attributes:
        path: The name of the module that it entered, empty for the model itself.
        module: That module; None in a graph of somebody else's.
        frame: The innermost module that Python called in it.
        paths: How often the operator took which of its paths.
        never: How often it was dense because no length is faster sparse, by reason.
        called: Names of modules that Python called, itself the first.
        compiled: Names of modules in whose frames a graph ran.
        breaks: Reasons of the graph breaks in it, if it was the first one.
        options: What holds Dynamo's options from the first graph to the end of a call that compiles; None in others.
    """

    path: str
    module: nn.Module | None = None
    frame: nn.Module | None = None
    paths: Mapping[str, int] = MappingProxyType({})
    never: Mapping[str, int] = MappingProxyType({})
    called: Sequence[str] = ()
    compiled: frozenset[str] = frozenset()
    breaks: Sequence[str] = ()
    options: AbstractContextManager[None] | None = None


class _Running(threading.local):
    call: ModelCall | None = None


running = _Running()
"""The call of an optimized model that this thread is in."""


def count(path: str, never: str = "") -> None:
    """Count a call of the operator in that of the model around it, if this thread is in one; ``never`` as of `Call`."""
    call = running.call
    if call is not None:
        call.paths = {**call.paths, path: call.paths.get(path, 0) + 1}
        if never:
            call.never = {**call.never, never: call.never.get(never, 0) + 1}


_recordings: Scopes[list[Call]] = Scopes("s2o_recordings")


@contextmanager
def record_calls() -> Iterator[list[Call]]:
    """Collect every call of the operator that this thread or asyncio task makes inside the ``with`` block.

    A thread that is started inside the block has a context of its own, and its calls are not collected, unless it runs
    in a copy of this one: ``executor.submit(contextvars.copy_context().run, model, x)``, or ``asyncio.to_thread``. The
    replicas of ``nn.DataParallel`` are such threads. Calls that a backward repeats for a checkpoint count again on a
    CPU, where autograd makes them in the caller's thread; a GPU has a thread of autograd's own.
    """
    calls: list[Call] = []
    with _recordings.holding(calls):
        yield calls


def recording() -> bool:
    """Whether anybody wants to know about the calls of this thread."""
    return bool(_recordings)


def record(
    call: AttentionCall, path: str, computed: Tensor | None = None, error_sums: Tensor | None = None, *,
    area: Tensor | None = None, tile_rows: Sequence[int] | None = None, n_keys: int | None = None,
    unheld_error: float | None = None, never: str = "",
) -> None:  # fmt: skip
    """Count a call, and tell this thread's recordings about it as `Call` describes it; costs nothing without any.

    The path is "masked" if the call's own mask is not the one that it ran under. ``area``, ``tile_rows`` and ``n_keys``
    are given for queries that are a shard, not one run; the mask is then that of the whole sequence. ``never`` is as of
    `Call`.
    """
    count(path, never)
    if not _recordings:
        return
    n_queries, of_shard = call.n_queries, n_keys is not None
    n_keys = n_keys if n_keys is not None else call.n_keys
    area = call.mask.area(call.query.shape[0], n_queries, n_keys) if area is None else area
    text = "" if call.mask is UNKNOWN_MASK else call.mask.text(n_keys if of_shard else n_queries, n_keys)
    recorded = Call(
        site=call.site, path=path, n_queries=n_queries, n_keys=n_keys, computed=computed, area=area, mask=text,
        error_sums=error_sums, tile_rows=tile_rows, unheld_error=unheld_error, never=never,
    )  # fmt: skip
    for calls in _recordings.held():
        calls.append(recorded)
