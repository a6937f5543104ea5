"""Compile a function with the passes, run it, compare it with eager, and keep what the passes saw."""

import torch

from s2o_compile.passes import pipeline
from s2o_compile.passes.graph.nodes import value_of

EXACT = {"tau": 0.0, "min_seq_len": 0}
OPERATOR = torch.ops.s2o.attention.default


class Capture:
    """A torch.compile backend that runs the passes and keeps what it saw."""

    def __init__(self, options=EXACT):
        self.options, self.records, self.graphs, self.original = options, [], [], []

    def __call__(self, gm, example_inputs):
        self.original += [value_of(n) for n in gm.graph.nodes if "scaled_dot_product_attention" in str(n.target)]
        self.records += pipeline.run(gm, self.options)
        self.graphs.append(gm)
        return gm.forward

    @property
    def nodes(self):
        return [node for gm in self.graphs for node in gm.graph.nodes]

    @property
    def calls(self):
        return [node for node in self.nodes if node.target is OPERATOR]

    @property
    def values(self):
        return [value for node in self.nodes if isinstance(value := value_of(node), torch.Tensor)]


def rewritten(function, *inputs, mark=(), tolerance=1e-5):
    """Compiles and runs a function with the passes; checks the result against eager and returns the capture."""
    torch._dynamo.reset()
    capture = Capture()
    for tensor, dim in mark:
        torch._dynamo.mark_dynamic(tensor, dim)
    torch.testing.assert_close(
        torch.compile(function, backend=capture)(*inputs), function(*inputs), atol=tolerance, rtol=tolerance
    )
    return capture


def heads(count=4, length=40, dim=16, batch=2, dtype=torch.float32):
    return torch.randn(batch, length, count, dim, dtype=dtype).transpose(1, 2)
