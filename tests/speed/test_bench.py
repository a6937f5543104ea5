"""``bench``: three ways to run a model, what fails alone, and the verdict."""

import json

import pytest
import torch
from torch import nn

import s2o_compile
from s2o_compile import S2OConfig
from s2o_compile.errors import EvaluationError
from s2o_compile.speed import bench as bench_module
from s2o_compile.speed import measure
from s2o_compile.speed.benchmark import Benchmark, Row
from s2o_compile.speed.measure import Timing, time_calls
from tests.helpers.tiny import TinyAttention

CONFIG = S2OConfig(min_seq_len=128, segment_len=128, inner_backend="eager")


@pytest.fixture(autouse=True)
def without_inductor(monkeypatch, fresh_dynamo):
    """Inductor is not the point."""
    monkeypatch.setitem(bench_module.WAYS, "compiled", lambda model, _: torch.compile(model, backend="eager"))
    monkeypatch.setattr(measure, "CALLS", 1)


class Reader(nn.Module):
    """Token ids to logits [B, N, 97]."""

    def __init__(self):
        super().__init__()
        self.embed, self.attention, self.head = nn.Embedding(97, 32), TinyAttention(), nn.Linear(32, 97)

    def forward(self, input_ids):
        return self.head(self.attention(self.embed(input_ids)))


def ids(length):
    return torch.randint(97, (1, length), generator=torch.Generator().manual_seed(0))


def test_a_model_of_tokens_at_two_lengths():
    model, steps = Reader().eval(), []

    def progress(name):
        steps.append(name)
        return torch.no_grad()

    found = s2o_compile.bench(model, [ids(400), {"input_ids": ids(300)}], CONFIG, progress=progress)
    assert [row.tokens for row in found.rows] == [300, 400]
    assert len(steps) == 2 * bench_module.STEPS
    for row in found.rows:
        assert (row.sparse, row.sites) == (1, 1)
        assert row.density > 0
        assert row.error >= 0
        assert row.loss_difference == pytest.approx(row.loss_s2o - row.loss_dense)
        with torch.no_grad():
            logits = model(ids(row.tokens))[0, :-1]
        assert row.loss_dense == pytest.approx(nn.functional.cross_entropy(logits, ids(row.tokens)[0, 1:]).item(), 1e-5)
        for timing in (row.plain, row.compiled, row.s2o):
            assert timing.seconds > 0
            assert (timing.calls, timing.failure) == (1, "")
    written = json.loads(found.to_json())
    assert (written["format"], written["dtype"], written["model"]) == (1, "float32", "Reader")
    assert written["rows"][0]["speedup"] == pytest.approx(found.rows[0].plain.seconds / found.rows[0].s2o.seconds)
    assert written["verdict"] == found.verdict
    assert found.title in str(found)
    assert found.verdict in str(found)


def test_a_model_without_logits_has_no_loss():
    found = s2o_compile.bench(TinyAttention().eval(), torch.randn(1, 300, 32), CONFIG)
    (row,) = found.rows
    assert (row.tokens, row.sparse, row.loss_dense, row.loss_difference) == (300, 1, None, None)
    assert "loss" not in found.verdict


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"), "out of memory (CUDA out of memory."),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "out of memory ("),
        (RuntimeError("InvalidCxxCompiler: no C++ compiler"), "RuntimeError: InvalidCxxCompiler"),
    ],
    ids=["cuda", "cpu", "no-compiler"],
)
def test_a_way_that_fails_leaves_the_others(monkeypatch, error, said):
    def broken(*_, **__):
        def call(*_, **__):
            raise error

        return call

    monkeypatch.setitem(bench_module.WAYS, "compiled", broken)
    found = s2o_compile.bench(Reader().eval(), ids(300), CONFIG)
    (row,) = found.rows
    assert row.compiled == Timing(failure=row.compiled.failure)
    assert said in row.compiled.failure
    assert row.plain.seconds
    assert row.s2o.seconds
    assert row.gain == row.speedup
    assert f"torch.compile at 300 tokens failed: {row.compiled.failure}" in str(found)


def test_an_interrupt_is_no_failure_of_a_way():
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        time_calls(interrupted, torch.device("cpu"))


@pytest.mark.parametrize(("device", "median"), [("cpu", 7.0), ("cuda", 2.0)])
def test_what_a_gpu_does_once_is_not_timed(monkeypatch, device, median):
    """The second call on CUDA writes its launches down, and may wait for a compiler."""
    taken = iter([9.0, 8.0, 7.0, 2.0, 2.0, 2.0])
    for name in ("reset_peak", "peak_bytes", "free_memory"):
        monkeypatch.setattr(measure, name, lambda *_: 0)
    monkeypatch.setattr(measure, "CALLS", 3)
    monkeypatch.setattr(measure, "TIMED_SECONDS", 99.0)
    monkeypatch.setattr(measure, "seconds_of", lambda call, device: call())
    found = time_calls(lambda: next(taken), torch.device(device))
    assert (found.first_seconds, found.seconds) == (9.0, median)


def test_short_inputs_of_a_given_configuration_run_dense():
    found = s2o_compile.bench(Reader().eval(), ids(300), S2OConfig(min_seq_len=4096, inner_backend="eager"))
    assert found.rows[0].sparse == 0
    assert found.verdict == "S2O changes nothing here: no attention ran sparse (ran dense)."


@pytest.mark.parametrize(
    ("inputs", "said"),
    [([], "at least one input, got none"), ([3], "a tensor or a mapping of keyword inputs, got int")],
    ids=["none", "number"],
)
def test_inputs_that_are_none(inputs, said):
    with pytest.raises(EvaluationError, match=said):
        s2o_compile.bench(Reader().eval(), inputs, CONFIG)


def test_only_an_original_in_eval_mode():
    model = Reader().eval()
    compiled, optimized = torch.compile(model, backend="eager"), s2o_compile.optimize(model, CONFIG)
    for given, said in (
        (Reader(), "expected a model in eval mode"),
        (compiled, "bench: expected an uncompiled"),
        (optimized, "bench: expected an uncompiled"),
    ):
        with pytest.raises(EvaluationError, match=said):
            s2o_compile.bench(given, ids(300))


def row(tokens, plain, compiled, s2o, sparse=1):
    times = (Timing(seconds=x) if x else Timing(failure="out of memory (9 GiB)") for x in (plain, compiled, s2o))
    named = dict(zip(("plain", "compiled", "s2o"), times, strict=True))
    return Row(tokens=tokens, **named, sparse=sparse, sites=2, density=0.4, error=0.021, loss_dense=2.0, loss_s2o=2.003)


COSTS = "; error 2.1% (sampled), loss +0.0030."
USE, NOT = "Use it from {} tokens on: at {} tokens it ", "Do not use it up to {} tokens: there it is "
VERDICTS = {
    "wins": ([row(8192, 3.0, 2.0, 1.0)], USE.format(8192, 8192) + "is 2.00 times as fast as torch.compile"),
    "wins-late": (
        [row(4096, 1.0, 1.0, 2.0), row(8192, 4.0, 3.0, 2.0)],
        USE.format(8192, 8192) + "is 1.50 times as fast as torch.compile",
    ),
    "wins-twice": (
        [row(4096, 4.0, 3.0, 2.0), row(8192, 6.0, 7.0, 2.0)],
        USE.format(4096, 8192) + "is 3.00 times as fast as plain PyTorch",
    ),
    "loses": ([row(4096, 1.0, 2.0, 2.0)], NOT.format(4096) + "2.00 times as slow as plain PyTorch"),
    "loses-late": (
        [row(4096, 4.0, 3.0, 2.0), row(8192, 1.0, 1.0, 2.0)],
        NOT.format(8192) + "2.00 times as slow as plain PyTorch",
    ),
    "equal": ([row(4096, 1.01, 1.02, 1.0)], NOT.format(4096) + "no faster than plain PyTorch"),
    "alone": ([row(4096, None, None, 2.0)], USE.format(4096, 4096) + "ran where both others failed"),
    "one-rival": ([row(4096, None, 3.0, 2.0)], USE.format(4096, 4096) + "is 1.50 times as fast as torch.compile"),
}


@pytest.mark.parametrize("kind", VERDICTS)
def test_verdict(kind):
    rows, said = VERDICTS[kind]
    found = Benchmark(model="m", device="cpu", dtype="float32", config=CONFIG, rows=tuple(rows))
    assert found.verdict == said + COSTS


def test_no_verdict_without_s2o():
    found = Benchmark(model="m", device="cpu", dtype="float32", config=CONFIG, rows=(row(4096, 1.0, 1.0, None),))
    assert found.verdict == "No verdict: S2O did not run (out of memory (9 GiB))."


def test_no_attention_is_sparse_at_some_lengths():
    rows = row(4096, 4.0, 4.0, 2.0), row(8192, None, None, 2.0, sparse=0)
    found = Benchmark(model="m", device="cpu", dtype="float32", config=CONFIG, rows=rows)
    assert found.verdict.startswith("Use it from 4096 tokens on: at 4096 tokens it is 2.00 times")


def test_memory_is_told_where_it_was_forgotten_before(monkeypatch, tmp_path):
    cpu = torch.device("cpu")
    assert time_calls(lambda: None, cpu).peak_bytes != 0
    monkeypatch.setattr(measure, "_CLEAR", tmp_path / "none" / "clear_refs")
    assert time_calls(lambda: None, cpu).peak_bytes is None


@pytest.mark.gpu
def test_on_a_gpu(monkeypatch):
    monkeypatch.undo()
    found = s2o_compile.bench(Reader().cuda().eval(), ids(2048), S2OConfig(min_seq_len=128))
    (row,) = found.rows
    assert row.sparse == 1
    assert all(timing.peak_bytes > 0 for timing in (row.plain, row.compiled, row.s2o))
    assert found.device == torch.cuda.get_device_name()
