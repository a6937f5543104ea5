"""Streams for the slices of one call: the last, longest tiles of one slice run beside the next slice."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch

STREAMS = 2


@cache
def _streams_of(device: torch.device) -> tuple[torch.cuda.Stream, ...]:
    return tuple(torch.cuda.Stream(device) for _ in range(STREAMS))


def fork(device: torch.device, count: int) -> Sequence[torch.cuda.Stream]:
    """Streams for ``count`` pieces of work, behind all that the current one has to do; none for one piece, or a CPU."""
    if device.type != "cuda" or count < 2:
        return ()
    streams = _streams_of(device)
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream(device))
    return streams


def turn(streams: Sequence[torch.cuda.Stream], number: int) -> AbstractContextManager[object]:
    """A block whose kernels go to the stream whose turn it is."""
    return torch.cuda.stream(streams[number % len(streams)]) if streams else nullcontext()


def join(streams: Sequence[torch.cuda.Stream]) -> None:
    """Let the current stream wait for all of them; the host does not wait."""
    for stream in streams:
        torch.cuda.current_stream(stream.device).wait_stream(stream)
