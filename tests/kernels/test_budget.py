"""The error budget of a call holds while it runs: on inputs that are sparse, and on those that cannot be."""

import pytest
import torch

import s2o_compile
from s2o_compile import ImplementationUnavailableError, S2OConfig
from s2o_compile.kernels import budget
from s2o_compile.kernels.observe import observe_attention
from s2o_compile.kernels.statistics import record_calls

LENGTH, DIM = 2048, 32


def topical(heads=4, kv_heads=2, length=LENGTH, seed=0):
    """Keys lie in topics of 32, and each query looks for one of them: most of a row's mass lies in few keys."""
    generator = torch.Generator().manual_seed(seed)
    topics = torch.randn(1, kv_heads, length // 32, DIM, generator=generator)
    key = topics.repeat_interleave(32, 2) * 1.4 + 0.6 * torch.randn(1, kv_heads, length, DIM, generator=generator)
    wanted = torch.randint(0, length // 32, (1, heads, length // 64), generator=generator).repeat_interleave(64, 2)
    looked_for = topics.repeat_interleave(heads // kv_heads, 1).gather(2, wanted[..., None].expand(-1, -1, -1, DIM))
    query = looked_for * 1.4 + 0.6 * torch.randn(1, heads, length, DIM, generator=generator)
    return query, key, torch.randn(1, kv_heads, length, DIM, generator=generator)


def one_head_dense():
    query, key, value = topical()
    query[:, 1] *= 0.05
    return query, key, value


def one_query_wants_one_key():
    query, key, value = topical()
    query[:, :, 1900] = 0
    query[:, :, 1900, 0], key[:, :, 300] = 40.0, 0.0
    key[:, :, 300, 0], value[:, :, 300] = 10.0, 9.0
    return query, key, value


def flat_rows():
    query, key, value = topical()
    return query * 0.0, key, value


def identical_keys():
    query, key, value = topical()
    return query, key[:, :, :1].expand_as(key).contiguous(), value


def noise():
    generator = torch.Generator().manual_seed(2)
    return tuple(torch.randn(1, h, LENGTH, DIM, generator=generator) for h in (4, 2, 2))


INPUTS = {
    "topical": topical,
    "one head dense": one_head_dense,
    "one query wants one key": one_query_wants_one_key,
    "flat rows": flat_rows,
    "identical keys": identical_keys,
    "noise": noise,
}
TERMS = {"": {}, "sinks": {"sinks": torch.tensor([-1.0, 3.0, 6.0, 9.0])}, "softcap": {"softcap": 8.0}}


def attend(inputs, error, implementation="auto", **terms):
    """Output and the record of the call."""
    config = S2OConfig(error=error, min_seq_len=1, segment_len=128, implementation=implementation)
    with record_calls() as calls:
        output = s2o_compile.attention(*inputs, causal=True, config=config, **terms)
    return output, calls[0]


def exact(inputs, **terms):
    config = S2OConfig(tau=0.0, min_seq_len=1, implementation="auto")
    return s2o_compile.attention(*(x.float() for x in inputs), causal=True, config=config, **terms)


def distance(output, expected):
    return ((output.float() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("error", [0.2, 0.05])
@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("name", INPUTS)
def test_budget_holds(name, terms, error):
    inputs, terms = INPUTS[name](), TERMS[terms]
    output, call = attend(inputs, error, **terms)
    assert call.error <= error
    assert distance(output, exact(inputs, **terms)) <= 1.15 * error


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", INPUTS)
def test_budget_holds_on_the_gpu(name, dtype):
    inputs = [x.cuda().to(dtype) for x in INPUTS[name]()]
    output, call = attend(inputs, 0.05)
    assert call.error <= 0.05
    assert distance(output, exact(inputs)) <= 1.15 * 0.05


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_budget_holds_in_half_precision(dtype):
    inputs = [x.to(dtype) for x in topical()]
    output, call = attend(inputs, 0.1)
    assert call.error <= 0.1
    assert distance(output, exact(inputs)) <= 1.15 * 0.1


def test_a_looser_budget_computes_less():
    densities = [attend(topical(), error)[1].density for error in (0.3, 0.1, 0.0)]
    assert densities[0] < 0.8 * densities[1] < 0.8 * densities[2]


def test_the_budget_decides_and_not_tau():
    """A tau that leaves far too much out is only where the call begins."""
    inputs = topical()
    loose = s2o_compile.attention(*inputs, causal=True, config=S2OConfig(tau=50.0, min_seq_len=1, segment_len=128))
    kept = torch.ops.s2o.attention(*inputs, causal=True, tau=50.0, error=0.05, min_seq_len=1, segment_len=128)[0]
    expected = exact(inputs)
    assert distance(loose, expected) > 0.2
    assert distance(kept, expected) <= 1.15 * 0.05


def test_without_the_rounds_the_budget_does_not_hold(monkeypatch):
    """The inputs above are hard enough: the first tau alone misses the budget on one of them."""
    monkeypatch.setattr(budget, "ROUNDS", budget.Rounds(256, ()))
    assert max(attend(INPUTS[name](), 0.05)[1].error for name in INPUTS) > 0.05


def test_nan_goes_to_the_rows_that_hold_it():
    query, key, value = topical()
    query[0, 1, 1000, 3] = torch.nan
    output, _ = attend((query, key, value), 0.05)
    bad = output.isnan().any(-1)
    assert bad.nonzero().tolist() == [[0, 1, 1000]]
    query[0, 1, 1000, 3] = 0.0
    expected = exact((query, key, value))
    assert distance(output[:, :, 1001:], expected[:, :, 1001:]) <= 1.15 * 0.05


def test_same_bits_every_time():
    inputs = topical()
    assert torch.equal(attend(inputs, 0.1)[0], attend(inputs, 0.1)[0])


def test_slices_hold_the_budget_one_by_one(monkeypatch):
    from s2o_compile.kernels import schedule

    monkeypatch.setattr(schedule, "SCRATCH_BYTES", 2**17)
    monkeypatch.setattr(schedule, "SCRATCH_SHARE", 2**20)
    inputs = topical()
    output, call = attend(inputs, 0.1)
    assert call.error <= 0.1
    assert distance(output, exact(inputs)) <= 0.115


def test_a_batch_holds_it_entry_by_entry():
    parts = [topical(), noise()]
    inputs = [torch.cat(pair) for pair in zip(*parts, strict=True)]
    output, _ = attend(inputs, 0.1)
    expected = exact(inputs)
    for entry in range(2):
        assert distance(output[entry], expected[entry]) <= 0.115


@pytest.mark.gpu
@pytest.mark.parametrize("quality", [{"error": 0.05}, {}], ids=["budget", "default"])
def test_a_cuda_graph_holds_it(quality):
    first, second = ([x.cuda().bfloat16() for x in make()] for make in (topical, noise))
    held = [x.clone() for x in first]
    config = S2OConfig(min_seq_len=1, segment_len=128, **quality)

    def call():
        return s2o_compile.attention(*held, causal=True, config=config)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        output = call()
    for inputs in (first, second):
        for into, x in zip(held, inputs, strict=True):
            into.copy_(x)
        graph.replay()
        assert torch.equal(output, call())
        assert distance(output, exact(inputs)) <= 1.15 * config.error


def test_a_plan_holds_it():
    query, key, value = topical()
    config = S2OConfig(error=0.05, min_seq_len=1, segment_len=128)
    plan = s2o_compile.plan(query, key, value, causal=True, config=config)
    with record_calls() as calls:
        output = s2o_compile.attention(query, key, value, causal=True, plan=plan, config=config)
    assert calls[0].error <= 0.05
    assert distance(output, exact((query, key, value))) <= 1.15 * 0.05
    loose = s2o_compile.attention(query, key, value, causal=True, plan=plan, config=S2OConfig(tau=3.0))
    assert distance(loose, exact((query, key, value))) > 0.05
    with pytest.raises(ImplementationUnavailableError, match="expected a tau alone"):
        s2o_compile.attention(
            query, key, value, causal=True, plan=plan, config=S2OConfig(error=0.05, implementation="flex")
        )


def test_a_row_without_keys_beside_a_sink_of_nothing_is_no_error():
    query, key, value = topical()
    mask = torch.ones(1, LENGTH, dtype=torch.bool)
    mask[:, :200] = False
    sinks = torch.full((4,), -torch.inf)
    _, call = attend((query, key, value), 0.1, key_mask=mask, sinks=sinks)
    assert call.error <= 0.1
    assert call.density < 0.9 * attend((query, key, value), 0.0, key_mask=mask)[1].density


def test_padding_pays_for_no_error():
    """Queries of padding that are easy to rank must not make up for real ones that are off."""
    query, key, value = topical()
    key_mask = torch.arange(LENGTH)[None] < LENGTH // 2
    query[:, :, LENGTH // 2 :] = query[:, :, LENGTH // 2 - 1 : LENGTH // 2] * 3
    output, call = attend((query, key, value), 0.05, key_mask=key_mask)
    real = slice(0, LENGTH // 2)
    expected = exact((query, key, value), key_mask=key_mask)[:, :, real]
    assert distance(output[:, :, real], expected) <= 1.15 * 0.05
    assert call.error <= 0.05
    loose = S2OConfig(tau=3.0, min_seq_len=1, segment_len=128)
    with record_calls() as calls:
        output = s2o_compile.attention(query, key, value, key_mask=key_mask, causal=True, config=loose)
    assert calls[0].error == pytest.approx(distance(output[:, :, real], expected), rel=0.35)


def test_nothing_is_asked_of_padding_alone():
    inputs = [torch.cat([x, x]) for x in topical()]
    key_mask = torch.stack([torch.ones(LENGTH, dtype=torch.bool), torch.zeros(LENGTH, dtype=torch.bool)])
    output, call = attend(inputs, 0.1, key_mask=key_mask)
    assert not output[1].any()
    assert call.error <= 0.1
    assert distance(output[0], exact([x[:1] for x in inputs])[0]) <= 0.115


def test_a_budget_of_zero_is_exact():
    inputs = topical()
    given = torch.ops.s2o.attention(*inputs, causal=True, tau=5.0, error=0.0, min_seq_len=1, segment_len=128)[0]
    assert distance(given, exact(inputs)) < 1e-5


def test_autocast_does_not_round_what_a_plan_measures():
    inputs = topical()
    config = S2OConfig(error=0.05, min_seq_len=1, segment_len=128)
    plan = s2o_compile.plan(*inputs, causal=True, config=config)
    found = []
    for on in (False, True):
        with record_calls() as calls, torch.autocast("cpu", dtype=torch.bfloat16, enabled=on):
            output = s2o_compile.attention(*inputs, causal=True, plan=plan, config=config)
        found.append((output, calls[0].error, calls[0].density))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1:] == found[1][1:]


def test_an_output_that_was_replaced_is_not_measured():
    config = S2OConfig(min_seq_len=1, segment_len=128)
    with record_calls() as calls, observe_attention(lambda call: call.exact()):
        s2o_compile.attention(*topical(), causal=True, config=config)
    with record_calls() as looked_at, observe_attention(lambda call: None):
        s2o_compile.attention(*topical(), causal=True, config=config)
    assert calls[0].error is None
    assert looked_at[0].error > 0
