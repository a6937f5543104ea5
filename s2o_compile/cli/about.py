"""Versions of packages, and what a file says of its making."""

from __future__ import annotations

import datetime
import importlib.metadata
import shlex
import sys


def made_by() -> dict[str, str]:
    """Date, command and versions."""
    date = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    makers = {name: version for name, version in versions().items() if name in MAKERS}
    return {"date": date, "command": shlex.join(["s2o", *sys.argv[1:]])} | makers


MAKERS = ("s2o-compile", "torch", "triton", "transformers")
PACKAGES = (
    *MAKERS,
    *("accelerate", "gguf", "rich", "typer", "matplotlib", "diffusers"),
    *("onnx", "onnxscript", "torch-tensorrt", "vllm", "sglang"),
)


def versions() -> dict[str, str]:
    """Versions of the packages that matter here, as far as they are installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
