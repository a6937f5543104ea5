"""Launches of compiled kernels that look at no argument again: the only file with private names of triton.

A launch by ``kernel[grid](...)`` takes 20 to 40 us of the host: it binds up to 90 arguments, and looks for the kernel
that was compiled for their types, their divisors and their constants. If none of these has changed, the compiled kernel
can be launched itself, in 3 to 6 us. Pointers are given as integers then.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import triton

FIRST_TESTED, LAST_TESTED = (3, 6), (3, 9)
"""Versions of triton whose compiled kernels are launched as `launcher` says (``test_direct.py``)."""

Launcher = Callable[[int, Sequence[object]], None]
"""Launches on a stream, by its number, with all arguments of the kernel's signature in their order."""


def is_tested() -> bool:
    """Whether the triton that is installed is one whose compiled kernels are known."""
    release = tuple(int(number) for number in triton.__version__.split(".")[:2])
    return FIRST_TESTED <= release <= LAST_TESTED


def launcher(compiled: Any, grid: tuple[int, ...]) -> Launcher | None:
    """What launches a compiled kernel on a grid; None if this triton does not say how, or the kernel is interpreted."""
    if not is_tested():
        return None
    run, function, metadata = (getattr(compiled, name, None) for name in ("run", "function", "packed_metadata"))
    if run is None or function is None or metadata is None:
        return None
    x, y, z = (*grid, 1, 1)[:3]
    bare = _without_scratch(run)
    if bare is not None:
        return lambda stream, arguments: bare[0](
            x, y, z, stream, function, *bare[1:], None, None, metadata, None, None, None, *arguments
        )

    def launch(stream: int, arguments: Sequence[object]) -> None:
        run(x, y, z, stream, function, metadata, None, None, None, *arguments)

    return launch


def _without_scratch(run: Any) -> tuple[Any, bool, bool] | None:
    """The C function behind triton 3.6's launch of a kernel that needs no scratch memory, and its first two flags.

    The Python around it takes as long as the launch itself. Other versions call it in other ways.
    """
    names = ("launch", "launch_cooperative_grid", "launch_pdl")
    sizes = [getattr(run, name, None) for name in ("global_scratch_size", "profile_scratch_size")]
    if not triton.__version__.startswith("3.6.") or sizes != [0, 0] or not all(hasattr(run, name) for name in names):
        return None
    return run.launch, run.launch_cooperative_grid, run.launch_pdl


def hooked() -> bool:
    """Whether somebody wants to hear of launches, as a profiler of triton's does."""
    enter, leave = (getattr(triton.knobs.runtime, name, None) for name in ("launch_enter_hook", "launch_exit_hook"))
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))
