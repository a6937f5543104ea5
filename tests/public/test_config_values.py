"""Whatever stands in a field: a configuration that round-trips, or one error that names the field."""

import dataclasses
import json
import math
import string

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from s2o_compile import OptionError, S2OConfig
from s2o_compile.backend import split_options

FIELDS = [field.name for field in dataclasses.fields(S2OConfig)]
DEEP = "[" * 100_000
LONG = "9" * 5000


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


class Hostile:
    """An object that answers nothing."""

    def __repr__(self):
        raise RuntimeError

    __eq__ = __hash__ = __bool__ = __repr__


BAD = {
    "none": None,
    "bool": True,
    "nan": math.nan,
    "inf": math.inf,
    "huge-int": 2**67,
    "longest-int": 10**5000,
    "huge-float": 1e300,
    "bytes": b"auto",
    "nul": "auto\0",
    "surrogate": "\ud800",
    "huge-text": "a" * 10**7,
    "list": [],
    "lists": nested(900),
    "dict": {"a": {"b": 1}},
    "names-no-text": {3: (0,)},
    "array": np.zeros(3),
    "one-in-an-array": np.array(1),
    "tensor": torch.tensor(1),
    "flag-of-numpy": np.True_,
    "function": len,
    "hostile": Hostile(),
}
FLAGS = ("assume_causal_mask", "assume_block_masks", "check_assumptions", "read_masks")
TAKEN = {("error", "none"), ("tau", "none"), ("min_seq_len", "none"), ("segment_len", "none"), ("tau", "huge-int")}
TAKEN |= {(name, "bool") for name in FLAGS}


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("name", FIELDS)
def test_what_a_field_cannot_take_is_one_error_that_names_it(name, kind):
    if (name, kind) in TAKEN:
        assert S2OConfig.from_json(S2OConfig(**{name: BAD[kind]}).to_json()) is not None
        return
    with pytest.raises(OptionError) as caught:
        S2OConfig(**{name: BAD[kind]})
    message = str(caught.value)
    assert name in message
    assert "expected" in message
    assert "got" in message or "unknown" in message
    assert len(message) < 1000
    assert "\n" not in message
    message.encode()  # a terminal can show it
    with pytest.raises(OptionError, match=name):
        split_options({f"s2o.{name}": BAD[kind]})


@pytest.mark.parametrize(
    "number",
    [math.nan, math.inf, -1.0, 1e300, 2**200, True, "1", None, [0.5]],
    ids=["nan", "inf", "negative", "huge", "huge-int", "bool", "text", "none", "list"],
)
@pytest.mark.parametrize("name", ["site_tau", "dense_heads"])
def test_numbers_of_a_site_are_checked_one_by_one(name, number):
    with pytest.raises(OptionError, match=rf"{name}.'layers.0'.: expected .*>= 0"):
        S2OConfig(**{name: {"layers.0": [0, number]}})


@pytest.mark.parametrize(
    "numbers",
    [b"\0\1", bytearray(2), memoryview(b"ab"), "01", {0: 1}, np.zeros(2), 0],
    ids=["bytes", "bytearray", "memoryview", "text", "dict", "array", "number"],
)
@pytest.mark.parametrize("name", ["site_tau", "dense_heads"])
def test_numbers_of_a_site_are_a_sequence(name, numbers):
    with pytest.raises(OptionError, match=rf"{name}.'layers.0'.: expected .*>= 0"):
        S2OConfig(**{name: {"layers.0": numbers}})


def test_numbers_of_a_library_become_pythons():
    config = S2OConfig(
        tau=(np.float32(0.25), np.float64(0.5), np.int8(1), np.float16(2.0)),
        min_seq_len=np.int64(256),
        segment_len=np.uint16(512),
        site_tau={"a": [np.float32(0.5)]},
        dense_heads={"a": (np.int32(1),)},
    )
    plain = S2OConfig(
        tau=(0.25, 0.5, 1, 2), min_seq_len=256, segment_len=512, site_tau={"a": [0.5]}, dense_heads={"a": [1]}
    )
    assert config == plain
    assert config.to_json() == plain.to_json()
    held = [*config.tau, config.min_seq_len, config.segment_len, *config.site_tau["a"], *config.dense_heads["a"]]
    assert {type(x) for x in held} == {float, int}
    assert type(S2OConfig(error=np.float32(0.5)).error) is float


def test_no_negative_zero():
    config = S2OConfig(tau=-0.0, site_tau={"a": [-0.0]})
    assert [math.copysign(1, x) for x in (config.tau, config.site_tau["a"][0])] == [1, 1]
    assert math.copysign(1, S2OConfig(error=-0.0).error) == 1
    assert config.quality == S2OConfig(tau=0.0, site_tau={"a": [0.0]}).quality


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param(DEEP, r"expected JSON.*nested too deeply", id="deep"),
        pytest.param('{"tau": ' + DEEP, r"expected JSON.*nested too deeply", id="deep-field"),
        pytest.param('{"tau": ' + nested(900).__repr__() + "}", r"^tau: expected", id="rather-deep"),
        pytest.param(f'{{"segment_len": {LONG}}}', "^segment_len: expected", id="long-number"),
        pytest.param(f'{{"tau": {LONG}}}', "^tau: expected", id="long-tau"),
        pytest.param(f'{{"dense_heads": {{"a": [{LONG}]}}}}', r"^dense_heads.'a'.: expected", id="long-head"),
        pytest.param('{"tau": 1e400}', "^tau: expected a finite number >= 0, got inf", id="infinite"),
        pytest.param('{"tau": NaN}', "^tau: expected a finite number >= 0, got nan", id="nan"),
        pytest.param('{"tau": 0.1, "tau": 0.2}', "expected JSON.*the name 'tau' twice", id="twice"),
        pytest.param('{"dense_heads": {"a": [0], "a": [1]}}', "expected JSON.*the name 'a' twice", id="site-twice"),
        pytest.param(b"\xff\xfe\0", "expected JSON.*can't decode byte 0xff", id="bytes"),
        pytest.param("a" * 10**7, "expected JSON", id="long-text"),
        pytest.param("", "expected JSON, got ''", id="empty"),
        pytest.param(None, "expected JSON text, got None", id="none"),
        pytest.param({"tau": 1}, "expected JSON text.*from_dict", id="dict"),
        pytest.param("null", "expected a JSON object, got NoneType", id="null"),
        pytest.param('{"a\ud800": 1}', r"unknown configuration field 'a\\ud800'", id="surrogate"),
        pytest.param(json.dumps({"a" * 10**6: 1}), "unknown configuration field", id="long-name"),
    ],
)
def test_text_that_is_no_configuration(text, message):
    with pytest.raises(OptionError, match=message) as caught:
        S2OConfig.from_json(text)
    assert len(str(caught.value)) < 1000
    assert "\n" not in str(caught.value)


def test_a_byte_order_mark_is_dropped():
    assert S2OConfig.from_json("\ufeff{}") == S2OConfig.from_json("\ufeff{}".encode()) == S2OConfig()


@pytest.mark.parametrize("fields", [None, 3, "tau", ["tau"], {3: 1}, {None: 1}, {("tau",): 1}, {b"tau": 1}], ids=repr)
def test_fields_go_by_names(fields):
    with pytest.raises(OptionError, match="expected"):
        S2OConfig.from_dict(fields)


@pytest.mark.parametrize("options", [3, "s2o.tau", [("s2o.tau", 1)], {3: 1}, {b"s2o.tau": 1}], ids=repr)
def test_options_of_the_backend_go_by_names(options):
    with pytest.raises(OptionError, match="options: expected"):
        split_options(options)


NUMBERS = st.one_of(
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.sampled_from([0, 128, 256, 0.5, -0.0, 2**31, 2**53, 2**63 - 1, 2**63, 1e39, 1e308]),
)
NAMES = st.text(alphabet=st.characters(categories=None) | st.sampled_from(string.ascii_lowercase), max_size=8)
CHOICES = st.sampled_from(["auto", "group", "head", "none", "mean_query", "per_query", "torch", "eager", "sparse"])
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | NAMES | CHOICES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=6,
)
SITES = st.dictionaries(NAMES, st.lists(st.integers(0, 9) | NUMBERS, max_size=3), max_size=3)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(FIELDS), VALUES | SITES)
@example("tau", [2**67])
@example("site_tau", {"": []})
@example("tau", [])
def test_any_value_of_a_field_round_trips_or_is_refused_by_name(name, value):
    text = json.dumps({name: value})
    try:
        config = S2OConfig.from_json(text)
    except OptionError as error:
        assert name in str(error)  # noqa: PT017 (either is right)
        return
    again = config.to_json()
    assert S2OConfig.from_json(again) == config
    assert S2OConfig.from_json(again).to_json() == again
    assert hash(S2OConfig.from_json(again)) == hash(config)
    assert config.quality
    options = config.operator_options()
    assert all(abs(x) < 2**63 for x in options.values() if isinstance(x, int))


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from(FIELDS) | NAMES, VALUES, max_size=4) | VALUES)
def test_any_json_is_a_configuration_or_an_option_error(value):
    try:
        config = S2OConfig.from_json(json.dumps(value))
    except OptionError:
        return
    assert S2OConfig.from_json(config.to_json()) == config


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=40) | st.text(max_size=40))
def test_any_text_is_a_configuration_or_an_option_error(text):
    try:
        S2OConfig.from_json(text)
    except OptionError:
        return
