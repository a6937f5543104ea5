"""Keywords of before: renamed ones warn and mean what they meant, removed ones say why they are gone."""

import re

import pytest
import torch

import s2o_compile
from s2o_compile import OptionError, Report, S2OConfig
from s2o_compile.backend import split_options

WAYS = {
    "keyword": lambda fields: S2OConfig(**fields),
    "dict": S2OConfig.from_dict,
    "backend": lambda fields: split_options({f"s2o.{name}": value for name, value in fields.items()})[0],
}


@pytest.fixture(params=WAYS.values(), ids=WAYS)
def make(request):
    return request.param


def test_a_renamed_field_means_what_it_meant(make):
    with pytest.warns(DeprecationWarning, match="list_per is now called ranking_per"):
        assert make({"list_per": "head", "tau": 0.25}) == S2OConfig(ranking_per="head", tau=0.25)


def test_both_names_of_a_field_are_refused(make):
    with pytest.raises(OptionError, match="expected one of list_per and ranking_per, got both"):
        make({"list_per": "head", "ranking_per": "head"})


@pytest.mark.parametrize(
    ("field", "harmless", "gone"), [("query_order", "none", "mean_query"), ("training", "dense", "sparse")]
)
def test_a_removed_field_says_so(make, field, harmless, gone):
    with pytest.warns(DeprecationWarning, match=f"{field} was removed and '{harmless}' changes nothing"):
        assert make({field: harmless}) == S2OConfig()
    with pytest.raises(OptionError, match=re.escape(f"{field}: expected none, got '{gone}'. It was removed: ")):
        make({field: gone})


def test_a_removed_ranking_says_so(make):
    with pytest.raises(OptionError, match=r"ranking: expected one of 'per_query', 'mean_query'.*sub_mean was removed"):
        make({"ranking": "sub_mean"})


def test_a_configuration_that_was_saved_before_can_be_read():
    text = '{"tau": 0.25, "list_per": "group", "query_order": "none", "training": "dense", "min_seq_len": null}'
    with pytest.warns(DeprecationWarning, match="is now called|was removed") as caught:
        assert S2OConfig.from_json(text) == S2OConfig(tau=0.25)
    assert len(caught) == 3


def test_no_field_of_today_warns(recwarn):
    S2OConfig.from_json(S2OConfig(ranking_per="head").to_json())
    assert not recwarn.list


def test_attention_knows_the_old_word_for_fully_masked_rows():
    tensors = [torch.randn(1, 2, 8, 16) for _ in range(3)]
    hidden = torch.zeros(1, 8, dtype=torch.bool)
    expected = s2o_compile.attention(*tensors, key_mask=hidden, fully_masked="mean")
    with pytest.warns(DeprecationWarning, match="blind is now called fully_masked"):
        assert torch.equal(s2o_compile.attention(*tensors, key_mask=hidden, blind="mean"), expected)
    assert not torch.equal(s2o_compile.attention(*tensors, key_mask=hidden), expected)


def test_a_report_knows_the_old_word_for_its_audit():
    report = Report(sites=(), graphs=0, audit_error="it failed")
    with pytest.warns(DeprecationWarning, match="census_error is now called audit_error"):
        assert report.census_error == "it failed"
