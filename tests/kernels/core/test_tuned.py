"""The table of devices: built-in entries, defaults, and the user's file."""

import json
import types

import pytest
import torch

from s2o_compile import TunedFileWarning, attention
from s2o_compile.kernels.core import tuned
from s2o_compile.kernels.core.tuned import Entry, Launch
from s2o_compile.kernels.support import cpp_library

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
CHOSEN = {"head_dim": 128, "dtype": "bfloat16", "key_block": 32, "num_warps": 4, "stages": 3, "maxnreg": None}


@pytest.fixture
def user_file(tmp_path, monkeypatch):
    """The path that the operator reads; nothing read before counts, nothing read here stays."""
    monkeypatch.setenv(tuned.FILE_VARIABLE, str(tmp_path / "tuned.json"))
    tuned.forget()
    yield tmp_path / "tuned.json"
    tuned.forget()


@pytest.fixture
def gpu(monkeypatch, user_file):
    """Pretends to be a GPU of this name and shared memory."""

    def pretend(name, shared=99 * 1024):
        properties = types.SimpleNamespace(shared_memory_per_block_optin=shared)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
        user_file.write_text('{"format": 1, "devices": {}}')
        return CUDA

    return pretend


@pytest.mark.parametrize(
    ("name", "expected"), [("NVIDIA H100 80GB HBM3", 16384), ("NVIDIA GeForce RTX 4090", tuned.UNKNOWN_CROSSOVER)]
)
def test_crossover_goes_by_the_beginning_of_the_name(gpu, name, expected):
    assert tuned.crossover(gpu(name), torch.bfloat16) == expected


@pytest.fixture
def in_torch(monkeypatch):
    """A CPU without a C++ compiler, and with AMX."""
    monkeypatch.setattr(cpp_library, "load", lambda: None)
    monkeypatch.setattr(tuned, "has_amx", lambda: True)
    tuned.forget()


@pytest.mark.parametrize(
    ("compiler", "amx", "bfloat16", "float32"),
    [
        (True, True, 8192, 4096),
        (True, False, 4096, 4096),
        (False, True, tuned.NEVER, 12288),
        (False, False, 12288, 12288),
    ],
)
def test_crossover_of_a_cpu_goes_by_its_compiler_and_its_tiles(
    monkeypatch, user_file, compiler, amx, bfloat16, float32
):
    monkeypatch.setattr(tuned, "has_amx", lambda: amx)
    monkeypatch.setattr(cpp_library, "load", lambda: compiler or None)
    user_file.write_text('{"format": 1, "devices": {}}')
    assert tuned.crossover(CPU, torch.bfloat16) == bfloat16
    assert tuned.crossover(CPU, torch.float32) == float32


def test_a_package_computes_in_torch_whatever_was_measured(monkeypatch, user_file):
    monkeypatch.setattr(tuned, "has_amx", lambda: True)
    user_file.write_text('{"format": 1, "devices": {"cpu": {"crossover": 2048}}}')
    assert tuned.crossover(CPU, torch.float32) == 2048
    assert tuned.crossover(CPU, torch.float32, packaged=True) == 12288
    assert tuned.crossover(CPU, torch.bfloat16, packaged=True) == tuned.NEVER


@pytest.mark.parametrize(
    ("stored", "bfloat16", "float32"),
    [
        ({"crossover": 4096}, tuned.NEVER, 4096),  # as it was measured before: in one dtype
        ({"crossovers": {"bfloat16": 16384}}, 16384, 12288),
        ({"crossovers": {"float32": "never"}}, tuned.NEVER, tuned.NEVER),
        ({"crossover": 4096, "crossovers": {"float32": 2048}}, tuned.NEVER, 2048),
    ],
    ids=str,
)
def test_a_file_may_tell_dtypes_apart(in_torch, user_file, stored, bfloat16, float32):
    user_file.write_text(json.dumps({"format": 1, "devices": {"cpu": stored}}))
    assert tuned.crossover(CPU, torch.bfloat16) == bfloat16
    assert tuned.crossover(CPU, torch.float32) == float32


def test_a_long_call_of_a_dtype_that_never_pays_has_a_reason(in_torch, user_file):
    user_file.write_text('{"format": 1, "devices": {}}')
    reason = tuned.why_never(8192, "auto", CPU, torch.bfloat16)
    assert reason.startswith("bfloat16 on this CPU: SDPA is faster at any length; S2OConfig(min_seq_len=8192) runs it")
    for n_keys, shortest, dtype in ((8191, "auto", torch.bfloat16), (8192, 0, torch.bfloat16), (8192, "auto", None)):
        assert tuned.why_never(n_keys, shortest, CPU, dtype or torch.float32) == ""


@pytest.mark.parametrize(
    ("dim", "expected"),
    [
        (64, Launch(key_block=128, num_warps=8, stages=2, maxnreg=128)),
        (128, Launch(key_block=64, num_warps=8, stages=2, maxnreg=128)),
        (256, Launch(key_block=64, num_warps=8, stages=2, maxnreg=None)),
        (512, Launch(key_block=32, num_warps=8, stages=2, maxnreg=None)),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_h100_runs_as_it_was_measured(gpu, dim, dtype, expected):
    assert tuned.launch(gpu("NVIDIA H100 80GB HBM3"), dim, dtype) == expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("dim", tuned.HEAD_DIMS)
@pytest.mark.parametrize("shared", [64, 99, 163, 227])
def test_another_gpu_gets_what_fits_its_shared_memory(gpu, shared, dim, dtype):
    found = tuned.launch(gpu("NVIDIA Unheard-of", shared * 1024), dim, dtype)
    assert found.maxnreg is None
    if dtype == torch.float16:
        held = (128 + 2 * found.stages * found.key_block) * dim * 2
        assert held <= shared * 1024 or found == Launch(key_block=16, stages=1)


def test_the_users_entries_win(gpu, user_file):
    device = gpu("NVIDIA H100 80GB HBM3")
    text = {"format": 1, "devices": {"NVIDIA H100 80GB HBM3": {"crossover": 12288, "launches": [CHOSEN]}}}
    user_file.write_text(json.dumps(text))
    assert tuned.crossover(device, torch.float16) == 12288
    assert tuned.launch(device, 128, torch.bfloat16) == Launch(key_block=32, num_warps=4, stages=3)
    assert tuned.launch(device, 128, torch.float16) == Launch(key_block=64, maxnreg=128)  # not tuned


def test_an_entry_of_another_device_changes_nothing(gpu, user_file):
    device = gpu("NVIDIA H100 80GB HBM3")
    user_file.write_text(json.dumps({"format": 1, "devices": {"NVIDIA H100 PCIe": {"crossover": 12288}}}))
    assert tuned.crossover(device, torch.float16) == 16384


@pytest.mark.parametrize(
    ("text", "said"),
    [
        pytest.param(None, "No such file", id="missing"),
        pytest.param("{", "no JSON", id="broken"),
        pytest.param("[1]", 'no object with "format": 1', id="third_party"),
        pytest.param('{"format": 2, "devices": {}}', 'no object with "format": 1', id="newer"),
        pytest.param('{"format": 1, "devices": {"cpu": 3}}', "an entry of 'cpu' that is not understood", id="no-entry"),
        pytest.param('{"format": 1, "devices": {"cpu": {"crossover": "8K"}}}', "got '8K'", id="bad-crossover"),
        pytest.param(
            json.dumps({"format": 1, "devices": {"cpu": {"launches": [CHOSEN | {"key_block": 100}]}}}),
            r"key_block: expected one of \(16, 32, 64, 128\), got 100",
            id="bad-launch",
        ),
        pytest.param(
            json.dumps({"format": 1, "devices": {"cpu": {"launches": [CHOSEN | {"dtype": "int8"}]}}}),
            "not understood",
            id="bad-dtype",
        ),
    ],
)
def test_a_file_that_cannot_be_used_is_named_and_ignored(user_file, text, said):
    if text is not None:
        user_file.write_text(text)
    with pytest.warns(TunedFileWarning, match=f"tuned.json: expected a file of `s2o tune`, got .*{said}.*delete it"):
        assert tuned.crossover(CPU, torch.float32) == 4096
    assert tuned.crossover(CPU, torch.float32) == 4096  # read once, said once


def test_without_a_file_nothing_is_said(monkeypatch, tmp_path):
    monkeypatch.delenv(tuned.FILE_VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tuned.forget()
    assert tuned.user_file() == tmp_path / "s2o_compile" / "tuned.json"
    assert tuned.user_entries() == {}
    tuned.forget()


@pytest.mark.parametrize(
    "fields", [{"crossover": -1}, {"launches": {(100, torch.float16): Launch(key_block=16)}}], ids=str
)
def test_entries_are_checked(fields):
    with pytest.raises(ValueError, match="expected"):
        Entry(**fields)


def test_short_calls_on_a_cpu_ask_no_compiler(monkeypatch, user_file):
    monkeypatch.setattr(cpp_library, "load", lambda: pytest.fail("a short call compiled"))
    user_file.write_text('{"format": 1, "devices": {}}')
    assert tuned.is_short(4095, "auto", CPU, torch.float32)
    q, k, v = torch.randn(3, 1, 2, 300, 16).unbind(0)
    assert attention(q, k, v, causal=True).shape == q.shape
    assert not tuned.is_short(300, 300, CPU, torch.float32)
