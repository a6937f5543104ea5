"""A stub in the place of CUDA's driver: what would be launched, byte for byte, without a GPU."""

import ctypes
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

COMPILER = next(filter(None, map(shutil.which, ("g++", "clang++", "c++"))), None)


class Launched(NamedTuple):
    """A launch: the kernel's handle, grid, block, shared memory and number of attributes, stream, parameters."""

    function: int
    sizes: tuple[int, ...]
    stream: int
    parameters: tuple[bytes, ...]


class StubDriver:
    """A ``libcuda.so.1`` that keeps what it is asked for in ``made``.

    ``widths`` says by a kernel's handle how many bytes each of its parameters has.
    """

    def __init__(self, folder: Path) -> None:
        path, source = folder / "libcuda.so.1", Path(__file__).with_suffix(".cpp")
        named = ("-Wl,-soname,libcuda.so.1", "-o", str(path), str(source))
        subprocess.run([str(COMPILER), "-shared", "-fPIC", *named], check=True)
        self.library = ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)  # others that look for this name find it
        self.made: list[Launched | tuple[str, int, int]] = []
        self.widths: dict[int, list[int]] = {}
        number, pointer = ctypes.c_int, ctypes.c_void_p
        launch = ctypes.CFUNCTYPE(number, pointer, ctypes.POINTER(ctypes.c_uint), pointer, ctypes.POINTER(pointer))
        order = ctypes.CFUNCTYPE(number, ctypes.c_char_p, pointer, pointer)
        self._callbacks = {"on_launch": launch(self._on_launch), "on_order": order(self._on_order)}
        for name, callback in self._callbacks.items():
            pointer.in_dll(self.library, name).value = ctypes.cast(callback, pointer).value

    def _on_launch(self, function, sizes, stream, parameters):
        given = tuple(ctypes.string_at(parameters[at], width) for at, width in enumerate(self.widths[function]))
        self.made.append(Launched(function, tuple(sizes[:8]), stream or 0, given))
        return 0

    def _on_order(self, what, stream, event):
        self.made.append((what.decode(), stream or 0, event or 0))
        return 0
