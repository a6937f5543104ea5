"""torch.onnx.export of what S2O optimised: dense attention that ONNX runs, with the same result."""

import warnings

import pytest
import torch

import s2o_compile
from s2o_compile import DenseExportWarning, InputError, S2OConfig
from tests.helpers.tiny import tiny_input, tiny_model

pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")

import s2o_compile.onnx  # noqa: E402

EXACT = S2OConfig(tau=0.0, min_seq_len=0)
KEYS, QUERIES = 60, 40
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning", "ignore:.*LeafSpec.*:DeprecationWarning")


def run(program, *inputs):
    """What ONNX Runtime makes of an ONNXProgram."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString(), options)
    names = [given.name for given in session.get_inputs()]
    return torch.tensor(session.run(None, {name: x.numpy() for name, x in zip(names, inputs, strict=True)})[0])


def exported(model, inputs=(), **options):
    return torch.onnx.export(model, inputs, dynamo=True, verbose=False, **options)


class Attention(torch.nn.Module):
    """One call of the operator as a function."""

    def __init__(self, **options):
        super().__init__()
        self.options = options

    def forward(self, query, key, value):
        return s2o_compile.attention(query, key, value, config=EXACT, **self.options)


def tensors(queries=QUERIES, keys=KEYS):
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 4, queries, 8), (2, 2, keys, 8), (2, 2, keys, 8)
    query, key, value = (torch.randn(shape, generator=generator) for shape in shapes)
    return query.transpose(1, 2).contiguous().transpose(1, 2), key, value  # as models make it


PADDING = torch.arange(KEYS).expand(2, -1) >= torch.tensor([[0], [7]])
CALLS = {
    "causal": {"causal": True},
    "window-padding-softcap": {"causal": True, "window": 9, "key_mask": PADDING, "softcap": 2.0},
    "chunks-sinks": {"causal": True, "attention_chunk": 16, "sinks": torch.tensor([0.5, -1.0, 2.0, 0.0])},
    "fully-masked-zeros": {"causal": True, "causal_offset": -5},
    "fully-masked-mean": {"causal": True, "causal_offset": -5, "fully_masked": "mean"},
    "mask": {"attn_mask": torch.ones(QUERIES, KEYS, dtype=torch.bool).tril(-5)},
    "additive": {"attn_mask": torch.full((QUERIES, KEYS), -torch.inf).triu(-4) + 0.1},
}


@pytest.mark.parametrize("name", CALLS)
@torch.no_grad()
def test_a_program_with_s2o_operators_leaves_with_dense_attention(name):
    model, inputs = Attention(**CALLS[name]).eval(), tensors()
    program = torch.export.export(model, inputs)
    assert any("s2o" in str(node.target) for node in program.graph.nodes)
    with pytest.warns(DenseExportWarning, match="1 attentions run densely"):
        dense = s2o_compile.onnx.dense(program)
    assert not any("s2o" in str(node.target) for node in dense.graph.nodes)
    torch.testing.assert_close(run(exported(dense), *inputs), model(*inputs), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "example"),
    [
        pytest.param({}, (QUERIES, KEYS), id="causal"),
        # Nothing is hidden at the example's lengths.
        pytest.param({"causal_offset": 5}, (3, 4), id="offset"),
        pytest.param({"attention_chunk": 16, "causal_offset": 9}, (3, 7), id="chunks"),
    ],
)
@torch.no_grad()
def test_one_graph_serves_all_lengths(options, example):
    queries, keys = (torch.export.Dim(name, min=1, max=512) for name in ("queries", "keys"))
    model = Attention(causal=True, **options).eval()
    program = torch.export.export(model, tensors(*example), dynamic_shapes=[{2: queries}, {2: keys}, {2: keys}])
    with pytest.warns(DenseExportWarning):
        onnx = exported(s2o_compile.onnx.dense(program))
    for lengths in (example, (40, 60), (25, 60), (60, 25)):
        torch.testing.assert_close(run(onnx, *tensors(*lengths)), model(*tensors(*lengths)), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["fully-masked-zeros", "additive"])
@torch.no_grad()
def test_a_call_is_dense_while_it_is_exported(name):
    model, inputs = Attention(**CALLS[name]).eval(), tensors()
    with pytest.warns(DenseExportWarning, match="ONNX"):
        onnx = exported(model, inputs)
    torch.testing.assert_close(run(onnx, *inputs), model(*inputs), atol=2e-6, rtol=1e-5)


@torch.no_grad()
@pytest.mark.usefixtures("fresh_dynamo")
def test_an_optimized_model_leaves_densely():
    model, x = tiny_model(), tiny_input()
    fast = s2o_compile.optimize(model, EXACT)
    torch.testing.assert_close(run(exported(fast, (x,)), x), model(x), atol=2e-6, rtol=1e-5)


@torch.no_grad()
def test_a_transformers_model_with_our_attention_leaves_densely():
    transformers = pytest.importorskip("transformers")
    import s2o_compile.transformers

    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads, use_cache=False)).eval()
    ids = torch.randint(50, (1, 200), generator=torch.Generator().manual_seed(1))
    expected = model(ids).logits
    model.set_attn_implementation("s2o")
    s2o_compile.transformers.configure(model, EXACT)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers' own, about tracing
        onnx = exported(model, kwargs={"input_ids": ids})
    torch.testing.assert_close(run(onnx, ids), expected, atol=2e-6, rtol=1e-5)


@torch.no_grad()
def test_what_dense_attention_does_not_return_is_refused():
    class WithLse(Attention):
        def forward(self, *inputs):
            return super().forward(*inputs)[1]

    program = torch.export.export(WithLse(causal=True, return_lse=True).eval(), tensors())
    with pytest.raises(InputError, match=r"return_lse.* Export the model without it"):
        s2o_compile.onnx.dense(program)


def test_other_programs_stay_as_they_are():
    program = torch.export.export(torch.nn.Linear(2, 2), (torch.ones(1, 2),))
    assert s2o_compile.onnx.dense(program) is program
    with pytest.raises(TypeError, match=r"expected a torch\.export\.ExportedProgram, got Linear"):
        s2o_compile.onnx.dense(torch.nn.Linear(2, 2))
