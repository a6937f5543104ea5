"""Compiles the C++ sources of ``kernels/impl/cpp`` for the machine at hand, once, and loads them.

torch.compile wants a C++ compiler on a CPU, too, so most machines have one. Where there is none, or it fails, `why_not`
says so, one warning does, and plain torch serves. The library lies in the user's cache folder. Its name says what it
was made of: the sources, the compiler, and the instructions of the machine.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

SOURCES = tuple(
    Path(__file__).parents[1] / "impl" / "cpp" / name
    for name in ("simd.h", "floats.h", "halves.h", "forward.cpp", "rank.cpp")
)
COMPILERS = ("g++", "clang++", "c++")
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fPIC", "-fno-math-errno")
SECONDS = 120
"""A compiler that takes longer is stopped; it takes one or two."""

ALL = 1 << 40
"""Larger than any position: what sees all keys."""


def folder() -> Path:
    """Where libraries are kept: ``S2O_CACHE``, or ``s2o_compile`` in the user's cache folder."""
    chosen = os.environ.get("S2O_CACHE")
    return Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "s2o_compile"


def serves(device: torch.device) -> bool:
    """Whether tensors of a device can be computed here. The first call may compile, which takes seconds."""
    return device.type == "cpu" and load() is not None


def why_not() -> str:
    """Why there is no library; empty if there is one."""
    return _loaded()[1]


def has_halves() -> bool:
    """Whether the library multiplies bfloat16 in tiles (AMX), several times as fast as float32."""
    functions = load()
    return functions is not None and bool(functions.s2o_has_halves())


def load() -> ctypes.CDLL | None:
    """The library, or None if there is none."""
    return _loaded()[0]


@cache
def _loaded() -> tuple[ctypes.CDLL | None, str]:
    """The library, or None and why there is none."""
    if os.environ.get("S2O_CPP") == "0":
        return None, "S2O_CPP=0"
    reason = f"expected a C++ compiler, looked for {', '.join(COMPILERS)} and $CXX, got none"
    for name in (os.environ.get("CXX"), *COMPILERS):
        compiler = shutil.which(name) if name else None
        if compiler is None:
            continue
        try:
            return ctypes.CDLL(str(_compiled(compiler))), ""
        except (OSError, RuntimeError, subprocess.SubprocessError) as error:
            said = (getattr(error, "stderr", None) or str(error)).strip().splitlines() or [repr(error)]
            reason = f"{compiler} failed: {said[0]}"
            break
    warnings.warn(
        f"S2O on a CPU runs in plain torch, at about half of its speed: {reason}. Install g++, or set S2O_CPP=0 to "
        "silence this.",
        stacklevel=2,
    )
    return None, reason


def _compiled(compiler: str) -> Path:
    """The file of the library, compiled if it is not there."""
    macros = _run(compiler, *FLAGS, "-dM", "-E", "-x", "c++", os.devnull)  # they name the compiler and the instructions
    made_of = "\0".join((*(path.read_text() for path in SOURCES), *FLAGS, macros))
    path = folder() / f"cpu-{hashlib.sha256(made_of.encode()).hexdigest()[:24]}.so"
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, made = tempfile.mkstemp(suffix=".so", dir=path.parent)
    os.close(handle)
    try:
        _run(compiler, *FLAGS, "-shared", "-o", made, *(str(path) for path in SOURCES if path.suffix == ".cpp"))
        os.replace(made, path)  # whole or not at all: several processes may compile
    finally:
        Path(made).unlink(missing_ok=True)
    return path


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=SECONDS).stdout


def structure(pointers: str, sizes: str, numbers: str, flags: str = "") -> type[ctypes.Structure]:
    """The argument of a C++ function: names of its pointers, sizes of 64 bits, floats, and flags of 32 bits."""
    kinds = (pointers, ctypes.c_void_p), (sizes, ctypes.c_int64), (numbers, ctypes.c_float), (flags, ctypes.c_int32)
    fields = [(name, kind) for names, kind in kinds for name in names.split()]
    return type("Argument", (ctypes.Structure,), {"_fields_": fields})


def run(function: Callable[..., int], argument: ctypes.Structure) -> None:
    """Call a function of the library.

    Raises:
        MemoryError: It found no memory to work in.
    """
    if function(ctypes.byref(argument)):
        raise MemoryError("attention in C++: expected memory to work in, got none. Give it a shorter or smaller input.")


def with_unit_stride(x: Tensor) -> Tensor:
    """The tensor, or a copy of it whose last stride is 1."""
    return x if x.stride(-1) == 1 else x.contiguous()


def address(x: Tensor | None, *place: int) -> int | None:
    """The address of an element; None of no tensor."""
    if x is None:
        return None
    return x.data_ptr() + x.element_size() * sum(i * step for i, step in zip(place, x.stride(), strict=False))
