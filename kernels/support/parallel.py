"""Work of one call spread over the CPU's threads, one item a thread.

A segment is many small operations. On all threads most of the time of each goes into waiting for the slowest one, far
more so on a busy machine. One thread an item waits once. Where torch cannot let a thread compute alone, items run in
order on all of its threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from s2o_compile.kernels.support.torch_threads import can_compute_alone, compute_alone

Item = TypeVar("Item")


def for_each(work: Callable[[Item], None], items: Iterable[Item], device: torch.device) -> None:
    """Call ``work`` on every item, in parallel on a CPU, in order elsewhere; items must not depend on each other."""
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1 or not can_compute_alone():
        for item in items:
            work(item)
        return

    inference = torch.is_inference_mode_enabled()

    def alone(item: Item) -> None:
        with torch.inference_mode(inference), torch.no_grad():  # both modes are a thread's own
            work(item)

    with ThreadPoolExecutor(threads, initializer=compute_alone) as pool:
        list(pool.map(alone, items))  # the list raises what an item raised
