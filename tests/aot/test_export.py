"""Exported programs: what is rewritten in ATen's form, what comes back from a file, and what is reported."""

import dataclasses
import itertools
import subprocess
import sys
import warnings
from functools import partial

import pytest
import torch
from torch import nn
from torch._dynamo.exc import UserError, UserErrorType
from torch.export import Dim
from torch.nn.functional import scaled_dot_product_attention
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    ViTConfig,
    ViTModel,
)

import s2o_compile
from s2o_compile import S2OConfig
from s2o_compile.kernels.impl.aot import attention as decomposition
from tests.helpers.tiny import tiny_input, tiny_language_model, tiny_model, tiny_tokens

OPERATOR = torch.ops.s2o.attention.default
ASSERTIONS = {"op": "call_function", "target": torch.ops.aten._assert_scalar.default}
EXACT = S2OConfig(tau=0.0, min_seq_len=0)
SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}


def calls(program):
    return [node for node in program.graph.nodes if node.target is OPERATOR]


def exported(model, args=(), kwargs=None, *, shapes, config=EXACT):
    """The program and what was reported, after its outputs were compared with the model's."""
    torch.manual_seed(0)
    with s2o_compile.record() as recording:
        program = s2o_compile.export(model.eval(), args, kwargs, config=config, dynamic_shapes=shapes)
    with torch.no_grad():
        expected, actual = model(*args, **(kwargs or {})), program.module()(*args, **(kwargs or {}))
    expected, actual = (x if isinstance(x, torch.Tensor) else x[0] for x in (expected, actual))
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    return program, recording.report


AUTO = {0: Dim.AUTO, 1: Dim.AUTO}


@pytest.mark.parametrize(
    ("kind", "padded"),
    [
        pytest.param("sdpa", False, id="sdpa-"),
        pytest.param("sdpa", True, id="sdpa-padded", marks=pytest.mark.slow),
        pytest.param("eager", False, id="eager-", marks=pytest.mark.slow),
        pytest.param("eager", True, id="eager-padded"),
    ],
)
def test_llama_is_rewritten_in_every_spelling(kind, padded):
    model = LlamaForCausalLM(LlamaConfig(**SMALL, attn_implementation=kind))
    ids = torch.randint(64, (2, 70))
    inputs = {"input_ids": ids, "use_cache": False, "logits_to_keep": 1}
    shapes = {"input_ids": AUTO, "use_cache": None, "logits_to_keep": None}
    if padded:
        mask = torch.ones_like(ids)
        mask[0, :9] = 0
        inputs["attention_mask"], shapes["attention_mask"] = mask, AUTO
    program, report = exported(model, (), inputs, shapes=shapes)
    (site,) = report.sites
    assert (site.name, site.rewritten) == ("model.layers.0.self_attn", True)
    assert site.mask == ("causal, key padding" if padded else "causal")
    assert not site.query_shape[2].isdigit()
    (call,) = calls(program)
    assert call.args[1].meta["val"].shape[1] == 2  # grouped heads are not repeated
    pairs = [
        n for n in program.graph.nodes if isinstance(v := n.meta.get("val"), torch.Tensor) and v.dtype is torch.bool
    ]
    assert all(node.meta["val"].ndim < 4 for node in pairs)  # the mask's sub-graph is gone
    assert calls(program.run_decompositions())


@pytest.mark.parametrize(
    ("model", "masks"),
    [
        (lambda: MistralForCausalLM(MistralConfig(**SMALL, sliding_window=16)), ["causal, window 16"]),
        (
            lambda: GptOssForCausalLM(
                GptOssConfig(
                    **(SMALL | {"num_hidden_layers": 2}),
                    head_dim=8,
                    sliding_window=16,
                    num_local_experts=4,
                    layer_types=["sliding_attention", "full_attention"],
                    rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
                    attn_implementation="eager",
                )
            ),
            ["causal, window 16", "causal"],
        ),
    ],
    ids=["window", "sinks"],
)
def test_windows_and_sinks(model, masks):
    inputs = {"input_ids": torch.randint(64, (2, 70)), "use_cache": False}
    _, report = exported(model(), (), inputs, shapes={"input_ids": AUTO, "use_cache": None})
    assert [site.mask for site in report.sites if site.rewritten] == masks


def test_vision_transformer():
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=32, image_size=32, patch_size=8
    )
    program, _ = exported(ViTModel(config), (torch.randn(2, 3, 32, 32),), shapes=({0: Dim.AUTO},))
    assert len(calls(program)) == 1


class SelfAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


class Einsum(nn.Module):
    """Its last step is an operator that the passes insert: the program's output keeps its name."""

    def forward(self, x):
        scores = torch.einsum("bnhd,bmhd->bhnm", x, x) * 0.3
        length = x.shape[1]
        hidden = torch.triu(torch.ones(length, length, dtype=torch.bool), 1)
        return torch.einsum("bhnm,bmhd->bnhd", scores.masked_fill(hidden, float("-inf")).softmax(-1), x)


@pytest.mark.parametrize(
    ("model", "shape"), [(SelfAttention(), (2, 70, 32)), (Einsum(), (2, 70, 4, 8))], ids=["multihead", "einsum"]
)
def test_other_spellings(model, shape):
    program, _ = exported(model, (torch.randn(shape),), shapes=(AUTO,))
    assert len(calls(program)) == 1
    assert len(program.graph_signature.user_outputs) == 1


def test_a_padding_mask_with_a_batch_of_its_own_is_cut():
    class Padded(nn.Module):
        def forward(self, x, mask):
            rows = torch.arange(x.shape[0])[:, None, None, None]
            keys = torch.arange(x.shape[2])[None, None, None, :]
            return scaled_dot_product_attention(x, x, x, attn_mask=mask[rows, keys])

    x, mask = torch.randn(2, 2, 40, 8), torch.rand(3, 40) > 0.3
    program, _ = exported(Padded(), (x, mask), shapes=({0: Dim("b"), 2: Dim("n")}, {0: Dim("m"), 1: Dim("n")}))
    assert len(calls(program)) == 1


class Quarter(nn.Module):
    """A window, and an offset, that no node of the graph holds: the passes insert nodes that compute them."""

    def forward(self, x, key):
        queries, keys = x.shape[2], key.shape[2]
        distance = torch.arange(keys) - torch.arange(queries)[:, None]
        window = scaled_dot_product_attention(x, key, key, attn_mask=(distance <= 0) & (distance >= -(queries // 4)))
        shifted = (distance <= 3 * keys - 2 * queries) & (distance > -min(queries, keys))
        return window + scaled_dot_product_attention(x, key, key, attn_mask=shifted)


@pytest.mark.parametrize("way", ["module", "unflattened", "decomposed"])
def test_sizes_that_the_passes_compute(way):
    model, inputs = Quarter(), (torch.randn(2, 2, 40, 8), torch.randn(2, 2, 60, 8))
    program, report = exported(model, inputs, shapes=({2: Dim.AUTO}, {2: Dim.AUTO}))
    assert report.rewritten == 2
    ways = {
        "module": program.module,
        "unflattened": lambda: torch.export.unflatten(program),
        "decomposed": lambda: program.run_decompositions().module(),
    }
    run = ways[way]()
    for queries, keys in ((40, 60), (9, 31), (150, 131), (130, 300)):
        inputs = torch.randn(2, 2, queries, 8), torch.randn(2, 2, keys, 8)
        torch.testing.assert_close(run(*inputs), model(*inputs), atol=1e-5, rtol=1e-5)


def test_any_length_after_a_round_trip_through_a_file(tmp_path):
    model = tiny_language_model()
    config = S2OConfig(min_seq_len=256, site_tau={"layers.0": (0.1,) * 4}, dense_heads={"layers.1": (1,)})
    shapes = ({0: Dim("b", max=8), 1: Dim("n", min=1, max=4096)},)
    program = s2o_compile.export(model, (tiny_tokens(700, 2),), config=config, dynamic_shapes=shapes)
    assert [call.kwargs.get("head_tau") for call in calls(program)] == [[0.1] * 4, None]
    assert [call.kwargs.get("dense_heads") for call in calls(program)] == [None, [1]]
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    options = dataclasses.asdict(dataclasses.replace(config, inner_backend="eager"))
    compiled = torch.compile(model, backend="s2o", options={f"s2o.{name}": x for name, x in options.items()})
    with torch.no_grad(), s2o_compile.record() as recording:
        for batch, length in ((1, 1), (2, 2), (3, 300), (1, 2500)):
            ids = tiny_tokens(length, batch)
            assert torch.equal(loaded(ids), program.module()(ids))
        torch.testing.assert_close(loaded(ids), compiled(ids), atol=1e-5, rtol=1e-5)
    assert {call.path for call in recording.calls} == {"dense", "s2o"}


@pytest.mark.slow
def test_a_load_without_the_package_names_the_operator(tmp_path):
    program = s2o_compile.export(tiny_model(), (tiny_input(),))
    torch.export.save(program, tmp_path / "model.pt2")
    script = f"import torch; torch.export.load({str(tmp_path / 'model.pt2')!r})"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert run.returncode
    assert "torch.ops.s2o.attention" in run.stderr


def test_what_is_refused_and_what_is_warned_of():
    with pytest.raises(TypeError, match=r"export: expected an uncompiled torch\.nn\.Module, got function"):
        s2o_compile.export(lambda x: x, ())
    for compiled in (torch.compile(tiny_model()), s2o_compile.optimize(tiny_model(), EXACT)):
        with pytest.raises(TypeError, match="expected an uncompiled"):
            s2o_compile.export(compiled, (tiny_input(),))
    with pytest.warns(s2o_compile.UnknownSiteWarning, match=r"layers\.7"):
        s2o_compile.export(tiny_model(), (tiny_input(),), config=S2OConfig(dense_heads={"layers.7": (0,)}))

    class Biased(nn.Module):
        def forward(self, x):
            return scaled_dot_product_attention(x, x, x, attn_mask=torch.arange(40.0).expand(40, 40))

    with pytest.warns(s2o_compile.NothingRewrittenWarning):
        s2o_compile.export(Biased(), (torch.randn(1, 2, 40, 8),))


def test_gradients_do_not_keep_attention_dense():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        program = s2o_compile.export(tiny_model(), (tiny_input(),))
    assert len(calls(program)) == 2


class Pairs(nn.Module):
    """Holds for even lengths only."""

    def forward(self, x):
        return x.reshape(x.shape[0], -1, 2)


@pytest.mark.parametrize("bound", [{}, {"min": 2, "max": 64}], ids=["open", "bounded"])
def test_a_constraint_that_some_length_violates_is_torchs_error(bound):
    with pytest.raises(UserError, match="Constraints violated"):
        s2o_compile.export(Pairs(), (torch.ones(3, 8),), dynamic_shapes=({1: Dim("n", **bound)},))


@pytest.mark.slow
def test_a_constraint_that_every_length_keeps_becomes_an_assertion(monkeypatch):
    """torch 2.11 cannot prove one of repeated heads; later versions are made to fail alike."""
    export = torch.export.export

    def unsure(*args, prefer_deferred_runtime_asserts_over_guards=False, **keywords):
        if not prefer_deferred_runtime_asserts_over_guards:
            raise UserError(UserErrorType.CONSTRAINT_VIOLATION, "Constraints violated (length)!")
        return export(*args, prefer_deferred_runtime_asserts_over_guards=True, **keywords)

    monkeypatch.setattr(torch.export, "export", unsure)
    model = LlamaForCausalLM(LlamaConfig(**SMALL))
    ids = torch.arange(300)[None] % 64
    shapes = {"input_ids": {1: Dim("length", min=1, max=2048)}, "use_cache": None}
    program, report = exported(model, (), {"input_ids": ids, "use_cache": False}, shapes=shapes)
    assert report.rewritten == 1
    said = [node.args[0].meta["val"].node.expr for node in program.graph.find_nodes(**ASSERTIONS)]
    with torch.no_grad():
        # What is learned of the example's sizes behind it is not asserted of others.
        decomposed = program.run_decompositions({OPERATOR: partial(decomposition.attention, min_seq_len=256)})
        assert {node.args[0].meta["val"].node.expr for node in decomposed.graph.find_nodes(**ASSERTIONS)} <= set(said)
        for length, some in itertools.product((1, 2, 2048), (program, decomposed)):
            ids = torch.arange(length)[None] % 64
            actual = some.module()(input_ids=ids, use_cache=False).logits
            torch.testing.assert_close(actual, model(input_ids=ids, use_cache=False).logits, atol=1e-5, rtol=1e-5)


def test_a_cache_among_the_outputs_is_one_line():
    """torch's own error has 80 lines of traceback and no remedy."""
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_attention_heads=4)).eval()
    ids = torch.randint(64, (1, 70))
    with pytest.raises(
        s2o_compile.ExportError, match=r"got a DynamicCache among the outputs of Llama\S+ For a"
    ) as caught:
        s2o_compile.export(llama, (ids,))
    assert caught.value.__suppress_context__
    llama.config.use_cache = False  # the first remedy
    assert s2o_compile.export(llama, (ids,))
