"""Wrong metadata under compute-sanitizer, where it is installed: no kernel touches foreign memory, and none races."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[3]


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="needs compute-sanitizer of the CUDA toolkit")
@pytest.mark.parametrize(("tool", "only"), [("memcheck", []), ("racecheck", ["one"])])
def test_no_kernel_touches_foreign_memory(tool, only):
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    program = [sys.executable, "-m", "tests.helpers.sanitized", *only]
    checked = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *program]
    for command in (program, checked):  # first without, which compiles the kernels
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
