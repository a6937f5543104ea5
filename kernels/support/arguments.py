"""Numbers, names and devices among arguments, and the text of other objects in messages.

One rule holds for every option, configuration field and file. A number of a library, such as NumPy's, is converted to
Python's. A bool is no number. An array or a tensor is none either, even if it holds a single one: reading it may wait
for a device.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Collection
from numbers import Integral, Real

from torch import Tensor

from s2o_compile.kernels.support.errors import InputError

INT64_MAX = 2**63 - 1
"""The largest integer that torch takes as an operator's argument."""

FLOAT32_MAX = 3.4028234663852886e38
"""The largest number that kernels can compare with."""

LONGEST_INT = 256
"""Bits of an integer that a message still spells out. Python itself refuses to print much longer ones."""


_VALUE = re.compile(r"\s*[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?\s*|True|False|None", re.IGNORECASE)
"""A text that looks like another value."""


class _Shortened(reprlib.Repr):
    def repr_int(self, x: int, level: int) -> str:
        """Digits, or how many bits the integer has."""
        return repr(x) if x.bit_length() <= LONGEST_INT else f"an integer of {x.bit_length()} bits"


_SHORTENED = _Shortened()
_SHORTENED.maxlevel, _SHORTENED.maxstring, _SHORTENED.maxother = 3, 80, 80


def shown(x: object) -> str:
    """``repr`` on one line, shortened; it never fails, whatever the object. Quotes alone hide that "0.5" is a text."""
    try:
        text = "the text " if isinstance(x, str) and _VALUE.fullmatch(x) else ""
        return text + " ".join(_SHORTENED.repr(x).splitlines())
    except Exception:  # a repr of somebody else's
        return f"an object of type {type(x).__name__}"


def as_integer(x: object, *, least: int = -INT64_MAX, most: int = INT64_MAX) -> int | None:
    """The integer as Python's, if it is one from ``least`` to ``most``; else None."""
    if isinstance(x, bool) or not isinstance(x, (int, Integral)):
        return None
    x = int(x)
    return x if least <= x <= most else None


def as_number(x: object, *, least: float = 0.0, most: float = FLOAT32_MAX) -> float | None:
    """The number as a float without a negative zero, if it lies from ``least`` to ``most``; else None."""
    if isinstance(x, bool) or not isinstance(x, (float, int, Real)):
        return None
    try:
        number = float(x) + 0.0
    except OverflowError:
        return None
    return number if least <= number <= most else None  # NaN fails every comparison


def as_numbers(x: object) -> tuple[float, ...] | None:
    """The numbers >= 0 of a list or a tuple, if it holds one or more and `as_number` takes all of them; else None."""
    if not isinstance(x, (list, tuple)) or not x:
        return None
    numbers = [number for number in map(as_number, x) if number is not None]
    return tuple(numbers) if len(numbers) == len(x) else None


def is_one_of(x: object, allowed: Collection[str]) -> bool:
    """Whether this is one of these names. Only a text is compared: ``==`` of other objects may answer anything."""
    return isinstance(x, str) and x in allowed


def check_device(name: str, x: Tensor, first: Tensor, *, host_too: bool = False, of: str = "query") -> None:
    """Raise InputError unless a tensor is where the first one, named ``of``, is, or on the CPU if it may be there."""
    if x.device != first.device and not (host_too and x.is_cpu):
        expected = f"{first.device}, as the {of}{', or cpu' if host_too and not first.is_cpu else ''}"
        remedy = "Move all inputs to one device with .to(device)."
        raise InputError(f"device of {name}", expected=expected, got=x.device, remedy=remedy)
