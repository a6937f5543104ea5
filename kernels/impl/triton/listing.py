"""A call as a list of launches over a workspace: written down once, then made on other tensors.

The functions that launch kernels run on stand-ins without memory (device "meta"), and ``tile.launch`` writes each
launch down instead of making it. An argument is a number, or a place in one of the call's tensors, or in memory that
the functions asked for. All of that memory is one workspace: what is no longer read makes room for what comes later.

A launch that is made again looks at no argument: the kernel that was compiled for the first one runs. That is right for
tensors of the same shapes, strides, dtypes and device whose addresses have the same remainder modulo 16.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any, NamedTuple

import torch
from torch import Tensor

from s2o_compile.kernels.impl.triton import direct
from s2o_compile.kernels.support.torch_compat import TorchDispatchMode, returns_views, storages

ALIGNED = 256
"""Bytes that pieces of the workspace begin at multiples of; kernels are compiled for multiples of 16."""

TURNS = 2
"""Streams that slices of a call take turns on."""

MOST_TURNS = 64
"""Slices of a call that is written down, at most: more keep the card busy for longer than the host takes, and a list of
their launches takes memory."""

FACTORIES = ("aten::empty.", "aten::empty_strided", "aten::empty_like", "aten::new_empty", "aten::new_empty_strided")
"""Operators that ask for memory and leave it as it is."""


class UnlistableError(Exception):
    """A function did other work on the device than launches, which a list would leave out; or a list is too long."""


class Place(NamedTuple):
    """Where a tensor among the arguments of a launch begins.

    Attributes:
        argument: Its number among them.
        slot: Number of the tensor or of the piece of memory that it lies in; the call's tensors come first.
        offset: Bytes from there on.
    """

    argument: int
    slot: int
    offset: int


@dataclass
class Step:
    """One launch.

    Attributes:
        kernel: The kernel.
        grid: Its grid.
        arguments: All arguments in the order of the signature; None for tensors.
        places: The tensors among them.
        dtypes: Their dtypes.
        options: Options of the launch, as ``num_warps``.
        turn: Number of the slice of the call that it belongs to; None for what all slices need.
        compiled: The compiled kernel, once it is known.
        launch: What launches it.
        is_aside: Whether it was written down in `aside`.
        is_beside: Whether it may run on another stream: it belongs to one of every second slices, or `overlap` says so.
        waits: What the streams wait for ahead of it, as `direct.packed` takes it.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: list[object]
    places: list[Place]
    dtypes: list[torch.dtype]
    options: dict[str, object]
    turn: int | None
    compiled: Any = None
    launch: direct.Launcher | None = None
    is_aside: bool = False
    is_beside: bool = field(init=False)
    waits: int = 0

    def __post_init__(self) -> None:
        self.is_beside = self.turn is not None and self.turn % TURNS > 0


@dataclass
class Piece:
    """Memory that the functions asked for: its size in bytes, its slice, and the first and last launch that uses it."""

    size: int
    turn: int | None
    first: int = sys.maxsize
    last: int = -1


class _NothingElse(TorchDispatchMode):
    """Refuses whatever writes to memory: it would be lost with the stand-ins."""

    def __torch_dispatch__(self, operator: Any, types: object, args: Any = (), kwargs: Any = None) -> Any:
        """Run what only asks for memory, or looks at it in another shape."""
        if not str(operator.name()).startswith(FACTORIES) and not returns_views(operator):
            raise UnlistableError(str(operator))
        return operator(*args, **(kwargs or {}))


class Listing:
    """Takes launches down.

    Attributes:
        inputs: How many of the tensors, the first ones, no launch writes to.
        tensors: Stand-ins for the tensors of the call, in their order.
        device: The device that the launches are for.
        steps: The launches up to now.
        is_aside: Whether the next ones are written down in `aside`.
    """

    def __init__(self, tensors: Sequence[Tensor], inputs: int) -> None:
        self.device = tensors[0].device
        self.inputs = inputs
        self.tensors = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta") for x in tensors]
        self.steps: list[Step] = []
        self._slots = {_storage(x): number for number, x in enumerate(self.tensors)}
        self._pieces: dict[int, Piece] = {}
        self._alive: list[Tensor] = []  # no storage takes the number of another
        self._turn: int | None = None
        self.is_aside = False

    @contextmanager
    def turn(self, number: int) -> Iterator[None]:
        """A block whose launches belong to a slice of the call, behind those before all slices."""
        if number >= MOST_TURNS:
            raise UnlistableError(f"more than {MOST_TURNS} slices")
        self._turn = number
        try:
            yield
        finally:
            self._turn = None

    @contextmanager
    def writing(self) -> Iterator[None]:
        """A block in which launches are written down here.

        Raises:
            UnlistableError: Something else than launches was asked for, or too many of them.
        """
        held = listing.set(self)
        try:
            with _NothingElse():
                yield
        finally:
            listing.reset(held)

    def add(self, kernel: Any, grid: Iterable[int], args: Sequence[object], keywords: dict[str, object]) -> None:
        """Write down the launch ``kernel[grid](*args, **keywords)``."""
        names = kernel.arg_names
        arguments = [*args, *(keywords[name] for name in names[len(args) :])]
        places, dtypes = [], []
        for number, x in enumerate(arguments):
            if isinstance(x, Tensor):
                places.append(Place(number, self._slot(x), x.storage_offset() * x.element_size()))
                dtypes.append(x.dtype)
                arguments[number] = None
        options = {name: x for name, x in keywords.items() if name not in names}
        self.steps.append(
            Step(kernel, tuple(grid), arguments, places, dtypes, options, self._turn, is_aside=self.is_aside)
        )

    def _slot(self, x: Tensor) -> int:
        storage = _storage(x)
        if storage not in self._slots:
            self._slots[storage] = len(self._slots)
            self._alive.append(x)
            self._pieces[self._slots[storage]] = Piece(x.untyped_storage().nbytes(), self._turn)
        slot = self._slots[storage]
        if slot in self._pieces:
            piece = self._pieces[slot]
            if piece.turn != self._turn:
                piece.turn = None  # of all slices
        return slot

    def finish(self) -> Launches:
        """The launches that were written down, over one workspace."""
        turns = {step.turn for step in self.steps} - {None}
        alone = len(turns) < 2
        for part in (*self.steps, *self._pieces.values()) if alone else ():
            part.turn = None
        steps, window = overlap(self.steps, self.inputs)
        common = sum(step.turn is None for step in steps)
        if any(step.turn is not None for step in steps[:common]):
            raise UnlistableError("launches of all slices behind those of one")
        if not alone:
            steps[common].waits |= direct.FORK
        for number, step in enumerate(steps):
            is_aside = number in window and step.is_beside
            first, last = (window.start, window.stop - 1) if is_aside else (number, number)
            for piece in (self._pieces[place.slot] for place in step.places if place.slot in self._pieces):
                piece.first, piece.last = min(piece.first, first), max(piece.last, last)
        offsets, size = _lay_out(
            {slot: piece for slot, piece in self._pieces.items() if piece.turn is None},
            last=None if alone else common,
        )
        for nth in range(0 if alone else TURNS):  # slices of one stream run one behind the other
            begin, end = size, size
            for turn in sorted(turn for turn in turns if turn % TURNS == nth):
                own, length = _lay_out({slot: x for slot, x in self._pieces.items() if x.turn == turn})
                offsets |= {slot: begin + offset for slot, offset in own.items()}
                end = max(end, begin + length)
            size = end
        workspace = len(self.tensors)
        for step in steps:
            step.places = [
                Place(number, workspace, offset + offsets[slot]) if slot in offsets else Place(number, slot, offset)
                for number, slot, offset in step.places
            ]
        return Launches(steps[:common], steps[common:], size, len(turns))


listing: ContextVar[Listing | None] = ContextVar("listing", default=None)
"""What takes launches down at present."""


@contextmanager
def aside() -> Iterator[None]:
    """A block of launches that keep few programs busy for long: in a list, others that need none of them run beside."""
    held = listing.get()
    if held is None:
        yield
        return
    before, held.is_aside = held.is_aside, True
    try:
        yield
    finally:
        held.is_aside = before


def device_of(x: Tensor) -> torch.device:
    """The device that a launch on a tensor is for."""
    held = listing.get()
    return x.device if held is None else held.device


def overlap(steps: list[Step], inputs: int) -> tuple[list[Step], range]:
    """The steps in an order in which those aside run beside all common ones that have no memory in common with them.

    Steps depend on each other through memory alone, and nothing writes to the first ``inputs`` slots. So a step may run
    before others that use none of its memory. The range has the numbers of all that may be under way beside each other.
    """
    first = next((number for number, step in enumerate(steps) if step.is_aside), len(steps))
    moved = [*takewhile(lambda step: step.is_aside, steps[first:])]
    used = {place.slot for step in moved for place in step.places} - {*range(inputs)}
    free: list[Step] = []
    behind: list[Step] = []
    for step in steps[first + len(moved) :]:
        own = {place.slot for place in step.places} - {*range(inputs)}
        if step.turn is None and used.isdisjoint(own):
            free.append(step)
        else:
            behind.append(step)
            used |= own
    if not (moved and free and behind):
        return steps, range(0)
    for step in moved:
        step.is_beside = True
    moved[0].waits |= direct.FORK
    behind[0].waits |= direct.JOIN
    return [*steps[:first], *moved, *free, *behind], range(first, first + len(moved) + len(free))


def _storage(x: Tensor) -> int:
    (number,) = storages(x)
    if number is None:
        raise UnlistableError("storages that cannot be told apart")
    return number


def _lay_out(pieces: dict[int, Piece], last: int | None = None) -> tuple[dict[int, int], int]:
    """Offsets of pieces and the bytes of them all: two that are in use at the same time never overlap.

    A piece that is used from launch ``last`` on stays in use to the end. The largest are placed first, which leaves the
    least between them.
    """
    ends = {slot: sys.maxsize if last is not None and x.last >= last else x.last for slot, x in pieces.items()}
    offsets: dict[int, int] = {}
    size = 0
    for slot, piece in sorted(pieces.items(), key=lambda item: -item[1].size):
        beside = sorted(
            (offsets[other], offsets[other] + _rounded(pieces[other].size))
            for other in offsets
            if pieces[other].first <= ends[slot] and piece.first <= ends[other]
        )
        offset = 0
        for begin, end in beside:
            if begin - offset >= _rounded(piece.size):
                break
            offset = max(offset, end)
        offsets[slot] = offset
        size = max(size, offset + _rounded(piece.size))
    return offsets, size


def _rounded(size: int) -> int:
    return -(-size // ALIGNED) * ALIGNED


@dataclass
class Launches:
    """Launches that can be made on tensors like those that they were written down for.

    Attributes:
        common: Those that all slices need, in their order.
        slices: Those of the slices, in their order.
        size: Bytes of their workspace.
        turns: How many slices there are.
        streams: Streams that they go to when they are made at once.
        ready: Whether all kernels are compiled, and can be launched without triton's look at their arguments.
        replay: What makes all launches in one call, if that is known.
    """

    common: list[Step]
    slices: list[Step]
    size: int
    turns: int
    streams: int = field(init=False)
    ready: bool = field(default=False, init=False)
    replay: direct.Replay | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.streams = TURNS if any(step.is_beside for step in (*self.common, *self.slices)) else 1

    @property
    def count(self) -> int:
        """Number of launches."""
        return len(self.common) + len(self.slices)

    @property
    def at_once(self) -> direct.Replay | None:
        """What makes all launches in one call, if that is known and nobody wants to hear of each."""
        return None if self.replay is None or direct.hooked() else self.replay

    def workspace(self, device: torch.device, more: int = 0) -> Tensor:
        """Memory for one run, with more bytes behind it."""
        return torch.empty(self.size + more, dtype=torch.uint8, device=device)

    def make(
        self, steps: Sequence[Step], tensors: Sequence[Tensor], workspace: Tensor, other: torch.cuda.Stream | None
    ) -> None:
        """Make some of the launches one by one: every second slice's on another stream, if there is one."""
        if not self.ready or direct.hooked():
            self._make_first(steps, tensors, workspace, other)
            every = [*self.common, *self.slices]
            self.ready = all(step.launch is not None for step in every)
            if self.ready and self.replay is None:
                self.replay = direct.replay([_packed(step) for step in every], 1 + len(tensors))
            return
        bases = [x.data_ptr() for x in (*tensors, workspace)]
        stream = direct.current_stream(workspace.device.index)
        beside = stream if other is None else other.cuda_stream
        for step in steps:
            arguments = step.arguments.copy()
            for number, slot, offset in step.places:
                arguments[number] = bases[slot] + offset
            step.launch(beside if step.is_beside else stream, arguments)  # pyright: ignore[reportOptionalCall]

    def _make_first(
        self, steps: Sequence[Step], tensors: Sequence[Tensor], workspace: Tensor, other: torch.cuda.Stream | None
    ) -> None:
        """Make them by triton's own launch, which compiles, and keep the compiled kernels."""
        for step in steps:
            with nullcontext() if other is None or not step.is_beside else torch.cuda.stream(other):
                compiled = step.kernel[step.grid](*self.arguments(step, tensors, workspace), **step.options)
            if step.compiled is None:
                step.compiled, step.launch = compiled, direct.launcher(compiled, step.grid)

    @staticmethod
    def arguments(step: Step, tensors: Sequence[Tensor], workspace: Tensor) -> list[object]:
        """The arguments of a launch, with tensors that begin where its pointers point to."""
        arguments = step.arguments.copy()
        for (number, slot, offset), dtype in zip(step.places, step.dtypes, strict=True):
            if slot == len(tensors):
                arguments[number] = workspace[offset:].view(dtype)
            else:
                x = tensors[slot]
                arguments[number] = x.as_strided((1,), (1,), x.storage_offset() + offset // x.element_size())
        return arguments


def _packed(step: Step) -> bytes | None:
    """A launch as `direct.replay` takes it: base 0 is that of numbers."""
    places = {number: (1 + slot, offset) for number, slot, offset in step.places}
    ahead = {"is_beside": step.is_beside, "waits": step.waits}
    return direct.packed(step.compiled, step.grid, step.arguments, places, **ahead)
