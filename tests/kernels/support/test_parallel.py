"""Items of one call on several threads: each once, failures are raised, and what is left is dropped."""

import threading

import pytest
import torch

from s2o_compile.kernels.support.parallel import can_compute_alone, for_each

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_every_item_is_done_once():
    seen, modes = [], set()

    def work(item: int) -> None:
        seen.append(item)
        modes.add((torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_num_threads()))

    with torch.inference_mode():
        for_each(work, iter(range(500)), CPU)
    assert sorted(seen) == list(range(500))
    assert modes == {(False, True, 1 if can_compute_alone() else 2)}


def test_two_items_run_at_a_time():
    if not can_compute_alone():
        pytest.skip("items run in order")
    barrier = threading.Barrier(2, timeout=30)
    for_each(lambda _: barrier.wait(), range(2), CPU)


@pytest.mark.parametrize("failure", [ValueError("item 3"), IndexError("item 3")], ids=["ValueError", "IndexError"])
def test_a_failure_is_raised_and_the_rest_is_dropped(failure):
    seen = []

    def work(item: int) -> None:
        if item == 3:
            raise failure
        seen.append(item)
        threading.Event().wait(0.001)

    with pytest.raises(type(failure), match="item 3"):
        for_each(work, range(2000), CPU)
    assert len(seen) < 1000
