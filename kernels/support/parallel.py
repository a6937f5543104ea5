"""Work of one call spread over the CPU's threads, one item a thread that computes alone.

A segment is many small operations. On all threads most of the time of each goes into waiting for the slowest one, far
more so on a busy machine. One thread an item waits once. Where torch cannot let a thread compute alone, items run in
order on all of its threads.

``torch.set_num_threads`` also writes a number of the whole process. A thread that starts before it is written back
takes it over and keeps it for life. So the libraries that torch was built with are told: OpenMP's number belongs to a
thread anyhow, and MKL has one for a thread beside that of the process.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch

Item = TypeVar("Item")

_LIBRARY = {"darwin": "libtorch_cpu.dylib", "win32": "torch_cpu.dll"}.get(sys.platform, "libtorch_cpu.so")


@cache
def _function(name: str) -> Any:  # noqa: ANN401 (a C function)
    """A C function of torch's library or of one that it was linked with; None if there is none."""
    try:
        return getattr(ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / _LIBRARY)), name)
    except (OSError, AttributeError):
        return None


def compute_alone() -> bool:
    """Let the calling thread alone compute its operators, for the rest of its life; whether this torch can."""
    threads = torch.get_num_threads()  # a thread takes over the number of the process when it first asks
    of_openmp, of_mkl = _function("omp_set_num_threads"), _function("MKL_Set_Num_Threads_Local")
    if of_openmp is None or (of_mkl is None and torch.backends.mkl.is_available()):
        return threads == 1
    of_openmp(1)
    if of_mkl is not None:
        of_mkl(1)
    return torch.get_num_threads() == 1


@cache
def can_compute_alone() -> bool:
    """Whether `compute_alone` works with this torch, tried in a thread of its own."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(compute_alone).result()


def for_each(work: Callable[[Item], object], items: Iterable[Item], device: torch.device) -> None:
    """Call ``work`` on every item, in parallel on a CPU, in order elsewhere; items must not depend on each other."""
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1 or not can_compute_alone():
        for item in items:
            work(item)
        return

    left, inference = deque(items), torch.is_inference_mode_enabled()

    def alone() -> None:
        with torch.inference_mode(inference), torch.no_grad():  # both modes are a thread's own
            while True:
                try:
                    item = left.popleft()
                except IndexError:
                    return
                try:
                    work(item)
                except BaseException:
                    left.clear()
                    raise

    pool, futures = _pool(threads), []
    try:
        # One future a thread: one an item took longer than short items do.
        futures.extend(pool.submit(alone) for _ in range(min(threads, len(left))))
        wait(futures)
    except RuntimeError:  # there is no further thread, or Python ends, which lets none begin
        alone()
    finally:
        left.clear()
        wait(futures)  # nobody writes into tensors of a call that has ended
        _idle.append((threads, pool))
    for future in futures:
        future.result()  # raises what an item raised


def _pool(threads: int) -> ThreadPoolExecutor:
    """So many threads that compute alone and that no other call uses."""
    with suppress(IndexError):
        number, pool = _idle.pop()
        if number == threads:  # else they end: another number is asked for now
            return pool
    return ThreadPoolExecutor(threads, thread_name_prefix="s2o", initializer=compute_alone)


_idle: deque[tuple[int, ThreadPoolExecutor]] = deque(maxlen=2)
"""Threads that no call uses, and their number, for the next call: to begin new ones took 2 ms (2 cores).

Calls at the same time have threads of their own. What a thread of torch has from its beginning, they keep:
``torch.set_flush_denormal`` changes nothing for them.
"""

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_idle.clear)  # a child has none of its parent's threads
