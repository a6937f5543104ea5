"""What a server's log says of sparse calls, and when."""

import pytest
import torch

from s2o_compile import S2OConfig, attention
from s2o_compile.serving.counters import INTERVAL, SAMPLED, Counters


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def counters():
    lines, clock = [], Clock()
    return Counters(lines.append, clock), lines, clock


def run(counters, layer, *, others=0, dense_heads=()):
    x = torch.randn(1, 2, 256, 16, generator=torch.Generator().manual_seed(0))
    with counters.counting(layer, 256, others):
        attention(x, x, x, causal=True, dense_heads=dense_heads, config=S2OConfig(min_seq_len=0))


def test_nothing_is_said_of_nothing():
    counted, lines, _ = counters()
    counted.flush()
    assert lines == []


def test_the_first_line_comes_at_once_and_the_next_after_a_while():
    counted, lines, clock = counters()
    run(counted, 0, others=3)
    counted.flush()
    assert len(lines) == 1
    assert lines[0].startswith("S2O: 1 sparse calls, one a layer, of 256 queries beside 3 dense ones; of 1 measured")
    run(counted, 0)
    clock.now = INTERVAL - 1
    counted.flush()
    assert len(lines) == 1
    clock.now = INTERVAL
    counted.flush()
    assert lines[1] == "S2O: 1 sparse calls, one a layer, of 256 queries"
    counted.flush()
    assert len(lines) == 2


def test_layers_are_measured_in_turn():
    counted, lines, _ = counters()
    for _ in range(SAMPLED):
        for layer in range(3):
            run(counted, layer)
    counted.flush()
    assert "of 3 measured calls: density " in lines[0]
    assert lines[0].startswith(f"S2O: {3 * SAMPLED} sparse calls")


def test_a_call_that_fails_counts_nothing_and_leaves_the_counters_usable():
    counted, lines, _ = counters()
    with pytest.raises(ZeroDivisionError), counted.counting(0, 256, 0):
        1 / 0  # noqa: B018
    run(counted, 0)
    counted.flush()
    assert lines[0].startswith("S2O: 1 sparse calls")


def test_a_layer_whose_heads_are_all_marked_dense_runs_no_sparse_call():
    counted, lines, _ = counters()
    for layer in range(SAMPLED):  # measured or not
        run(counted, layer, dense_heads=(0, 1))
    counted.flush()
    assert lines == []
    run(counted, 0, dense_heads=(0,))
    counted.flush()
    assert lines[0].startswith("S2O: 1 sparse calls")
