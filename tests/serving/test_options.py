"""The environment variables of servers."""

import pytest

from s2o_compile import OptionError, S2OConfig
from s2o_compile.serving.options import config_from_environment


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, S2OConfig()),
        ({"S2O_TAU": "", "S2O_ERROR": "", "S2O_CONFIG": "", "S2O_MIN_SEQ_LEN": ""}, S2OConfig()),
        ({"S2O_TAU": "0.25"}, S2OConfig(tau=0.25)),
        ({"S2O_TAU": "0"}, S2OConfig(tau=0.0)),
        ({"S2O_ERROR": "0.05", "S2O_MIN_SEQ_LEN": "4096"}, S2OConfig(error=0.05, min_seq_len=4096)),
        ({"S2O_MIN_SEQ_LEN": "auto"}, S2OConfig()),
    ],
    ids=str,
)
def test_what_they_mean(variables, expected):
    assert config_from_environment(variables) == expected


def test_a_file_and_a_length_beside_it(tmp_path):
    config = S2OConfig(error=0.02, site_tau={"a.b": (0.5, 1.0)})
    file = tmp_path / "s2o.json"
    file.write_text(config.to_json(about={"model": "some"}))
    assert config_from_environment({"S2O_CONFIG": str(file)}) == config
    changed = config_from_environment({"S2O_CONFIG": str(file), "S2O_MIN_SEQ_LEN": "100"})
    assert (changed.min_seq_len, changed.site_tau) == (100, config.site_tau)


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"S2O_TAU": "half"}, r"^S2O_TAU: expected a number, got 'half'\. Write S2O_TAU"),
        ({"S2O_TAU": "-1"}, r"^S2O_TAU: tau: expected a finite number >= 0, got -1\.0"),
        ({"S2O_TAU": "nan"}, r"^S2O_TAU: tau: expected a finite number"),
        ({"S2O_ERROR": "5%"}, r"^S2O_ERROR: expected a number, got '5%'"),
        ({"S2O_ERROR": "2"}, r"^S2O_ERROR: error: expected a relative error between 0 and 1"),
        ({"S2O_MIN_SEQ_LEN": "8k"}, r"^S2O_MIN_SEQ_LEN: expected a number of tokens.*got '8k'\. Write"),
        ({"S2O_MIN_SEQ_LEN": "-5"}, r"^S2O_MIN_SEQ_LEN: expected a number of tokens"),
        ({"S2O_TAU": "0.5", "S2O_CONFIG": "x"}, r"^S2O_TAU and S2O_CONFIG: expected .* from a file or from variables"),
        ({"S2O_ERROR": "0.5", "S2O_CONFIG": "x"}, r"^S2O_ERROR and S2O_CONFIG: expected .* Unset S2O_CONFIG, or"),
        ({"S2O_CONFIG": "/nowhere.json"}, r"^S2O_CONFIG: expected a file that can be read, got '/nowhere\.json'"),
    ],
    ids=str,
)
def test_bad_values_say_what_to_do(variables, said):
    with pytest.raises(OptionError, match=said):
        config_from_environment(variables)


def test_a_tau_and_an_error_may_stand_together():
    assert config_from_environment({"S2O_TAU": "0.5", "S2O_ERROR": "0.05"}) == S2OConfig(tau=0.5, error=0.05)
    assert config_from_environment({"S2O_TAU": "0.5"}) == S2OConfig(tau=0.5)
    assert config_from_environment({"S2O_ERROR": "0.05"}) == S2OConfig(error=0.05)
    assert config_from_environment({}) == S2OConfig(tau=0.5, error=0.1)


def test_a_file_that_is_no_configuration(tmp_path):
    file = tmp_path / "s2o.json"
    file.write_text('{"taus": 0.5}')
    with pytest.raises(OptionError, match=r"S2O_CONFIG=.*unknown configuration field 'taus'.*Did you mean 'tau'"):
        config_from_environment({"S2O_CONFIG": str(file)})


def test_without_an_argument_it_is_the_process_that_is_asked(monkeypatch):
    monkeypatch.setenv("S2O_TAU", "0.125")
    assert config_from_environment().tau == 0.125
