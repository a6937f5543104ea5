"""Symbolic index tensors: what is derived from the graph's structure is what the graph computes, at every length."""

import pytest
import torch
from torch.nn import functional as F

from s2o_compile.passes.graph.mutations import Mutations
from s2o_compile.passes.graph.nodes import value_of
from s2o_compile.passes.graph.rejected import Refused, Rejected, attempt
from s2o_compile.passes.masks.index_arithmetic import IndexEvaluator
from tests.helpers.capture import Capture
from tests.helpers.masks import capture, visible

LENGTHS = (7, 12, 33)


def evaluate(build, *extra):
    """Captures ``build(length, *extra)`` for a dynamic length; returns its symbolic value and the length's symbol."""
    graphs = []

    def backend(gm, example_inputs):
        graphs.append(gm)
        return gm.forward

    x = torch.randn(LENGTHS[0], 3)
    torch._dynamo.reset()
    for tensor in (x, *extra):
        torch._dynamo.mark_dynamic(tensor, 0)
    torch.compile(lambda x, *extra: (build(x.shape[0], *extra), x + 1), backend=backend, fullgraph=True)(x, *extra)
    graph = graphs[0].graph
    node = graph.output_node().args[0][0]
    symbol = next(
        value_of(n).shape[0].node.expr
        for n in graph.find_nodes(op="placeholder")
        if isinstance(value_of(n), torch.Tensor) and value_of(n).ndim == 2
    )
    return attempt(IndexEvaluator(Mutations(graph)).evaluate, node), symbol


def at_length(value, symbol, length):
    """The tensor that a symbolic value stands for."""

    def number(size):
        return int(size.node.expr.subs(symbol, length)) if isinstance(size, torch.SymInt) else int(size)

    shape = [number(size) for size in value.shape]
    result = torch.full(shape, number(value.const))
    for dim, step in enumerate(value.steps):
        positions = torch.arange(shape[dim]).reshape([-1 if d == dim else 1 for d in range(len(shape))])
        result = result + step * positions
    return result


ARITHMETIC = {
    "arange": lambda n: torch.arange(n),
    "arange-start": lambda n: torch.arange(3, n),
    "arange-step": lambda n: torch.arange(1, n, 2),
    "arange-keywords": lambda n: torch.arange(start=2, end=n),
    "arange-int32": lambda n: torch.arange(n, dtype=torch.int32),
    "add-constant": lambda n: torch.arange(n) + 5,
    "add-length": lambda n: torch.arange(n) + n,
    "radd": lambda n: 5 + torch.arange(n),
    "rsub": lambda n: n - 1 - torch.arange(n),
    "torch.add": lambda n: torch.add(torch.arange(n), 2),
    "sub-tensors": lambda n: torch.arange(n)[:, None] - torch.arange(n)[None],
    "mul": lambda n: torch.arange(n) * 3,
    "neg": lambda n: -torch.arange(n),
    "unsqueeze": lambda n: torch.arange(n).unsqueeze(0).unsqueeze(-1),
    "none-index": lambda n: torch.arange(n)[None, None, :, None],
    "ellipsis": lambda n: torch.arange(n)[None, ..., None],
    "view": lambda n: torch.arange(n).view(1, -1, 1),
    "reshape": lambda n: torch.arange(n).reshape(-1, 1),
    "expand": lambda n: torch.arange(n)[None].expand(2, -1),
    "expand-of-one": lambda n: torch.arange(1).expand(n) + torch.arange(1)[:, None],
    "repeat": lambda n: torch.arange(n)[None].repeat(2, 1),
    "transpose": lambda n: torch.arange(n)[None].transpose(0, 1),
    "permute": lambda n: torch.arange(n)[None, :, None].permute(2, 1, 0),
    "slice": lambda n: torch.arange(n)[2:],
    "slice-negative": lambda n: torch.arange(n + 4)[-3:],
    "slice-step": lambda n: torch.arange(n)[1::2],
    "select": lambda n: (torch.arange(n)[:, None] + torch.arange(4)[None])[:, 3],
    "narrow": lambda n: torch.arange(n).narrow(0, 1, 4),
    "to": lambda n: torch.arange(n).to(torch.int32).long().contiguous().clone(),
    "gather": lambda n: torch.arange(n + 3)[torch.arange(n) + 2],
    "gather-two": lambda n: (torch.arange(3)[:, None] + torch.arange(n))[
        torch.arange(2)[:, None, None], torch.arange(n)[:, None]
    ],
    "zeros": lambda n: torch.zeros(n, dtype=torch.long),
    "full": lambda n: torch.full((n,), 4),
    "ones-like": lambda n: torch.ones_like(torch.arange(n)),
    "cumsum-of-ones": lambda n: torch.ones(2, n, dtype=torch.long).cumsum(-1) - 1,
    "diff": lambda n: torch.arange(n).diff(),
    # How transformers looks for packed sequences in position ids that it made itself.
    "no-packing": lambda n: (
        torch.diff(torch.arange(n)[None].expand(2, -1), prepend=torch.arange(n)[None].expand(2, -1)[:, :1] - 1, dim=-1)
        != 1
    ).cumsum(-1),
}


@pytest.mark.parametrize("build", ARITHMETIC.values(), ids=ARITHMETIC)
def test_derived_values_hold_at_every_length(build):
    value, symbol = evaluate(build)
    assert not isinstance(value, Rejected), value
    for length in LENGTHS:
        torch.testing.assert_close(at_length(value, symbol, length), build(length).long())


UNKNOWN = {
    "input": (lambda n, given: given + torch.arange(n), "graph input"),
    "position-ids": (lambda n, given: given[None] + torch.arange(n), "graph input"),
    "uint8": (lambda n: torch.arange(n, dtype=torch.uint8), "uint8"),
    "int16": (lambda n: torch.arange(n).to(torch.int16).long(), "int16"),
    "float": (lambda n: torch.arange(n, dtype=torch.float32).long(), "float32"),
    "float-step": (lambda n: torch.arange(0, 1, 0.25).long(), "float32"),
    "through-bool": (lambda n: torch.arange(n).bool().long(), "not a constant"),
    "floor-divide": (lambda n: torch.arange(n) // 4, "cuts positions into chunks"),
    "remainder": (lambda n: torch.arange(n) % 4, "not index arithmetic"),
    "product": (lambda n: torch.arange(n) * torch.arange(n), "multiplies two index tensors"),
    "add-alpha": (lambda n: torch.add(torch.arange(n), 2, alpha=3), "alpha"),
    "in-place-method": (lambda n: torch.arange(n).add_(1), "changed in place by add_"),
    "fill": (lambda n: torch.zeros(n, dtype=torch.long).fill_(3), "changed in place by fill_"),
    "flip": (lambda n: torch.arange(n).flip(0), "not index arithmetic"),
    "merged-dims": (lambda n: torch.arange(n)[None].expand(3, -1).reshape(-1), "merges or splits"),
    "tiled": (lambda n: torch.arange(n).repeat(2), "repeats a dimension"),
    "bits": (lambda n: torch.arange(n).view(torch.int32), "reinterprets"),
    "negative-gather": (lambda n: torch.arange(n)[torch.arange(n) - 1], "negative positions"),
    "gather-by-input": (lambda n, given: torch.arange(n + 9)[given], "graph input"),
    "random": (lambda n: torch.randperm(n), "not index arithmetic"),
    "cumsum-of-arange": (lambda n: torch.arange(n).cumsum(0), "not one constant"),
    "prepended-jump": (
        lambda n: torch.arange(n).diff(prepend=torch.zeros(1, dtype=torch.long) + 5),
        "does not continue",
    ),
}


@pytest.mark.parametrize(("build", "why"), UNKNOWN.values(), ids=UNKNOWN)
def test_everything_else_is_rejected_with_its_reason(build, why):
    extra = [torch.arange(LENGTHS[0])] * (build.__code__.co_argcount - 1)
    value, _ = evaluate(build, *extra)
    assert isinstance(value, Rejected)
    assert why in value.reason


def test_a_remembered_failure_is_raised_afresh():
    """Raised again, one exception would collect the frames of every reader and keep them alive."""
    graph = torch.fx.symbolic_trace(lambda x: x + 1).graph
    (node,) = graph.find_nodes(op="placeholder")
    node.meta["example_value"] = torch.arange(3)
    evaluator = IndexEvaluator(Mutations(graph))
    errors = []
    for _ in range(3):
        with pytest.raises(Refused, match="depends on the values of the graph input x") as caught:
            evaluator.evaluate(node)
        errors.append(caught)
    assert len({id(caught.value) for caught in errors}) == 3
    assert len({len(caught.traceback) for caught in errors[1:]}) == 1
    (remembered,) = evaluator._values.values()
    assert isinstance(remembered, Rejected)
    assert str(errors[0].value) == remembered.reason


def in_place_add(n):
    index = torch.arange(n)
    index += 1
    return index


def write_through_a_view(n):
    index = torch.arange(n)
    index[None][:, :2].zero_()
    return index + 1


def set_item(n):
    index = torch.arange(n)
    index[0] = 9
    return index


def write_afterwards(n):
    index = torch.arange(n)
    shifted = index + 1
    index.add_(3)
    return shifted


@pytest.mark.parametrize("build", [in_place_add, write_through_a_view, set_item, write_afterwards])
def test_a_tensor_written_in_place_is_not_what_its_node_says(build):
    value, _ = evaluate(build)
    assert isinstance(value, Rejected)
    assert "changed in place" in value.reason


def test_integers_that_grow_in_place_are_no_mutation():
    def build(n):
        offset = n
        offset += 2
        return torch.arange(n) + offset

    value, symbol = evaluate(build)
    torch.testing.assert_close(at_length(value, symbol, 9), build(9))


BIG = 2**31
# Masks whose numbers leave the range of their dtype, at some length or at every one: torch's wrap around.
WRAPPING = {
    "cast": lambda q, k: (torch.arange(k) + BIG).int() <= (torch.arange(q)[:, None] + (BIG - 20)).int(),
    "cast-of-a-query": lambda q, k: torch.arange(k) <= (torch.arange(q)[:, None] + BIG).int(),
    "cast-to-64-and-back": lambda q, k: torch.arange(k) + BIG <= (torch.arange(q)[:, None] + BIG).int().long() + BIG,
    "sum": lambda q, k: positions(k) + (BIG - 4) <= positions(q)[:, None] + (BIG - 6),
    "difference": lambda q, k: positions(k) - (BIG - 4) - 8 <= positions(q)[:, None] - (BIG - 4),
    "product": lambda q, k: positions(k) * (BIG // 4) <= positions(q)[:, None] * (BIG // 4),
    "negative": lambda q, k: -(positions(k) + (-BIG)) >= -(positions(q)[:, None] + (-BIG)),
    "number-tensor": lambda q, k: positions(k) <= positions(q)[:, None] * 0 + torch.tensor(BIG * 4 + 3),
    "number-tensor-compared": lambda q, k: positions(k).expand(q, k) <= torch.tensor(BIG * 4 + 3),
    "number-tensor-times": lambda q, k: positions(k) * torch.tensor(BIG * 2 + 1) <= positions(q)[:, None],
    "running-sum": lambda q, k: (
        torch.full((k,), BIG // 4, dtype=torch.int32).cumsum(0, dtype=torch.int32)
        <= torch.full((q,), BIG // 4, dtype=torch.int32).cumsum(0, dtype=torch.int32)[:, None]
    ),
    "range": lambda q, k: torch.arange(BIG - 3, BIG - 3 + k).int() <= torch.arange(BIG - 3, BIG - 3 + q)[:, None].int(),
    "distance": lambda q, k: ((positions(k) + (BIG - 4)) - (positions(q)[:, None] - 4)).abs() <= BIG - 4,
    "distance-of-the-least": lambda q, k: (positions(k) * 0 + (-BIG) + positions(q)[:, None] * 0).abs() <= 3,
    "distance-and-a-number": lambda q, k: (positions(k) - positions(q)[:, None]).abs() <= torch.tensor(BIG * 2 + 2),
    "chunks": lambda q, k: (
        ((positions(k) + (BIG - 4)) // 4 == (positions(q)[:, None] + (BIG - 4)) // 4)
        & (torch.arange(k) <= torch.arange(q)[:, None])
    ),
    "64-bits": lambda q, k: torch.arange(k) + (2**63 - 4) <= torch.arange(q)[:, None] + (2**63 - 6),
    "64-bits-product": lambda q, k: torch.arange(k) * 2**61 <= torch.arange(q)[:, None] * 2**61,
    "difference-of-neighbours": lambda q, k: (
        ((positions(k + 1) * (BIG // 2)).diff() <= 0) & (torch.arange(k) <= torch.arange(q)[:, None])
    ),
    "eight-bits": lambda q, k: (
        (torch.arange(k) + 250).to(torch.uint8) <= (torch.arange(q)[:, None] + 250).to(torch.uint8)
    ),
}


def positions(n):
    return torch.arange(n, dtype=torch.int32)


@pytest.mark.parametrize("dynamic", [True, False], ids=["dynamic", "static"])
@pytest.mark.parametrize("mask_of", WRAPPING.values(), ids=WRAPPING)
@pytest.mark.usefixtures("fresh_dynamo")
def test_numbers_that_wrap_around_prove_nothing(mask_of, dynamic):
    def attend(q, k):
        return F.scaled_dot_product_attention(q, k, k, attn_mask=mask_of(q.shape[2], k.shape[2]))

    compiled = torch.compile(attend, backend=Capture())
    for lengths in [(5, 9), (12, 12), (31, 40)] if dynamic else [(5, 9)]:
        q, k = (torch.randn(1, 2, length, 8) for length in lengths)
        for tensor in (q, k) if dynamic else ():
            torch._dynamo.mark_dynamic(tensor, 2)
        torch.testing.assert_close(compiled(q, k), attend(q, k), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "mask_of",
    [
        lambda q, k: positions(k) + (2**30 - 1) <= positions(q)[:, None] + (2**30 - 1),
        lambda q, k: (torch.arange(k) + 7).int() <= (torch.arange(q)[:, None] + 7).int(),
        lambda q, k: positions(k) <= positions(q)[:, None] + torch.tensor(3),
        lambda q, k: (torch.arange(k) > torch.arange(q)[:, None] - 2**62) & (positions(k) <= positions(q)[:, None]),
        lambda q, k: positions(k) <= torch.arange(q)[:, None] + 2**40,
    ],
)
def test_large_numbers_that_do_not_wrap_are_proven(mask_of):
    proof, symbols = capture(mask_of)
    assert not isinstance(proof, Rejected), proof
    torch.testing.assert_close(visible(proof, symbols, (5, 9)), mask_of(5, 9).expand(1, 1, 5, 9))
