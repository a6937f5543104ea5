"""Compiles C++ sources for the machine at hand, once, and loads them: those of ``kernels/impl/cpp``, others quietly.

torch.compile wants a C++ compiler on a CPU, too, so most machines have one. Where there is none, or it fails, `why_not`
says so, one warning does, and plain torch serves. The library lies in the user's cache folder. Its name says what it
was made of: the sources, the compiler, and the instructions of the machine.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from s2o_compile.kernels.support.errors import warn

SOURCES = tuple(
    Path(__file__).parents[1] / "impl" / "cpp" / name
    for name in ("simd.h", "floats.h", "halves.h", "forward.cpp", "rank.cpp", "order.cpp")
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
    return _known().reason


def remedy() -> str:
    """What brings the library, if there is none."""
    return _known().remedy


def has_halves() -> bool:
    """Whether the library multiplies bfloat16 in tiles (AMX), several times as fast as float32."""
    functions = load()
    return functions is not None and bool(functions.s2o_has_halves())


def quietly(sources: tuple[Path, ...]) -> ctypes.CDLL | None:
    """The library of other sources, or None if there is none: something slower serves without a word."""
    return _known(sources).functions


def load() -> ctypes.CDLL | None:
    """The library, or None if there is none, which one warning says."""
    found = _known()
    if found.functions is None and found.reason != _SWITCHED_OFF:
        _warn(found)
    return found.functions


class _Loaded(NamedTuple):
    functions: ctypes.CDLL | None
    reason: str = ""
    remedy: str = ""


_SWITCHED_OFF = "S2O_CPP=0"
_one_at_a_time = threading.Lock()


def _known(sources: tuple[Path, ...] = SOURCES) -> _Loaded:
    with _one_at_a_time:
        return _loaded(sources)


@cache
def _warn(found: _Loaded) -> None:
    warn(
        f"S2O on a CPU runs in plain torch, at about half of its speed: {found.reason}. {found.remedy}, or set "
        "S2O_CPP=0 to silence this.",
        each_machine=True,
    )


@cache
def _loaded(sources: tuple[Path, ...]) -> _Loaded:
    """The library, or why there is none and what to do."""
    if os.environ.get("S2O_CPP") == "0":
        return _Loaded(None, _SWITCHED_OFF, "Unset S2O_CPP")
    compiler = _compiler()
    if compiler is None:
        looked_for = f"looked for {', '.join(COMPILERS)} and $CXX"
        return _Loaded(None, f"expected a C++ compiler, {looked_for}, got none", "Install g++")
    try:
        path = _path(compiler, sources)
        try:
            return _Loaded(ctypes.CDLL(str(path)))
        except OSError:  # it is not there, or a disk has spoilt it
            _compile(compiler, path, sources)
            return _Loaded(ctypes.CDLL(str(path)))
    except subprocess.SubprocessError as error:
        lines = str(getattr(error, "stderr", None) or error).strip().splitlines() or [repr(error)]
        said = next((line for line in lines if "error" in line), lines[0])  # warnings may come first
        return _Loaded(None, f"{compiler[0]} failed: {said}", "Install g++, or let CXX name a compiler that works")
    except (OSError, RuntimeError) as error:  # a user may have no home
        return _Loaded(
            None, f"expected a folder to keep the compiled library in, got {error}",
            "Let S2O_CACHE name a folder of yours that can be written",
        )  # fmt: skip


def _compiler() -> tuple[str, ...] | None:
    """The compiler and its own arguments (``CXX="ccache g++"``); None if there is none."""
    for name in (os.environ.get("CXX", ""), *COMPILERS):
        try:
            command = shlex.split(name)
        except ValueError:  # a quotation mark without its second one
            continue
        found = shutil.which(command[0]) if command else None
        if found is not None:
            return found, *command[1:]
    return None


def _path(compiler: tuple[str, ...], sources: tuple[Path, ...]) -> Path:
    """The file of the library."""
    # The macros name the compiler and the instructions.
    macros = _run(*compiler, *FLAGS, "-dM", "-E", "-x", "c++", os.devnull)
    made_of = "\0".join((*(path.read_text("utf-8") for path in sources), *compiler[1:], *FLAGS, macros))
    return folder() / f"{sources[0].parent.name}-{hashlib.sha256(made_of.encode()).hexdigest()[:24]}.so"


def _compile(compiler: tuple[str, ...], path: Path, sources: tuple[Path, ...]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, made = tempfile.mkstemp(suffix=".so", dir=path.parent)
    os.close(handle)
    try:
        _run(*compiler, *FLAGS, "-shared", "-o", made, *(str(source) for source in sources if source.suffix == ".cpp"))
        with open(made, "rb+") as file:
            os.fsync(file.fileno())  # a part of a library would end the process
        os.replace(made, path)  # whole or not at all: several processes may compile
    finally:
        Path(made).unlink(missing_ok=True)


def _run(*command: str) -> str:
    """What a compiler prints.

    Raises:
        SubprocessError: It failed, took too long, or is no program.
    """
    try:
        return subprocess.run(
            command, check=True, capture_output=True, text=True, errors="replace", timeout=SECONDS
        ).stdout
    except OSError as error:
        raise subprocess.SubprocessError(str(error)) from error


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
