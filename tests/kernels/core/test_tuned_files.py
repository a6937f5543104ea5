"""The user's file, whatever it holds: it is used, or named in a warning and ignored."""

import json
import os
import warnings

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from s2o_compile import OptionError, TunedFileWarning
from s2o_compile.cli import tune
from s2o_compile.kernels.core import tuned
from s2o_compile.kernels.core.tuned import Launch

CPU = torch.device("cpu")
CHOSEN = {"head_dim": 128, "dtype": "bfloat16", "key_block": 32, "num_warps": 4, "stages": 3, "maxnreg": None}


@pytest.fixture
def user_file(tmp_path, monkeypatch):
    monkeypatch.setenv(tuned.FILE_VARIABLE, str(tmp_path / "tuned.json"))
    tuned.forget()
    yield tmp_path / "tuned.json"
    tuned.forget()


def device(**fields):
    return json.dumps({"format": 1, "devices": {"cpu": fields}})


def launches(**fields):
    return device(launches=[CHOSEN | fields])


BAD = {
    "deep": "[" * 100_000,
    "deep-entry": '{"format": 1, "devices": {"cpu": ' + "[" * 100_000,
    "long-number": f'{{"format": 1, "devices": {{"cpu": {{"crossover": {"9" * 5000}}}}}}}',
    "long-format": f'{{"format": {"9" * 5000}}}',
    "infinite": device(crossover=float("inf")),
    "huge-crossover": device(crossover=2**67),
    "flag-crossover": device(crossover=True),
    "flag-crossovers": device(crossovers={"float32": True}),
    "dtype-crossovers": device(crossovers={"int8": 4096}),
    "word-crossovers": device(crossovers={"float32": "always"}),
    "list-crossovers": device(crossovers=[4096]),
    "twice": '{"format": 1, "format": 1, "devices": {}}',
    "device-twice": '{"format": 1, "devices": {"cpu": {}, "cpu": {"crossover": 1}}}',
    "no-text": b"\xff\xfe\0\1",
    "zeros": b"\0" * 100,
    "empty": b"",
    "launches-number": device(launches=3),
    "launches-none": device(launches=None),
    "launches-text": device(launches="ab"),
    "unhashable-dim": launches(head_dim=[128]),
    "fractional-dim": launches(head_dim=128.0),
    "unhashable-dtype": launches(dtype={}),
    "long-dtype": launches(dtype="a" * 10**6),
    "fractional-warps": launches(num_warps=4.0),
    "flag-stages": launches(stages=True),
    "flag-registers": launches(maxnreg=True),
    "long-name": json.dumps({"format": 1, "devices": {"a" * 10**6: 3}}),
    "surrogate": '{"format": 1, "devices": {"\\ud800": 3}}',
}


@pytest.mark.parametrize("kind", BAD)
def test_a_file_that_cannot_be_used_is_one_short_warning(user_file, kind):
    user_file.write_bytes(BAD[kind].encode() if isinstance(BAD[kind], str) else BAD[kind])
    with pytest.warns(TunedFileWarning, match="tuned.json: expected a file of `s2o tune`, got") as caught:
        assert tuned.crossover(CPU, torch.float32) == 4096
    (message,) = [str(warning.message) for warning in caught]
    assert len(message) < 1000
    assert "\n" not in message
    message.encode()
    with pytest.raises(OptionError, match=r"tuned\.json: expected a file of `s2o tune`, got"):
        tune.read(user_file)


def test_a_folder_is_no_file(user_file):
    user_file.mkdir()
    with pytest.warns(TunedFileWarning, match="directory"):
        assert tuned.crossover(CPU, torch.float32) == 4096
    with pytest.raises(OptionError, match="directory"):
        tune.read(user_file)


def test_a_file_behind_a_file(user_file, monkeypatch):
    user_file.write_text("{}")
    monkeypatch.setenv(tuned.FILE_VARIABLE, str(user_file / "tuned.json"))
    tuned.forget()
    with pytest.warns(TunedFileWarning, match="Not a directory"):
        assert tuned.crossover(CPU, torch.float32) == 4096


def test_a_folder_that_may_not_be_searched(user_file, monkeypatch):
    """As it is for a user whose home is another's; the tests may run as root, so it is pretended."""

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.delenv(tuned.FILE_VARIABLE)
    monkeypatch.setattr(type(user_file), "exists", refuse)
    tuned.forget()
    with pytest.warns(TunedFileWarning, match="Permission denied"):
        assert tuned.crossover(CPU, torch.float32) == 4096


@pytest.mark.parametrize("name", [None, "~nobody-of-this-name/tuned.json"], ids=["none-named", "named"])
def test_without_a_home(user_file, monkeypatch, name):
    for variable in ("HOME", "XDG_CACHE_HOME", tuned.FILE_VARIABLE):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as where no user has this number
    if name:
        monkeypatch.setenv(tuned.FILE_VARIABLE, name)
    tuned.forget()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert tuned.crossover(CPU, torch.float32) == 4096
    assert [warning.category for warning in caught] == ([TunedFileWarning] if name else [])


def test_a_byte_order_mark_is_dropped(user_file):
    user_file.write_bytes(b"\xef\xbb\xbf" + device(crossover=4096).encode())
    assert tuned.crossover(CPU, torch.float32) == 4096
    tune.write(user_file, CPU, crossovers={"float32": 2048}, launches={})
    assert tuned.crossover(CPU, torch.float32) == 2048


def test_a_file_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OptionError, match="expected a file"):
        tune.write(tmp_path / "file" / "tuned.json", CPU, crossovers={}, launches={})


@pytest.mark.parametrize("name", ["key_block", "num_warps", "stages", "maxnreg"])
@pytest.mark.parametrize(
    "value",
    [True, 4.0, 10**5000, "4", [4], float("nan")],
    ids=["flag", "fraction", "long", "text", "list", "nan"],
)
def test_a_launch_is_made_of_integers(name, value):
    with pytest.raises(ValueError, match=f"{name}: expected"):
        Launch(**{"key_block": 32, name: value})


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
LAUNCHES = st.fixed_dictionaries({}, optional={name: st.just(x) | VALUES for name, x in CHOSEN.items()})
FILES = st.fixed_dictionaries(
    {
        "format": st.just(1),
        "devices": VALUES
        | st.dictionaries(
            st.just("cpu"),
            st.fixed_dictionaries(
                {
                    "crossover": st.just(4096) | VALUES,
                    "crossovers": st.dictionaries(st.sampled_from(["float32", "int8"]), VALUES, max_size=2) | VALUES,
                    "launches": st.lists(LAUNCHES | VALUES, max_size=2) | VALUES,
                }
            ),
        ),
    }
)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=40) | (FILES | VALUES).map(lambda value: json.dumps(value).encode()))
@example(b"[" * 100_000)
@example(b"9" * 5000)
def test_no_bytes_raise(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("tuned") / "tuned.json"
    path.write_bytes(content)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        patch.setenv(tuned.FILE_VARIABLE, str(path))
        tuned.forget()
        try:
            assert tuned.crossover(CPU, torch.float32) >= 0
            assert isinstance(tuned.launch(CPU, 128, torch.bfloat16), Launch)
            ignored = tuned.user_entries() == {}
        finally:
            tuned.forget()
    assert not caught or (ignored and [warning.category for warning in caught] == [TunedFileWarning])
