"""What a file says of its making."""

from __future__ import annotations

import datetime
import importlib.metadata
import shlex
import sys


def made_by() -> dict[str, str]:
    """Date, command and versions."""
    date = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    return {"date": date, "command": shlex.join(["s2o", *sys.argv[1:]])} | _versions()


def _versions() -> dict[str, str]:
    found = {}
    for package in ("torch", "triton", "transformers", "s2o-compile"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
