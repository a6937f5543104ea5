"""A compiled package whose masks are inputs as they are, in a process of its own: it crashed there."""

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.export import Dim
from torch.nn.functional import scaled_dot_product_attention

import s2o_compile
from s2o_compile import S2OConfig
from tests.conftest import PACKAGED

RUN = """
import sys, torch
run = torch._inductor.aoti_load_package(sys.argv[1])
for inputs, expected in torch.load(sys.argv[2]):
    torch.testing.assert_close(tuple(run(*inputs)), tuple(expected), atol=1e-5, rtol=1e-5)
"""


class Padded(nn.Module):
    def forward(self, q, k, v, seen):
        n = q.shape[2]
        near = torch.ones(n, n, dtype=torch.bool).tril().triu(-99) & seen[:, None, None]
        padded = scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None, None])
        return padded, scaled_dot_product_attention(q, k, v, attn_mask=near)


def inputs(batch, length):
    generator = torch.Generator().manual_seed(length)
    q, k, v = (torch.randn(batch, 2, length, 8, generator=generator) for _ in range(3))
    return q, k, v, (torch.rand(batch, length, generator=generator) > 0.2).index_fill(1, torch.tensor(0), True)


@PACKAGED
@pytest.mark.slow
@pytest.mark.timeout(600)
@torch.no_grad()
def test_a_padding_mask_that_is_an_input(tmp_path):
    batch, length = Dim("batch", min=1, max=4), Dim("length", min=2, max=1024)
    shapes = (*({0: batch, 2: length},) * 3, {0: batch, 1: length})
    config = S2OConfig(tau=0.0, min_seq_len=0)
    program = s2o_compile.export(Padded(), inputs(2, 300), config=config, dynamic_shapes=shapes)
    package = s2o_compile.package(program, tmp_path / "padded.pt2")
    assert (len(package.sparse), package.dense) == (2, {})
    cases = [inputs(batch, length) for batch, length in ((2, 300), (1, 129), (4, 20), (1, 1000))]
    torch.save([(case, Padded()(*case)) for case in cases], tmp_path / "cases")
    subprocess.run([sys.executable, "-c", RUN, package.path, tmp_path / "cases"], check=True, cwd=tmp_path)
