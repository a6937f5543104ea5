"""Segments and tiles spread over threads: the same bits, errors passed on, thread counts restored."""

import threading

import pytest
import torch

from s2o_compile.kernels.impl.torch import exact as torch_exact
from s2o_compile.kernels.impl.torch import forward as torch_forward
from s2o_compile.kernels.support import parallel
from s2o_compile.kernels.support.parallel import for_each
from tests.conftest import Case

CPU = torch.device("cpu")


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
class TestTwoThreads:
    @pytest.mark.parametrize("tau", [0.0, 0.5])
    def test_the_result_is_that_of_one_thread(self, tau, build_plan):
        inputs = Case(queries=1000, heads=4, kv_heads=2, batch=2, padding="left").inputs()
        plan = build_plan(inputs)
        results = []
        for threads in (2, 1):
            torch.set_num_threads(threads)
            results.append(torch_forward.attend(inputs.call, plan, tau))
        for ours, expected in zip(*results, strict=True):
            assert torch.equal(ours, expected)

    @pytest.mark.parametrize("window", [None, 40])
    def test_threads_work_in_the_inference_mode_of_the_caller(self, window):
        tensors = [torch.randn(1, heads, 700, 16, generator=torch.Generator().manual_seed(0)) for heads in (4, 2, 2)]
        keywords = {"causal": True, "window": window, "min_seq_len": 0}
        expected, _ = torch.ops.s2o.attention(*tensors, **keywords)
        with torch.inference_mode():
            assert torch.equal(torch.ops.s2o.attention(*tensors, **keywords)[0], expected)

    @pytest.mark.parametrize(
        "case", [Case(queries=700, heads=4, kv_heads=2, window=200), Case(queries=500, softcap=5.0)], ids=str
    )
    def test_the_result_in_position_order_is_that_of_one_thread(self, case, poison_empty):
        inputs = case.inputs()
        results = []
        for threads in (2, 1):
            torch.set_num_threads(threads)
            results.append(torch_exact.attend_exact(inputs.call))
        for ours, expected in zip(*results, strict=True):
            assert torch.equal(ours, expected)

    def test_every_item_is_worked_on_once_with_one_thread_and_without_gradients(self):
        seen = torch.zeros(50, dtype=torch.long)
        inner = []

        def work(item):
            seen[item] += 1
            inner.append((torch.get_num_threads(), torch.is_grad_enabled()))

        for_each(work, range(50), CPU)
        assert (seen == 1).all()
        assert set(inner) == {(1, False)}
        assert torch.get_num_threads() == 2

    def test_no_other_thread_is_changed(self):
        """Neither one that starts while items are worked on, nor the process, nor the matrix library."""
        numbers = []

        def other():
            numbers.append((torch.get_num_threads(), "mkl_get_max_threads() : 2" in torch.__config__.parallel_info()))

        def in_a_thread(_=None):
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()

        in_a_thread()
        for_each(in_a_thread, range(4), CPU)
        other()
        assert numbers == [(2, torch.backends.mkl.is_available())] * 6

    def test_a_torch_that_cannot_let_a_thread_compute_alone_works_in_order(self, monkeypatch):
        monkeypatch.setattr(parallel, "_function", lambda name: None)
        parallel.can_compute_alone.cache_clear()
        order = []
        for_each(order.append, range(5), CPU)
        parallel.can_compute_alone.cache_clear()
        assert order == [0, 1, 2, 3, 4]

    def test_an_error_reaches_the_caller_and_threads_are_restored(self):
        def work(item):
            if item == 3:
                raise ArithmeticError("item 3")

        with pytest.raises(ArithmeticError, match="item 3"):
            for_each(work, range(10), CPU)
        assert torch.get_num_threads() == 2


def test_one_thread_works_in_order():
    order = []
    for_each(order.append, range(5), CPU)
    assert order == [0, 1, 2, 3, 4]
