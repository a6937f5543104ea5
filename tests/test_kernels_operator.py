"""``s2o::attention`` as PyTorch and its users see it: opcheck, layout, dispatch, statistics, errors, poisoned inputs.

Every test takes the public path, tensors in and tensors out.
"""

import math
import re

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import s2o_compile
from s2o_compile.kernels import operator, registration
from s2o_compile.kernels.errors import ImplementationUnavailableError, InputError, S2OError
from s2o_compile.kernels.mask import AttentionMask
from s2o_compile.kernels.options import OperatorOptions
from s2o_compile.kernels.plan import TILE_LEN
from s2o_compile.kernels.statistics import record_calls
from s2o_compile.kernels.validation import check_inputs
from tests.conftest import CUDA, INTERPRETED, Case, assert_close, exact_attention, lay_out, visible_pairs

OPERATOR = torch.ops.s2o.attention.default
DEVICES = ["cpu", CUDA]


def call(inputs, **options):
    """The operator on a case's inputs; S2O at every length unless told otherwise."""
    return OPERATOR(*inputs.tensors, inputs.mask.key_mask, **arguments(inputs, **options))


def arguments(inputs, **options):
    mask = inputs.mask
    offset = mask.offset if mask.causal else None
    given = {"causal": mask.causal, "causal_offset": offset, "window": mask.window, "scale": inputs.scale}
    return {**given, "min_seq_len": 0, "tau": 0.0, **options}


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
        assert_close(call(inputs, return_lse=True, tau=1.0), exact_attention(inputs), inputs)

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
            (Case(queries=200, heads=4, kv_heads=2, keys=300), {"query_order": "mean_query", "ranking": "sub_mean"}),
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
            (Case(queries=8192), "auto", "s2o"),
            (Case(queries=8191), "auto", "dense"),
        ],
        ids=str,
    )
    def test_path_follows_from_lengths(self, case, shortest, path):
        query, key = torch.empty(1, 1, case.queries, 16), torch.empty(1, 1, case.n_keys, 16)
        mask = AttentionMask(causal=True, offset=case.causal_offset, window=case.window)
        assert operator.choose_path(query, key, mask, scale=1.0, min_seq_len=shortest) == path

    @pytest.mark.parametrize("scale", [0.0, -1.0])
    def test_a_scale_that_is_not_positive_runs_dense(self, scale):
        x = torch.empty(1, 1, 4096, 16)
        assert operator.choose_path(x, x, AttentionMask(causal=True), scale=scale, min_seq_len=0) == "dense"

    def test_the_crossover_knows_every_device(self):
        for length, path in ((16383, "dense"), (16384, "s2o")):
            x = torch.empty(1, 1, length, 16, device="meta")
            assert operator.choose_path(x, x, AttentionMask(causal=True), scale=1.0, min_seq_len="auto") == path

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

    @pytest.mark.parametrize("wanted", ["auto", "torch"])
    def test_cpu_tensors_run_in_torch(self, wanted):
        assert operator.choose_implementation(wanted, torch.device("cpu"), torch.float32, 64) == "torch"

    def test_cuda_tensors_run_in_triton_where_there_is_triton(self, monkeypatch):
        cuda = torch.device("cuda"), torch.float32, 64
        assert operator.choose_implementation("auto", *cuda) == "triton"
        assert operator.choose_implementation("torch", *cuda) == "torch"
        monkeypatch.setattr(operator, "triton_forward", None)
        assert operator.choose_implementation("auto", *cuda) == "torch"

    def test_wide_float32_heads_do_not_fit_the_kernels(self):
        cuda = torch.device("cuda")
        assert operator.choose_implementation("auto", cuda, torch.float32, 257) == "torch"
        assert operator.choose_implementation("auto", cuda, torch.bfloat16, 512) == "triton"
        with pytest.raises(ImplementationUnavailableError, match="head_dim of at most 256 in float32, got 512"):
            operator.choose_implementation("triton", cuda, torch.float32, 512)


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


def tensors(query=(2, 4, 200, 64), key=(2, 2, 200, 64), value=None, dtype=torch.float32):
    return [torch.zeros(shape, dtype=dtype) for shape in (query, key, key if value is None else value)]


def says(*parts):
    """Message pattern: what, expected, got, remedy, in this order."""
    return "s2o attention: " + ".*".join(re.escape(part) for part in parts)


class TestErrors:
    @pytest.mark.parametrize(
        ("args", "options", "message"),
        [
            (
                tensors(query=(4, 200, 64)),
                {},
                ("rank of query", "4 dimensions", "got 3 of shape (4, 200,", "unsqueeze"),
            ),
            (tensors(key=(2, 2, 200, 64, 1)), {}, ("rank of key", "4 dimensions", "got 5", "transpose")),
            (tensors(value=(200, 64)), {}, ("rank of value", "4 dimensions", "got 2", "unsqueeze")),
            (tensors(query=(2, 4, 0, 64)), {}, ("size of query", "at least one element", "(2, 4, 0, 64)", "Skip")),
            (tensors(key=(2, 2, 0, 64)), {}, ("size of key", "at least one element", "(2, 2, 0, 64)", "Skip")),
            (
                tensors(dtype=torch.float64),
                {},
                ("dtype of query", "float16, bfloat16, float32", "float64", ".to("),
            ),
            (
                [*tensors()[:2], tensors(dtype=torch.bfloat16)[2]],
                {},
                (
                    "dtype of value",
                    "the same for query, key and value",
                    "bfloat16 beside a torch.float32",
                    ".to(dtype)",
                ),
            ),
            (
                [tensors()[0], *(x.to("meta") for x in tensors()[1:])],
                {},
                ("device of key", "expected cpu", "got meta", ".to(device)"),
            ),
            (
                tensors(value=(2, 2, 100, 32)),
                {},
                ("shape of value", "(2, 2, 200) and", "(2, 2, 200, 64)", "got (2, 2, 100, 32)", "one value"),
            ),
            (tensors(key=(1, 2, 200, 64)), {}, ("shape of key", "[2, kv_heads, keys, 64]", "(1, 2, 200, 64)", "Batch")),
            (
                tensors(key=(2, 2, 200, 32)),
                {},
                ("shape of key", "kv_heads, keys, 64]", "(2, 2, 200, 32)", "head_dim"),
            ),
            (tensors(key=(2, 3, 200, 64)), {}, ("number of heads", "divisible by the 3", "got 4", "group")),
            (tensors((1, 1, 9, 513), (1, 1, 9, 513)), {}, ("head_dim of query", "at most 512", "got 513", "dense")),
            (tensors(value=(2, 2, 200, 513)), {}, ("head_dim of value", "at most 512", "got 513", "dense")),
            (tensors(), {"causal": True, "window": 0}, ("window", "at least 1", "window=0, causal=True", "looks back")),
            (
                tensors(),
                {"causal": False, "window": 9},
                ("window", "causal=True", "window=9, causal=False", "looks"),
            ),
            (
                [*tensors(), torch.ones(2, 200)],
                {},
                ("key_mask", "bool of shape (2, 200)", "torch.float32 of shape (2, 200)", "[batch, keys]"),
            ),
            (
                [*tensors(), torch.ones(2, 1, 1, 200, dtype=torch.bool)],
                {},
                ("key_mask", "(2, 200)", "(2, 1, 1, 200)", "[batch, keys]"),
            ),
            (
                [*tensors(), torch.ones(3, 200, dtype=torch.bool)],
                {},
                ("key_mask", "or (1, 200)", "(3, 200)", "[batch, keys]"),
            ),
            (
                [*tensors(), torch.ones(2, 200, dtype=torch.bool, device="meta")],
                {},
                ("device of key_mask", "expected cpu", "got meta", ".to(device)"),
            ),
        ],
        ids=lambda x: x[0] if isinstance(x, tuple) else None,
    )
    def test_tensors(self, args, options, message):
        given = {"causal": True, "window": None, **options}
        key_mask = args[3] if len(args) > 3 else None
        with pytest.raises(InputError, match=says(*message)):
            check_inputs(*args[:3], key_mask, **given)
        if all(x.device.type == "cpu" for x in args):
            with pytest.raises(InputError, match=says(*message)):
                OPERATOR(*args, **given)

    @pytest.mark.parametrize(
        ("name", "value", "message"),
        [
            ("tau", -0.1, ("finite number >= 0", "got -0.1", "tau=0.0")),
            ("tau", math.inf, ("finite number >= 0", "got inf", "tau=0.0")),
            ("tau", math.nan, ("finite number >= 0", "got nan", "tau=0.0")),
            ("tau", "1", ("finite number >= 0", "got 1", "tau=0.0")),
            ("tau", True, ("finite number >= 0", "got True", "tau=0.0")),
            ("min_seq_len", -1, ('integer >= 0, or "auto"', "got -1", "length in tokens")),
            ("min_seq_len", 1.5, ('integer >= 0, or "auto"', "got 1.5", "length in tokens")),
            ("min_seq_len", True, ('integer >= 0, or "auto"', "got True", "length in tokens")),
            ("segment_len", 0, ("positive multiple of 128", "got 0", "None")),
            ("segment_len", -128, ("positive multiple of 128", "got -128", "None")),
            ("segment_len", 100, ("positive multiple of 128", "got 100", "None")),
            ("segment_len", 128.0, ("positive multiple of 128", "got 128.0", "None")),
            ("ranking", "best", ("'per_query', 'sub_mean', 'mean_query'", "got 'best'", "Choose")),
            ("query_order", None, ("'none', 'mean_query'", "got None", "Choose")),
            ("implementation", "cuda", ("'auto', 'triton', 'torch'", "got 'cuda'", "Choose")),
        ],
    )
    def test_options(self, name, value, message):
        with pytest.raises(InputError, match=says(name, *message)):
            OperatorOptions(**{name: value})

    def test_options_reach_the_operator(self):
        with pytest.raises(InputError, match=says("tau", "got -1.0")):
            OPERATOR(*tensors(), tau=-1.0)

    def test_triton_without_triton_is_refused(self, monkeypatch):
        monkeypatch.setattr(operator, "triton_forward", None)
        with pytest.raises(ImplementationUnavailableError, match=r"expected the triton package, got none.*Install"):
            OPERATOR(*tensors(), implementation="triton", min_seq_len=0)

    @pytest.mark.parametrize("shortest", [0, 10**6])
    def test_triton_on_the_cpu_is_refused(self, monkeypatch, shortest):
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        with pytest.raises(ImplementationUnavailableError, match=r"expected CUDA tensors, got cpu.*Move.*INTERPRET"):
            OPERATOR(*tensors(), implementation="triton", min_seq_len=shortest)

    def test_one_hierarchy(self):
        assert issubclass(InputError, S2OError)
        assert issubclass(InputError, ValueError)
        assert issubclass(ImplementationUnavailableError, S2OError)
        assert issubclass(ImplementationUnavailableError, RuntimeError)


LENGTH, UNIMPORTANT, IMPORTANT = 3072, 700, 701


@pytest.fixture(scope="module")
def peaked():
    """Attention that stops early; every query dislikes key UNIMPORTANT and likes key IMPORTANT."""
    inputs = Case(queries=LENGTH, heads=2).inputs(heavy=64)
    direction = torch.nn.functional.normalize(inputs.query.mean((0, 1, 2)), dim=0)
    inputs.key[0, 0, UNIMPORTANT] = -2 * direction
    inputs.key[0, 0, IMPORTANT] = 8 * direction
    return inputs


class TestPoison:
    """NaN and inf travel as they do through SDPA, also where the tile would have stopped before meeting them."""

    def run(self, inputs, **options):
        with record_calls() as calls:
            output, lse = call(inputs, tau=1.0, return_lse=True, **options)
        return output, lse, calls[0]

    def poisoned(self, inputs, name, position, dim, number):
        changed = {"query": inputs.query.clone(), "key": inputs.key.clone(), "value": inputs.value.clone()}
        changed[name][0, :, position, dim] = number
        return type(inputs)(*changed.values(), inputs.mask, inputs.scale)

    def test_the_example_stops_early(self, peaked):
        output, _, statistics = self.run(peaked)
        assert statistics.path == "s2o"
        assert statistics.density < 0.6
        assert output.isfinite().all()
        probability = (peaked.query[0] @ peaked.key[0, 0].T * peaked.scale).softmax(-1)
        assert probability[..., UNIMPORTANT].max() < 1 / LENGTH < probability[..., IMPORTANT].min()

    @pytest.mark.parametrize("query_order", ["none", "mean_query"])
    @pytest.mark.parametrize("ranking", ["per_query", "sub_mean", "mean_query"])
    @pytest.mark.parametrize(
        ("name", "position", "number"),
        [
            ("key", UNIMPORTANT, math.nan),
            ("key", UNIMPORTANT, math.inf),
            ("key", UNIMPORTANT, -math.inf),
            ("key", IMPORTANT, math.nan),
            ("value", UNIMPORTANT, math.nan),
            ("value", IMPORTANT, math.nan),
            ("value", IMPORTANT, math.inf),
            ("value", IMPORTANT, -math.inf),
        ],
    )
    def test_rows_that_see_a_poisoned_key(self, peaked, name, position, number, ranking, query_order):
        inputs = self.poisoned(peaked, name, position, 3, number)
        output, _, statistics = self.run(inputs, ranking=ranking, query_order=query_order)
        group = inputs.query.shape[1]
        key, value = (x.repeat_interleave(group, dim=1) for x in (inputs.key, inputs.value))
        expected = scaled_dot_product_attention(inputs.query, key, value, is_causal=True)
        seeing = slice(position, None)
        assert not expected[:, :, seeing].isfinite().all()
        assert torch.equal(output[:, :, seeing].isnan(), expected[:, :, seeing].isnan())
        assert torch.equal(output[:, :, seeing].isinf(), expected[:, :, seeing].isinf())
        assert statistics.path == "s2o"

    @pytest.mark.parametrize("name", ["key", "value"])
    def test_segments_before_the_poisoned_key_stay_finite(self, peaked, name):
        """Inside its own segment weight zero times NaN is NaN, as in SDPA's own blocks."""
        output, lse, _ = self.run(self.poisoned(peaked, name, 1500, 3, math.nan), segment_len=128)
        before = 1500 // 128 * 128
        assert output[:, :, :before].isfinite().all()
        assert lse[:, :, :before].isfinite().all()

    @pytest.mark.parametrize("number", [math.nan, math.inf])
    @pytest.mark.parametrize("query_order", ["none", "mean_query"])
    def test_a_poisoned_query_spoils_its_own_row_only(self, peaked, number, query_order):
        inputs = self.poisoned(peaked, "query", 2000, 3, number)
        output, lse, statistics = self.run(inputs, query_order=query_order)
        rows = output.isnan().any(-1)
        assert rows[:, :, 2000].all()
        assert rows.sum().item() == rows[:, :, 2000].numel()
        assert (~lse.isfinite()).sum().item() == rows.sum().item()
        assert statistics.density < 0.6 + 2 * TILE_LEN / LENGTH * 2  # its tile may walk to the end, no other

    @pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
    @pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning")
    @pytest.mark.filterwarnings("ignore:divide by zero encountered:RuntimeWarning")
    @pytest.mark.parametrize("device", DEVICES)
    @pytest.mark.parametrize(("name", "position"), [("key", 40), ("value", 41), ("query", 200)])
    def test_triton_agrees_with_torch(self, name, position, device):
        if device == "cpu" and torch.cuda.is_available():
            pytest.skip("kernels are compiled where there is a GPU")
        inputs = self.poisoned(Case(queries=300, dtype="fp16").inputs(device), name, position, 3, math.nan)
        ours = call(inputs, tau=1.0, implementation="triton", segment_len=128)[0].isnan()
        theirs = call(inputs, tau=1.0, implementation="torch", segment_len=128)[0].isnan()
        seeing = slice(128, None)
        assert theirs[:, :, seeing].any()
        assert torch.equal(ours[:, :, seeing], theirs[:, :, seeing])


class TestBlindRows:
    @pytest.mark.parametrize("options", [{}, {"tau": 1.0}, {"min_seq_len": 10**6}], ids=["exact", "s2o", "dense"])
    @pytest.mark.parametrize(
        "case",
        [
            Case(queries=400, keys=150),
            Case(queries=300, batch=2, padding="all"),
            Case(queries=300, batch=2, padding="left"),
            Case(queries=300, batch=2, padding="left", window=20),
        ],
        ids=str,
    )
    def test_a_query_that_sees_no_key_gives_zeros(self, case, options):
        inputs = case.inputs()
        output, lse = call(inputs, return_lse=True, **options)
        blind = exact_attention(inputs)[1] == float("-inf")
        assert blind.any()
        for result in (output, call(inputs, **options)[0]):
            assert (result[blind] == 0).all()
            assert result.isfinite().all()
        assert (lse[blind] == float("-inf")).all()
        assert lse[~blind].isfinite().all()


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
@pytest.mark.parametrize("ranking", ["per_query", "mean_query", "sub_mean"])
@pytest.mark.parametrize("masked", [False, True], ids=["keywords", "attn_mask"])
def test_the_default_dtype_is_nobodys_business(default_dtype, dtype, ranking, masked):
    length = 400
    config = s2o_compile.S2OConfig(tau=0.0, min_seq_len=0, segment_len=128, ranking=ranking, query_order="mean_query")
    query, key, value = (torch.randn(1, 2, length, 16, dtype=torch.float32).to(dtype) for _ in range(3))
    visible = torch.ones(length, length, dtype=torch.bool).tril()
    visible[:, 7] = False
    mask = {"attn_mask": visible} if masked else {"causal": True, "key_mask": visible[-1:]}
    actual = s2o_compile.attention(query, key, value, **mask, config=config)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=visible)
    tolerance = 1e-5 if dtype is torch.float32 else 2e-2
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


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
