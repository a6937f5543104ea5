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


@contextmanager
def other_stream(device: torch.device, pieces: int) -> Iterator[torch.cuda.Stream | None]:
    """A block in which every second piece may go to this stream; None if all go to the current one.

    The stream starts behind all work of the current one. At the end the current one waits for it, whatever happens
    inside; the host does not wait. One piece, and a CPU, need no other stream. A CUDA graph is captured on one.
    """
    if device.type != "cuda" or pieces < STREAMS or torch.cuda.is_current_stream_capturing():
        yield None
        return
    current, other = torch.cuda.current_stream(device), _stream_of(device, threading.get_ident())
    other.wait_stream(current)
    try:
        yield other
    finally:
        current.wait_stream(other)


@contextmanager
def side_by_side(device: torch.device, pieces: int) -> Iterator[Callable[[int], AbstractContextManager[object]]]:
    """A block in which ``turn(number)`` is a block whose kernels go to the stream whose turn it is."""
    held = in_turn.get()
    if held is not None:
        yield held
        return
    with other_stream(device, pieces) as other:
        yield lambda number: nullcontext() if other is None or number % STREAMS == 0 else torch.cuda.stream(other)
