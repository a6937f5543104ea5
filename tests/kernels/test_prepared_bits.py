"""Prepared calls have the bits of calls planned anew: interpreted, and on a GPU by streams, threads and graphs."""

import threading

import pytest
import torch

pytest.importorskip("triton")

from s2o_compile.kernels import ops, prepared, schedule
from s2o_compile.kernels.core.call import AttentionCall
from s2o_compile.kernels.core.mask import AttentionMask
from s2o_compile.kernels.core.options import _copied
from s2o_compile.kernels.impl.triton import direct
from s2o_compile.kernels.impl.triton.forward import gathered_fwd_kernel
from s2o_compile.kernels.support.errors import InputError
from tests.conftest import CUDA, INTERPRETED
from tests.helpers.prepared_calls import KNOWN, UNKNOWN, attend, call_of, moved, options_of, run, same

DEVICES = [INTERPRETED, CUDA]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("error", [None, 0.02])
def test_the_bits_are_those_of_the_call_planned_anew(device, error, monkeypatch):
    on_cpu = device == "cpu"
    call = call_of(256 if on_cpu else 4096, heads=2, kv_heads=1 if on_cpu else 2, device=device)
    call = call if not on_cpu else call.over(*(x[:1] for x in call.tensors))
    options = options_of(error=error)
    expected = run(call, options)
    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    assert all(same(expected, run(call, options)) for _ in range(1 if on_cpu else 3))
    assert prepared.newest() is not None


def poisoned(empty):
    """Memory that holds what nobody would write."""
    return lambda *args, **keywords: x.fill_(111) if (x := empty(*args, **keywords)).dtype == torch.uint8 else x


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestOnCuda:
    @pytest.fixture(autouse=True)
    def _prepared(self, monkeypatch):
        monkeypatch.setattr(schedule, "SCRATCH_BYTES", 2**21)
        monkeypatch.setattr(schedule, "SCRATCH_SHARE", 2**20)

    @staticmethod
    def call(length=4096, dtype=torch.bfloat16):
        return call_of(length, heads=8, kv_heads=4, dim=64, device="cuda", dtype=dtype)

    def test_other_tensors_get_their_own_results(self):
        options = options_of(segment_len=None, error=0.05)
        run(self.call(), options)
        for seed in range(3):
            call = self.call()
            call = call.over(*(x + 0.1 * seed * torch.randn_like(x) for x in call.tensors))
            result = run(call, options)
            prepared.forget()
            assert same(run(call, options), result)
            run(call, options)

    def test_the_launch_that_looks_at_no_argument_is_used(self, monkeypatch):
        call, options = self.call(), options_of()
        expected = [run(call, options) for _ in range(2)]
        monkeypatch.setattr(type(gathered_fwd_kernel), "run", None)
        assert same(expected[0], run(call, options))

    @pytest.mark.parametrize("error", [None, 0.1, 0.05])
    @pytest.mark.parametrize("case", [*KNOWN, "sinks", "one slice"])
    def test_the_bits_are_the_same_at_once_and_one_by_one(self, case, error, monkeypatch):
        given = {**KNOWN, **UNKNOWN, "one slice": {}}[case]
        if case == "padded":
            given = {
                "mask": AttentionMask(causal=True, key_mask=torch.arange(4096, device="cuda").expand(2, -1) % 7 > 0)
            }
        given = given if case != "sinks" else {"sinks": torch.zeros(8, device="cuda")}
        if case == "one slice":
            monkeypatch.setattr(schedule, "SCRATCH_BYTES", 2**30)
        call, results = self.call().but(**given), []
        for at_most, replay in ((0, None), (128, lambda *_: None), (128, direct.replay)):
            with monkeypatch.context() as changed:
                changed.setattr(prepared, "KEPT", at_most)
                changed.setattr(direct, "replay", replay)
                prepared.forget()
                results += [attend(call, error=error) for _ in range(4)]
                launches = prepared.newest()
        assert launches.replay is not None
        assert (launches.turns == 1) == (case == "one slice")
        assert all(same(results[0], result) for result in results)

    def test_a_cuda_graph_other_streams_and_threads_go_straight_to_launches(self, monkeypatch):
        calls = [self.call(4096 - 128 * (n % 2)) for n in range(4)]
        calls = [call.over(*(x * (1 + n) for x in call.tensors)) for n, call in enumerate(calls)]
        expected = [[attend(call) for _ in range(3)][-1] for call in calls]
        torch.cuda.synchronize()
        monkeypatch.setattr(AttentionCall, "of", None)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = attend(calls[0])
        failed = []

        def attend_often(number):
            with torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(10):
                    result = attend(calls[number])
                    torch.cuda.current_stream().synchronize()
                    failed.extend([number] * (not same(expected[number], result)))

        threads = [threading.Thread(target=attend_often, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failed
        for _ in range(3):
            result[0].zero_()
            graph.replay()
            torch.cuda.synchronize()
            assert same(expected[0], result)

    def test_a_cuda_graph_has_taus_of_its_own(self):
        call, taus = self.call(), options_of(tau=(0.1, 0.2, 0.3, 0.4) * 2).to_op_kwargs()
        arguments = {"causal": True, "causal_offset": 0, "scale": call.scale, **taus}
        expected = [ops.attention(*call.tensors, **arguments) for _ in range(3)][-1]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = ops.attention(*call.tensors, **arguments)
        _copied.cache_clear()
        torch.cuda.empty_cache()
        result[0].zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert same(expected, result)

    def test_a_refused_launch_is_an_error(self, monkeypatch):
        call, packed = self.call(), direct.packed
        expected = [attend(call) for _ in range(3)][-1]
        prepared.forget()
        with monkeypatch.context() as changed:

            def without_blocks(*given, **more):
                launch = packed(*given, **more)
                return launch[:8] + bytes(8) + launch[16:]

            changed.setattr(direct, "packed", without_blocks)
            for _ in range(2):
                attend(call)
            with pytest.raises(RuntimeError, match="expected CUDA_SUCCESS, got CUDA_ERROR_INVALID_VALUE"):
                attend(call)
        prepared.forget()
        assert all(same(expected, attend(call)) for _ in range(3))

    def test_tensors_at_odd_addresses_run_kernels_of_their_own(self):
        call, options = self.call(), options_of()
        expected = [run(call, options) for _ in range(3)][-1]
        for name in ("query", "key", "value"):
            for _ in range(3):
                odd = call.but(**{name: moved(getattr(call, name))})
                assert getattr(odd, name).data_ptr() % 16
                for x, y in zip(expected[:2], run(odd, options)[:2], strict=True):
                    torch.testing.assert_close(x, y, rtol=2e-2, atol=2e-2)

    def test_a_cuda_graph_holds_it(self):
        call, options = self.call(), options_of(error=0.05)
        expected = [run(call, options) for _ in range(3)][-1]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = run(call, options)
        for _ in range(3):
            result.output.zero_()
            graph.replay()
            torch.cuda.synchronize()
            assert same(expected, result)

    def test_streams_and_threads_have_memory_of_their_own(self):
        options, failed = options_of(error=0.05), []
        calls = [self.call(4096 - 128 * (n % 2)) for n in range(4)]
        calls = [call.over(*(x * (1 + n) for x in call.tensors)) for n, call in enumerate(calls)]
        expected = [[run(call, options) for _ in range(3)][-1] for call in calls]
        torch.cuda.synchronize()

        def attend(number):
            with torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(10):
                    result = run(calls[number], options)
                    torch.cuda.current_stream().synchronize()
                    failed.extend([number] * (not same(expected[number], result)))

        threads = [threading.Thread(target=attend, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failed

    def test_a_new_thread_goes_straight_to_launches(self, monkeypatch):
        """It has no context yet, for it has called nothing of CUDA."""
        monkeypatch.setattr(schedule, "SCRATCH_BYTES", 2**30)  # one slice: no other stream makes one
        call, found = self.call(), []
        expected = [attend(call) for _ in range(3)][-1]
        torch.cuda.synchronize()
        monkeypatch.setattr(AttentionCall, "of", None)
        thread = threading.Thread(target=lambda: found.append(attend(call)))
        thread.start()
        thread.join()
        assert same(expected, found[0])

    def test_keys_on_the_cpu_are_refused(self):
        call = self.call()
        for _ in range(4):
            attend(call)
        with pytest.raises(InputError, match="device of key"):
            attend(call.but(key=call.key.cpu()))

    def test_memory_that_is_freed_behind_a_call_is_not_written_before_it_is_read(self):
        """The host is far ahead: inputs, workspaces and results of calls take each other's memory."""
        call = self.call()
        expected = [attend(call) for _ in range(3)][-1]
        sums = []
        for _ in range(50):
            copies = call.over(*(x.clone() for x in call.tensors))
            output, _ = attend(copies)
            copies.key.fill_(torch.nan)
            del copies
            sums.append((output.view(torch.int16) != expected[0].view(torch.int16)).sum())
            output.fill_(torch.nan)
            del output
        assert not torch.stack(sums).any()

    def test_other_places_of_a_tensor_are_read_there(self):
        call = self.call()
        expected = [attend(call) for _ in range(3)][-1]
        storage = torch.cat([torch.full_like(call.key, torch.nan), call.key])
        assert same(expected, attend(call.over(call.query, storage[2:], call.value)))

    @pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
    def test_every_device_is_gone_straight_to(self, monkeypatch):
        """While another one is current."""
        here = self.call()
        there = here.over(*(x.to("cuda:1") for x in here.tensors))
        expected = [[attend(call) for _ in range(3)][-1] for call in (here, there)]
        monkeypatch.setattr(AttentionCall, "of", None)
        for current in (0, 1):
            with torch.cuda.device(current):
                assert same(expected[0], attend(here))
                assert same(expected[0], [x.to("cuda:0") for x in attend(there)])

    @pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
    def test_every_device_has_kernels_of_its_own(self):
        call, options = self.call(), options_of()
        there = call.over(*(x.to("cuda:1") for x in call.tensors))
        results = [[run(each, options) for _ in range(3)] for each in (call, there)]
        assert same(results[0][2], [x.to("cuda:0") for x in results[1][2]])
