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
from functools import cache, lru_cache
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

    # One future a thread: one an item took longer than short items do.
    pool, futures = _pool(threads), []
    try:
        futures.extend(pool.submit(alone) for _ in range(min(threads, len(left))))
        wait(futures)
    except RuntimeError:  # there is no further thread, or Python ends, which lets none begin
        alone()
    finally:
        left.clear()
        wait(futures)  # nobody writes into tensors of a call that has ended
    for future in futures:
        future.result()  # raises what an item raised


@lru_cache(maxsize=2)
def _pool(threads: int) -> ThreadPoolExecutor:
    """Threads that compute alone, kept for the next call: to begin new ones took 2 ms (2 cores).

    Those of a number that is no longer asked for end.
    """
    return ThreadPoolExecutor(threads, thread_name_prefix="s2o", initializer=compute_alone)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # a child has none of its parent's threads
