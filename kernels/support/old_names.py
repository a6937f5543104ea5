"""Keywords that were renamed or removed: the old ones warn and mean what they meant, or say why they are gone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from s2o_compile.kernels.support.arguments import shown
from s2o_compile.kernels.support.errors import warn


class Removed(NamedTuple):
    """A keyword that is gone.

    Attributes:
        harmless: Its one value that changes nothing now: it is dropped with a warning.
        reason: Why every other value is gone, and what to do.
    """

    harmless: object
    reason: str


def current_names(
    given: Mapping[str, object], renamed: Mapping[str, str], removed: Mapping[str, Removed]
) -> dict[str, object]:
    """The keywords of a call, or the fields of a file, with today's names: ``renamed`` has that of each old one.

    Raises:
        ValueError: A removed keyword asks for what is gone, or both names of one keyword are given.
    """
    found = dict(given)
    for old, new in renamed.items():
        if old in found:
            if new in found:
                raise ValueError(f"{old}: expected one of {old} and {new}, got both. {old} is now called {new}.")
            warn(f"{old} is now called {new}; the old name will go.", DeprecationWarning)
            found[new] = found.pop(old)
    for name, gone in removed.items():
        if name in found:
            value = found.pop(name)
            if value != gone.harmless:
                raise ValueError(f"{name}: expected none, got {shown(value)}. It was removed: {gone.reason}")
            warn(f"{name} was removed and {gone.harmless!r} changes nothing; leave it out.", DeprecationWarning)
    return found
