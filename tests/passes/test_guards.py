"""The passes add no guard of their own: a stored tensor as long as the example's sequence does not pin the length."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from s2o_compile.passes.graph import operand
from s2o_compile.passes.graph.nodes import value_of
from tests.helpers.capture import Capture, heads

STORED = 48
PADDING = torch.arange(2 * STORED).view(2, STORED) % 7 != 3


def causal(q, k):
    return torch.arange(k.shape[2]) <= torch.arange(q.shape[2])[:, None]


def key_mask_by_position(q, k, v):
    rows, keys = torch.arange(2)[:, None, None, None], torch.arange(k.shape[2])[None, None, None]
    return sdpa(q, k, v, attn_mask=PADDING[rows, keys] & causal(q, k))


def key_mask_sliced(q, k, v):
    return sdpa(q, k, v, attn_mask=PADDING[:, None, None, : k.shape[2]] & causal(q, k))


def mask_written(q, k, v):
    mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool)
    mask[~causal(q, k)] = False
    return sdpa(q, k, v, attn_mask=mask)


def flat_heads(q, k, v):
    flat = [x.flatten(0, 1) for x in (q, k, v)]
    scores = torch.bmm(flat[0], flat[1].mT).masked_fill(~causal(q, k), float("-inf"))
    return torch.bmm(scores.softmax(-1), flat[2]).unflatten(0, (2, 4))


FUNCTIONS = (key_mask_by_position, key_mask_sliced, mask_written, flat_heads)


class Counting(Capture):
    """Counts the guards that the passes add."""

    guards = 0

    def __call__(self, gm, example_inputs):
        tensors = [value_of(node) for node in gm.graph.nodes if isinstance(value_of(node), torch.Tensor)]
        guards = tensors[0].fake_mode.shape_env.guards
        before = len(guards)
        try:
            return super().__call__(gm, example_inputs)
        finally:
            self.guards += len(guards) - before


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_one_graph_for_every_length(function):
    torch._dynamo.reset()
    backend = Counting()
    compiled = torch.compile(function, backend=backend)
    for length in (STORED, 30, 17):
        tensors = [heads(length=length) for _ in range(3)]
        for tensor in tensors:
            torch._dynamo.mark_dynamic(tensor, 2)
        torch.testing.assert_close(compiled(*tensors), function(*tensors), atol=1e-5, rtol=1e-5)
    assert len(backend.graphs) == 1
    assert backend.guards == 0


def test_computed_values_guard_nothing():
    added = []

    def backend(gm, example_inputs):
        fake = next(v for n in gm.graph.nodes if isinstance(v := value_of(n), torch.Tensor) and v.ndim == 4)
        guards = fake.fake_mode.shape_env.guards
        before = len(guards)
        with fake.fake_mode:
            stored = torch.empty(fake.shape[1], STORED)
        assert operand.computed(fake, torch.add, (fake[..., 0], stored)) is not None  # asks whether they broadcast
        added.append(len(guards) - before)
        return gm.forward

    torch._dynamo.reset()
    query = heads(length=STORED)
    torch._dynamo.mark_dynamic(query, 2)
    torch.compile(lambda q: q + 1, backend=backend)(query)
    assert added == [0]
