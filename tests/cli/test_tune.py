"""``s2o tune``: what is checked, chosen and written; the clock is made up where a choice depends on it."""

import json
import warnings
from concurrent.futures.process import BrokenProcessPool
from importlib.metadata import version

import pytest
import torch

from s2o_compile import OptionError
from s2o_compile.cli import tune
from s2o_compile.cli.tune import Length, Shape, Timing
from s2o_compile.kernels.core import tuned
from s2o_compile.kernels.core.tuned import Launch
from tests.conftest import CUDA, INTERPRETED

CPU = torch.device("cpu")
SMALL = {"heads": 2, "kv_heads": 1, "head_dim": 16, "dtype": torch.float32}


def ticking(*times):
    """A clock that runs every call once and says these times in turn."""
    left = list(times)

    def clock(call):
        call()
        return left.pop(0)

    return clock


@pytest.fixture
def triton_forward(monkeypatch):
    pytest.importorskip("triton")
    from s2o_compile.kernels.impl.triton import forward as triton_forward

    monkeypatch.setattr(tune, "CHECKED_LEN", 300)  # interpreted, 1024 take minutes
    return triton_forward


class Processes:
    """A pool that works in this process."""

    workers = 0

    def __init__(self, workers, context):
        Processes.workers = workers
        assert context.get_start_method() == "spawn"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return False

    def map(self, function, parts):
        return map(function, parts)


def broken():
    raise BrokenProcessPool("a process ended")


@pytest.mark.filterwarnings("ignore:divide by zero encountered:RuntimeWarning")
class TestSweep:
    @pytest.mark.parametrize("device", [INTERPRETED, CUDA])
    def test_times_the_present_configuration_first(self, device, triton_forward):
        shape = Shape(**SMALL, device=torch.device(device))
        present = tuned.launch(shape.device, 16, torch.float32)
        other = Launch(key_block=16, stages=1)
        timings = list(tune.sweep(shape, 256, [present, other], clock=ticking(4.0, 2.0, 3.0, 1.0)))
        assert timings == [
            Timing(launch=present, gathered_ms=4.0, exact_ms=2.0),
            Timing(launch=other, gathered_ms=3.0, exact_ms=1.0),
        ]
        assert tune.best(timings).launch == other
        assert tuned.launch(shape.device, 16, torch.float32) == present

    @pytest.mark.parametrize("device", [INTERPRETED, CUDA])
    def test_a_wrong_or_failing_configuration_is_never_timed(self, device, triton_forward, monkeypatch):
        shape = Shape(**SMALL, device=torch.device(device))
        wrong, failing = Launch(key_block=16), Launch(key_block=64)
        attend = triton_forward.attend

        def broken(call, *rest):
            chosen = tuned.launch(call.query.device, 16, torch.float32)
            if chosen == failing:
                raise RuntimeError("out of resources\nand more")
            result = attend(call, *rest)
            return result._replace(output=result.output + 1e-3) if chosen == wrong else result

        monkeypatch.setattr(triton_forward, "attend", broken)
        first, *others = tune.sweep(shape, 256, [wrong, failing], clock=ticking(1.0, 1.0))
        assert not first.failed
        assert others[0].failed.startswith("wrong: error 0.001 beyond")
        assert others[1].failed == "RuntimeError: out of resources"
        with pytest.raises(OptionError, match="expected some configuration to run, got wrong"):
            tune.best(others)

    def test_every_configuration_is_compiled_ahead_whatever_fails(self, monkeypatch):
        ran, tried = [], tune.candidates()[:5]

        def call():
            ran.append(tuned.launch(torch.device("cpu"), 16, torch.float32))
            if ran[-1] == tried[1]:
                raise RuntimeError("out of resources")

        monkeypatch.setattr(tune, "_calls", lambda *_: [(call, call), (call, call)])
        monkeypatch.setattr(tune, "ProcessPoolExecutor", Processes)
        monkeypatch.setattr(tune.os, "cpu_count", lambda: 6)
        shape = Shape(**SMALL, device=torch.device("cpu"))
        tune.compile_ahead(shape, 256, tried)
        assert Processes.workers == 3
        assert sorted(map(repr, ran)) == sorted(map(repr, tried * 4))
        monkeypatch.setattr(tune, "_calls", lambda *_: 1 / 0)  # such as too little memory
        tune.compile_ahead(shape, 256, tried)
        monkeypatch.setattr(Processes, "map", lambda *_: broken())
        tune.compile_ahead(shape, 256, tried)  # the sweep compiles then

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    def test_processes_compile_what_the_sweep_runs(self, tmp_path, monkeypatch):
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
        shape, tried = Shape(**SMALL, device=torch.device("cuda")), [Launch(key_block=32, num_warps=8, stages=1)]
        tune.compile_ahead(shape, 2048, tried)
        compiled = {path.name for path in tmp_path.rglob("*.cubin")}
        assert {"gathered_fwd_kernel.cubin", "exact_fwd_kernel.cubin"} <= compiled
        files = {*tmp_path.rglob("*.cubin")}
        assert not any(timing.failed for timing in tune.sweep(shape, 2048, tried, clock=ticking(1.0, 1.0, 1.0, 1.0)))
        new = set(tmp_path.rglob("*.cubin")) - files
        assert len(new) <= 3, "only the present configuration was left to compile"

    def test_every_candidate_is_one_that_a_file_may_hold(self):
        assert len(set(tune.candidates())) == len(tune.candidates()) == 24


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ({1024: (1, 2), 2048: (1, 2)}, 1024),
        ({1024: (3, 2), 2048: (1, 2), 4096: (1, 2)}, 2048),
        ({1024: (1, 2), 2048: (3, 2), 4096: (1, 2)}, 4096),
        ({1024: (1, 2), 2048: (3, 2)}, None),
        ({8192: (3, 2), 16384: (3, 2)}, tuned.NEVER),
        ({8192: (3, 2), 16384: (1, 2)}, 16384),
        ({8192: (1.98, 2), 16384: (1, 2)}, 16384),
        ({8192: (1.9, 2), 16384: (1, 2)}, 8192),
        ({8192: (3, 2), 16384: (1.98, 2)}, None),
        ({8192: (1, 2), 16384: (1.98, 2)}, 8192),
    ],
    ids=[
        "always",
        "late",
        "with-an-exception",
        "not-at-the-longest",
        "never",
        "at-the-longest",
        "a-tie",
        "just",
        "a-tie-at-the-longest",
        "a-tie-behind",
    ],
)
def test_crossover(times, expected):
    lengths = [Length(length=n, s2o_ms=ours, dense_ms=dense, backend="") for n, (ours, dense) in times.items()]
    assert tune.crossover(lengths) == expected


def test_what_a_call_does_once_is_not_timed(monkeypatch):
    """On CUDA the second call of a kind writes its launches down, and the third may wait for a compiler."""
    monkeypatch.setattr(tune, "TIMED_SECONDS", 0.0)
    monkeypatch.setattr(tune, "seconds_of", lambda call, device: call())
    monkeypatch.setattr(tune.torch.cuda, "is_available", lambda: True)
    taken = iter([9.0, 9.0, 9.0, 1.0, 2.0, 3.0])
    assert tune.milliseconds(lambda: next(taken)) == 2000


def test_what_a_backend_says_against_inputs_is_not_shown(monkeypatch):
    def dense(*inputs):
        warnings.warn("flash attention kernel not used because", UserWarning, stacklevel=2)

    monkeypatch.setattr(tune, "_dense", dense)
    with warnings.catch_warnings(record=True) as shown:
        tune.compare(Shape(**SMALL, device=torch.device("cpu")), 512, clock=lambda call: call() or 1.0)
    assert not shown


def test_compare_times_both():
    found = tune.compare(Shape(**SMALL, device=torch.device("cpu")), 512, clock=ticking(2.0, 3.0))
    assert (found.s2o_ms, found.dense_ms) == (2.0, 3.0)


class TestFile:
    @pytest.fixture
    def path(self, tmp_path, monkeypatch):
        monkeypatch.setenv(tuned.FILE_VARIABLE, str(tmp_path / "folder" / "tuned.json"))
        yield tuned.user_file()
        tuned.forget()

    def write(self, path, dim, launch, crossover=1024):
        timing = Timing(launch=launch, gathered_ms=1.0, exact_ms=2.0)
        crossovers = {} if crossover is None else {"float32": crossover}
        return tune.write(path, CPU, crossovers=crossovers, launches={(dim, "float16"): timing})

    def test_what_is_written_is_what_runs(self, path, monkeypatch):
        monkeypatch.setattr("sys.argv", ["/bin/s2o", "tune"])
        chosen = Launch(key_block=16, num_warps=4, stages=3, maxnreg=96)
        self.write(path, 64, chosen)
        assert tuned.crossover(CPU, torch.float32) == 1024
        assert tuned.user_entries()["cpu"].launches == {(64, torch.float16): chosen}
        about = json.loads(path.read_text())["devices"]["cpu"]["about"]
        assert about["command"] == "s2o tune"
        assert about["torch"] == version("torch")
        assert about["date"]

    def test_no_crossover_found_leaves_the_built_in_one(self, path):
        self.write(path, 64, Launch(key_block=16), crossover=None)
        assert tuned.crossover(CPU, torch.float32) == 4096

    def test_other_entries_stay(self, path):
        self.write(path, 64, Launch(key_block=16))
        content = json.loads(path.read_text())
        content["devices"]["NVIDIA A100"] = {"crossover": 7}
        path.write_text(json.dumps(content))
        self.write(path, 128, Launch(key_block=32), crossover=2048)
        self.write(path, 64, Launch(key_block=128), crossover=2048)
        entries = tuned.user_entries()
        assert entries["NVIDIA A100"].crossover == 7
        launches = {(128, torch.float16): Launch(key_block=32), (64, torch.float16): Launch(key_block=128)}
        assert (entries["cpu"].crossovers, entries["cpu"].launches) == ({torch.float32: 2048}, launches)

    def test_other_dtypes_stay(self, path):
        for name, length in (("bfloat16", tuned.NEVER), ("float32", 4096), ("float32", 2048)):
            tune.write(path, CPU, crossovers={name: length}, launches={})
        assert json.loads(path.read_text())["devices"]["cpu"]["crossovers"] == {"bfloat16": "never", "float32": 2048}
        assert tuned.crossover(CPU, torch.float32) == 2048
        assert tuned.crossover(CPU, torch.bfloat16) == tuned.NEVER

    def test_a_foreign_file_is_not_overwritten(self, path):
        path.parent.mkdir()
        path.write_text("mine")
        with pytest.raises(OptionError, match=r"tuned.json: expected a file of `s2o tune`, got no JSON.*Delete it"):
            self.write(path, 64, Launch(key_block=16))
        assert path.read_text() == "mine"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is tuned for minutes")
def test_command_without_a_gpu(s2o, tmp_path):
    path = tmp_path / "tuned.json"
    done = s2o("tune", "--heads", "2", "--kv-heads", "1", "--head-dim", "16", "--lengths", "512", "--output", str(path))
    assert done.returncode == 0, done.stderr
    assert "expected a CUDA device, got none" in done.stdout.replace("\n", " ")
    found = tuned.parse(path.read_text())["cpu"].crossovers
    assert found.get(torch.float32, 512) == found.get(torch.bfloat16, 512) == 512


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--dtype", "int8"), '--dtype: expected "bfloat16", "float16" or "float32", got \'int8\''),
        (("--heads", "3", "--kv-heads", "2"), "--heads: expected a multiple of the 2 key/value heads, got 3"),
        (("--head-dim", "100"), "expected head dims out of"),
    ],
    ids=["dtype", "heads", "head-dim"],
)
def test_wrong_arguments_end_with_a_message(s2o, args, message):
    done = s2o("tune", *args)
    assert done.returncode != 0
    assert message in done.stderr.replace("\n", " ")
    assert "Traceback" not in done.stderr
