"""Caps of scores, ``cap * tanh(scores / cap)``: constants of the operator, also where Dynamo makes them inputs."""

import pytest
import torch

from tests.helpers.capture import Capture, heads


class Capped(torch.nn.Module):
    """Scores under a cap that is the module's, as Gemma 2 has it."""

    def __init__(self, capped):
        super().__init__()
        self.cap, self.capped = 5.0, capped

    def forward(self, q, k, v):
        scores = self.capped(q @ k.transpose(-2, -1) / self.cap, self.cap)
        hidden = torch.ones(scores.shape[-2:]).triu(1).bool()
        return scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v


@pytest.mark.parametrize(
    "capped",
    [
        lambda x, cap: torch.tanh(x) * cap,
        lambda x, cap: torch.tanh(x).to(x.dtype) * cap,
        lambda x, cap: torch.tanh(x) / (1 / cap),
        lambda x, cap: torch.tanh(x) * (cap / 2) * 2.0,
    ],
    ids=["times", "cast", "divided", "twice"],
)
@pytest.mark.parametrize("dynamic", [None, True], ids=["automatic", "dynamic"])
def test_a_cap_that_dynamo_makes_an_input_is_a_constant_under_a_guard(dynamic, capped):
    """With ``dynamic=True`` all floats of modules enter the graph, else those that changed."""
    torch._dynamo.reset()
    model, capture, inputs = Capped(capped), Capture(), (heads(), heads(), heads())
    compiled = torch.compile(model, backend=capture, dynamic=dynamic)
    for model.cap in (5.0, 2.0, 0.5):
        torch.testing.assert_close(compiled(*inputs), model(*inputs), atol=1e-5, rtol=1e-5)
    assert [record.reason for record in capture.records] == [""] * 3
    assert [call.kwargs["softcap"] for call in capture.calls] == [5.0, 2.0, 0.5]
