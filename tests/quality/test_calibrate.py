"""Calibration: what is measured is what happens, and the budget is kept at the least density."""

import dataclasses
import json
import math
import re

import pytest
import torch
from typer.testing import CliRunner

import s2o_compile
from s2o_compile import EvaluationError, OptionError, S2OConfig
from s2o_compile.kernels import planner as rank
from s2o_compile.kernels.core import plan
from s2o_compile.kernels.core.budget_rule import MEASURED, tau_for
from s2o_compile.kernels.observe import observe_attention
from s2o_compile.quality.calibrate import AIM, TAUS, CurveMeter, budgeted
from s2o_compile.quality.head_curves import DENSE_FROM, HEAD_SHARE, HeadCurves
from tests.helpers.tiny import tiny_language_model, tiny_tokens

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
CONFIG = S2OConfig(min_seq_len=0, segment_len=128, inner_backend="eager")


@pytest.fixture(autouse=True)
def short_lists(monkeypatch):
    """The smallest chunks, so that a few hundred keys are enough to stop early."""
    for module in (plan, rank):
        monkeypatch.setattr(module, "default_chunk_len", lambda _: 128)


@torch.no_grad()
def sharp_model():
    """A model whose heads weigh keys apart, so that tiles can stop."""
    model = tiny_language_model()
    for layer in model.layers:
        layer.qkv.weight[:48].mul_(3.0)  # queries and keys
    return model


def long_tokens(length=1500):
    return tiny_tokens(length)


@torch.no_grad()
def measured(model, ids, config=CONFIG):
    """Error and density [Hq] of every site under exact inputs, through the configuration's graph."""
    found = {}

    def look(call):
        exact, result = call.exact(), call.result
        error = ((result.output - exact).square().sum() / exact.square().sum()).sqrt().item()
        found[call.site] = error, call.densities(result).mean().item()
        return exact

    with observe_attention(look):
        s2o_compile.optimize(model, config)(ids)
    return found


def curves(errors, densities, *, power=None, kv_heads=None):
    """Curves by hand: errors and densities [taus, Hq]."""
    made = HeadCurves([2.0**i for i in range(len(errors))], kv_heads or len(errors[0]))
    power = torch.ones(len(errors[0]), dtype=torch.float64) if power is None else torch.tensor(power).double()
    made.sums.power = power
    made.sums.difference = torch.tensor(errors).double().square() * power
    made.sums.computed, made.sums.area = torch.tensor(densities).double(), 1.0
    return made


class TestChoice:
    def test_meets_the_budget_between_two_taus(self):
        choice = curves([[0.01], [0.1]], [[0.4], [0.2]]).choose(0.032)
        assert choice.error == pytest.approx(0.032, rel=0.1)
        assert choice.error <= 0.032
        assert 1.0 < choice.tau[0] < 2.0
        assert 0.2 < choice.density < 0.4

    def test_gives_more_error_to_the_head_that_saves_more(self):
        choice = curves([[0.01, 0.01], [0.1, 0.1]], [[0.7, 0.31], [0.2, 0.3]]).choose(0.04)
        assert choice.tau[0] > choice.tau[1]
        assert choice.error <= 0.04

    def test_lets_no_head_be_off_too_far(self):
        """The second head weighs next to nothing in its layer."""
        made = curves([[0.001, 0.05], [0.002, 0.5]], [[0.5, 0.5], [0.4, 0.1]], power=[1.0, 1e-6])
        budget = 0.05
        choice = made.choose(budget)
        share = math.log(choice.tau[1]) / math.log(2.0)  # the only interval: taus 1 and 2
        assert 0.05 * 10**share <= HEAD_SHARE * budget * 1.001
        assert choice.tau[1] > 1.0

    def test_an_unreachable_budget_never_stops(self):
        choice = curves([[0.5, 0.5], [0.6, 0.6]], [[0.5, 0.5], [0.4, 0.4]]).choose(0.01)
        assert choice.dense_heads == (0, 1)
        assert (choice.error, choice.density) == (0.0, 1.0)

    def test_marks_a_group_that_stays_nearly_dense_and_spends_what_it_leaves(self):
        densities = [[0.9, 0.9, 0.5, 0.5], [0.85, 0.85, 0.2, 0.2]]
        made = curves([[0.03] * 4, [0.3] * 4], densities, kv_heads=2)
        choice = made.choose(0.06)
        assert min(densities[1][:2]) >= DENSE_FROM
        assert choice.dense_heads == (0,)
        assert choice.tau[:2] == (0.0, 0.0)
        alone = curves([[0.03] * 2, [0.3] * 2], [row[2:] for row in densities], kv_heads=1)
        assert choice.tau[2:] == alone.choose(0.06 * math.sqrt(2)).tau
        assert choice.density == pytest.approx((2.0 + sum(alone.choose(0.06 * math.sqrt(2)).density for _ in "ab")) / 4)

    def test_curves_that_are_no_curves_are_made_monotonic(self):
        made = curves([[0.02], [0.01], [0.05]], [[0.3], [0.4], [0.2]])
        _, difference, density = made._refined(made.sums.power)
        assert (difference.diff(dim=0) >= 0).all()
        assert (density.diff(dim=0) <= 0).all()


class TestMeasuring:
    def test_curves_are_what_each_tau_gives(self):
        model, ids = sharp_model(), long_tokens()
        meter = CurveMeter((0.5, 4.0))
        with torch.no_grad(), observe_attention(meter):
            s2o_compile.optimize(model, CONFIG)(ids)
        for place, tau in enumerate((0.5, 4.0)):
            alone = dataclasses.replace(CONFIG, tau=tau, error=None)
            for site, (error, density) in measured(model, ids, alone).items():
                found = meter.sites[site]
                assert found.sums.errors()[place] == pytest.approx(error, rel=1e-4)
                assert found.sums.densities()[place].mean().item() == pytest.approx(density)
        first, second = meter.sites["layers.0"].sums.errors()
        assert 0 < first < second

    @pytest.mark.parametrize("error", [0.05, 0.1])
    def test_the_budget_is_kept_in_the_optimized_model(self, error):
        model = sharp_model()
        config = s2o_compile.calibrate(model, [long_tokens(), long_tokens(1300)], error, config=CONFIG)
        assert config.error == error
        assert set(config.site_tau) == {"layers.0", "layers.1"}
        assert all(len(taus) == 4 for taus in config.site_tau.values())
        assert S2OConfig.from_json(config.to_json()) == config
        for ids, share in ((long_tokens(), 1.25), (long_tokens(1400).flip(1), 1.5)):  # the second was never measured
            for site, (found, _) in measured(model, ids, config).items():
                assert found <= share * error, site
        alone = dataclasses.replace(
            config, tau=0.5, error=None
        )  # the taus, without the budget that holds while they run
        for ids, share in ((long_tokens(), 1.25), (long_tokens(1400).flip(1), 1.5)):
            for site, (found, _) in measured(model, ids, alone).items():
                assert found <= share * error, site
        assert any(found > 0.4 * error for found, _ in measured(model, long_tokens(), alone).values())

    def test_a_smaller_budget_costs_more(self):
        model, ids = sharp_model(), long_tokens()
        meter = CurveMeter(TAUS)
        with torch.no_grad(), observe_attention(meter):
            s2o_compile.optimize(model, CONFIG)(ids)
        costs = [sum(x.choose(AIM * error).density for x in meter.sites.values()) for error in (0.02, 0.05, 0.1)]
        assert costs == sorted(set(costs), reverse=True)
        assert budgeted(CONFIG, meter, 0.02).config.error == 0.02

    def test_what_is_not_calibrated_is_kept(self):
        given = dataclasses.replace(CONFIG, ranking="mean_query", tau=0.1, dense_heads={"layers.9": (0,)})
        config = s2o_compile.calibrate(sharp_model(), long_tokens(), 0.5, config=given)
        assert (config.ranking, config.segment_len, config.tau) == ("mean_query", 128, None)
        assert "layers.9" not in config.dense_heads

    def test_calls_without_a_site_run_as_they_are(self):
        class Mixed(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = sharp_model()

            def forward(self, ids):
                logits = self.inner(ids)
                heads = logits[..., :48].unflatten(-1, (3, 16)).transpose(1, 2)
                return logits + s2o_compile.attention(heads, heads, heads, causal=True, config=CONFIG).sum()

        config = s2o_compile.calibrate(Mixed().eval(), tiny_tokens(), 0.05, config=CONFIG)
        assert set(config.site_tau) == {"inner.layers.0", "inner.layers.1"}


class TestRefusals:
    def test_an_exact_budget_beside_taus(self):
        with pytest.raises(OptionError, match=r"error=0.0, which is exact: expected no site_tau beside it"):
            S2OConfig(error=0.0, site_tau={"layers.0": (0.5,)})

    def test_what_cannot_be_written_before_the_work(self, tmp_path):
        from s2o_compile.cli import main as cli

        out = str(tmp_path / "missing" / "s2o.json")
        for command in (
            ["calibrate", "--out", out],
            ["evaluate", "--json", out],
            ["plot", "depth", "--out", out + ".png"],
        ):
            result = CliRunner().invoke(cli.app, command)
            assert isinstance(result.exception, OptionError)
            assert "expected a file in a directory that exists" in str(result.exception)

    @pytest.mark.parametrize("error", [0.0, 2.0, -0.1, True, "small", float("nan")])
    def test_what_is_no_budget(self, error):
        with pytest.raises(OptionError, match=r"calibrate: error: expected a relative error between 0.0001 and 1, got"):
            s2o_compile.calibrate(tiny_language_model(), tiny_tokens(), error, config=CONFIG)

    def test_batches_that_would_run_dense(self):
        with pytest.raises(EvaluationError, match=r"calibrate: expected batches of at least 5000 tokens, got 700"):
            s2o_compile.calibrate(tiny_language_model(), tiny_tokens(), config=S2OConfig(min_seq_len=5000))

    @pytest.mark.parametrize(
        ("length", "error", "message"),
        [(300, 0.05, "% of the pairs and err .*Give longer batches"), (1500, 1e-4, "Give a larger error")],
        ids=["short", "strict"],
    )
    def test_a_budget_that_no_head_keeps_sparsely(self, length, error, message):
        expected = rf"calibrate: expected some heads to run sparse within an error of .*%, got none of 2 .*{message}"
        with pytest.raises(EvaluationError, match=expected):
            s2o_compile.calibrate(sharp_model(), long_tokens(length), error, config=CONFIG)

    def test_a_model_in_training_mode(self):
        with pytest.raises(EvaluationError, match=r"calibrate: expected a model in eval mode"):
            s2o_compile.calibrate(tiny_language_model().train(), tiny_tokens(), config=CONFIG)


class TestBudgetWithoutCalibration:
    def test_zero_is_exact(self):
        model, ids = tiny_language_model(), tiny_tokens()
        for error, density in measured(model, ids, dataclasses.replace(CONFIG, error=0.0)).values():
            assert error < 1e-5
            assert density >= 1.0

    def test_tau_grows_with_the_budget_and_meets_what_was_measured(self):
        taus = [tau_for(error) for error in (0.001, 0.005, 0.02, 0.05, 0.1, 0.5)]
        assert taus == sorted(set(taus))
        assert [tau_for(error) for error, _ in MEASURED] == pytest.approx([tau for _, tau in MEASURED])
        assert S2OConfig(error=0.0236).fixed_tau == pytest.approx(0.25)
        assert S2OConfig(error=0.0236).tau_on(torch.device("cpu")) == pytest.approx(1.5 * 0.25)
        assert S2OConfig(error=1.0).tau_on(torch.device("cpu")) == 3.0

    def test_the_quality_in_words(self):
        assert S2OConfig().quality == "error 0.1 from tau 0.5"
        assert S2OConfig(tau=0.5).quality == "tau 0.5"
        assert S2OConfig(tau=(0.1, 0.2)).quality == "tau by head"
        assert S2OConfig(tau=(0.1, 0.2), error=0.02).quality == "error 0.02 from tau by head"
        assert S2OConfig(error=0.02).quality == "error 0.02"
        assert S2OConfig(error=0.02, site_tau={"a": (1.0,)}).quality == "error 0.02, calibrated"


@pytest.fixture
def command(monkeypatch):
    """Run ``s2o calibrate`` on a model that needs no file, at 1500 tokens."""
    from s2o_compile.cli import calibrate as cli_calibrate
    from s2o_compile.cli import main as cli

    monkeypatch.setattr(cli_calibrate, "load", lambda *_: (sharp_model(), None))
    monkeypatch.setattr(cli_calibrate, "tokenize", lambda _, __, tokens, ___: tiny_tokens(tokens))
    given = ["calibrate", "--tokens", "1500", "--error", "0.1", "--device", "cpu"]
    return lambda *more: CliRunner().invoke(cli.app, [*given, *map(str, more)])


def test_the_command_writes_a_configuration(command, tmp_path):
    text, out = tmp_path / "text.txt", tmp_path / "s2o.json"
    text.write_text("any")
    result = command("--text", text, "--out", out)
    assert result.exit_code == 0, result.output
    assert "2 of 2 attentions will run sparse from 4096 tokens on (min_seq_len 'auto' on cpu)" in result.output
    assert re.search(
        r"At 1500 tokens they computed \d\d% of the query-key pairs. That should take \d\d%", result.output
    )
    assert "Prompts of 1500 tokens run dense." in result.output
    config = S2OConfig.from_json(out.read_text())
    assert (config.error, config.min_seq_len) == (0.1, "auto")
    assert set(config.site_tau) == {"layers.0", "layers.1"}
    about = json.loads(out.read_text())["about"]
    assert (about["model"], about["text"]) == ("SmolLM2-135M-Instruct", [str(text)])
    assert (about["tokens"], about["device"]) == (1500, "cpu")
    assert {"date", "command", "torch"} <= about.keys()


def test_a_given_configuration_keeps_its_own_length(command, tmp_path):
    given, out = tmp_path / "given.json", tmp_path / "s2o.json"
    given.write_text('{"min_seq_len": 1000, "segment_len": 128}')
    result = command("--config", given, "--out", out)
    assert result.exit_code == 0, result.output
    assert "will run sparse from 1000 tokens on (min_seq_len 1000 on cpu)" in result.output
    assert "run dense. Calibrate" not in result.output
    config = S2OConfig.from_json(out.read_text())
    assert (config.min_seq_len, config.segment_len) == (1000, 128)
