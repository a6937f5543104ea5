import dataclasses
import json
import pickle

import pytest
import torch

import s2o_compile
from s2o_compile import OptionError, S2OConfig

VALUES = [
    pytest.param({}, id="defaults"),
    pytest.param({"tau": 0.0, "min_seq_len": 0}, id="exact"),
    pytest.param({"tau": 2, "segment_len": 256, "ranking": "mean_query"}, id="paper"),
    pytest.param({"implementation": "torch", "inner_backend": "eager"}, id="torch-eager"),
    pytest.param({"assume_causal_mask": True, "check_assumptions": True}, id="promise"),
    pytest.param({"dense_heads": {"layers.1.attn": (3, 0, 0), "layers.0.attn": [2]}}, id="dense-heads"),
    pytest.param({"assume_block_masks": True, "check_assumptions": True}, id="promise-of-blocks"),
]


@pytest.mark.parametrize("fields", VALUES)
def test_json_round_trip(fields):
    config = S2OConfig(**fields)
    assert S2OConfig.from_json(config.to_json()) == config


def test_missing_fields_take_defaults():
    assert S2OConfig.from_json('{"tau": 0.5}') == S2OConfig(tau=0.5)


@pytest.mark.parametrize(
    ("said", "tau", "error"),
    [
        ({}, 0.5, 0.1),
        ({"tau": 0.25}, 0.25, None),
        ({"tau": 0.5}, 0.5, None),
        ({"tau": (0.1, 0.2)}, (0.1, 0.2), None),
        ({"error": 0.1}, None, 0.1),
        ({"tau": 2.5, "error": 0.05}, 2.5, 0.05),
        ({"tau": 0.5, "error": 0.0}, 0.5, 0.0),
        ({"site_tau": {"a": (0.3,)}}, 0.5, 0.1),
    ],
    ids=str,
)
def test_tau_and_error_alone_together_and_unsaid(said, tau, error):
    config = S2OConfig(**said)
    assert (config.tau, config.error) == (tau, error)
    assert S2OConfig.from_json(config.to_json()) == config
    assert dataclasses.replace(config, tau=0.25, error=None) == S2OConfig(**{**said, "tau": 0.25, "error": None})


def test_a_ceiling_stays_with_another_tau():
    config = dataclasses.replace(S2OConfig(), tau=0.25)
    assert (config.tau, config.error) == (0.25, 0.1)
    assert dataclasses.replace(S2OConfig(), error=None) == S2OConfig(tau=0.5)


def test_files_from_before_the_ceiling_measure_nothing():
    assert S2OConfig.from_json('{"tau": 0.5, "error": null, "min_seq_len": "auto"}') == S2OConfig(tau=0.5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tau": float("nan")}, "tau: expected a finite number >= 0, got nan"),
        ({"tau": -1.0}, "tau: expected a finite number >= 0, got -1.0"),
        ({"tau": "high"}, "tau: expected a finite number >= 0, got 'high'"),
        ({"tau": "0.5"}, "tau: expected a finite number >= 0, got the text '0.5'"),
        ({"error": "1e-2"}, "error: expected a relative error between 0 and 1, or None, got the text '1e-2'"),
        ({"min_seq_len": "128"}, "min_seq_len: expected an integer >= 0, or \"auto\", got the text '128'"),
        ({"read_masks": "False"}, "read_masks: expected True or False, got the text 'False'"),
        ({"min_seq_len": -1}, "min_seq_len: expected an integer >= 0"),
        ({"min_seq_len": 1.5}, "min_seq_len: expected an integer >= 0"),
        ({"min_seq_len": "short"}, "min_seq_len: expected an integer >= 0, or \"auto\", got 'short'"),
        ({"segment_len": 100}, "segment_len: expected a positive multiple of 128"),
        ({"ranking": "magic"}, "ranking: expected one of 'per_query', 'mean_query', got 'magic'"),
        ({"ranking_per": "model"}, "ranking_per: expected one of 'head', 'group'"),
        ({"query_order": "random"}, "query_order: expected none, got 'random'. It was removed"),
        ({"implementation": "cuda"}, "implementation: expected one of 'auto', 'triton', 'cpp', 'torch'"),
        ({"inner_backend": "inductr"}, "Did you mean 'inductor'"),
        ({"assume_causal_mask": 1}, "assume_causal_mask: expected True or False, got 1"),
        ({"assume_block_masks": 1}, "assume_block_masks: expected True or False, got 1"),
        ({"inner_backend": "s2o"}, "unknown inner_backend 's2o'"),
        ({"dense_heads": ["a"]}, "dense_heads: expected site names and their key/value heads >= 0, got .'a'.. Give"),
        ({"dense_heads": {3: (0,)}}, "dense_heads: expected a site name, got 3"),
        ({"dense_heads": {"a": 0}}, "dense_heads.'a'.: expected key/value heads >= 0, got 0"),
        ({"dense_heads": {"a": (0, -1)}}, "dense_heads.'a'.: expected key/value heads >= 0, got .0, -1."),
        ({"dense_heads": {"a": (True,)}}, "dense_heads.'a'.: expected key/value heads >= 0"),
        ({"dense_heads": {"a": "01"}}, "dense_heads.'a'.: expected key/value heads >= 0"),
    ],
)
def test_bad_values_say_expected_and_got(fields, message):
    with pytest.raises(ValueError, match=message):
        S2OConfig(**fields)


def test_an_unknown_inner_backend_lists_none_that_only_torch_tests():
    """They are accepted, but nobody looks for ``aot_eager_decomp_partition_crossref``."""
    with pytest.raises(OptionError, match=r"expected one of .*eager.*inductor.*tensorrt") as caught:
        S2OConfig(inner_backend="foo")
    assert not any(name in str(caught.value) for name in ("minifier", "debug", "_ts", "TESTING", "aot_"))
    assert S2OConfig(inner_backend="aot_eager").inner_backend == "aot_eager"


def test_a_text_says_where_it_comes_from():
    config = S2OConfig(tau=0.25)
    text = config.to_json({"model": "mine", "date": "2026-11-29"})
    assert json.loads(text)["about"] == {"model": "mine", "date": "2026-11-29"}
    assert S2OConfig.from_json(text) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "expected JSON, got '{'"),
        ("[1]", "expected a JSON object, got list"),
        ('{"taw": 1}', "unknown configuration field 'taw'.*Did you mean 'tau'"),
    ],
)
def test_bad_json(text, message):
    with pytest.raises(OptionError, match=message):
        S2OConfig.from_json(text)


def test_frozen_and_keyword_only():
    with pytest.raises(dataclasses.FrozenInstanceError):
        S2OConfig().tau = 0.0
    with pytest.raises(TypeError):
        S2OConfig(0.0)


def test_json_names_every_field():
    assert set(json.loads(S2OConfig().to_json())) == {field.name for field in dataclasses.fields(S2OConfig)}


def test_dense_heads_are_sorted_unique_immutable_and_hashable():
    given = {"b": [2, 0, 2], "a": (1,), "none": ()}
    config = S2OConfig(dense_heads=given)
    given["b"].append(5)
    assert config.dense_heads == {"a": (1,), "b": (0, 2)}
    assert hash(config) == hash(S2OConfig(dense_heads={"b": (0, 2), "a": (1,)}))
    assert pickle.loads(pickle.dumps(config)) == config
    assert dataclasses.replace(config, tau=0.1).dense_heads == config.dense_heads
    with pytest.raises(TypeError):
        config.dense_heads["a"] = (0,)


def test_a_dict_is_no_configuration():
    model = torch.nn.Linear(2, 2)
    given = {"optimize": (), "explain": (), "export": (), "evaluate": ((),), "calibrate": ((), 0.1)}
    for name, arguments in given.items():
        with pytest.raises(OptionError, match=rf"{name}: config: expected an S2OConfig, got dict"):
            getattr(s2o_compile, name)(model, *arguments, config={"tau": 0.2})


def test_no_min_seq_len_is_auto():
    assert S2OConfig.from_json('{"min_seq_len": null}') == S2OConfig(min_seq_len="auto") == S2OConfig()
    assert S2OConfig().operator_options()["min_seq_len"] is None
    config = S2OConfig(tau=(0.1, 0.2), site_tau={"a": (0.3, 0.4)}, dense_heads={"b": (1,)})
    assert config.operator_options()["head_tau"] == [0.1, 0.2]
    assert config.operator_options("a")["head_tau"] == [0.3, 0.4]
    assert config.operator_options("b")["dense_heads"] == [1]
    assert "dense_heads" not in config.operator_options("a")
    budget = S2OConfig(error=0.02, site_tau={"a": (0.3,)})
    assert budget.operator_options("a")["head_tau"] == [0.3]
    assert budget.operator_options("a")["error"] == budget.operator_options()["error"] == 0.02
    assert config.operator_options()["error"] is None
