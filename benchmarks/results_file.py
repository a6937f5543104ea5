"""Collect a benchmark's rows and write them with what they were measured on."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import platform
import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import torch


class Rows(list[dict[str, object]]):
    """Rows in sections: each is printed and written as soon as it is measured, a failure in its row.

    Args:
        path: JSON to write, None for none.
        **about: As ``write``.
    """

    def __init__(self, path: Path | None, **about: object) -> None:
        super().__init__()
        self._path, self._about = path, about

    def measure(self, section: str, what: Mapping[str, object], call: Callable[[], Mapping[str, object]]) -> None:
        """Add the row {"section", **what, **call()}; an exception of ``call`` goes into it as "failed"."""
        try:
            measured = dict(call())
        except Exception as error:  # whatever a kernel or a compiler raises: the other rows are still wanted
            measured = {"failed": f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"[:300]}
        self.append({"section": section, **what, **measured})
        print("  ".join(f"{name}={value}" for name, value in self[-1].items()), flush=True)
        if self._path:
            write(self._path, self, **self._about)


def write(path: Path, rows: list[dict[str, object]], **about: object) -> None:
    """JSON {"about": device, versions, date, command, ...; "rows": rows}."""
    versions = {}
    for package in ("torch", "triton", "transformers"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu ({torch.get_num_threads()} threads)"
    described = {
        "device": device,
        **versions,
        "python": platform.python_version(),
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "command": f"python benchmarks/{Path(sys.argv[0]).name} {shlex.join(sys.argv[1:])}",
        **about,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"about": described, "rows": rows}, indent=1) + "\n")
