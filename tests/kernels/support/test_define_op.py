"""A call's short cuts: past the dispatcher where nobody looks on, and straight to SDPA where nothing else is needed.

The same output, strides, errors and statistics as without them; whoever has to see the operator sees it.
"""

import contextlib
import dataclasses

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import s2o_compile
from s2o_compile.kernels import ops as registration
from s2o_compile.kernels.core.options import from_op_kwargs
from s2o_compile.kernels.statistics import record_calls
from s2o_compile.kernels.support.define_op import can_skip_dispatcher
from s2o_compile.kernels.support.errors import InputError, NoGradientError
from tests.conftest import Case, visible_pairs
from tests.helpers.operator_calls import described, public

OPERATOR = torch.ops.s2o.attention.default
MASKED = torch.ops.s2o.masked_attention.default

CASES = [
    Case(queries=40),
    Case(queries=40, batch=2, heads=4, kv_heads=2, dtype="bf16"),
    Case(queries=1, keys=40),
    Case(queries=1, keys=40, batch=2, padding="left"),
    Case(queries=7, keys=40),
    Case(queries=40, keys=7),
    Case(queries=7, keys=40, offset=0),
    Case(queries=7, keys=40, offset=39),
    Case(queries=7, keys=40, offset=-3),
    Case(queries=40, causal=False),
    Case(queries=7, keys=40, causal=False, heads=4),
    Case(queries=40, batch=2, padding="all"),
    Case(queries=40, batch=2, padding="left", heads=4, causal=False),
    Case(queries=40, window=9),
    Case(queries=40, window=9, batch=2, padding="right"),
    Case(queries=40, chunk=16),
    Case(queries=40, head_dim=32, value_dim=48, heads=4),
    Case(queries=40, fully_masked="mean"),
    Case(queries=40, keys=7, fully_masked="mean"),
    Case(queries=40, softcap=3.0),
    Case(queries=40, sinks=True),
]


def by_operator(inputs, **options):
    return OPERATOR(*inputs.tensors, inputs.mask.key_mask, inputs.sinks, **described(inputs, **options))[0]


class Watch(TorchDispatchMode):
    """A mode that must see every call."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


class WatchFunctions(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


class Marked(torch.Tensor):
    """A subclass that keeps its class and writes down what is called on it."""

    seen: list = []  # noqa: RUF012

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.seen.append(func)
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.fixture
def slow(monkeypatch):
    """Calls that take no short cut: each goes through a mode, and no call is a usual short one."""

    def call(f, *args, **kwargs):
        with monkeypatch.context() as patch, Watch() as watch:
            patch.setattr(registration, "run_short", lambda *_, **__: None)
            result = f(*args, **kwargs)
        assert OPERATOR in watch.seen or MASKED in watch.seen
        return result

    return call


class TestSameResult:
    @pytest.mark.parametrize("grad_mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
    @pytest.mark.parametrize("layout", ["plain", "transposed", "packed", "strided"])
    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_short_calls(self, slow, case, layout, grad_mode):
        inputs = dataclasses.replace(case, layout=layout).inputs()
        expected = slow(by_operator, inputs)
        with grad_mode():
            for call in (public, by_operator):
                output = call(inputs)
                assert torch.equal(output, expected)
                assert output.stride() == expected.stride()
                assert not output.requires_grad

    @pytest.mark.parametrize("case", [CASES[0], CASES[11], CASES[13]], ids=str)
    def test_long_calls(self, slow, case):
        inputs = dataclasses.replace(case, queries=300).inputs()
        expected = slow(by_operator, inputs, min_seq_len=0, tau=0.0)
        config = s2o_compile.S2OConfig(min_seq_len=0, tau=0.0)
        assert torch.equal(public(inputs, config=config), expected)
        assert torch.equal(by_operator(inputs, min_seq_len=0, tau=0.0), expected)

    @pytest.mark.parametrize("kind", [torch.bool, torch.float32], ids=str)
    @pytest.mark.parametrize("case", [CASES[0], CASES[3], CASES[6], CASES[16]], ids=str)
    def test_masks_that_are_read(self, slow, case, kind):
        inputs = case.inputs()
        mask = visible_pairs(inputs)
        if kind is torch.float32:
            mask = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
        expected = slow(MASKED, *inputs.tensors, mask)[0]
        for output in (s2o_compile.attention(*inputs.tensors, attn_mask=mask), MASKED(*inputs.tensors, mask)[0]):
            assert torch.equal(output, expected)
            assert output.stride() == expected.stride()

    @pytest.mark.parametrize("layout", ["auto", "BHND", "BNHD"])
    def test_the_layout_asked_for(self, slow, layout):
        inputs = CASES[1].inputs()
        assert by_operator(inputs, layout=layout).stride() == slow(by_operator, inputs, layout=layout).stride()

    @pytest.mark.parametrize("scale", [None, 0.3, 0.0, -0.2])
    def test_any_scale(self, slow, scale):
        inputs = dataclasses.replace(CASES[0].inputs(), scale=scale)
        assert torch.equal(public(inputs), slow(by_operator, inputs))

    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_statistics(self, slow, case):
        inputs = case.inputs()
        with record_calls() as calls:
            slow(by_operator, inputs)
            number = len(calls)
            public(inputs)
            by_operator(inputs, site="layer")
        first, second, third = (
            [(c.path, c.n_queries, c.n_keys, c.mask, c.area.tolist(), c.density) for c in calls[i * number :][:number]]
            for i in range(3)
        )
        assert first == second == third
        assert {c.site for c in calls[2 * number :]} == {"layer"}

    def test_a_negation_that_is_still_to_be_done(self):
        x = torch.randn(1, 2, 200, 16)
        negated = torch._neg_view(x)
        assert negated.is_neg()
        assert not can_skip_dispatcher(x, negated)
        assert torch.equal(s2o_compile.attention(negated, x, x), s2o_compile.attention(-x, x, x))
        assert torch.equal(OPERATOR(negated, x, x)[0], OPERATOR(-x, x, x)[0])

    def test_autocast(self):
        inputs = CASES[1].inputs().to(torch.float32)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs = public(inputs), by_operator(inputs)
        expected = by_operator(inputs.to(torch.bfloat16))
        assert expected.dtype == torch.bfloat16
        assert all(torch.equal(output, expected) for output in outputs)

    @pytest.mark.parametrize("case", [CASES[1], CASES[3]], ids=str)
    def test_vmap(self, case):
        entries = [case.inputs(seed=seed) for seed in range(3)]
        stacked = [torch.stack(x) for x in zip(*(entry.tensors for entry in entries), strict=True)]
        given = {**described(entries[0]), "key_mask": entries[0].mask.key_mask}
        mapped = torch.vmap(lambda *tensors: s2o_compile.attention(*tensors, **given))(*stacked)
        torch.testing.assert_close(mapped, torch.stack([public(entry) for entry in entries]))


BAD = {
    "rank": lambda q, k, v: (q[0], k, v),
    "empty": lambda q, k, v: (q[:, :, :0], k, v),
    "no_heads": lambda q, k, v: (q, k[:, :0], v[:, :0]),
    "dtype": lambda q, k, v: (q, k.half(), v),
    "float64": lambda q, k, v: (q.double(), k.double(), v.double()),
    "device": lambda q, k, v: (q, k.to("meta"), v),
    "value": lambda q, k, v: (q, k, v[:, :, 1:]),
    "batch": lambda q, k, v: (q[:1], k, v),
    "head_dim": lambda q, k, v: (q[..., 1:], k, v),
    "heads": lambda q, k, v: (q[:, :3], k, v),
    "wide": lambda q, k, v: (q.repeat(1, 1, 1, 40), k.repeat(1, 1, 1, 40), v),
    "wide_value": lambda q, k, v: (q, k, v.repeat(1, 1, 1, 40)),
}


class TestSameErrors:
    @pytest.mark.parametrize("spoil", BAD.values(), ids=BAD)
    def test_tensors(self, slow, spoil):
        tensors = spoil(torch.randn(2, 4, 8, 16), torch.randn(2, 2, 8, 16), torch.randn(2, 2, 8, 16))
        with pytest.raises(InputError) as expected:
            registration.attention(*tensors)
        for call in (s2o_compile.attention, OPERATOR):
            with pytest.raises(InputError) as error:
                call(*tensors, causal=True)
            assert str(error.value) == str(expected.value)

    @pytest.mark.parametrize(
        "options",
        [
            {"window": 3},
            {"causal": True, "window": 0},
            {"attention_chunk": 4},
            {"fully_masked": "nan"},
            {"softcap": -1.0},
        ],
        ids=str,
    )
    def test_arguments(self, slow, options):
        x = torch.randn(1, 2, 8, 16)
        with pytest.raises(InputError) as expected:
            slow(OPERATOR, x, x, x, **options)
        for call in (s2o_compile.attention, OPERATOR):
            with pytest.raises(InputError) as error:
                call(x, x, x, **options)
            assert str(error.value) == str(expected.value)

    def test_options_are_checked_by_type_although_they_are_remembered(self):
        assert from_op_kwargs(1.0, 0, None, "per_query", "group", "auto").tau == 1.0
        with pytest.raises(InputError, match="got True"):
            from_op_kwargs(True, 0, None, "per_query", "group", "auto")
        with pytest.raises(InputError, match="min_seq_len"):
            from_op_kwargs(1.0, False, None, "per_query", "group", "auto")


class TestGradients:
    @pytest.mark.parametrize("which", range(3))
    def test_a_backward_through_the_operator_raises(self, which):
        tensors = [torch.randn(1, 2, 8, 16, requires_grad=at == which) for at in range(3)]
        for output in (OPERATOR(*tensors)[0], MASKED(*tensors, torch.ones(8, 8, dtype=torch.bool))[0]):
            assert output.requires_grad
            with pytest.raises(NoGradientError, match=r"no backward.*Call s2o_compile\.attention"):
                output.sum().backward()

    def test_a_mask_that_requires_grad(self):
        x, bias = torch.randn(1, 2, 8, 16), torch.zeros(8, 8, requires_grad=True)
        with pytest.raises(NoGradientError):
            MASKED(x, x, x, bias)[0].sum().backward()

    @pytest.mark.parametrize("quiet", [torch.no_grad, torch.inference_mode])
    def test_none_without_grad_mode(self, quiet):
        x = torch.randn(1, 2, 8, 16, requires_grad=True)
        with quiet():
            for output in (OPERATOR(x, x, x)[0], s2o_compile.attention(x, x, x)):
                assert not output.requires_grad
                assert torch.equal(output, scaled_dot_product_attention(x, x, x))

    def test_the_function_stays_differentiable(self):
        x = torch.randn(1, 2, 8, 16, requires_grad=True)
        (found,) = torch.autograd.grad(s2o_compile.attention(x, x, x, causal=True).square().sum(), x)
        (wanted,) = torch.autograd.grad(scaled_dot_product_attention(x, x, x, is_causal=True).square().sum(), x)
        torch.testing.assert_close(found, wanted)

    def test_compiled(self):
        x = torch.randn(1, 2, 8, 16, requires_grad=True)
        torch._dynamo.reset()
        with pytest.raises(Exception, match="no backward through"):
            torch.compile(lambda x: OPERATOR(x, x, x)[0].sum(), backend="aot_eager", fullgraph=True)(x).backward()


@contextlib.contextmanager
def autocast():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        yield


@contextlib.contextmanager
def profiled():
    with torch.autograd.profiler.profile():
        yield


class TestWhoLooks:
    @pytest.mark.parametrize(
        "context", [contextlib.nullcontext, torch.no_grad, torch.inference_mode, torch.enable_grad]
    )
    def test_nobody(self, context):
        with context():
            x = torch.randn(1, 2, 8, 16)
            assert can_skip_dispatcher(x, x, x, None)

    @pytest.mark.parametrize("context", [Watch, WatchFunctions, FakeTensorMode, autocast, profiled])
    def test_modes(self, context):
        x = torch.randn(1, 2, 8, 16)
        with context():
            assert not can_skip_dispatcher(x, x, x)

    @pytest.mark.parametrize("kind", [torch.nn.Parameter, lambda x: x.as_subclass(Marked), lambda x: x.to("meta")])
    def test_tensors(self, kind):
        x = torch.randn(1, 2, 8, 16)
        assert not can_skip_dispatcher(x, kind(x), None)

    @pytest.mark.parametrize(
        "transform",
        [torch.vmap, torch.func.grad, torch.func.functionalize, make_fx, lambda f: lambda x: torch.jit.trace(f, x)],
        ids=["vmap", "grad", "functionalize", "make_fx", "jit"],
    )
    @pytest.mark.filterwarnings("ignore")
    def test_transforms(self, transform):
        looked = []

        def function(x):
            looked.append(can_skip_dispatcher(x))
            return x.sum()

        transform(function)(torch.randn(3))
        assert looked
        assert not looked[0]

    def test_a_dispatch_mode_sees_one_node(self):
        x, mask = torch.randn(1, 2, 8, 16), torch.ones(8, 8, dtype=torch.bool)
        for call in (s2o_compile.attention, OPERATOR):
            with Watch() as watch:
                call(x, x, x, causal=True)
            assert watch.seen == [OPERATOR]
        with Watch() as watch:
            s2o_compile.attention(x, x, x, attn_mask=mask)
        assert watch.seen == [MASKED]

    def test_a_function_mode_sees_the_operator(self):
        x = torch.randn(1, 2, 8, 16)
        for call in (s2o_compile.attention, OPERATOR):
            with WatchFunctions() as watch:
                call(x, x, x, causal=True)
            assert OPERATOR in watch.seen

    def test_a_subclass_sees_the_operator(self):
        x = torch.randn(1, 2, 8, 16)
        for call in (s2o_compile.attention, OPERATOR):
            Marked.seen.clear()
            call(x, x.as_subclass(Marked), x, causal=True)
            assert OPERATOR in Marked.seen
            assert scaled_dot_product_attention not in Marked.seen

    def test_a_profiler_sees_the_operator(self):
        x = torch.randn(1, 2, 8, 16)
        with torch.autograd.profiler.profile() as profile:
            s2o_compile.attention(x, x, x, causal=True)
        assert "s2o::attention" in {event.name for event in profile.function_events}

    @pytest.mark.parametrize("layout", ["plain", "transposed", "packed"])
    def test_fake_tensors(self, layout):
        inputs = dataclasses.replace(CASES[1], layout=layout).inputs()
        expected = public(inputs)
        with FakeTensorMode() as mode:
            fake = [mode.from_tensor(x) for x in inputs.tensors]
            for output in (s2o_compile.attention(*fake, causal=True), OPERATOR(*fake, causal=True)[0]):
                assert type(output) is not torch.Tensor
                assert (output.shape, output.stride()) == (expected.shape, expected.stride())

    @pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
    @pytest.mark.parametrize("pre_dispatch", [False, True])
    def test_make_fx(self, mode, pre_dispatch):
        x = torch.randn(1, 2, 8, 16)
        trace = make_fx(lambda x: s2o_compile.attention(x, x, x), tracing_mode=mode, pre_dispatch=pre_dispatch)
        graph = trace(x).graph
        assert OPERATOR in [node.target for node in graph.nodes]
        assert not any("scaled_dot" in str(node.target) for node in graph.nodes)

    @pytest.mark.filterwarnings("ignore::FutureWarning")  # torch.export's own
    @pytest.mark.parametrize("strict", [False, True])
    def test_export(self, strict):
        class Attention(torch.nn.Module):
            def forward(self, x):
                return s2o_compile.attention(x, x, x, causal=True)

        x = torch.randn(1, 2, 8, 16)
        program = torch.export.export(Attention(), (x,), strict=strict).run_decompositions()
        assert [node.target for node in program.graph.nodes if "s2o" in str(node.target)] == [OPERATOR]
        assert torch.equal(program.module()(x), s2o_compile.attention(x, x, x, causal=True))

    @pytest.mark.parametrize("quiet", [torch.no_grad, torch.inference_mode])
    @pytest.mark.parametrize("call", [OPERATOR, s2o_compile.attention], ids=["operator", "function"])
    def test_dynamo_does_not_look_into_the_operator(self, call, quiet):
        graphs = []

        @torch._dynamo.disable(recursive=False)
        def skipped(x):
            return call(x, x, x, causal=True)

        def backend(module, _):
            graphs.append(module)
            return module

        @torch.compile(backend=backend)
        def function(x):
            return skipped(x + 1)

        torch._dynamo.reset()
        with quiet():
            for length in (8, 9, 10):
                function(torch.randn(1, 2, length, 16))
        targets = [str(node.target) for graph in graphs for node in graph.graph.nodes if node.op == "call_function"]
        assert graphs
        assert not [target for target in targets if "scaled_dot" in target or "empty" in target]


class TestOpcheck:
    """What `torch.library` promises of an operator, for the short calls of every kind."""

    @pytest.mark.parametrize("requires_grad", [False, True])
    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_short_calls(self, case, requires_grad):
        inputs = case.inputs()
        tensors = [x.detach().requires_grad_(requires_grad) for x in inputs.tensors]
        utils = ["test_schema", "test_faketensor", "test_autograd_registration"]
        utils += [] if requires_grad else ["test_aot_dispatch_dynamic"]
        given = (*tensors, inputs.mask.key_mask, inputs.sinks)
        result = torch.library.opcheck(OPERATOR, given, described(inputs), test_utils=utils)
        assert set(result.values()) == {"SUCCESS"}

    def test_masked(self):
        inputs = CASES[3].inputs()
        result = torch.library.opcheck(MASKED, (*inputs.tensors, visible_pairs(inputs)))
        assert set(result.values()) == {"SUCCESS"}

    def test_tags(self):
        assert torch.Tag.pt2_compliant_tag in OPERATOR.tags
        unsafe = getattr(torch.Tag, "cudagraph_unsafe", None)
        assert unsafe is None or (unsafe in MASKED.tags and unsafe not in OPERATOR.tags)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_visible_pairs_are_the_definition(case):
    inputs = case.inputs()
    pairs = inputs.mask.visible_pairs(case.queries, case.n_keys, torch.device("cpu"))
    assert torch.equal(pairs.expand(case.batch, 1, case.queries, case.n_keys), visible_pairs(inputs))
