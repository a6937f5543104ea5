"""``s2o::attention`` as PyTorch and its users see it: opcheck, layout, dispatch, statistics.

Every test takes the public path, tensors in and tensors out.
"""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import s2o_compile
from s2o_compile.kernels import dispatch as operator
from s2o_compile.kernels import ops as registration
from s2o_compile.kernels.core.call import AttentionCall
from s2o_compile.kernels.core.mask import AttentionMask
from s2o_compile.kernels.core.plan import TILE_LEN
from s2o_compile.kernels.statistics import record_calls
from s2o_compile.kernels.support import cpp_library
from s2o_compile.kernels.support.errors import ImplementationUnavailableError
from tests.conftest import CUDA, INTERPRETED, Case, assert_close, exact_attention, lay_out, query_on, visible_pairs
from tests.helpers.operator_calls import DEVICES, OPERATOR, arguments, call


def causal_call(x, scale):
    return AttentionCall(query=x, key=x, value=x, mask=AttentionMask(causal=True), scale=scale)


class TestExact:
    """tau = 0 through the front door: dense attention, whatever path was taken."""

    @pytest.mark.parametrize(
        "case",
        [
            Case(queries=1),
            Case(queries=127, batch=2, heads=4, kv_heads=2),
            Case(queries=1000, batch=2, heads=4, kv_heads=2, dtype="bf16"),
            Case(queries=300, keys=700, head_dim=80, dtype="fp16"),
            Case(queries=700, keys=300),
            Case(queries=300, keys=700, offset=0),
            Case(queries=100, keys=300, offset=0),
            Case(queries=100, offset=7),
            Case(queries=100, keys=60),
            Case(queries=500, causal=False),
            Case(queries=300, keys=700, causal=False, heads=4),
            Case(queries=500, window=100),
            Case(queries=100, keys=300, window=30, heads=4),
            Case(queries=500, batch=2, padding="left", heads=4),
            Case(queries=100, batch=2, padding="all"),
            Case(queries=500, batch=2, padding="all", window=200),
            Case(queries=500, heads=4, kv_heads=2, layout="transposed"),
            Case(queries=500, heads=4, kv_heads=2, layout="packed"),
            Case(queries=500, heads=4, kv_heads=2, layout="strided"),
            Case(queries=500, heads=4, kv_heads=2, layout="strided", window=100),
            Case(queries=100, heads=4, kv_heads=2, layout="strided", causal=False),
        ],
        ids=str,
    )
    def test_equals_dense_attention(self, case):
        inputs = case.inputs()
        with record_calls() as calls:
            result = call(inputs, return_lse=True)
            output, no_lse = call(inputs)
        short = case.queries < TILE_LEN
        assert [c.path for c in calls] == ["dense" if short else "s2o" if case.window is None else "window"] * 2
        assert_close(result, exact_attention(inputs), inputs)
        assert_close((output, result[1]), exact_attention(inputs), inputs)
        assert no_lse.numel() == 0

    def test_scale_defaults_to_one_over_the_root_of_head_dim(self):
        inputs = Case(queries=200).inputs()
        assert torch.equal(call(inputs, scale=None)[0], call(inputs)[0])
        assert not torch.equal(call(inputs, scale=0.3)[0], call(inputs)[0])

    def test_offset_defaults_to_bottom_right(self):
        inputs = Case(queries=200, keys=300).inputs()
        assert torch.equal(call(inputs, causal_offset=None)[0], call(inputs)[0])
        assert not torch.equal(call(inputs, causal_offset=0)[0], call(inputs)[0])

    @pytest.mark.parametrize("queries", [100, 300])
    @pytest.mark.parametrize("scale", [0.0, -0.2])
    def test_a_scale_that_reverses_the_order_is_still_exact(self, scale, queries):
        inputs = Case(queries=queries).inputs()
        inputs = type(inputs)(*inputs.tensors, inputs.mask, scale)
        with record_calls() as calls:
            assert_close(call(inputs, return_lse=True, tau=1.0), exact_attention(inputs), inputs)
        assert [one.path for one in calls] == ["dense"]
        assert ("a scale of" in calls[0].never) == (queries >= 128)  # fewer are dense anyhow

    @pytest.mark.parametrize("queries", [100, 300])
    def test_one_key_mask_serves_the_whole_batch(self, queries):
        inputs = Case(queries=queries, batch=2, heads=4).inputs()
        row = torch.arange(queries)[None] % 5 != 2
        one = OPERATOR(*inputs.tensors, row, **arguments(inputs))[0]
        assert torch.equal(one, OPERATOR(*inputs.tensors, row.expand(2, -1).contiguous(), **arguments(inputs))[0])

    @pytest.mark.filterwarnings("ignore:divide by zero encountered:RuntimeWarning")
    @pytest.mark.parametrize("window", [None, 60])
    @pytest.mark.parametrize("implementation", ["torch", "triton"])
    @pytest.mark.parametrize("device", DEVICES)
    def test_a_key_mask_may_have_any_strides(self, device, implementation, window):
        if implementation == "triton" and device == "cpu" and torch.cuda.is_available():
            pytest.skip("kernels are compiled where there is a GPU")
        inputs = Case(queries=200, batch=2, padding="left", window=window, dtype="fp16").inputs(device)
        plain = call(inputs, implementation=implementation)[0]
        strided = inputs.mask.key_mask.T.contiguous().T
        assert strided.stride(1) != 1
        result = OPERATOR(*inputs.tensors, strided, **arguments(inputs, implementation=implementation))[0]
        assert torch.equal(result, plain)

    @pytest.mark.filterwarnings("ignore:divide by zero encountered:RuntimeWarning")
    @pytest.mark.parametrize("device", DEVICES)
    @pytest.mark.parametrize("layout", ["transposed", "packed", "strided"])
    def test_layout_changes_nothing_for_triton(self, device, layout):
        if device == "cpu" and torch.cuda.is_available():
            pytest.skip("kernels are compiled where there is a GPU")
        inputs = Case(queries=200, heads=4, kv_heads=2, layout=layout, dtype="fp16").inputs(device)
        result = call(inputs, implementation="triton", return_lse=True)
        assert_close(result, exact_attention(inputs), inputs)


class TestOpcheck:
    @pytest.mark.parametrize("device", DEVICES)
    @pytest.mark.parametrize("layout", ["plain", "transposed", "packed", "strided"])
    @pytest.mark.parametrize(
        ("case", "options"),
        [
            (Case(queries=200), {}),
            (Case(queries=200, window=50), {}),
            (Case(queries=200), {"return_lse": True}),
            (Case(queries=200), {"min_seq_len": 1000}),
            (Case(queries=200), {"min_seq_len": 1000, "return_lse": True}),
            (Case(queries=200, batch=2, padding="left"), {}),
            (Case(queries=200, batch=2, padding="left"), {"min_seq_len": 1000}),
            (Case(queries=200, heads=4, kv_heads=2, keys=300), {"ranking": "mean_query"}),
            (Case(queries=200, heads=4, kv_heads=2, causal=False), {"tau": 1.0}),
        ],
        ids=lambda x: str(x) if isinstance(x, Case) else "-".join(f"{k}={v}" for k, v in x.items()) or "default",
    )
    def test_opcheck(self, case, options, layout, device):
        inputs = case.inputs(device)
        tensors = lay_out(layout, *inputs.tensors)
        given = arguments(inputs, implementation="torch", **options)
        result = torch.library.opcheck(OPERATOR, (*tensors, inputs.mask.key_mask), given)
        assert set(result.values()) == {"SUCCESS"}


class TestLayout:
    """Code behind an attention relies on the strides SDPA gives its output."""

    @pytest.mark.parametrize("options", [{}, {"min_seq_len": 10**6}, {"window": 60}], ids=["s2o", "dense", "window"])
    @pytest.mark.parametrize("layout", ["plain", "transposed", "packed"])
    @pytest.mark.parametrize("device", DEVICES)
    @pytest.mark.parametrize("dtype", ["fp32", "fp16"])
    def test_strides_are_those_of_sdpa(self, layout, options, device, dtype):
        inputs = Case(queries=200, batch=2, heads=4, kv_heads=4, layout=layout, dtype=dtype).inputs(device)
        expected = scaled_dot_product_attention(*inputs.tensors, is_causal=True)
        output = call(inputs, implementation="torch", **options)[0]
        assert output.stride() == expected.stride()

        def flatten(x):
            return x.transpose(1, 2).view(2, 200, 4 * 64)

        try:
            flatten(expected)
        except RuntimeError:
            with pytest.raises(RuntimeError, match="view size is not compatible"):
                flatten(output)
        else:
            assert flatten(output).shape == (2, 200, 256)

    @pytest.mark.parametrize("layout", ["plain", "transposed", "packed"])
    def test_grouped_heads(self, layout):
        inputs = Case(queries=200, batch=2, heads=4, kv_heads=2, layout=layout).inputs()
        expected = scaled_dot_product_attention(*inputs.tensors, is_causal=True, enable_gqa=True)
        for shortest in (0, 10**6):
            assert call(inputs, min_seq_len=shortest)[0].stride() == expected.stride()

    def test_compiled_code_may_view_the_output(self):
        inputs = Case(queries=200, batch=2, heads=4, kv_heads=2, layout="packed").inputs()

        @torch.compile(fullgraph=True, backend="aot_eager")
        def layer(inputs):
            return call(inputs)[0].transpose(1, 2).view(2, 200, 256) + 1

        expected = call(inputs)[0].transpose(1, 2).reshape(2, 200, 256) + 1
        assert torch.equal(layer(inputs), expected)


class TestDispatch:
    @pytest.mark.parametrize(
        ("case", "shortest", "path"),
        [
            (Case(queries=1, keys=100000), 0, "dense"),
            (Case(queries=127, keys=100000), 0, "dense"),
            (Case(queries=128, keys=100000), 0, "s2o"),
            (Case(queries=128, keys=128), 0, "s2o"),
            (Case(queries=4096), 4097, "dense"),
            (Case(queries=4096), 4096, "s2o"),
            (Case(queries=4096, window=1024), 4096, "window"),
            (Case(queries=4096, window=1024), 4097, "dense"),
            (Case(queries=127, keys=4096, window=1024), 0, "dense"),
            (Case(queries=4096), "auto", "s2o"),
            (Case(queries=4095), "auto", "dense"),
        ],
        ids=str,
    )
    def test_path_follows_from_lengths(self, case, shortest, path):
        query, key = torch.empty(1, 1, case.queries, 16), torch.empty(1, 1, case.n_keys, 16)
        mask = AttentionMask(causal=True, offset=case.causal_offset, window=case.window)
        attention_call = AttentionCall(query=query, key=key, value=key, mask=mask, scale=1.0)
        assert operator.choose_path(attention_call, shortest) == path

    @pytest.mark.parametrize("scale", [0.0, -1.0])
    def test_a_scale_that_is_not_positive_runs_dense(self, scale):
        x = torch.empty(1, 1, 4096, 16)
        assert operator.choose_path(causal_call(x, scale), 0) == "dense"

    def test_the_crossover_knows_every_device(self):
        for length, path in ((16383, "dense"), (16384, "s2o")):
            x = torch.empty(1, 1, length, 16, device="meta")
            assert operator.choose_path(causal_call(x, 1.0), "auto") == path

    @pytest.mark.parametrize(
        ("case", "path"),
        [
            (Case(queries=300, window=300), "s2o"),
            (Case(queries=300, window=299), "window"),
            (Case(queries=200, keys=300, window=300), "s2o"),
            (Case(queries=300, keys=200, window=200), "s2o"),
            (Case(queries=300, offset=50, window=349), "window"),
            (Case(queries=300, offset=50, window=350), "s2o"),
        ],
        ids=str,
    )
    def test_a_window_that_hides_nothing_is_no_window(self, case, path):
        inputs = case.inputs()
        with record_calls() as calls:
            result = call(inputs, return_lse=True)
        assert [c.path for c in calls] == [path]
        assert_close(result, exact_attention(inputs), inputs)

    def test_cpu_tensors_run_in_cpp_where_there_is_a_compiler(self, monkeypatch):
        on_cpu = query_on("cpu", torch.float32, 64)
        assert operator.choose_implementation("auto", on_cpu) == operator.choose_implementation("cpp", on_cpu) == "cpp"
        assert operator.choose_implementation("torch", on_cpu) == "torch"
        monkeypatch.setattr(cpp_library, "load", lambda: None)
        monkeypatch.setattr(cpp_library, "why_not", lambda: "expected a C++ compiler, got none")
        monkeypatch.setattr(cpp_library, "remedy", lambda: "Install g++")
        assert operator.choose_implementation("auto", on_cpu) == "torch"
        with pytest.raises(ImplementationUnavailableError, match=r'"cpp": expected a C\+\+ compiler, got none'):
            operator.choose_implementation("cpp", on_cpu)
        with pytest.raises(ImplementationUnavailableError, match='"cpp": expected tensors of the CPU, got cuda'):
            operator.choose_implementation("cpp", query_on("cuda", torch.float32, 64))

    def test_cuda_tensors_run_in_triton_where_there_is_triton(self, monkeypatch):
        cuda = query_on("cuda", torch.float32, 64)
        assert operator.choose_implementation("auto", cuda) == "triton"
        assert operator.choose_implementation("torch", cuda) == "torch"
        monkeypatch.setattr(operator, "triton_forward", None)
        assert operator.choose_implementation("auto", cuda) == "torch"

    def test_wide_float32_heads_do_not_fit_the_kernels(self):
        assert operator.choose_implementation("auto", query_on("cuda", torch.float32, 257)) == "torch"
        assert operator.choose_implementation("auto", query_on("cuda", torch.bfloat16, 512)) == "triton"
        with pytest.raises(ImplementationUnavailableError, match="head_dim of at most 256 in float32, got 512"):
            operator.choose_implementation("triton", query_on("cuda", torch.float32, 512))


class TestStatistics:
    def test_dense_calls_have_density_one(self):
        inputs = Case(queries=300).inputs()
        with record_calls() as calls:
            call(inputs, min_seq_len=1000, site="model.layers.0.attention")
        (only,) = calls
        assert (only.path, only.site, only.n_queries, only.n_keys) == ("dense", "model.layers.0.attention", 300, 300)
        assert only.density == 1.0

    @pytest.mark.parametrize("batch", [1, 2])
    def test_s2o_density_counts_whole_tiles(self, batch):
        with record_calls() as calls:
            call(Case(queries=300, batch=batch, heads=4).inputs())
        area = 300 * 301 / 2
        assert calls[0].path == "s2o"
        assert calls[0].density == pytest.approx((128 * 128 + 128 * 256 + 44 * 300) / area)

    def test_window_density_counts_the_visible_range(self):
        inputs = Case(queries=256, window=10).inputs()
        with record_calls() as calls:
            call(inputs)
        assert calls[0].path == "window"
        assert calls[0].density == pytest.approx(128 * (128 + 128 + 9) / visible_pairs(inputs).sum().item())

    def test_recordings_nest_and_end(self):
        inputs = Case(queries=200).inputs()
        with record_calls() as outer:
            call(inputs, site="a")
            with record_calls() as inner:
                call(inputs, site="b")
        call(inputs, site="c")
        assert [c.site for c in outer] == ["a", "b"]
        assert [c.site for c in inner] == ["b"]

    def test_a_recording_ends_when_the_block_raises(self):
        recordings = []

        def fail():
            with record_calls() as calls:
                recordings.append(calls)
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            fail()
        call(Case(queries=200).inputs())
        assert recordings == [[]]


def test_custom_op_and_namespace_are_one_operator():
    inputs = Case(queries=200).inputs()
    assert torch.equal(registration.attention(*inputs.tensors, **arguments(inputs))[0], call(inputs)[0])


@pytest.fixture(params=[torch.bfloat16, torch.float64], ids=str)
def default_dtype(request):
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("ranking", ["per_query", "mean_query"])
@pytest.mark.parametrize("masked", [False, True], ids=["keywords", "attn_mask"])
def test_the_default_dtype_is_nobodys_business(default_dtype, dtype, ranking, masked):
    length = 400
    config = s2o_compile.S2OConfig(tau=0.0, min_seq_len=0, segment_len=128, ranking=ranking)
    query, key, value = (torch.randn(1, 2, length, 16, dtype=torch.float32).to(dtype) for _ in range(3))
    visible = torch.ones(length, length, dtype=torch.bool).tril()
    visible[:, 7] = False
    mask = {"attn_mask": visible} if masked else {"causal": True, "key_mask": visible[-1:]}
    actual = s2o_compile.attention(query, key, value, **mask, config=config)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=visible)
    tolerance = 1e-5 if dtype is torch.float32 else 2e-2
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("given", [{}, {"window": 40, "softcap": 5.0}, {"config": {"tau": 0.3}}], ids=str)
def test_the_default_dtype_changes_no_bit(default_dtype, given):
    config = s2o_compile.S2OConfig(min_seq_len=0, segment_len=128, **given.get("config", {}))
    query, key, value = (torch.randn(1, 2, 400, 16, dtype=torch.float32) for _ in range(3))
    keywords = {"causal": True, "return_lse": True, **given, "config": config}
    actual = s2o_compile.attention(query, key, value, **keywords)
    torch.set_default_dtype(torch.float32)
    expected = s2o_compile.attention(query, key, value, **keywords)
    assert all(torch.equal(*pair) for pair in zip(actual, expected, strict=True))


@pytest.mark.filterwarnings("ignore:divide by zero encountered:RuntimeWarning")
@pytest.mark.parametrize("offset", [2**31 - 1, -(2**31)])
@pytest.mark.parametrize("device", [INTERPRETED, CUDA])
def test_offsets_at_the_end_of_32_bits(device, offset):
    pytest.importorskip("triton")
    x = torch.randn(1, 1, 128, 16, generator=torch.Generator().manual_seed(0)).to(device)
    config = s2o_compile.S2OConfig(tau=0.0, min_seq_len=1, segment_len=128, implementation="triton")
    output = s2o_compile.attention(x, x, x, causal=True, causal_offset=offset, config=config)
    expected = scaled_dot_product_attention(x, x, x) if offset > 0 else torch.zeros_like(x)
    assert (output - expected).abs().max() < 1e-5
