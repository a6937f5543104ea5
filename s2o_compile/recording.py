"""Records compilations and calls: the source of every report, and the account of an optimized model."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from s2o_compile.config import S2OConfig
from s2o_compile.errors import NothingRewrittenWarning
from s2o_compile.kernels.core.plan import TILE_LEN
from s2o_compile.kernels.core.tuned import shortest_sparse
from s2o_compile.kernels.statistics import Call, ModelCall, record_calls
from s2o_compile.kernels.support.derivatives import in_forward_mode
from s2o_compile.kernels.support.errors import warn
from s2o_compile.kernels.support.scopes import Scopes
from s2o_compile.kernels.support.torch_compat import dtype_of, in_dispatch_mode, interpreter_stack
from s2o_compile.kernels.support.torch_compile import compile_seconds, graph_breaks, never_captured, skip_frame
from s2o_compile.passes.site import SiteRecord
from s2o_compile.report import Report, Status, called_elsewhere, join_calls


@dataclass
class Recording:
    """Everything that the backend compiled and the operator ran inside a ``with record()`` block.

    ``compile_seconds`` is known after the block. ``step_seconds`` holds the time of every pass by its name. ``marked``
    holds the site names that the configuration speaks of, in their order. ``account`` counts the calls of optimized
    models.
    """

    graphs: list[tuple[SiteRecord, ...]] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    step_seconds: dict[str, float] = field(default_factory=dict)
    compile_seconds: float = 0.0
    graph_breaks: tuple[str, ...] = ()
    marked: dict[str, None] = field(default_factory=dict)
    account: Account = field(default_factory=lambda: Account())

    @property
    def status(self) -> Status:
        """The calls of optimized models inside the block, and the graphs that were compiled for them."""
        return self.account.status

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
            called=called_elsewhere(records, self.calls),
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


SPARSE = frozenset(("s2o", "window"))
"""Paths of the operator that leave keys out: unimportant ones, or those outside a window."""

_TRANSFORMED = (
    " (torch compiles nothing inside transforms of torch.func such as vmap or grad, in a dual_level, or under a "
    "dispatch mode such as a FLOP counter: call the model outside, with a batch dimension for vmap)"
)
_GAVE_UP = (
    " (torch compiled it before, and compiles a function a limited number of times: raise "
    "torch.compiler.config.recompile_limit and optimize anew, write optimize(model, dynamic=True), pad inputs to a "
    "few lengths, or end a torch.compiler.set_stance)"
)


class Account:
    """What happened in the calls of one optimized model; it warns once a class of long calls in which none ran sparse.

    Nothing is read from a tensor. Several threads may call the model. A copy of the model has an account of its own.
    """

    def __init__(self, config: S2OConfig | None = None) -> None:
        self._config = config or S2OConfig()
        self._lock = threading.Lock()
        self._warned: set[type] = set()  # classes of modules: an image tower's warning must not hide the model's
        self._sparse: set[str] = set()  # paths of modules whose calls have run sparse
        self._found: set[str] = set()  # paths of modules in whose calls a graph with attention was compiled
        self._graphs: list[tuple[str, tuple[SiteRecord, ...]]] = []
        self._calls = 0
        self._paths: Counter[str] = Counter()
        self._never: Counter[str] = Counter()
        self._python = 0  # calls in which no graph ran
        self._uncompiled: dict[tuple[str, str], None] = {}  # path of the call, path of the module
        self._breaks: dict[tuple[str, str], None] = {}  # path of the call, reason

    def __reduce__(self) -> tuple[object, ...]:
        return Account, (self._config,)

    @property
    def config(self) -> S2OConfig:
        """The configuration of the model."""
        return self._config

    @property
    def status(self) -> Status:
        """The account so far."""
        with self._lock:
            records = [record for _, graph in self._graphs for record in graph]
            return Status(
                calls=self._calls,
                graphs=len(self._graphs),
                rewritten=sum(record.rewritten for record in records),
                left_dense=dict(Counter(record.reason for record in records if not record.rewritten)),
                paths=dict(self._paths),
                never=dict(self._never),
                graph_breaks=_distinct(self._breaks),
                uncompiled=_distinct(self._uncompiled),
                uncompiled_calls=self._python,
            )

    @contextmanager
    def compiling(self, path: str) -> Iterator[None]:
        """A block that compiles one graph, captured in a call of the module at a path."""
        recording = Recording(account=self)
        with _open.holding(recording):
            yield
        for account in {id(held.account): held.account for held in (recording, *_open.held())}.values():
            with account._lock:
                account._graphs += [(path, records) for records in recording.graphs]
                if any(record.certain for records in recording.graphs for record in records):
                    account._found.add(path)

    @skip_frame
    def add(self, call: ModelCall, args: Sequence[object], kwargs: Mapping[str, object]) -> None:
        """A call that has ended, and its inputs; see ``capture.entry``."""
        self.count(call)
        if _open:
            for recording in _open.held():
                recording.account.count(call)
        if type(call.module) in self._warned or (call.path in self._sparse and (call.paths or not _in_no_graph(call))):
            return
        if not SPARSE.isdisjoint(call.paths):
            self._sparse.add(call.path)
            return
        if reason := self._why_dense(call, args, kwargs):
            self._warned.add(type(call.module))
            called = f"{call.path}, a part of an optimized model," if call.path else "an optimized model"
            warn(
                f"{called} was called, and no attention ran sparse: {reason}. s2o_compile.explain(model, "
                "*inputs) lists every attention that runs, s2o_compile.status(model) what happened so far. "
                "docs/troubleshooting.md says what to do.",
                NothingRewrittenWarning,
            )

    def count(self, call: ModelCall) -> None:
        """Count a call that has ended in this account alone."""
        with self._lock:
            self._calls += 1
            self._paths.update(call.paths)
            self._never.update(call.never)
            self._uncompiled |= {(call.path, module): None for module in _in_no_graph(call)}
            self._python += bool(call.called and not call.compiled)
            self._breaks |= {(call.path, reason.partition("\n")[0]): None for reason in call.breaks}

    @skip_frame
    def _why_dense(self, call: ModelCall, args: Sequence[object], kwargs: Mapping[str, object]) -> str:
        """Why a call without sparse attention should have had some; empty if there is nothing to say."""
        path, found = call.path, call.path in self._found
        if "masked" in call.paths:
            others = ", and other attentions were short or marked dense" if "dense" in call.paths else ""
            return f"the masks that were read are no causal, sliding or padding masks{others}"
        if call.never:
            return next(iter(call.never))
        modules = _in_no_graph(call)
        if found and not modules:  # it is short, or was marked dense; `rewrite` warns of what it leaves dense
            return ""
        breaks = [reason for at, reason in self._breaks if at == path]
        if not modules and (found or not breaks):
            # Nothing is left to be found: said of the model as a whole, not of a part that needs no attention.
            return "" if path or found else f"none was found in {self._graphs_at(path)}"
        device, tokens = _longest(args, kwargs)
        if tokens < max(TILE_LEN, shortest_sparse(self._config.min_seq_len, device, dtype_of(call.module))):
            return ""
        reasons = [f"torch broke the graph ({reason})" for reason in breaks[:3]]
        if modules:
            names = ", ".join(name or "the model itself" for name in modules[:5])
            inside = interpreter_stack() or in_dispatch_mode() or in_forward_mode()
            remedy = _TRANSFORMED if inside else _GAVE_UP if found and path in modules else ""
            reasons.append(f"these ran uncompiled: {names}{', ...' if len(modules) > 5 else ''}{remedy}")
        return ("" if found else f"none was found in {self._graphs_at(path)}; ") + "; ".join(reasons)

    def _graphs_at(self, path: str) -> str:
        number = sum(at == path for at, _ in self._graphs)
        return f"{number} captured graph{'' if number == 1 else 's'}"


@skip_frame
def _in_no_graph(call: ModelCall) -> list[str]:
    """Modules that Python called in a call, and in and below which no graph ran: it ran them, too.

    Without generators: none can be captured, where the code around the model is compiled with ``fullgraph``.
    """
    found = []
    for module in dict.fromkeys(call.called):
        for frame in call.compiled:
            if frame == module or not module or frame.startswith(f"{module}."):
                break
        else:
            found.append(module)
    return found


def _distinct(seen: Iterable[tuple[str, str]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(x for _, x in seen))


@never_captured
def _longest(args: Sequence[object], kwargs: Mapping[str, object]) -> tuple[torch.device, int]:
    """The device and the number of tokens of the longest input, by its shape; masks span caches and say nothing."""
    named = (value for name, value in kwargs.items() if "mask" not in name)
    inputs = [value for value in (*args, *named) if isinstance(value, Tensor)]
    return max(((x.device, _tokens(x)) for x in inputs), key=lambda pair: pair[1], default=(torch.device("cpu"), 0))


def _tokens(x: Tensor) -> int:
    """The tokens of ids [B, N], of states [B, N, D], [N, B, D] or [N, D], and of images [B, C, H, W]."""
    if not x.is_floating_point():
        return x.shape[-1] if x.ndim else 0
    return max(x.shape[:-1], default=0) if x.ndim < 4 else x.shape[2:].numel()
