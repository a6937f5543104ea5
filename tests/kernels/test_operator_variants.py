"""Softcap, sinks, value head dims and fully masked rows through ``s2o::attention``: paths, transforms, errors."""

import dataclasses
import itertools
import math
import re

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import s2o_compile
from s2o_compile.kernels.core.mask import AttentionMask
from s2o_compile.kernels.exact.epilogue import add_sinks, all_rows_see, fully_masked_rows
from s2o_compile.kernels.statistics import record_calls
from s2o_compile.kernels.support.errors import InputError
from tests.conftest import (
    CUDA,
    INTERPRETED,
    Case,
    assert_close,
    bounds,
    distance,
    exact_attention,
    lay_out,
    on,
    visible_pairs,
)
from tests.helpers.operator_calls import OPERATOR, arguments, call

EVERYTHING = {"value_dim": 40, "softcap": 5.0, "sinks": True}
# Interpreted, log2(0) warns through numpy where a row sees no key; a GPU gives -inf silently.
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero encountered:RuntimeWarning")


CASES = [
    Case(queries=300, heads=4, kv_heads=2, **EVERYTHING),
    Case(queries=300, softcap=30.0, dtype="bf16"),
    Case(queries=300, batch=2, heads=4, kv_heads=2, sinks=True, dtype="bf16"),
    Case(queries=300, batch=2, sinks=True, padding="all"),
    Case(queries=300, batch=2, sinks=True, padding="left", fully_masked="mean"),
    Case(queries=300, heads=4, kv_heads=2, head_dim=96, value_dim=64),
    Case(queries=300, heads=4, kv_heads=4, head_dim=64, value_dim=96, dtype="fp16", causal=False),
    Case(queries=300, batch=2, heads=4, kv_heads=2, value_dim=16, padding="left", fully_masked="mean"),
    Case(queries=300, batch=2, heads=4, kv_heads=2, padding="all", fully_masked="mean", dtype="bf16"),
    Case(queries=300, keys=200, fully_masked="mean", softcap=10.0),
    Case(queries=300, keys=200, offset=150, window=20, fully_masked="mean"),
    Case(queries=300, batch=2, padding="left", window=20, fully_masked="mean"),
    Case(queries=300, batch=2, padding="all", causal=False, fully_masked="mean"),
    Case(queries=300, window=50, layout="transposed", **EVERYTHING),
    Case(queries=1, keys=300, **EVERYTHING),
]
WITH_TRITON = [
    Case(queries=300, heads=4, kv_heads=2, dtype="fp16", **EVERYTHING),
    Case(queries=300, window=50, batch=2, padding="left", dtype="fp16", **EVERYTHING),
    Case(queries=200, batch=2, padding="all", dtype="fp16", sinks=True),
    Case(queries=200, batch=2, padding="left", dtype="fp16", fully_masked="mean"),
]


class TestExact:
    """tau = 0 is dense attention in float64 on every path."""

    @pytest.mark.parametrize("shortest", [0, 10**6], ids=["sparse", "dense"])
    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_equals_dense_attention(self, case, shortest):
        inputs = case.inputs()
        with record_calls() as calls:
            result = call(inputs, return_lse=True, min_seq_len=shortest)
            output, no_lse = call(inputs, min_seq_len=shortest)
        short = shortest > 0 or case.queries < 128
        assert {c.path for c in calls} == {"dense" if short else "s2o" if case.window is None else "window"}
        assert result[0].shape == (*inputs.query.shape[:3], inputs.value.shape[3])
        assert_close(result, exact_attention(inputs), inputs)
        assert_close((output, result[1]), exact_attention(inputs), inputs)
        assert no_lse.numel() == 0

    @pytest.mark.parametrize("shortest", [0, 10**6], ids=["sparse", "dense"])
    @pytest.mark.parametrize(("device", "case"), [*on(INTERPRETED, *WITH_TRITON), *on(CUDA, *WITH_TRITON, *CASES)])
    def test_equals_dense_attention_with_triton(self, device, case, shortest):
        pytest.importorskip("triton")
        inputs = case.inputs(device)
        result = call(inputs, return_lse=True, min_seq_len=shortest, implementation="triton")
        assert_close(result, exact_attention(inputs), inputs)
        assert_close((call(inputs, min_seq_len=shortest)[0], result[1]), exact_attention(inputs), inputs)

    @pytest.mark.parametrize("scale", [0.0, -0.2])
    def test_a_scale_that_is_not_positive(self, scale):
        inputs = dataclasses.replace(CASES[0].inputs(), scale=scale)
        assert_close(call(inputs, return_lse=True), exact_attention(inputs), inputs)

    def test_early_stop_with_sinks_errs_by_the_mass_left_out(self):
        inputs = Case(queries=3000, value_dim=40, softcap=50.0, sinks=True).inputs(heavy=64)
        with record_calls() as calls:
            output, lse = call(inputs, return_lse=True, tau=1.0)
        expected, expected_lse = exact_attention(inputs)
        limit, lse_limit = bounds(inputs)
        assert calls[0].density < 0.7
        missing = expected_lse - lse
        assert missing.min() >= -lse_limit
        share = 1 - (-missing.clamp(min=0)).exp()
        spread = max(inputs.value.max(), 0) - min(inputs.value.min(), 0)  # the sink's value is zero
        assert ((output - expected).abs() - share[..., None] * spread).max() <= limit


class TestSinks:
    def test_a_sink_of_minus_infinity_is_none(self):
        inputs = Case(queries=300, batch=2, padding="all").inputs()
        never = dataclasses.replace(inputs, sinks=torch.full((2,), -math.inf))
        for ours, expected in zip(call(never, return_lse=True), call(inputs, return_lse=True), strict=True):
            assert torch.equal(ours, expected)

    def test_a_row_that_sees_no_key_has_the_sink_alone(self):
        inputs = Case(queries=300, keys=200, sinks=True, heads=4, fully_masked="mean").inputs()
        output, lse = call(inputs, return_lse=True)
        assert (output[:, :, :100] == 0).all()
        assert torch.equal(lse[:, :, :100], inputs.sinks[None, :, None].expand(1, 4, 100))

    def test_nan_stays_nan(self):
        output, lse = add_sinks(torch.full((1, 1, 2, 4), math.nan), torch.full((1, 1, 2), math.nan), torch.zeros(1))
        assert output.isnan().all()
        assert lse.isnan().all()

    def test_half_precision_sinks_meet_full_precision_inputs(self):
        inputs = Case(queries=200, sinks=True).inputs()
        inputs = dataclasses.replace(inputs, sinks=inputs.sinks.to(torch.bfloat16))
        assert_close(call(inputs, return_lse=True), exact_attention(inputs), inputs)


MASKS = [
    AttentionMask(),
    *(
        AttentionMask(causal=True, offset=offset, window=window, attention_chunk=chunk)
        for offset, window, chunk in itertools.product((-12, -3, 0, 4, 30), (None, 1, 5), (None, 3))
    ),
]


def mask_id(mask):
    return f"causal{mask.causal}-offset{mask.offset}-window{mask.window}-chunk{mask.attention_chunk}"


class TestBlindRows:
    @pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
    @pytest.mark.parametrize(("queries", "keys"), [(1, 1), (9, 9), (5, 12), (12, 5)])
    @pytest.mark.parametrize("mask", MASKS, ids=mask_id)
    def test_rows_follow_from_the_mask(self, mask, queries, keys, padded):
        key_mask = torch.rand(3, keys, generator=torch.Generator().manual_seed(0)) < 0.3 if padded else None
        mask = dataclasses.replace(mask, key_mask=key_mask)
        expected = ~mask.visible_pairs(queries, keys, torch.device("cpu")).any(-1)[:, 0]
        assert torch.equal(fully_masked_rows(mask, queries, keys, torch.device("cpu")), expected)
        assert all_rows_see(mask, queries, keys) == (not padded and not expected.any())

    def test_the_mean_is_what_a_finite_mask_gives(self):
        inputs = Case(queries=300, batch=2, padding="left", fully_masked="mean").inputs()
        bias = torch.zeros(2, 1, 300, 300).masked_fill_(~visible_pairs(inputs), torch.finfo(torch.float32).min)
        key, value = (x.expand(-1, 2, -1, -1) for x in (inputs.key, inputs.value))
        expected = scaled_dot_product_attention(inputs.query, key, value, attn_mask=bias, scale=inputs.scale)
        output, lse = call(inputs, return_lse=True)
        assert (lse == -math.inf).any()
        assert_close((output, lse), (expected, lse), inputs)

    @pytest.mark.parametrize("options", [{}, {"min_seq_len": 10**6}], ids=["s2o", "dense"])
    def test_poisoned_values_stay_in_fully_masked_rows(self, options):
        inputs = Case(queries=300, batch=2, padding="right", fully_masked="mean").inputs()
        inputs.value[0, :, 299] = math.nan  # hidden from all; the mean is over all keys, as the finite mask's is
        output = call(inputs, causal_offset=-10, **options)[0]
        assert output[0, :, :10].isnan().all()
        assert output[1].isfinite().all()

    @pytest.mark.parametrize(
        "case", [Case(queries=200), Case(queries=200, window=20), Case(queries=200, causal=False)], ids=str
    )
    def test_nothing_is_done_where_lengths_prove_sight(self, case, monkeypatch):
        monkeypatch.setattr("s2o_compile.kernels.exact.epilogue.fully_masked_rows", None)
        inputs = case.inputs()
        assert torch.equal(call(inputs, fully_masked="mean")[0], call(inputs)[0])

    @pytest.mark.parametrize("device", [CUDA])
    @pytest.mark.parametrize("shortest", [0, 10**6], ids=["sparse", "dense"])
    def test_waits_for_nothing(self, device, shortest):
        case = Case(queries=3000, batch=2, padding="left", dtype="bf16", fully_masked="mean")
        inputs = case.inputs(device)
        first = call(inputs, min_seq_len=shortest)[0]
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            second = call(inputs, min_seq_len=shortest)[0]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(first, second)


class TestOpcheck:
    @pytest.mark.parametrize("device", ["cpu", CUDA])
    @pytest.mark.parametrize("layout", ["plain", "transposed"])
    @pytest.mark.parametrize(
        "options",
        [{}, {"return_lse": True}, {"min_seq_len": 1000}, {"window": 50}],
        ids=lambda x: "-".join(f"{k}={v}" for k, v in x.items()) or "default",
    )
    @pytest.mark.parametrize(
        "case",
        [
            Case(queries=200, heads=4, kv_heads=2, **EVERYTHING),
            Case(queries=200, value_dim=96),
            Case(queries=200, batch=2, padding="left", fully_masked="mean"),
        ],
        ids=str,
    )
    def test_opcheck(self, case, options, layout, device):
        inputs = case.inputs(device)
        tensors = lay_out(layout, *inputs.tensors)
        given = arguments(inputs, implementation="torch", **options)
        result = torch.library.opcheck(OPERATOR, (*tensors, inputs.mask.key_mask, inputs.sinks), given)
        assert set(result.values()) == {"SUCCESS"}


class TestLayout:
    @pytest.mark.parametrize("options", [{}, {"min_seq_len": 10**6}], ids=["s2o", "dense"])
    @pytest.mark.parametrize("layout", ["plain", "transposed"])
    @pytest.mark.parametrize("value_dim", [40, 96])
    @pytest.mark.parametrize("dtype", ["fp32", "fp16"])
    @pytest.mark.parametrize("device", ["cpu", CUDA])
    def test_strides_are_those_of_sdpa(self, device, dtype, value_dim, layout, options):
        case = Case(queries=200, batch=2, heads=4, kv_heads=4, value_dim=value_dim, layout=layout, dtype=dtype)
        inputs = case.inputs(device)
        expected = scaled_dot_product_attention(*inputs.tensors, is_causal=True)
        assert call(inputs, implementation="torch", **options)[0].stride() == expected.stride()


class TestTransforms:
    @pytest.mark.parametrize("wants_lse", [False, True], ids=["output", "lse"])
    @pytest.mark.parametrize("case", [CASES[0], CASES[3], CASES[7]], ids=str)
    @pytest.mark.parametrize("mapped", [False, True], ids=["shared_sinks", "mapped_sinks"])
    def test_vmap_is_a_loop(self, case, mapped, wants_lse):
        inputs = [case.inputs(seed=seed) for seed in range(3)]
        query, key, value = (torch.stack(x) for x in zip(*(i.tensors for i in inputs), strict=True))
        mask = inputs[0].mask.key_mask
        sinks = inputs[0].sinks
        if mapped and sinks is None:
            pytest.skip("no sinks to map")
        sinks = torch.stack([i.sinks for i in inputs], dim=1) if mapped else sinks
        given = arguments(inputs[0], return_lse=wants_lse)
        actual = torch.vmap(lambda *x: OPERATOR(*x, **given), in_dims=(0, 0, 0, None, 1 if mapped else None))(
            query, key, value, mask, sinks
        )
        for n, each in enumerate(inputs):
            each = dataclasses.replace(each, sinks=sinks[:, n] if mapped else sinks)
            expected = OPERATOR(*each.tensors, mask, each.sinks, **given)
            assert torch.equal(actual[1][n], expected[1])
            assert distance(actual[0][n], expected[0]) <= bounds(each)[0]

    def test_vmap_over_one_key_mask_for_a_batch(self):
        inputs = Case(queries=150, batch=2).inputs()
        query, key, value = (torch.stack([x, x + 1]) for x in inputs.tensors)
        mask = torch.arange(150)[None] % 5 != 2
        given = arguments(inputs)
        actual = torch.vmap(lambda q, k, v: OPERATOR(q, k, v, mask, **given)[0])(query, key, value)
        expected = [OPERATOR(q, k, v, mask, **given)[0] for q, k, v in zip(query, key, value, strict=True)]
        assert torch.equal(actual, torch.stack(expected))

    def test_vmap_refuses_sinks_of_the_wrong_shape(self):
        x = torch.zeros(3, 1, 4, 150, 16)
        with pytest.raises(
            InputError, match=r"sinks: expected floating of shape \(4,\).*got torch.float32 of .*\(5,\)"
        ):
            torch.vmap(lambda q, s: OPERATOR(q, q, q, None, s))(x, torch.zeros(3, 5))

    def test_autocast_keeps_the_sinks(self):
        inputs = Case(queries=200, **EVERYTHING).inputs()
        half = inputs.to(torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16):
            output, lse = call(inputs, return_lse=True)
        assert output.dtype == torch.bfloat16
        expected = call(dataclasses.replace(half, sinks=inputs.sinks), return_lse=True)
        assert torch.equal(output, expected[0])
        assert torch.equal(lse, expected[1])

    @pytest.mark.usefixtures("fresh_dynamo")
    def test_compiles_whole(self):
        inputs = CASES[0].inputs()
        compiled = torch.compile(lambda i: call(i)[0].transpose(1, 2) + 1, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(inputs), call(inputs)[0].transpose(1, 2) + 1)


class TestPublic:
    """``s2o_compile.attention`` hands everything on, with and without gradients."""

    def public(self, inputs, **options):
        mask = inputs.mask
        return s2o_compile.attention(
            *inputs.tensors,
            key_mask=mask.key_mask,
            sinks=inputs.sinks,
            causal=mask.causal,
            causal_offset=mask.offset if mask.causal else None,
            window=mask.window,
            scale=inputs.scale,
            softcap=inputs.softcap,
            fully_masked=inputs.fully_masked,
            **options,
        )

    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_without_gradients(self, case):
        inputs = case.inputs()
        config = s2o_compile.S2OConfig(tau=0.0, min_seq_len=0)
        assert_close(self.public(inputs, return_lse=True, config=config), exact_attention(inputs), inputs)

    @pytest.mark.parametrize("case", [case for case in CASES if case.dtype == "fp32"], ids=str)
    def test_gradients_are_those_of_the_formula(self, case):
        inputs = case.inputs()
        wide = inputs.to(torch.float64)
        wanted = {}
        for name, given in (("ours", inputs), ("exact", wide), ("eager", inputs)):
            leaves = [x.clone().requires_grad_() for x in (*given.tensors, given.sinks) if x is not None]
            sinks = leaves[3] if given.sinks is not None else None
            given = dataclasses.replace(given, query=leaves[0], key=leaves[1], value=leaves[2], sinks=sinks)
            output = self.public(given) if name == "ours" else differentiable_formula(given)
            with torch.autograd.set_detect_anomaly(True):  # no NaN on the way either
                output.square().sum().backward()
            wanted[name] = [output.detach(), *(x.grad for x in leaves)]
        assert wanted["ours"][0].stride() == call(inputs)[0].stride()
        for ours, exact, eager in zip(*wanted.values(), strict=True):
            assert ours.isfinite().all()
            rounding = torch.finfo(torch.float32).eps * exact.abs().max()
            assert (ours - exact).abs().max() <= 4 * max((eager - exact).abs().max(), rounding)

    def test_sinks_alone_may_want_gradients(self):
        inputs = CASES[0].inputs()
        sinks = inputs.sinks.clone().requires_grad_()
        self.public(dataclasses.replace(inputs, sinks=sinks)).sum().backward()
        assert sinks.grad.abs().min() > 0


def differentiable_formula(inputs):
    """``conftest.softmax_attention`` without the steps that have no gradient: masks by hand, sinks as one more key."""
    n_keys, group = inputs.key.shape[2], inputs.query.shape[1] // inputs.key.shape[1]
    key, value = (x.repeat_interleave(group, dim=1) for x in (inputs.key, inputs.value))
    logits = inputs.query @ key.transpose(-1, -2) * inputs.scale
    if inputs.softcap is not None:
        logits = inputs.softcap * (logits / inputs.softcap).tanh()
    seen = visible_pairs(inputs).expand_as(logits)
    weights = logits.masked_fill(~seen, -1e4).exp() * seen
    total = weights.sum(-1, keepdim=True)
    if inputs.sinks is not None:
        total = total + inputs.sinks[:, None, None].exp()
    fully_masked = total == 0
    weights = weights / total.masked_fill(fully_masked, 1.0)
    if inputs.fully_masked == "mean":
        weights = weights + fully_masked / n_keys
    return weights @ value


def says(*parts):
    """Message pattern: what, expected, got, remedy, in this order."""
    return "s2o attention: " + ".*".join(re.escape(part) for part in parts)


class TestErrors:
    @pytest.mark.parametrize("requires_grad", [False, True], ids=["inference", "gradients"])
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"softcap": 0.0}, ("softcap", "finite number that float32 can hold, or None", "got 0.0", "None")),
            ({"softcap": -5.0}, ("softcap", "finite number that float32 can hold, or None", "got -5.0", "None")),
            ({"softcap": math.inf}, ("softcap", "finite number that float32 can hold, or None", "got inf", "None")),
            ({"softcap": math.nan}, ("softcap", "finite number that float32 can hold, or None", "got nan", "None")),
            (
                {"fully_masked": "zero"},
                ("fully_masked", "one of 'zeros', 'mean'", "got 'zero'", "finite additive mask"),
            ),
            ({"sinks": torch.zeros(2)}, ("sinks", "floating of shape (4,)", "torch.float32 of shape (2,)", "Flatten")),
            ({"sinks": torch.zeros(1, 4)}, ("sinks", "floating of shape (4,)", "of shape (1, 4)", "Flatten")),
            ({"sinks": torch.zeros(4, dtype=torch.int64)}, ("sinks", "floating", "got torch.int64", "Flatten")),
        ],
        ids=str,
    )
    def test_message(self, options, message, requires_grad):
        query = torch.zeros(1, 4, 200, 16, requires_grad=requires_grad)
        with pytest.raises(InputError, match=says(*message)):
            s2o_compile.attention(query, query, query, **options)

    def test_softcap_is_a_number(self):
        x = torch.zeros(1, 4, 200, 16, requires_grad=True)
        with pytest.raises(InputError, match=says("softcap", "finite number", "got True", "None")):
            s2o_compile.attention(x, x, x, softcap=True)

    def test_sinks_elsewhere(self):
        x = torch.zeros(1, 4, 200, 16, requires_grad=True)
        with pytest.raises(InputError, match=says("device of sinks", "expected cpu", "got meta", ".to(device)")):
            s2o_compile.attention(x, x, x, sinks=torch.zeros(4, device="meta"))

    def test_gradients_and_log_sum_exp_exclude_each_other(self):
        x = torch.zeros(1, 4, 200, 16)
        sinks = torch.zeros(4, requires_grad=True)
        with pytest.raises(InputError, match=says("return_lse", "no gradients", "require grad", "no_grad")):
            s2o_compile.attention(x, x, x, sinks=sinks, return_lse=True)
