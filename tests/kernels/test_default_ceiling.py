"""The default begins at tau 0.5 and keeps the sampled error of every attention below 10 %, whatever the input."""

import math

import pytest
import torch

import s2o_compile
from s2o_compile import ImplementationUnavailableError, S2OConfig
from s2o_compile.kernels import budget, dispatch
from s2o_compile.kernels.core.options import DEFAULT_ERROR, DEFAULT_TAU, OperatorOptions, from_op_kwargs
from s2o_compile.kernels.core.result import Result, empty_result
from s2o_compile.kernels.exact.sampled import sample_rows
from s2o_compile.kernels.statistics import record_calls
from tests.kernels.test_budget import INPUTS, LENGTH, TERMS, distance, exact, noise, topical

SHORT = {"min_seq_len": 1, "segment_len": 128}
BOUND = 1.15 * DEFAULT_ERROR


def attend(inputs, quality=None, **terms):
    """Output and the record of a call, by default of the default quality."""
    with record_calls() as calls:
        output = s2o_compile.attention(*inputs, causal=True, config=S2OConfig(**SHORT, **(quality or {})), **terms)
    return output, calls[0]


@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("name", INPUTS)
def test_it_holds(name, terms):
    inputs, terms = INPUTS[name](), TERMS[terms]
    output, call = attend(inputs, **terms)
    assert call.error <= DEFAULT_ERROR
    assert distance(output, exact(inputs, **terms)) <= BOUND


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", INPUTS)
def test_it_holds_on_the_gpu(name, dtype):
    inputs = [x.cuda().to(dtype) for x in INPUTS[name]()]
    output, call = attend(inputs)
    assert call.error <= DEFAULT_ERROR
    assert distance(output, exact(inputs)) <= BOUND


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_it_holds_in_half_precision(dtype):
    inputs = [x.to(dtype) for x in noise()]
    output, call = attend(inputs)
    assert call.error <= DEFAULT_ERROR
    assert distance(output, exact(inputs)) <= BOUND


def test_tau_alone_promises_nothing():
    """The inputs are hard enough: without the ceiling tau 0.5 errs twice as much."""
    inputs = noise()
    assert distance(attend(inputs, {"tau": DEFAULT_TAU})[0], exact(inputs)) > 1.5 * DEFAULT_ERROR


def test_nan_stays_in_its_row():
    query, key, value = noise()
    query[0, 1, 1000, 3] = torch.nan
    output, _ = attend((query, key, value))
    assert output.isnan().any(-1).nonzero().tolist() == [[0, 1, 1000]]
    query[0, 1, 1000, 3] = 0.0
    others = torch.arange(LENGTH) != 1000
    assert distance(output[:, :, others], exact((query, key, value))[:, :, others]) <= BOUND


def test_where_it_holds_at_once_it_changes_no_bit():
    inputs = topical()
    assert torch.equal(attend(inputs)[0], attend(inputs, {"tau": DEFAULT_TAU})[0])


def test_it_begins_at_a_tau_beside_it():
    """Of an error that everything meets nothing is left but the tau."""
    inputs = topical()
    densities = [attend(inputs, {"tau": tau, "error": 0.9})[1].density for tau in (0.1, 1.0)]
    assert densities == [attend(inputs, {"tau": tau})[1].density for tau in (0.1, 1.0)]
    taus = (0.1, 1.0, 0.1, 1.0)
    by_head = [attend(inputs, {"tau": taus, **error})[1].density for error in ({}, {"error": 0.9})]
    assert by_head[0] == by_head[1] not in densities


def test_a_cpu_measures_once_where_it_holds(monkeypatch):
    rounds = []

    def lower(*arguments):
        rounds.append(arguments[-1])
        lower_tau(*arguments)

    lower_tau = budget.lower_tau
    monkeypatch.setattr(budget, "lower_tau", lower)
    attend(topical())
    assert rounds == list(budget.FEW_ROUNDS.steps[:1])
    rounds.clear()
    attend(noise())
    assert rounds == list(budget.FEW_ROUNDS.steps)


def test_few_rounds_where_the_first_tau_is_far_below_the_budget():
    assert budget.rounds_for(0.5, 0.1, 2048) == budget.FEW_ROUNDS
    assert budget.rounds_for(0.5, 0.05, 2048) == budget.ROUNDS
    assert budget.rounds_for(torch.full((2,), 0.5), 0.1, 2048) == budget.ROUNDS
    for rounds in (budget.ROUNDS, budget.FEW_ROUNDS):
        assert rounds.steps[-1] == 0.0, "the last round must leave no key out"


@pytest.mark.parametrize(("queries", "samples"), [(100, 256), (4096, 256), (8192, 512), (16384, 1024), (2**20, 1024)])
def test_long_calls_are_sampled_more_often(queries, samples):
    assert budget.rounds_for(0.5, 0.05, queries).samples == samples
    assert budget.rounds_for(0.5, 0.1, queries) == budget.FEW_ROUNDS


@pytest.mark.parametrize("quality", [{"tau": 0.0}, {"tau": 0.0, "error": 0.1}, {"tau": 1.0}, {"error": 0.0}], ids=str)
def test_nothing_is_measured(quality, monkeypatch):
    monkeypatch.setattr("s2o_compile.kernels.schedule.attend_within", lambda *_: pytest.fail("measured"))
    inputs, config = topical(), S2OConfig(**SHORT, **quality)
    planned = s2o_compile.plan(*inputs, causal=True, config=config)
    for output in (
        attend(inputs, quality)[0],
        s2o_compile.attention(*inputs, causal=True, plan=planned, config=config),
    ):
        if 0.0 in quality.values():
            assert distance(output, exact(inputs)) < 1e-5


def test_a_call_without_a_configuration_holds_it():
    inputs = noise()
    output = torch.ops.s2o.attention(*inputs, causal=True, **SHORT)[0]
    assert torch.equal(output, attend(inputs)[0])
    assert S2OConfig().options == OperatorOptions() == from_op_kwargs(None, None, None, "per_query", "group", "auto")


@pytest.mark.parametrize("count", [64, 128, 256])
def test_the_first_row_stands_for_no_other(count):
    """Rows of equal weights have outputs of 1 / sqrt(n): the first of them would outweigh all others."""
    rows = sample_rows(4096, torch.device("cpu"), count)
    power = 1.0 / (1 + torch.arange(4096))
    seen = power[rows].mean() / power.mean()
    assert rows[0] > 0
    assert 0.5 < seen < 1.05


class TestFlexAttention:
    def test_it_goes_by_tau_and_says_so(self, monkeypatch):
        """Its kernel takes seconds to compile: what it would visit says enough."""
        seen = []

        def visit(call, _plan, visits):
            seen.append(visits)
            return Result(*(x.zero_() for x in empty_result(call.query, call.value.shape[3])))

        monkeypatch.setattr(dispatch.flex_forward, "attend", visit)
        inputs = [x[:, :, :512] for x in noise()]
        assert attend(inputs, {"implementation": "flex"})[1].unheld_error == DEFAULT_ERROR
        assert attend(inputs, {"implementation": "flex", "tau": DEFAULT_TAU})[1].unheld_error is None
        assert torch.equal(*seen)
        assert attend(inputs)[1].unheld_error is None

    @pytest.mark.parametrize("quality", [{"error": 0.1}, {"tau": 0.5, "error": 0.05}], ids=str)
    def test_an_error_that_was_asked_for_is_refused(self, quality):
        with pytest.raises(ImplementationUnavailableError, match="expected a tau alone"):
            attend([x[:, :, :512] for x in noise()], {"implementation": "flex", **quality})


def test_the_wire_says_what_the_configuration_says():
    for quality in ({}, {"tau": 0.25}, {"error": 0.05}, {"tau": 1.0, "error": 0.05}, {"tau": (0.1, 0.2), "error": 0.1}):
        options = S2OConfig(**quality).options
        fields = {"head_tau": (), **options.to_op_kwargs()}
        again = from_op_kwargs(**{**fields, "head_tau": tuple(fields["head_tau"])})
        assert again == options
        assert math.isclose(options.error or 0.0, S2OConfig(**quality).error or 0.0)
