"""Observers see sparse calls, can run them again, and may put another output in place."""

import pytest
import torch

import s2o_compile
from s2o_compile import S2OConfig
from s2o_compile.kernels import observe as observation
from s2o_compile.kernels import planner as rank
from s2o_compile.kernels.core import plan
from s2o_compile.kernels.core.call import AttentionCall
from s2o_compile.kernels.observe import observe_attention
from s2o_compile.kernels.statistics import record_calls
from s2o_compile.kernels.support.errors import InputError
from s2o_compile.quality.head_curves import HeadCurves
from s2o_compile.quality.site_quality import SiteMeter
from tests.conftest import CUDA, Case, assert_close, bounds, computed_pairs, dense_area, distance, exact_attention, on
from tests.helpers.tiny import tiny_input, tiny_model


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch):
    """The smallest chunks, so that a few hundred keys are enough to stop early."""
    for module in (plan, rank):
        monkeypatch.setattr(module, "default_chunk_len", lambda _: 128)


def attend(inputs, **options):
    mask = inputs.mask
    given = {"causal": mask.causal, "causal_offset": mask.offset if mask.causal else None, "window": mask.window}
    given |= {"attention_chunk": mask.attention_chunk, "scale": inputs.scale, "softcap": inputs.softcap}
    given |= {"min_seq_len": 0, "tau": 4.0, "segment_len": 128, "site": "here"} | options
    return torch.ops.s2o.attention(*inputs.tensors, mask.key_mask, inputs.sinks, **given)


def observed(inputs, answer=lambda call: None, **options):
    """Output, log-sum-exp, the calls seen and the calls recorded."""
    seen = []

    def observer(call):
        seen.append(call)
        return answer(call)

    with observe_attention(observer), record_calls() as recorded:
        output, lse = attend(inputs, **options)
    return output, lse, seen, recorded


CPU = pytest.param("cpu")
CASES = [
    Case(queries=520, heads=4, kv_heads=2),
    Case(queries=520, heads=4, kv_heads=2, dtype="bf16", layout="transposed"),
    Case(queries=200, keys=600, heads=2, kv_heads=2),
    Case(queries=520, heads=2, kv_heads=1, batch=2, padding="left"),
    Case(queries=520, heads=2, kv_heads=1, softcap=20.0),
    Case(queries=520, heads=2, kv_heads=1, value_dim=32),
    Case(queries=520, keys=500, heads=2, kv_heads=1, causal=False),
]


@pytest.mark.parametrize(("device", "case"), [*on(CPU, *CASES), *on(CUDA, *CASES)])
class TestCalls:
    def test_looking_changes_nothing(self, device, case):
        inputs = case.inputs(device)
        output, _, seen, recorded = observed(inputs)
        assert torch.equal(output, attend(inputs)[0])
        (call,) = seen
        assert (call.site, call.options.tau, call.options.segment_len) == ("here", 4.0, 128)
        assert call.densities(call.result).mean().item() == pytest.approx(recorded[0].density)
        assert torch.equal(call.result.output, output)

    def test_runs_again_with_other_options(self, device, case):
        inputs = case.inputs(device)
        _, _, (call,), recorded = observed(inputs)
        full = call.run(tau=0.0)
        assert_close((full.output, full.lse), exact_attention(inputs), inputs)
        assert torch.equal(call.run(tau=1.0).output, attend(inputs, tau=1.0, return_lse=True)[0])
        assert (call.densities(full) > call.densities(call.result)).all()
        pairs = computed_pairs(full.computed, case.queries)
        assert call.densities(full).mean().item() == pytest.approx(pairs / dense_area(inputs))
        assert len(recorded) == 1

    def test_exact_output(self, device, case):
        inputs = case.inputs(device)
        _, _, (call,), _ = observed(inputs)
        limit = bounds(inputs)[0]
        exact = exact_attention(inputs)[0]
        assert distance(call.exact(), exact) <= limit
        assert distance(call.exact(), exact) < distance(call.result.output, exact)
        assert call.exact().dtype == inputs.query.dtype


def test_dense_heads_of_a_call_and_of_another_run():
    inputs = Case(queries=520, heads=4, kv_heads=4).inputs()
    _, _, (call,), _ = observed(inputs, dense_heads=[1])
    exact, limit = exact_attention(inputs)[0], bounds(inputs)[0]

    def exact_heads(output):
        return [head for head in range(4) if distance(output[:, head], exact[:, head]) <= limit]

    assert exact_heads(call.result.output) == exact_heads(call.run().output) == [1]
    assert exact_heads(call.run(dense_heads=(0, 3)).output) == [0, 3]


@pytest.mark.parametrize("case", [CASES[0], Case(queries=520, sinks=True), Case(queries=700, chunk=640)], ids=str)
def test_what_an_observer_returns_is_passed_on(case):
    inputs = case.inputs()
    output, lse, seen, recorded = observed(inputs, lambda call: call.exact(), return_lse=True)
    assert_close((output, lse), exact_attention(inputs), inputs)
    assert distance(attend(inputs)[0], exact_attention(inputs)[0]) > bounds(inputs)[0]
    assert all(entry.path != "s2o" or entry.density >= 1 for entry in recorded)
    assert seen


def test_the_observer_opened_last_decides():
    inputs = CASES[0].inputs()
    two, three = (lambda call, number=number: torch.full_like(call.query, number) for number in (2, 3))
    with observe_attention(two), observe_attention(three), observe_attention(lambda call: None):
        assert (attend(inputs)[0] == 3).all()
    assert distance(attend(inputs)[0], exact_attention(inputs)[0]) < 1


@pytest.mark.parametrize(
    ("wrong", "got"),
    [
        (lambda call: call.query[:, :1], r"torch.float32 \(1, 1, 520, 64\)"),
        (lambda call: call.query.half(), r"torch.float16 \(1, 4, 520, 64\)"),
        (lambda call: call.result, r"Result\("),
    ],
    ids=["shape", "dtype", "type"],
)
def test_another_output_must_fit(wrong, got):
    message = rf"observer: expected None or an output torch.float32 \(1, 4, 520, 64\), got {got}.*call.exact"
    with pytest.raises(InputError, match="(?s)" + message):
        observed(CASES[0].inputs(), wrong)
    assert not observation.observing()


@pytest.mark.parametrize(
    "options", [{"min_seq_len": 4096}, {"window": 100}, {"dense_heads": [0, 1]}], ids=["short", "window", "all-dense"]
)
def test_calls_on_other_paths_are_not_shown(options):
    assert observed(CASES[0].inputs(), **options)[2] == []


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("inner_backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_calls_of_a_compiled_model_are_seen_by_site(inner_backend):
    model, x = tiny_model(), tiny_input(300)
    fast = s2o_compile.optimize(model, S2OConfig(min_seq_len=0, tau=4.0, inner_backend=inner_backend))
    sites = []

    def exact(call):
        sites.append(call.site)
        return call.exact()

    with torch.no_grad():
        fast(x)
        with observe_attention(exact):
            output = fast(x)
        expected = model(x)
    assert sites == ["layers.0", "layers.1"]
    assert (output - expected).abs().max() <= 4 * torch.finfo(torch.float32).eps * expected.abs().max()


def test_sinks_are_put_in_for_comparison():
    """Errors are those of what the model gets."""
    inputs = Case(queries=900, heads=4, kv_heads=2, sinks=True).inputs()
    inputs.sinks.add_(6.0)
    curves, meter, seen = HeadCurves([4.0], 2), SiteMeter(), []

    def look(call):  # at once: sinks are put into the call's own output behind it
        curves.add(call, call.exact())
        meter(call)
        seen.extend([call.with_sinks(call.exact()), call.with_sinks(call.result.output, call.result.lse)])
        seen.append(((call.result.output - call.exact()).norm() / call.exact().norm()).item())

    output, *_ = observed(inputs, look)
    exact, _ = attend(inputs, tau=0.0)
    torch.testing.assert_close(seen[0], exact, rtol=1e-4, atol=1e-5)
    assert torch.equal(seen[1], output)
    wanted = pytest.approx(((output - exact).norm() / exact.norm()).item(), rel=1e-3)
    assert (curves.sums.errors()[0], meter.sites()[0].error) == (wanted, wanted)
    assert seen[2] != pytest.approx(curves.sums.errors()[0], rel=0.2)  # what would be measured without them


def test_a_changed_call_leaves_results_behind():
    """A changed call has other results, so neither these nor the caller's options go with it."""
    inputs = Case(queries=520, heads=2, kv_heads=2).inputs()
    _, _, (call,), _ = observed(inputs)
    assert call.result is call.result
    changed = call.but(dense_heads=(0,), softcap=2.0)
    assert type(changed) is AttentionCall
    fields = {name: value for name, value in vars(call).items() if name not in ("options", "execute", "result")}
    assert vars(changed) == fields | {"dense_heads": (0,), "softcap": 2.0}


def test_nothing_is_copied_where_nothing_changes():
    call = AttentionCall.of(*(torch.randn(1, 2, 160, 16) for _ in range(3)), causal=True)
    assert call.for_kernels() is call
    assert call.mask.for_batch(1) is call.mask
