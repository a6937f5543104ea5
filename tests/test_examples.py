"""Examples run as they are."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SAID = {
    "flex_score_mod": (["512"], "1 attention sites found, 1 rewritten, 0 left dense"),
    "wrap_a_model": ([], "2 attention sites found, 2 rewritten, 0 left dense"),
}
"""Arguments that make an example small, and what it says."""


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_example_runs(path):
    arguments, said = SAID[path.stem]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(path), *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == 0, done.stderr
    assert said in done.stdout
