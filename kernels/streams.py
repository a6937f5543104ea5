"""Streams for the slices of one call: the last, longest tiles of one slice run beside the next slice."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache

import torch

STREAMS = 2


@cache
def _streams_of(device: torch.device, _thread: int) -> tuple[torch.cuda.Stream, ...]:
    """A thread's own: another thread's may be capturing a CUDA graph."""
    return tuple(torch.cuda.Stream(device) for _ in range(STREAMS))


@contextmanager
def side_by_side(device: torch.device, pieces: int) -> Iterator[Callable[[int], AbstractContextManager[object]]]:
    """A block in which ``turn(number)`` is a block whose kernels go to the stream whose turn it is.

    The streams start behind all that the current one has to do, and at the end, whatever happens inside, the current
    one waits for them; the host does not wait. One piece, and a CPU, need no other stream; a CUDA graph is captured on
    one.
    """
    if device.type != "cuda" or pieces < 2 or torch.cuda.is_current_stream_capturing():
        yield lambda _: nullcontext()
        return
    current, streams = torch.cuda.current_stream(device), _streams_of(device, threading.get_ident())
    for stream in streams:
        stream.wait_stream(current)
    try:
        yield lambda number: torch.cuda.stream(streams[number % STREAMS])
    finally:
        for stream in streams:
            current.wait_stream(stream)
