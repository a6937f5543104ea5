"""A seeded search for modules that compute something else compiled than in eager.

pytest tests/passes/test_fuzz.py --fuzz-seconds 3600 --fuzz-seed 100000
"""

import time
from collections import Counter

import pytest

from tests.helpers import fuzz
from tests.helpers.writers import BOOL_WRITERS, INTEGER_WRITERS, WRITERS

QUICK = 8
"""Modules drawn in the quick tier."""

SHARES = 2
"""Searches beside each other, each for its part of the time and with seeds of its own."""


def search(seed_of, goes_on):
    """What became of the modules drawn so far, and at most five failures, cut down."""
    seen, failures = Counter(), []
    while goes_on(seen["modules"]) and len(failures) < 5:
        module = fuzz.draw(seed_of(seen["modules"]))
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
    return seen, failures


@pytest.mark.slow
@pytest.mark.parametrize("share", range(SHARES))
@pytest.mark.timeout(0)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("fresh_dynamo")
def test_random_modules_compute_what_eager_computes(share, request, record_property):
    seconds, seed = (request.config.getoption(f"--fuzz-{name}") for name in ("seconds", "seed"))
    stop = time.monotonic() + seconds / SHARES
    seen, failures = search(lambda drawn: seed + SHARES * drawn + share, lambda _: time.monotonic() < stop)
    record_property("fuzz", dict(seen))
    print(dict(seen))
    assert not failures, "\n\n".join(failures)
    if seconds >= 60:  # it says something only if most of it runs, and is rewritten
        assert seen["rewritten"] > seen["modules"] / 3, seen
        assert seen["skipped"] < seen["modules"] / 4, seen


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("fresh_dynamo")
def test_a_few_random_modules():
    """A short one for the quick tier, of always the same modules."""
    seen, failures = search(lambda drawn: 1_000_000 + drawn, lambda drawn: drawn < QUICK)
    assert not failures, "\n\n".join(failures)
    assert seen["rewritten"] > seen["modules"] / 3, seen


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
