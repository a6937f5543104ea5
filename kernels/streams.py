"""Slices of a call that run beside each other on a GPU: every second one on a stream of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import cache

import torch

STREAMS = 2
"""Slices under way at a time on a GPU: one on the current stream, one on another."""


in_turn: ContextVar[Callable[[int], AbstractContextManager[object]] | None] = ContextVar("in_turn", default=None)
"""What a slice's turn is where its launches are written down (``prepared.py``); None where they are made."""


@cache
def _stream_of(device: torch.device, _thread: int) -> torch.cuda.Stream:
    """The other stream of a thread: another thread's may be capturing a CUDA graph."""
    return torch.cuda.Stream(device)


@cache
def _event_of(device: torch.device, thread: int) -> torch.cuda.Event:
    """What a thread orders its two streams by; an event exists from its first record on."""
    event = torch.cuda.Event()
    event.record(_stream_of(device, thread))
    return event


def _is_alone(device: torch.device, pieces: int) -> bool:
    return device.type != "cuda" or pieces < STREAMS or torch.cuda.is_current_stream_capturing()


def numbers_of_other(device: torch.device, pieces: int) -> tuple[int, int]:
    """The stream that every second piece goes to, and an event, as CUDA's driver knows them; 0 where there is none."""
    if _is_alone(device, pieces):
        return 0, 0
    thread = threading.get_ident()
    return _stream_of(device, thread).cuda_stream, _event_of(device, thread).cuda_event


@contextmanager
def other_stream(device: torch.device, pieces: int) -> Iterator[torch.cuda.Stream | None]:
    """A block in which every second piece may go to this stream; None if all go to the current one.

    The stream starts behind all work of the current one. At the end the current one waits for it, whatever happens
    inside; the host does not wait. One piece, and a CPU, need no other stream. A CUDA graph is captured on one.
    """
    if _is_alone(device, pieces):
        yield None
        return
    current, other = torch.cuda.current_stream(device), _stream_of(device, threading.get_ident())
    other.wait_stream(current)
    try:
        yield other
    finally:
        current.wait_stream(other)


class Turns:
    """Turns of the current stream and of another; without another, everything goes to the current one."""

    def __init__(self, device: torch.device, other: torch.cuda.Stream | None = None) -> None:
        self._device, self._other = device, other

    def __call__(self, number: int) -> AbstractContextManager[object]:
        """A block whose kernels go to the stream whose turn it is."""
        held = in_turn.get()
        if held is not None:
            return held(number)
        beside = self._other is not None and number % STREAMS > 0
        return torch.cuda.stream(self._other) if beside else nullcontext()

    def join(self) -> None:
        """Let the current stream wait for all that was given to the other so far; that one does not wait."""
        if self._other is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._other)


@contextmanager
def side_by_side(device: torch.device, pieces: int) -> Iterator[Turns]:
    """A block in which ``turn(number)`` is a block whose kernels go to the stream whose turn it is."""
    with other_stream(device, pieces) as other:
        yield Turns(device, other)
