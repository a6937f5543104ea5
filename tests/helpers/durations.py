"""How long tests take: read from junit files and kept in ``tests/durations.json``, which decides what is slow.

A test that took LONGEST seconds belongs to the slow tier, as those marked ``slow`` do. Long files start first.

``pytest --junitxml FILE``, once for each tier, and then ``python -m tests.helpers.durations FILE...`` write it anew.
"""

import argparse
import json
import os
from collections import Counter
from functools import cache
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[2]
FILE = ROOT / "tests" / "durations.json"
LONGEST = 1.5
"""Seconds on one of two busy cores from which on a test is slow."""


def file_and_scope(classname):
    """The file of ``tests.room.test_x.TestClass``, and the classes behind it."""
    parts = classname.split(".")
    for end in range(len(parts), 0, -1):
        path = Path(*parts[:end]).with_suffix(".py")
        if (ROOT / path).exists():
            return path.as_posix(), parts[end:]
    raise ValueError(f"{classname}: expected the name of a test module. Collect durations at this commit.")


def durations(junits):
    """What junit files say, as written to ``durations.json``."""
    suites = [ElementTree.parse(junit).getroot().find("testsuite") for junit in junits]
    files, tests = Counter(), {}
    for case in (
        case for suite in suites for case in suite.iter("testcase") if case.get("classname")
    ):  # no skipped file
        path, scope = file_and_scope(case.get("classname"))
        seconds = float(case.get("time"))
        files[path] += seconds
        tests["::".join([path, *scope, case.get("name")])] = seconds
    return {
        "date": max(suite.get("timestamp") for suite in suites)[:10],
        "torch": version("torch"),
        "cores": os.cpu_count(),
        "cases": len(tests),
        "seconds": round(sum(files.values()), 1),
        "files": {path: round(seconds, 1) for path, seconds in files.most_common()},
        "slowest": {name: round(seconds, 1) for name, seconds in Counter(tests).most_common() if seconds >= LONGEST},
    }


@cache
def known():
    """The content of the file."""
    return json.loads(FILE.read_text())


def is_slow(nodeid, longest):
    """Whether a test took so many seconds when it was last measured."""
    return known()["slowest"].get(nodeid, 0.0) >= longest


def long_files_first(items):
    """Sorts collected tests by what their file takes, without the slow tests of it that were deselected.

    New files come first: nobody knows how long they take.
    """
    takes, collected = Counter(known()["files"]), {item.nodeid for item in items}
    for name, seconds in known()["slowest"].items():
        if name not in collected:
            takes[name.split("::")[0]] -= seconds
    items.sort(key=lambda item: -takes.get(item.nodeid.split("::")[0], float("inf")))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("junit", type=Path, nargs="+")
    FILE.write_text(json.dumps(durations(parser.parse_args().junit), indent=1) + "\n")
