"""A recording, an observer or an audit of one thread says nothing about another, and answers for nobody else."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import threading
import warnings
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import s2o_compile
from s2o_compile import S2OConfig
from s2o_compile.aot import inductor_workarounds as inductor
from s2o_compile.api import watched
from s2o_compile.capture import audit as audit
from s2o_compile.kernels.observe import observe_attention, observing
from s2o_compile.kernels.statistics import record_calls, recording
from s2o_compile.recording import record
from tests.conftest import PACKAGED
from tests.helpers.tiny import tiny_input, tiny_model


def call(site: str = "here", length: int = 130) -> torch.Tensor:
    query = torch.ones(1, 1, length, 8)
    return torch.ops.s2o.attention(query, query, query, causal=True, min_seq_len=0, site=site)[0]


def side_by_side(*works: Callable[[Callable[[], object]], Any]) -> list[Any]:
    """What works return that run in threads of their own, each given a function that waits for all others."""
    barrier = threading.Barrier(len(works), timeout=60)

    def run(work: Callable[[Callable[[], object]], Any]) -> Any:
        try:
            return work(barrier.wait)
        except Exception:
            barrier.abort()
            raise

    with ThreadPoolExecutor(len(works)) as pool:
        return [future.result() for future in [pool.submit(run, work) for work in works]]


class TestRecordings:
    def test_each_thread_records_its_own_calls(self):
        def work(name):
            def inside(wait):
                with record_calls() as calls:
                    wait()
                    call(name)
                    wait()
                return [entry.site for entry in calls]

            return inside

        assert side_by_side(work("left"), work("right")) == [["left"], ["right"]]

    def test_a_thread_without_a_recording_pays_for_none(self):
        def open_one(wait):
            with record_calls():
                wait()
                wait()

        def look(wait):
            wait()
            seen = recording(), observing()
            wait()
            return seen

        assert side_by_side(open_one, look)[1] == (False, False)

    def test_workers_started_inside_are_recorded_in_a_copy_of_the_context(self):
        with record_calls() as calls, ThreadPoolExecutor(1) as pool:
            pool.submit(call, "on its own").result()
            pool.submit(contextvars.copy_context().run, call, "in a copy").result()
        assert [entry.site for entry in calls] == ["in a copy"]

    def test_blocks_may_end_in_another_order(self):
        first, second = record_calls(), record_calls()
        one = first.__enter__()
        other = second.__enter__()
        first.__exit__(None, None, None)
        call()
        second.__exit__(None, None, None)
        assert (len(one), len(other), recording()) == (0, 1, False)

    def test_a_block_may_end_in_another_thread(self):
        block = record_calls()
        calls = block.__enter__()
        side_by_side(lambda _: block.__exit__(None, None, None))
        call()
        assert (calls, recording()) == ([], False)

    def test_a_block_inside_a_generator(self):
        def generate():
            with record_calls() as calls:
                call("first")
                yield calls
                call("last")

        generator = generate()
        calls = next(generator)
        list(generator)
        call("behind it")
        assert [entry.site for entry in calls] == ["first", "last"]

    def test_asyncio_tasks(self):
        """A task sees its own block; one that outlives the block it was started in is not recorded behind it."""

        async def own(name):
            with record_calls() as calls:
                await asyncio.sleep(0)
                call(name)
                await asyncio.sleep(0)
            return [entry.site for entry in calls]

        async def late(over):
            call("inside")
            await over.wait()
            call("behind")

        async def main():
            over = asyncio.Event()
            with record_calls() as calls:
                task = asyncio.create_task(late(over))
                names = await asyncio.gather(own("left"), own("right"))
            over.set()
            await task
            return names, sorted(entry.site for entry in calls)

        assert asyncio.run(main()) == ([["left"], ["right"]], ["inside", "left", "right"])

    def test_a_checkpoint_calls_again_in_the_thread_of_the_backward(self):
        x = torch.ones(1, requires_grad=True)
        with record_calls() as calls:
            checkpoint(lambda x: x * call().sum(), x, use_reentrant=False).sum().backward()
        assert len(calls) == 2

    def test_a_context_that_outlives_the_block_keeps_nothing_alive(self):
        """Calls hold tensors, and a server's tasks live for long."""

        class Observer:
            def __call__(self, seen):
                return None

        observer = Observer()
        gone = weakref.ref(observer)
        with observe_attention(observer):
            outlives = contextvars.copy_context()
        del observer
        gc.collect()
        assert gone() is None
        assert not outlives.run(observing)

    @pytest.mark.usefixtures("fresh_dynamo")
    def test_compiled_models(self):
        """What one thread compiles and calls is in no report of another, and no second look compiles again."""
        models = [s2o_compile.optimize(tiny_model(), S2OConfig(min_seq_len=0, inner_backend="eager")) for _ in "ab"]

        def work(model, length):
            def inside(wait):
                with torch.no_grad(), record() as recorded:
                    wait()
                    model(tiny_input(length))
                    wait()
                with torch.no_grad(), record() as again:
                    model(tiny_input(length))
                return {entry.n_queries for entry in recorded.calls}, len(recorded.graphs), len(again.graphs)

            return inside

        found = side_by_side(work(models[0], 140), work(models[1], 150))
        assert found == [({140}, 1, 0), ({150}, 1, 0)]


class TestObservers:
    def test_an_observer_answers_for_its_own_thread(self):
        def observed(wait):
            with observe_attention(lambda seen: torch.full_like(seen.query, 7.0)):
                wait()
                output = call()
                wait()
            return output.unique().round(decimals=3).unique().tolist()

        def other(wait):
            wait()
            output = call()
            wait()
            return output.unique().round(decimals=3).unique().tolist()

        assert side_by_side(observed, other) == [[7.0], [1.0]]

    @pytest.mark.usefixtures("fresh_dynamo")
    def test_also_of_compiled_code(self):
        model = s2o_compile.optimize(tiny_model(), S2OConfig(min_seq_len=0, inner_backend="eager"))
        with torch.no_grad():
            expected = model(tiny_input(140))

        def observed(wait):
            seen = []
            with torch.no_grad(), observe_attention(seen.append):
                wait()
                model(tiny_input(140))
                wait()
            return len(seen)

        def other(wait):
            with torch.no_grad():
                wait()
                output = model(tiny_input(140))
                wait()
            return output

        with torch.no_grad(), record_calls() as calls:
            model(tiny_input(140))
        seen, output = side_by_side(observed, other)
        assert seen == len(calls)
        assert torch.equal(output, expected)


class Waiting(nn.Module):
    """Attention in a module of this name, which lets others go on while it runs."""

    def __init__(self, wait: Callable[[], object]) -> None:
        super().__init__()
        self.wait = wait
        self.inner = nn.Identity()

    def forward(self, x):
        self.wait()
        x = self.inner(x)
        self.wait()
        return nn.functional.scaled_dot_product_attention(x, x, x)


def test_modules_of_other_threads_are_no_place_in_a_audit():
    start, end = threading.Event(), threading.Event()
    entered = threading.Event()

    class Other(nn.Module):
        def __init__(self, inner=None):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            if self.inner is not None:
                return self.inner(x)
            entered.set()
            assert end.wait(60)
            return x

    steps = iter((lambda: (start.set(), entered.wait(60)), lambda: None))
    model = Waiting(lambda: next(steps)())

    def take(_):
        try:
            return audit.take(nn.Sequential(model), (torch.ones(1, 1, 4, 8),), {})
        finally:
            end.set()

    def other(_):
        assert start.wait(60)
        Other(Other())(torch.ones(1))

    (ran,), _ = side_by_side(take, other)
    assert ran.path == "0"


class Crowd:
    """Counts how many threads are inside at once."""

    def __init__(self) -> None:
        self.inside = self.most = 0
        self.lock = threading.Lock()

    def visit(self, x: object = None) -> object:
        """Stay for a while."""
        with self.lock:
            self.inside += 1
            self.most = max(self.most, self.inside)
        threading.Event().wait(0.1)
        with self.lock:
            self.inside -= 1
        return x


def test_two_audits_leave_the_process_as_it_was():
    """The second waits for the first: else it would restore what the first had set."""
    crowd = Crowd()
    before = torch._dynamo.eval_frame._stance
    side_by_side(*[lambda wait: (wait(), audit.take(crowd.visit, (torch.ones(1),), {}))] * 2)
    assert crowd.most == 1
    assert torch._dynamo.eval_frame._stance == before


@pytest.mark.usefixtures("fresh_dynamo")
def test_one_look_at_a_time_resets_dynamo_and_keeps_warnings_off():
    """Also a audit waits for the end of a look: it has filters of its own."""
    crowd = Crowd()

    def look(wait):
        wait()
        with watched():
            crowd.visit()

    before = list(warnings.filters)
    side_by_side(look, look, lambda wait: (wait(), audit.take(crowd.visit, (torch.ones(1),), {})))
    assert crowd.most == 1
    assert warnings.filters == before


@PACKAGED
def test_two_packages_leave_inductor_as_it_was():
    target = inductor.SubgraphLowering
    before = target.__init__
    entered, both, left = threading.Event(), threading.Event(), threading.Event()

    def first(_):
        with inductor.inductor_workarounds():
            entered.set()
            both.wait(0.3)  # the second waits for its turn, and comes in behind this block
        left.set()

    def second(_):
        assert entered.wait(60)
        with inductor.inductor_workarounds():
            both.set()
            assert left.wait(60)

    with patch.object(target, "__init__", before):  # put right behind the test, whatever it found
        side_by_side(first, second)
        assert target.__init__ is before


def test_exports_run_one_at_a_time():
    """torch.export traces for the whole process: two at once end in an assertion of its own."""

    model, config = tiny_model(), S2OConfig(min_seq_len=0, tau=0.0)
    inputs = [tiny_input(length) for length in (140, 150, 160)]

    def work(x):
        def export(wait):
            wait()
            return s2o_compile.export(model, (x,), config=config).module()

        return export

    with torch.no_grad():
        for program, x in zip(side_by_side(*map(work, inputs)), inputs, strict=True):
            torch.testing.assert_close(program(x), model(x))
