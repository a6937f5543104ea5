"""Seconds and memory of one way to run a model; a way that fails says why, and the others go on."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

CALLS = 5
"""Timed calls at most."""

UNTIMED = {"cuda": 3}
"""Calls ahead of the timed ones by device, else one: the first may compile. On CUDA the operator writes the launches of
the second one down, and may compile for that."""

TIMED_SECONDS = 2.0
"""No more calls are timed once they took so long together."""

LONGEST_CAUSE = 200
"""Characters of a cause."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """One way to run a model on one input.

    Attributes:
        seconds: Median of the timed calls; None if it failed.
        first_seconds: The first call, which is not timed: it compiles, and whatever else happens once.
        calls: Timed calls.
        peak_bytes: Most memory in a timed call. On CUDA all that torch allocated, on a CPU all of the process; both
            hold the weights. None where it cannot be told.
        failure: Why it failed; empty if it ran.
    """

    seconds: float | None = None
    first_seconds: float | None = None
    calls: int = 0
    peak_bytes: int | None = None
    failure: str = ""

    @property
    def compile_seconds(self) -> float | None:
        """What the first call took beyond a later one."""
        if self.seconds is None or self.first_seconds is None:
            return None
        return max(self.first_seconds - self.seconds, 0.0)


def time_calls(call: Callable[[], object], device: torch.device) -> Timing:
    """Call once, then again until the time is known. Whatever the calls raise becomes the failure."""
    try:
        first_seconds, times = seconds_of(call, device), []
        for _ in range(UNTIMED.get(device.type, 1) - 1):
            call()
        known = reset_peak(device)
        while len(times) < CALLS and sum(times) < TIMED_SECONDS:
            times.append(seconds_of(call, device))
        peak = peak_bytes(device) if known else None
    except Exception as error:  # whatever a model, a compiler or a driver raises: the other ways are still wanted
        return Timing(failure=cause(error))
    finally:
        free_memory(device)
    return Timing(seconds=statistics.median(times), first_seconds=first_seconds, calls=len(times), peak_bytes=peak)


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, the device's work included."""
    wait(device)
    start = time.perf_counter()
    call()
    wait(device)
    return time.perf_counter() - start


def wait(device: torch.device) -> None:
    """Until a device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def cause(error: BaseException) -> str:
    """An exception in one line."""
    text = " ".join(str(error).split())
    if is_out_of_memory(error):
        return f"out of memory ({text[:LONGEST_CAUSE]})"
    return f"{type(error).__name__}: {text}"[:LONGEST_CAUSE]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the machine had no memory left."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in str(error)


def free_memory(device: torch.device) -> None:
    """Give back what nobody holds, so that one way does not stand in the way of the next."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
_RESET_PEAK = "5"
"""What Linux takes in ``clear_refs`` as the wish to forget the largest size so far."""


def reset_peak(device: torch.device) -> bool:
    """Forget the most memory so far; False where the system does not tell it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        _CLEAR.write_text(_RESET_PEAK)
    except OSError:  # no Linux, or not allowed
        return False
    return device.type == "cpu"


def peak_bytes(device: torch.device) -> int | None:
    """The most memory since `reset_peak`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    found = [line.split()[1] for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM")]
    return 1024 * int(found[0]) if found else None
