"""Files that are written whole or not at all, and tried before the work whose result they will hold."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4


def try_writing(path: Path) -> None:
    """Raise OSError if a file cannot be written there: a neighbour of it is made, and removed.

    Nobody learns by permissions alone: root passes all of them, and file systems may be read-only or full.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a directory")
    if path.exists() and not os.access(path, os.W_OK):
        raise PermissionError(f"{path} may not be written")
    with writing(path) as part:
        if part != path:
            part.write_bytes(b"\0")
            part.unlink()


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """A file to write to, with the ending of a path, which it replaces once the block ends without an error.

    So a file is what it was before until the new one is whole. Pipes and devices are written to as they are.
    """
    if path.exists() and not path.is_file():
        yield path
        return
    path = path.resolve()  # a link stays a link
    part = path.with_name(f".{uuid4().hex}{path.suffix}")
    try:
        yield part
        if part.exists():
            if path.exists():
                shutil.copymode(path, part)
            part.replace(path)
    finally:
        part.unlink(missing_ok=True)
