"""The executor in C++: output, log-sum-exp and computed counts of the reference over the same plan."""

import platform

import pytest
import torch

from s2o_compile import S2OConfig, attention
from s2o_compile.kernels.core.plan import TILE_LEN
from s2o_compile.kernels.core.result import empty_progress
from s2o_compile.kernels.impl.cpp import exact, forward
from s2o_compile.kernels.support import cpp_library
from tests.conftest import Case, assert_close, exact_attention
from tests.helpers.operator_calls import assert_like_definition
from tests.kernels.impl.torch.test_forward import CASES, LONG
from tests.kernels.test_executor_variants import RANKED

pytestmark = pytest.mark.skipif(bool(cpp_library.why_not()), reason="needs a C++ compiler")


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.5])
@pytest.mark.parametrize("case", [*CASES, *RANKED], ids=str)
def test_equals_definition(case, tau, build_plan, poison_empty):
    inputs = case.inputs()
    assert_like_definition(forward, inputs, build_plan(inputs), tau)


@pytest.mark.parametrize("tau", [0.0, 1.0])
def test_equals_definition_at_length_4097(tau, build_plan):
    inputs = LONG.inputs()
    assert_like_definition(forward, inputs, build_plan(inputs, segment_len=512, chunk_len=256), tau)


@pytest.mark.parametrize("case", [CASES[2], CASES[7], CASES[11], CASES[13]], ids=str)
def test_equals_definition_with_a_list_per_head(case, build_plan):
    inputs = case.inputs()
    assert_like_definition(forward, inputs, build_plan(inputs, ranking_per="head"), 1.0)


@pytest.mark.parametrize("tau", [2.1, 1.0, 0.5, 0.02])
def test_stops_where_the_arithmetic_says(tau, weighed):
    example = weighed((64, 8, 1, 0.125, 0.125, 0.125, 0.125, 0.125))
    actual = assert_like_definition(forward, example.inputs, example.plan, tau)
    assert actual.computed.item() == TILE_LEN + 64 * example.stop(tau)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(("head_dim", "value_dim"), [(1, 64), (33, 31), (72, 100), (128, 1), (129, 256)])
def test_rows_of_any_length_are_packed(head_dim, value_dim, dtype, build_plan, poison_empty):
    """Keys and values lie beside numbers that are not finite, which no panel may hold."""
    case = Case(queries=290, head_dim=head_dim, value_dim=value_dim, dtype=dtype)
    inputs = case.inputs()
    call = inputs.call
    wide = [torch.cat([x, torch.full_like(x, float("nan"))], -1)[..., : x.shape[3]] for x in call.tensors]
    plan = build_plan(inputs)
    assert_like_definition(forward, inputs, plan, 0.5)
    assert torch.equal(forward.attend(call.over(*wide), plan, 0.5).output, forward.attend(call, plan, 0.5).output)


def test_a_list_of_less_than_two_chunks_is_walked_to_its_end(weighed):
    example = weighed((64, 8)).shortened(96)
    assert assert_like_definition(forward, example.inputs, example.plan, 0.6).computed.item() == TILE_LEN + 96


def test_inputs_are_left_alone_and_strides_are_followed(build_plan):
    inputs = CASES[2].inputs()
    plan, call = build_plan(inputs), inputs.call
    before = [x.clone() for x in inputs.tensors]
    expected = forward.attend(call, plan, 1.0)
    # Every other number of wider tensors: no last stride is 1.
    wide = [torch.stack([x, torch.full_like(x, float("nan"))], -1).flatten(3)[..., ::2] for x in inputs.tensors]
    actual = forward.attend(call.over(*wide), plan, 1.0)
    assert all(torch.equal(x, y) for x, y in zip(inputs.tensors, before, strict=True))
    assert all(torch.equal(x, y) for x, y in zip(actual, expected, strict=True))


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_nothing_is_written_beside_the_result(dtype, build_plan):
    """Into heads 1 to 2 and rows 128 to 428 of larger tensors, as a slice of a call has them."""
    inputs = Case(queries=300, heads=2, kv_heads=1, dtype=dtype).inputs()
    call, plan = inputs.call, build_plan(inputs)
    expected = forward.attend(call, plan, 1.0, None, (state := empty_progress(call.query)))
    tall = call.query.new_full((1, 4, 600, 64), 7.0)
    whole = type(expected)(tall, torch.full((1, 4, 600), 7.0), torch.full((1, 4, 5), 7, dtype=torch.int32))
    more = type(state)(torch.full((1, 4, 600), 7.0), torch.full((1, 4, 5), 7.0))
    rows, tiles = (slice(None), slice(1, 3), slice(128, 428)), (slice(None), slice(1, 3), slice(1, 4))
    parts = [
        (whole.output, rows),
        (whole.lse, rows),
        (whole.computed, tiles),
        (more.tail, rows),
        (more.unvisited, tiles),
    ]
    views = [x[place] for x, place in parts]
    forward.attend(call, plan, 1.0, type(expected)(*views[:3]), type(state)(*views[3:]))
    for (x, place), found in zip(parts, (*expected, *state), strict=True):
        assert torch.equal(x[place], found)
        x[place] = 7
        assert (x == 7).all()


def test_not_a_number_stays_where_it_is_seen(build_plan):
    """A key in a segment and its value: earlier rows of the same block do not see them."""
    for spoiled in ("key", "value"):
        inputs = Case(queries=300, heads=2, kv_heads=1).inputs()
        getattr(inputs, spoiled)[0, 0, 132, 3] = float("nan")
        output = forward.attend(inputs.call, build_plan(inputs), 0.0).output
        seen = output.isnan().any(-1)
        assert not seen[..., :132].any()
        assert seen[..., 132:].all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-30, 0.1, 1e15, 1e27, -1e20])
def test_the_largest_logit_counts_at_any_magnitude(scale, dtype):
    """Huge logits are off by a rounding of many units, which must not leave a row without any mass."""
    generator = torch.Generator().manual_seed(3)
    query, key = (torch.randn(1, 1, 300, 64, generator=generator, dtype=dtype) for _ in range(2))
    value = torch.arange(1.0, 301).to(dtype)[:, None].expand(1, 1, 300, 8)
    logits = query.double() @ key.double().mT * scale
    if abs(scale) > 1:  # one key gets all of the mass
        expected = value[0, 0, :, 0].double()[logits.argmax(-1)][..., None].expand(value.shape)
    else:
        expected = logits.softmax(-1) @ value.double()
    config = S2OConfig(tau=0.0, min_seq_len=0, segment_len=128, implementation="cpp")
    actual = attention(query, key, value, scale=scale, config=config)
    torch.testing.assert_close(actual.double(), expected, rtol=2 * torch.finfo(dtype).eps + 5e-6, atol=0)


@pytest.mark.parametrize("tau", [0.0, 0.5])
def test_the_result_is_that_of_one_thread(tau, build_plan):
    inputs = Case(queries=1000, heads=4, kv_heads=2, batch=2, padding="left").inputs()
    plan, before, results = build_plan(inputs), torch.get_num_threads(), []
    try:
        for threads in (2, 1):
            torch.set_num_threads(threads)
            results.append(forward.attend(inputs.call, plan, tau))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@pytest.mark.skipif(platform.machine() != "x86_64", reason="names machines of x86")
@pytest.mark.parametrize("machine", ["haswell", "x86-64"])
def test_machines_with_shorter_vectors(machine, monkeypatch, build_plan):
    """Vectors of 8 numbers and of 4, without tiles: what a machine lacks decides when it compiles."""
    if machine == "haswell" and "avx2" not in torch.backends.cpu.get_cpu_capability().lower().replace("avx512", "avx2"):
        pytest.skip("needs AVX2")
    flags = tuple(f"-march={machine}" if flag.startswith("-march") else flag for flag in cpp_library.FLAGS)
    monkeypatch.setattr(cpp_library, "FLAGS", flags)
    cpp_library._loaded.cache_clear()
    try:
        assert not cpp_library.has_halves()
        for case in (CASES[2], CASES[3], CASES[4], CASES[13], RANKED[0], RANKED[5]):
            inputs = case.inputs()
            assert_like_definition(forward, inputs, build_plan(inputs, by="cpp"), 0.5)
        assert_close(exact.attend_exact(inputs.call), exact_attention(inputs), inputs)
    finally:
        cpp_library._loaded.cache_clear()
