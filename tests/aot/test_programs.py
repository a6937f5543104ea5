"""What torch does with programs works on exported ones; what it would do to an optimized module is refused."""

import copy
import dataclasses
import functools
import io

import pytest
import torch
from torch import nn
from torch.export import Dim
from torch.export.passes import move_to_device_pass
from torch.nn.functional import scaled_dot_product_attention
from transformers import LlamaConfig, LlamaForCausalLM

import s2o_compile
from s2o_compile import S2OConfig
from tests.helpers.tiny import tiny_input, tiny_model

EXACT = S2OConfig(tau=0.0, min_seq_len=0)
OPERATORS = (torch.ops.s2o.attention.default, torch.ops.s2o.masked_attention.default)
AUTO = {0: Dim.AUTO, 1: Dim.AUTO}
HEADS = {0: Dim("b", min=1, max=8), 2: Dim("n", min=4, max=512)}


class Block(nn.Module):
    """An attention between two projections, by a function of query, key and mask."""

    def __init__(self, attend):
        super().__init__()
        self.attend, self.before, self.after = attend, nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x, start, *masks):
        return self.after(self.attend(self.before(x), x, *masks)) + start.float()


class Two(nn.Module):
    """Two blocks, which share what is made of their masks; both cast a tensor from before them."""

    def __init__(self, attend):
        super().__init__()
        self.blocks = nn.ModuleList(Block(attend) for _ in range(2))

    def forward(self, x, *masks):
        start = x * 2
        for block in self.blocks:
            x = block(x, start, *masks)
        return x


def read(q, x, mask):
    return scaled_dot_product_attention(q, x, x, attn_mask=mask)


def padded(q, x, mask):
    """The mask, integers that are cast, has rows of its own: they are cut to a length that nodes must compute."""
    mask = mask.bool()
    rows = torch.arange(x.shape[0])[:, None, None, None]
    return scaled_dot_product_attention(q, x, x, attn_mask=mask[rows, torch.arange(x.shape[2])[None, None, None]])


def window(q, x):
    """Its length is computed, and its fill is a tensor that torch lifts out of the graph."""
    at = torch.arange(x.shape[2])
    far = (at[None] > at[:, None]) | (at[None] <= at[:, None] - x.shape[2] // 2)
    return (q @ x.mT / 2).masked_fill(far, torch.tensor(float("-inf"))).softmax(-1) @ x


def llama(kind):
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=4096, attn_implementation=kind,
    )  # fmt: skip
    ids = torch.arange(140).view(2, 70) % 64
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    shapes = {"input_ids": AUTO, "attention_mask": AUTO, "use_cache": None}
    return LlamaForCausalLM(config), (), {"input_ids": ids, "attention_mask": mask, "use_cache": False}, shapes


def blocks(attend, *masks, shapes=()):
    return Two(attend), (torch.randn(2, 4, 70, 8), *masks), {}, (HEADS, *shapes)


CASES = {
    "llama": lambda: llama("sdpa"),
    "llama-eager": lambda: llama("eager"),
    "fixed-sizes": lambda: (tiny_model(), (tiny_input(),), {}, None),
    "read": lambda: blocks(read, torch.rand(70, 70) > 0.3, shapes=(({0: HEADS[2], 1: HEADS[2]},),)),
    "padded": lambda: blocks(padded, (torch.rand(3, 70) > 0.3).long(), shapes=(({0: Dim("m"), 1: HEADS[2]},),)),
    "window": lambda: blocks(window),
}


def saved(program):
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file)


def first(output):
    return output if isinstance(output, torch.Tensor) else output[0]


def check_structure(program):
    """Placeholders stand first, the signature names them and the outputs, and every attention is one node."""
    program.graph.lint()
    program.validate()
    placeholders = program.graph.find_nodes(op="placeholder")
    assert list(program.graph.nodes)[: len(placeholders)] == placeholders
    assert [spec.arg.name for spec in program.graph_signature.input_specs] == [node.name for node in placeholders]
    outputs = [node.name for node in program.graph.output_node().args[0]]
    assert [spec.arg.name for spec in program.graph_signature.output_specs] == outputs
    assert sum(node.target in OPERATORS for node in program.graph.nodes) == 2


STRICT = [pytest.param(False, id="non-strict"), pytest.param(True, id="strict")]
QUICK = {("padded", False), ("read", True), ("window", True)}
"""The rest is in the slow tier."""


@pytest.mark.parametrize(
    ("case", "strict"),
    [
        pytest.param(
            case, strict, id=f"{case}{'-strict' * strict}", marks=[pytest.mark.slow] * ((case, strict) not in QUICK)
        )
        for case in CASES
        for strict in (False, True)
    ],
)
@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_every_operation_on_a_program(case, strict):
    torch.manual_seed(0)
    model, args, kwargs, shapes = CASES[case]()
    program = s2o_compile.export(model.eval(), args, kwargs, config=EXACT, dynamic_shapes=shapes, strict=strict)
    check_structure(program)
    expected = first(model(*args, **kwargs))
    reexported = torch.export.export(program.module(), args, kwargs, strict=strict)
    loaded = saved(program)
    # torch cannot deep-copy a program once it was unflattened: so unflatten comes last.
    for made in (
        program, copy.deepcopy(program), loaded, reexported, program.run_decompositions(),
        program.run_decompositions({}), loaded.run_decompositions(), move_to_device_pass(program, "cpu"),
    ):  # fmt: skip
        check_structure(made)
        unflattened = torch.export.unflatten(made)
        outputs = [runs(*args, **kwargs) for runs in (made.module(), unflattened)]
        for output in (*outputs, unflattened.train().eval()(*args, **kwargs)):
            torch.testing.assert_close(first(output), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("strict", STRICT)
@torch.no_grad()
def test_a_program_is_exported_again_with_other_lengths(strict):
    model, args, _, shapes = CASES["window"]()
    program = s2o_compile.export(model, args, config=EXACT, dynamic_shapes=shapes)
    again = torch.export.export(program.module(), args, dynamic_shapes=shapes, strict=strict)
    longer = torch.randn(1, 4, 133, 8)
    for made in (program, again):
        torch.testing.assert_close(made.module()(longer), model(longer), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(torch.export.unflatten(made)(longer), model(longer), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_modules_of_an_unflattened_program_can_be_replaced():
    model, (x,), _, shapes = CASES["window"]()
    unflattened = torch.export.unflatten(s2o_compile.export(model, (x,), config=EXACT, dynamic_shapes=shapes))
    model.blocks[1].after, unflattened.get_submodule("blocks.1").after = nn.Identity(), nn.Identity()
    torch.testing.assert_close(unflattened(x), model(x), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_program_is_moved():
    program = s2o_compile.export(tiny_model(), (tiny_input(),), config=EXACT)
    moved = move_to_device_pass(program, "meta")
    assert moved.module()(tiny_input().to("meta")).shape == (1, 200, 8)


class Around(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x) + 1


@pytest.mark.filterwarnings("ignore:Exception ignored in")  # draft_export leaves the file of its log open
@pytest.mark.parametrize("around", [lambda model: model, Around], ids=["itself", "inside-another"])
@torch.no_grad()
def test_export_of_an_optimized_module_is_refused(around):
    model = tiny_model()
    config, inputs = dataclasses.replace(EXACT, inner_backend="eager"), (tiny_input(),)
    optimized = around(s2o_compile.optimize(model, config))
    expected = optimized(*inputs)
    strictly = functools.partial(torch.export.export, strict=True)
    for export in (torch.export.export, strictly, torch.export.draft_export, s2o_compile.export):
        with pytest.raises(TypeError, match="expected an uncompiled"):
            export(optimized, inputs)
    torch.testing.assert_close(optimized(*inputs), expected)
    torch.export.export(model, inputs)  # the model itself has no check
