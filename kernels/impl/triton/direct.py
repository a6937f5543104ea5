"""Launches of compiled kernels that look at no argument again: the only file with private names of triton.

A launch by ``kernel[grid](...)`` takes 20 to 40 us of the host: it binds up to 90 arguments, and looks for the kernel
that was compiled for their types, their divisors and their constants. If none of these has changed, the compiled kernel
can be launched itself, with pointers as integers: one by one through triton (`launcher`), in a few us each, or all of a
list in one call of C++ (`replay`), in the time that CUDA's driver takes.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import triton

from s2o_compile.kernels.support import cpp_library

FIRST_TESTED, LAST_TESTED = (3, 6), (3, 9)
"""Versions of triton whose compiled kernels are launched as this file says (``test_direct.py``)."""

Launcher = Callable[[int, Sequence[object]], None]
"""Launches on a stream, by its number, with all arguments of the kernel's signature in their order."""

Replay = Callable[[Sequence[int], int | None, int, int], None]
"""Makes a list of launches on a device's current stream, from its bases: some on another stream, if an event is given
beside it."""

SOURCE = Path(__file__).with_name("launch.cpp")

NUMBERS = {
    "i1": ctypes.c_int8, "i8": ctypes.c_int8, "i16": ctypes.c_int16, "i32": ctypes.c_int32, "i64": ctypes.c_int64,
    "u1": ctypes.c_uint8, "u8": ctypes.c_uint8, "u16": ctypes.c_uint16, "u32": ctypes.c_uint32, "u64": ctypes.c_uint64,
    "fp32": ctypes.c_float, "fp64": ctypes.c_double,
}  # fmt: skip
"""Types of numbers in a kernel's signature."""

PLAIN = {
    "num_ctas": 1, "warp_size": 32, "launch_cooperative_grid": False, "launch_pdl": False, "global_scratch_size": 0,
    "profile_scratch_size": 0, "instrumentation_mode": "",
}  # fmt: skip
"""What is said of a kernel whose launch has no attributes, and that needs no memory beside its arguments."""

MOST_PARAMETERS, MOST_SHARED = 256, 228 * 1024
"""Parameters that ``launch.cpp`` takes, and bytes of shared memory that a launch without attributes may have."""

FUNCTIONS = ("cuCtxGetCurrent", "cuCtxSetCurrent", "cuLaunchKernel", "cuEventRecord", "cuStreamWaitEvent")
"""What ``launch.cpp`` calls of the driver, in the order of its structure."""

JOIN, FORK = 1, 2
"""What happens ahead of a launch: the stream waits for the other one, or the other one for the stream; joins first."""

SCRATCH = 2
"""Pointers behind the arguments, to memory that a plain kernel does not need."""


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

    def launch(stream: int, arguments: Sequence[object]) -> None:
        run(x, y, z, stream, function, metadata, None, None, None, *arguments)

    return launch


def packed(
    compiled: Any, grid: tuple[int, ...], arguments: Sequence[object], places: Mapping[int, tuple[int, int]],
    *, is_beside: bool, waits: int,
) -> bytes | None:  # fmt: skip
    """A launch as ``launch.cpp`` takes it; None if it is not as plain as that, or this triton does not say all of it.

    ``arguments`` are those of the kernel's signature. ``places`` has the pointers among them by their number: which of
    the bases they count from, and the bytes behind it. It ``waits`` for a sum of JOIN and FORK ahead of it.
    """
    function, metadata = (getattr(compiled, name, None) for name in ("function", "metadata"))
    types = list(getattr(getattr(compiled, "src", None), "signature", {}).values())
    backend = getattr(getattr(metadata, "target", None), "backend", None)
    plain = all(getattr(metadata, name, None) == value for name, value in PLAIN.items())
    if not is_tested() or type(function) is not int or backend != "cuda" or not plain or len(types) != len(arguments):
        return None
    parameters: list[tuple[int, int]] = []
    for number, (kind, value) in enumerate(zip(types, arguments, strict=True)):
        if kind == "constexpr":
            continue
        is_pointer = isinstance(kind, str) and kind.startswith("*")
        if is_pointer != (number in places) or not (is_pointer or kind in NUMBERS):
            return None
        parameters.append(places[number] if is_pointer else (0, _bits(NUMBERS[kind], value)))
    parameters += [(0, 0)] * SCRATCH
    blocks, shared = (*grid, 1, 1)[:3], metadata.shared
    if len(parameters) > MOST_PARAMETERS or shared > MOST_SHARED or min(blocks) < 1:
        return None
    sizes = (*blocks, metadata.num_warps * metadata.warp_size, shared, is_beside, waits, len(parameters))
    return struct.pack(f"<{9 + 2 * len(parameters)}Q", function, *sizes, *(x for pair in parameters for x in pair))


def _bits(kind: Any, value: object) -> int:
    """A number as C converts it: its bytes first in 8 bytes of a little-endian machine."""
    return int.from_bytes(bytes(kind(value)), "little")


def replay(kernels: Sequence[bytes | None], bases: int) -> Replay | None:
    """What makes launches, as `packed` returns them; None if one is not known, or without a driver or a C++ compiler.

    Pointers count from so many ``bases``. A launch that the driver refuses is a RuntimeError.
    """
    known = [kernel for kernel in kernels if kernel is not None]
    driver = _driver() if len(known) == len(kernels) else None
    library = None if driver is None else cpp_library.quietly((SOURCE,))
    if library is None:
        return None
    launch, pack, listed = library.s2o_launch, struct.Struct(f"<{1 + bases}Q").pack, b"".join(known)
    pointer = ctypes.c_void_p
    launch.argtypes = (pointer, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, pointer, pointer, pointer)

    def make(addresses: Sequence[int], device: int | None, other: int, event: int) -> None:
        status = launch(driver, listed, len(known), pack(0, *addresses), current_stream(device), other, event)
        if status:
            raise RuntimeError(f"launches of a prepared call: expected CUDA_SUCCESS, got {_name_of(status)}.")

    return make


def _library() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _driver() -> Any:
    """This thread's context and the functions that ``launch.cpp`` calls; None without a driver or a context."""
    context = ctypes.c_void_p()
    try:
        library = _library()
        functions = [ctypes.cast(getattr(library, name), ctypes.c_void_p) for name in FUNCTIONS]
        library.cuCtxGetCurrent(ctypes.byref(context))
    except (OSError, AttributeError):
        return None
    return (ctypes.c_void_p * (1 + len(functions)))(context, *functions) if context else None


def _name_of(status: int) -> str:
    """An error of the driver by its name and number."""
    name = ctypes.c_char_p()
    _library().cuGetErrorName(status, ctypes.byref(name))
    return f"{(name.value or b'unknown').decode()} ({status})"


def current_stream(device: int | None) -> int:
    """The current stream of a device as the driver knows it: where triton launches."""
    return triton.runtime.driver.active.get_current_stream(device)


def hooked() -> bool:
    """Whether somebody wants to hear of launches, as a profiler of triton's does."""
    enter, leave = (getattr(triton.knobs.runtime, name, None) for name in ("launch_enter_hook", "launch_exit_hook"))
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))
