"""A seeded search for modules that compute something else compiled than in eager.

pytest tests/passes/test_fuzz.py --fuzz-seconds 3600 --fuzz-seed 100000
"""

import time
from collections import Counter

import pytest

from tests.helpers import fuzz
from tests.helpers.writers import BOOL_WRITERS, INTEGER_WRITERS, WRITERS

SHARES = 2
"""Searches beside each other, each for its part of the time and with seeds of its own."""


@pytest.mark.parametrize("share", range(SHARES))
@pytest.mark.timeout(0)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("fresh_dynamo")
def test_random_modules_compute_what_eager_computes(share, request, record_property):
    seconds, seed = (request.config.getoption(f"--fuzz-{name}") for name in ("seconds", "seed"))
    stop, seen, failures = time.monotonic() + seconds / SHARES, Counter(), []
    while time.monotonic() < stop and len(failures) < 5:
        module = fuzz.draw(seed + SHARES * seen["modules"] + share)
        outcome = fuzz.judge(module)
        seen += Counter(
            modules=1,
            rewritten=outcome.rewritten > 0,
            left=outcome.left > 0,
            skipped=bool(outcome.skipped),
            written=any("WRITERS[" in line for line in module.lines),
        )
        if outcome.problem:
            least = fuzz.minimal(module)
            failures.append(
                f"{fuzz.judge(least).problem}\ndynamic {least.dynamic}, read {least.read_masks}\n{least.source}"
            )
    record_property("fuzz", dict(seen))
    print(dict(seen))
    assert not failures, "\n\n".join(failures)
    if seconds >= 60:  # it says something only if most of it runs, and is rewritten
        assert seen["rewritten"] > seen["modules"] / 3, seen
        assert seen["skipped"] < seen["modules"] / 4, seen


def test_every_way_to_write_is_drawn():
    lines = "\n".join(line for seed in range(4000) for line in fuzz.draw(seed).lines)
    for table in (WRITERS, BOOL_WRITERS, INTEGER_WRITERS):
        assert not [name for name in table if f"[{name!r}]" not in lines]
    for part in (
        "flex_attention(",
        "self.heads(",
        "is_causal",
        "enable_gqa",
        "torch.bmm",
        "sink",
        "2147483643",
        "alias",
    ):
        assert part in lines
