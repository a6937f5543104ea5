"""Symbolic index tensors: what is derived from the graph's structure is what the graph computes, at every length."""

import pytest
import torch

from s2o_compile.passes.graph_values import value_of
from s2o_compile.passes.index_arithmetic import IndexEvaluator
from s2o_compile.passes.mutations import Mutations
from s2o_compile.passes.site import Rejected

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
    return IndexEvaluator(Mutations(graph)).evaluate(node), symbol


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
