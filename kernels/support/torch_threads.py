"""A thread that computes alone: the number of torch's own threads, set for one thread and no other.

``torch.set_num_threads`` also writes a number of the whole process. A thread that starts before it is written back
takes it over and keeps it for life. So the libraries that torch was built with are told: OpenMP's number belongs to a
thread anyhow, and MKL has one for a thread beside that of the process.
"""

from __future__ import annotations

import ctypes
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import torch

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
