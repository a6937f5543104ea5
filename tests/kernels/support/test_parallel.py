"""Items of one call on several threads: each once, failures are raised, and what is left is dropped."""

import os
import subprocess
import sys
import threading
import time

import pytest
import torch

from s2o_compile.kernels.support import parallel
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


def test_nothing_runs_on_after_a_failure():
    """Items write into tensors of the call, which are another call's once it has ended."""
    begun, going = threading.Barrier(2, timeout=30), []

    def work(item: int) -> None:
        begun.wait()
        if item == 0:
            raise ValueError(item)
        going.append(item)
        threading.Event().wait(0.2)
        going.remove(item)

    with pytest.raises(ValueError, match="0"):
        for_each(work, range(2), CPU)
    assert not going


def threads_of(items: int) -> set[int]:
    seen, both = set(), threading.Barrier(items, timeout=30)

    def work(_: int) -> None:
        both.wait()
        seen.add(threading.get_ident())

    for_each(work, range(items), CPU)
    return seen


def test_threads_are_kept_for_the_next_call():
    if not can_compute_alone():
        pytest.skip("items run in order")
    assert threads_of(2) == threads_of(2)
    torch.set_num_threads(3)
    assert len(threads_of(3)) == 3


def test_threads_of_numbers_that_are_no_longer_asked_for_end():
    if not can_compute_alone():
        pytest.skip("items run in order")
    before = threading.active_count()
    for number in range(2, 9):
        torch.set_num_threads(number)
        threads_of(number)
    deadline = time.monotonic() + 30
    while threading.active_count() - before > 7 + 8:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_without_threads_the_caller_does_what_is_left(monkeypatch):
    if not can_compute_alone():
        pytest.skip("items run in order")
    for_each(id, range(2), CPU)
    (_, pool), seen = parallel._idle[-1], []
    submit, given = pool.submit, iter([True, False])

    def rarely(work):
        if next(given):
            return submit(work)
        raise RuntimeError("can't start new thread")

    def work(item: int) -> None:
        threading.Event().wait(0.01)
        seen.append(item)

    monkeypatch.setattr(pool, "submit", rarely)
    for_each(work, range(20), CPU)
    assert sorted(seen) == list(range(20))


def test_calls_at_the_same_time_do_not_wait_for_each_other():
    first_began, second_ended = threading.Event(), threading.Event()

    def long(_: int) -> None:
        first_began.set()
        assert second_ended.wait(30)

    torch.set_num_threads(2)
    first = threading.Thread(target=for_each, args=(long, range(2), CPU))
    first.start()
    assert first_began.wait(30)
    for_each(id, range(9), CPU)
    second_ended.set()
    first.join(30)
    assert not first.is_alive()


AT_THE_END = """
import threading, torch
from s2o_compile.kernels.support.parallel import for_each
torch.set_num_threads(2)
done = []
for_each(id, range(9), torch.device("cpu"))
def late():
    threading.main_thread().join()
    for_each(done.append, range(9), torch.device("cpu"))
    print(sorted(done))
threading.Thread(target=late).start()
"""


def test_a_thread_that_outlives_the_main_one_computes_on():
    found = subprocess.run([sys.executable, "-c", AT_THE_END], capture_output=True, text=True, timeout=60, check=True)
    assert found.stdout == f"{list(range(9))}\n", found.stderr


IN_A_CHILD = """
import os, torch
from s2o_compile.kernels.support.parallel import for_each
torch.set_num_threads(2)
done = []
for_each(done.append, range(9), torch.device("cpu"))
child = os.fork()
if not child:
    for_each(done.append, range(9), torch.device("cpu"))
    os._exit(len(done))
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_child_makes_threads_of_its_own():
    """It has none of its parent's: what it left to them would wait forever."""
    found = subprocess.run([sys.executable, "-c", IN_A_CHILD], capture_output=True, text=True, timeout=60, check=True)
    assert found.stdout == "18\n"
