"""Shards on their way to every rank: several tensors in one exchange, which runs beside other work.

On a GPU shards are packed, sent and laid out on a stream of their own. The host does not wait, and other streams wait
where they need the result.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from s2o_compile.kernels.sequence.layout import Layout
from s2o_compile.kernels.sequence.ranks import Ranks

ALIGNED = 16
"""Bytes that the numbers of each tensor begin at a multiple of, so that they are copied as what they are."""


class Shard(NamedTuple):
    """A rank's shard of a tensor.

    Attributes:
        x: [.., n, ..], any dtype.
        dim: The dimension of positions.
        layout: Which positions are whose.
    """

    x: Tensor
    dim: int
    layout: Layout


@cache
def _stream_of(device: torch.device, _thread: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(device, priority=-1)  # copies wait for few blocks, not for the rest of a grid


def start_gather(ranks: Ranks, shards: Sequence[Shard]) -> tuple[list[Tensor], Callable[[], None]]:
    """Begin to gather shards of one device: whole tensors [.., N, ..], uninitialised until the function has waited.

    Shards differ in length by rank, so each is padded to the longest on its way. On a GPU the current stream waits; the
    function may be called on several streams. Before the whole tensors are freed, the stream that is current now must
    have waited for all that reads them.
    """
    device = shards[0].x.device
    wholes = [x.new_empty(*x.shape[:dim], layout.length, *x.shape[dim + 1 :]) for x, dim, layout in shards]
    sources = [_as_integers(x, dim) for x, dim, _ in shards]
    shapes = [
        (*x.shape[:dim], max(layout.counts), *x.shape[dim + 1 :])
        for x, (_, dim, layout) in zip(sources, shards, strict=True)
    ]
    ends = [0]
    for x, shape in zip(sources, shapes, strict=True):
        ends.append(ends[-1] + -(-math.prod(shape) * x.element_size() // ALIGNED) * ALIGNED)

    def views(buffer: Tensor) -> list[Tensor]:
        return [
            buffer[start : start + math.prod(shape) * x.element_size()].view(x.dtype).view(shape)
            for x, shape, start in zip(sources, shapes, ends, strict=False)
        ]

    def lay_out(received: Tensor) -> None:
        by_rank = [views(row) for row in received]
        for number, (whole, (_, dim, layout)) in enumerate(zip(wholes, shards, strict=True)):
            pieces = [by_rank[rank][number].narrow(dim, at.start, at.stop - at.start) for rank, at in layout.in_order]
            torch.cat(pieces, dim, out=whole.view(pieces[0].dtype))

    side = _stream_of(device, threading.get_ident()) if device.type == "cuda" else None
    if side is not None:
        side.wait_stream(torch.cuda.current_stream(device))
        for x in (*wholes, *sources):  # they may be freed while the stream is at work
            x.record_stream(side)
    with nullcontext() if side is None else torch.cuda.stream(side):
        sends = torch.empty(ends[-1], dtype=torch.uint8, device=device)
        for target, x, (_, dim, _) in zip(views(sends), sources, shards, strict=True):
            target.narrow(dim, 0, x.shape[dim]).copy_(x)
        received, wait = ranks.gather(sends)
        if side is not None:
            wait()
            lay_out(received)
            arrived = side.record_event()
            return wholes, lambda: torch.cuda.current_stream(device).wait_event(arrived)

    left = [received]

    def finish() -> None:
        if left:
            wait()
            lay_out(left.pop())

    return wholes, finish


def _as_integers(x: Tensor, dim: int) -> Tensor:
    """A tensor as the widest integers that its rows consist of: a copy moves that much at a time.

    No integer holds several positions of ``dim``.
    """
    size = x.element_size()
    numbers = [x.shape[-1], x.storage_offset(), *x.stride()[:-1]]
    for dtype in (torch.int64, torch.int32, torch.int16):
        in_rows = dim < x.dim() - 1 and x.stride(-1) == 1 and all(n * size % dtype.itemsize == 0 for n in numbers)
        if dtype.itemsize == size or (dtype.itemsize > size and in_rows):
            return x.view(dtype)
    return x.view(torch.uint8) if size == 1 else x
