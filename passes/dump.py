"""Writes a graph to files before and after each pass that changes it. The files show which pass went wrong.

``S2O_DUMP=folder`` turns it on. For each step that changes a graph, two files hold its readable text:

    graph000_step4_rewrite_before.txt        graph000_step4_rewrite_after.txt

Graphs are numbered from the first number that the folder does not hold yet, so files of earlier runs stay.
"""

from __future__ import annotations

import os
from itertools import count
from pathlib import Path

from s2o_compile.kernels.support.errors import S2OError

VARIABLE = "S2O_DUMP"
"""Environment variable with the folder; unset or empty, nothing is written."""


class DumpError(S2OError, ValueError):
    """The folder in ``S2O_DUMP`` cannot be used."""

    def __init__(self, folder: object, got: object) -> None:
        super().__init__(
            f"{VARIABLE}={folder}: expected a folder that can be made and written to, got {got}. Name another folder, "
            f"or unset {VARIABLE}."
        )


class Dump:
    """The files of one graph, in a folder that is made if it is not there.

    Raises:
        DumpError: The folder cannot be made.
    """

    def __init__(self, folder: str) -> None:
        self._name = folder
        self._graph: int | None = None
        try:
            self._folder = Path(folder).expanduser()
            self._folder.mkdir(parents=True, exist_ok=True)
        except (OSError, ValueError, RuntimeError) as error:
            raise DumpError(folder, error) from error

    def write(self, step: int, name: str, before: str, after: str) -> None:
        """Write the texts of a graph before and after a step, counted from 1; nothing if the step left it alone.

        Raises:
            DumpError: The files cannot be written.
        """
        if before == after:
            return
        try:
            if self._graph is None:
                self._graph = next(n for n in count() if not any(self._folder.glob(f"graph{n:03d}_*")))
            for when, text in (("before", before), ("after", after)):
                path = self._folder / f"graph{self._graph:03d}_step{step}_{name}_{when}.txt"
                path.write_text(text, encoding="utf-8")
        except OSError as error:
            raise DumpError(self._name, error) from error


def from_environment() -> Dump | None:
    """The files of the next graph; None if no folder is named.

    Raises:
        DumpError: The folder cannot be made.
    """
    folder = os.environ.get(VARIABLE)
    return Dump(folder) if folder else None
