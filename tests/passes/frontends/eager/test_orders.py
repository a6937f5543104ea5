"""Scores divided by tensors, and products whose dimensions stand in another order: values on the left, keys first."""

import logging

import numpy as np
import pytest
import torch
from torch import fx, nn

from s2o_compile.kernels.support.torch_compat import FakeTensor
from s2o_compile.passes import pipeline
from s2o_compile.passes.graph.calls import function_name
from s2o_compile.passes.graph.nodes import value_of
from tests.conftest import quick_rows
from tests.helpers.capture import EXACT, Capture

NINF = float("-inf")
PER_HEAD, PER_QUERY = torch.rand(4, 1, 1) + 1, torch.rand(2, 1, 256, 1) + 1


def hidden(tokens, length):
    """A causal mask and padding, bool [B, 1, N, N]."""
    return torch.ones(length, length, dtype=torch.bool).triu(1) | ~tokens[:, None, None]


def masked(scores, tokens):
    return scores.masked_fill(hidden(tokens, scores.shape[-1]), NINF)


def over_numpy(q, k, v, tokens):
    return masked(q @ k.mT / np.sqrt(q.shape[-1]), tokens).softmax(-1) @ v


def over_sqrt(q, k, v, tokens):
    return masked(q @ k.mT / torch.sqrt(torch.tensor(q.shape[-1])), tokens).softmax(-1) @ v


def over_sqrt_in_place(q, k, v, tokens):
    scores = q @ k.mT
    scores /= torch.tensor(16.0, dtype=q.dtype).sqrt()
    return masked(scores, tokens).softmax(-1) @ v


def over_heads(q, k, v, tokens):
    return masked(torch.div(q @ k.mT, PER_HEAD.to(q.dtype)), tokens).softmax(-1) @ v


def over_queries(q, k, v, tokens):
    return masked(q @ k.mT / 2 / PER_QUERY[:, :, : q.shape[2]].to(q.dtype), tokens).softmax(-1) @ v


class Divided(nn.Module):
    """Its scale is a buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.sqrt(torch.FloatTensor([16])))

    def forward(self, q, k, v, tokens):
        return masked(q @ k.mT / self.scale.to(q.dtype), tokens).softmax(-1) @ v


def one_head(q, k, v, tokens):
    """One head as an image network has it, [B, C, N]."""
    mask = hidden(tokens, q.shape[2])[:, 0]
    return *(x[:, 0].mT for x in (q, k, v)), mask


def values_left(q, k, v, tokens):
    q, k, v, mask = one_head(q, k, v, tokens)
    weights = (torch.bmm(q.permute(0, 2, 1), k) * 0.25).masked_fill(mask, NINF).softmax(2)
    return torch.bmm(v, weights.permute(0, 2, 1))


def values_left_by_einsum(q, k, v, tokens):
    q, k, v, mask = one_head(q, k, v, tokens)
    weights = torch.einsum("bij,bjk->bik", q.permute(0, 2, 1), k).masked_fill(mask, NINF) * 0.25
    return torch.einsum("bij,bjk->bik", v, weights.softmax(2).transpose(2, 1))


def values_left_of_heads(q, k, v, tokens):
    weights = masked(q @ k.mT, tokens).float().softmax(-1).to(v.dtype)
    return v.mT @ weights.mT.contiguous()


def transposed_twice(q, k, v, tokens):
    return masked(q @ k.mT, tokens).softmax(-1).transpose(2, 3).mT @ v


def keys_first(q, k, v, tokens):
    """The softmax runs over the first of the two dimensions."""
    scores = (k @ q.mT / 4).masked_fill(hidden(tokens, q.shape[2]).mT, NINF)
    return torch.einsum("bhts,bhtd->bhsd", scores.softmax(2), v)


def keys_first_and_values_left(q, k, v, tokens):
    scores = (k @ q.mT / 4).masked_fill(hidden(tokens, q.shape[2]).mT, NINF)
    scores = scores - scores.amax(-2, keepdim=True)
    return v.mT @ scores.softmax(-2)


def heads_between(q, k, v, tokens):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = torch.einsum("bshd,bthd->bsht", q, k) * 0.25
    scores += torch.full((q.shape[1], q.shape[1]), NINF).triu_(1).unsqueeze(1).to(q.dtype)
    scores = scores.masked_fill(~tokens[:, None, None], NINF)
    weights = scores.softmax(dim=-1, dtype=torch.float32).type_as(q)
    return torch.einsum("bsht,bthd->bshd", weights, v).flatten(2)


def batch_behind(q, k, v, tokens):
    """[queries, keys, B, H], the softmax over dimension 1."""
    q, k, v = (x.permute(2, 0, 1, 3) for x in (q, k, v))
    scores = torch.einsum("ibhd,jbhd->ijbh", q, k)
    scores *= 0.25
    scores = scores.masked_fill(hidden(tokens, q.shape[0]).permute(2, 3, 0, 1), NINF)
    return torch.einsum("ijbh,jbhd->ibhd", torch.nan_to_num(scores.softmax(dim=1)), v)


def queries_between(q, k, v, tokens):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = torch.einsum("bihd,bjhd->bijh", q, k) * 0.25
    scores = scores.masked_fill(hidden(tokens, q.shape[1])[:, 0, :, :, None], NINF)
    return torch.einsum("bijh,bjhd->bihd", scores.softmax(dim=2), v)


FORMS = {
    "over-numpy": over_numpy,
    "over-sqrt": over_sqrt,
    "over-sqrt-in-place": over_sqrt_in_place,
    "over-heads": over_heads,
    "over-queries": over_queries,
    "over-buffer": Divided(),
    "values-left": values_left,
    "values-left-einsum": values_left_by_einsum,
    "values-left-heads": values_left_of_heads,
    "transposed-twice": transposed_twice,
    "keys-first": keys_first,
    "keys-first-values-left": keys_first_and_values_left,
    "heads-between": heads_between,
    "batch-behind": batch_behind,
    "queries-between": queries_between,
}


def inputs(length, dtype, fully_masked):
    q, k, v = (torch.randn(2, 4, length, 16).to(dtype) for _ in range(3))
    tokens = torch.arange(length) < torch.tensor([[length], [length - 3]])
    if fully_masked:
        tokens[0] = False
    return q, k, v, tokens


def error(actual, expected):
    return (actual.double() - expected).abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("function", FORMS.values(), ids=FORMS)
@torch.no_grad()
def test_every_form_is_rewritten_and_right_at_every_length(function, dtype):
    torch._dynamo.reset()
    capture = Capture()
    compiled = torch.compile(function, backend=capture)
    for length, fully_masked in ((40, False), (23, True), (1 + 128, False)):
        given = inputs(length, dtype, fully_masked)
        for tensor in given:
            torch._dynamo.maybe_mark_dynamic(tensor, tensor.ndim - 2 if tensor.ndim == 4 else 1)
        # -inf over a whole row is NaN in eager, and zeros in the operator.
        exact = torch.nan_to_num(function(*(x.double() if x.is_floating_point() else x for x in given)))
        eager, actual = torch.nan_to_num(function(*given)), compiled(*given)
        assert actual.shape == eager.shape
        assert error(actual, exact) <= 2 * error(eager, exact) + 1e-6
    assert {record.reason for record in capture.records} == {""}
    causal = {"causal, key padding", "causal, offset 0, key padding"}
    assert {record.mask for record in capture.records} <= causal
    assert len(capture.calls) == len(capture.records)


def mutants(graph):
    """Changes of one node, as its new function and arguments: what another function of the same shape does."""
    swaps = {"div": torch.mul, "truediv": torch.mul, "itruediv": torch.mul, "mul": torch.div, "triu": torch.tril}
    for place, node in enumerate(graph.nodes):
        name = function_name(node)
        if name in swaps and isinstance(value_of(node), torch.Tensor):
            yield place, swaps[name], node.args
        if name == "softmax":
            yield from ((place, torch.softmax, (node.args[0], dim)) for dim in range(-value_of(node).ndim, 0))
        if name in ("permute", "transpose", "contiguous", "getattr"):
            yield place, torch.clone, node.args[:1]
            yield place, torch.transpose, (node.args[0], -1, -2)
        if name in ("matmul", "bmm"):
            yield place, torch.matmul, node.args[::-1]
        if name == "amax":
            yield from ((place, torch.amax, (node.args[0], dim, True)) for dim in (-1, -2))
        if name == "einsum":
            left, right, out = node.args[0].replace("->", ",").split(",")
            for first, second in ((right, left), (left[:-2] + left[-1] + left[-2], right), (left, right)):
                for text in (f"{first},{second}->{out}", f"{first},{second}->{out[:-2]}{out[-1]}{out[-2]}"):
                    yield place, torch.einsum, (text, *node.args[1:])


def changed(gm, place, function, args):
    """A copy of a graph with one changed node, its fake values computed anew; None if it cannot run."""
    graph, copies = fx.Graph(), {}
    for node in gm.graph.nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    node = list(graph.nodes)[place]
    node.op, node.target, node.kwargs = "call_function", function, {}
    node.args = fx.map_arg(args, copies.__getitem__)
    mode = next(value.fake_mode for node in graph.nodes if isinstance(value := value_of(node), FakeTensor))
    try:
        with mode:
            for node in graph.nodes:
                if node.op in ("call_function", "call_method"):
                    given, keywords = (fx.map_arg(part, value_of) for part in (node.args, node.kwargs))
                    call = node.target if node.op == "call_function" else getattr(torch.Tensor, node.target)
                    node.meta["example_value"] = call(*given, **keywords)
    except RuntimeError:
        return None
    return fx.GraphModule(gm, graph)


@pytest.fixture
def quiet_fakes():
    """Fake tensors log an error for each mutant that cannot run."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    yield
    logger.disabled = before


@pytest.mark.parametrize("name", quick_rows(FORMS, ("values-left", "keys-first-values-left", "heads-between")))
@pytest.mark.usefixtures("quiet_fakes")
@torch.no_grad()
def test_a_changed_operation_is_rewritten_as_what_it_is_or_not_at_all(name):
    graphs = []

    def keep(gm, example_inputs):
        def run(*given):
            graphs.append((gm, given))
            return gm.forward(*given)

        return run

    torch._dynamo.reset()
    # As many keys as dimensions of a head: most changes can run.
    torch.compile(FORMS[name], backend=keep, dynamic=False)(*inputs(16, torch.float32, False))
    ((gm, given),) = graphs
    accepted = rejected = 0
    for place, function, args in mutants(gm.graph):
        mutant = changed(gm, place, function, args)
        if mutant is None:
            continue
        (expected,) = mutant(*(x.clone() for x in given))
        records = pipeline.run(mutant, EXACT)
        (actual,) = mutant(*(x.clone() for x in given))
        torch.testing.assert_close(torch.nan_to_num(actual), torch.nan_to_num(expected), atol=1e-5, rtol=1e-5)
        accepted += sum(record.rewritten for record in records)
        rejected += sum(not record.rewritten for record in records)
    print(f"{accepted} rewritten, {rejected} left")
    assert rejected
