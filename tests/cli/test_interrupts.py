"""Ctrl-C leaves no traceback, whenever it comes: while the command line loads, which takes seconds, and behind that."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("typer")
ROOT = Path(__file__).parents[2]
SCRIPT = "import sys; sys.argv[0] = '/somewhere/bin/s2o'; from s2o_compile.__main__ import main; sys.exit(main())"
WAYS = {"module": ["-m", "s2o_compile"], "script": ["-c", SCRIPT]}


def loads_torch(process):
    return "libtorch" in Path(f"/proc/{process.pid}/maps").read_text()


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "seconds", [0, *(pytest.param(wait, marks=pytest.mark.slow) for wait in (0.05, 0.3, 1, 2, 3))], ids=str
)
def test_an_interrupt_while_it_loads(tmp_path, way, seconds):
    """From where torch begins to load: ahead of that Python itself starts, and no code of ours has run."""
    command = [sys.executable, *WAYS[way], "explain", "smollm2", "--tokens", "4096"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}) as process:
        while not loads_torch(process):
            time.sleep(0.005)
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        _, printed = process.communicate(timeout=60)
    assert process.returncode in (130, -signal.SIGINT), printed  # a shell says 130 of both
    assert "Traceback" not in printed


@pytest.mark.slow
def test_an_ignored_interrupt_stays_ignored(tmp_path):
    """As under nohup."""
    code = f"import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); {SCRIPT}"
    command = [sys.executable, "-c", code, "--version"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(ROOT)}) as process:
        while not loads_torch(process):
            time.sleep(0.005)
        process.send_signal(signal.SIGINT)
        printed, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert printed.startswith(b"s2o-compile")
