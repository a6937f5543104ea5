"""Packed sequences in the public face: what reports say of them, and what a configuration does to each document."""

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from s2o_compile import S2OConfig, explain, optimize, record
from s2o_compile.kernels.statistics import Call
from s2o_compile.passes.site import SiteRecord
from s2o_compile.report import join_calls
from tests.conftest import Case

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

LENGTHS = torch.tensor([2000, 1000, 100])
TOKENS = int(LENGTHS.sum())
IDS = torch.arange(3).repeat_interleave(LENGTHS)[None]


class Packed(nn.Module):
    def forward(self, q, k, v, ids):
        index = torch.arange(q.shape[2], device=q.device)
        mask = (ids[:, None, :, None] == ids[:, None, None]) & (index <= index[:, None])
        return scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


def inputs():
    case = Case(heads=4, kv_heads=2, queries=TOKENS, head_dim=32)
    return *case.inputs(heavy=64).tensors, IDS


def settings(**options):
    return S2OConfig(min_seq_len=300, inner_backend="eager", **options)


def test_the_report_names_the_mask():
    text = str(explain(Packed(), *inputs(), config=settings()))
    assert "packed causal" in text
    assert "1 attention sites found, 1 rewritten" in text


@torch.no_grad()
def test_a_run_is_sparse_by_document():
    run = optimize(Packed(), settings(tau=0.5))
    with record() as recording:
        output = run(*inputs())
    assert [(call.path, call.n_keys) for call in recording.calls] == [("s2o", 2000), ("s2o", 1000), ("dense", 100)]
    (site,) = recording.report.sites
    assert (site.mask, site.path) == ("packed causal", "s2o")
    assert site.density < 0.9
    assert 0 < site.error < 0.1
    expected = Packed()(*inputs())
    assert 0 < (output - expected).norm() / expected.norm() < 0.1


@torch.no_grad()
def test_options_hold_for_every_document():
    exact = Packed()(*inputs())
    name = optimize(Packed(), settings(tau=0.0))
    with record() as recording:
        torch.testing.assert_close(name(*inputs()), exact, atol=1e-5, rtol=1e-5)
    site = recording.report.sites[0].name
    torch._dynamo.reset()
    marked = optimize(Packed(), settings(tau=0.5, dense_heads={site: (0,)}))
    output = marked(*inputs())
    torch.testing.assert_close(output[:, :2], exact[:, :2], atol=1e-5, rtol=1e-5)
    assert (output[:, 2:] - exact[:, 2:]).abs().max() > 1e-3
    torch._dynamo.reset()
    within = optimize(Packed(), settings(error=0.01))(*inputs())
    assert (within - exact).norm() / exact.norm() < 0.013


def test_densities_of_a_site_are_weighed_by_pairs():
    """A document of 100 tokens that runs dense says little about one of 900."""

    def call(path, length, share):
        pairs = torch.tensor([float(length * length)], dtype=torch.float64)
        tiles = -(-length // 128)
        computed = None if share == 1 else torch.full((1, 1, tiles), int(share * length), dtype=torch.int32)
        return Call(site="a", path=path, n_queries=length, n_keys=length, computed=computed, area=pairs)

    calls = [call("dense", 100, 1), call("s2o", 900, 0.5), call("dense", 100, 1)]
    (site,) = join_calls([SiteRecord(name="a", rewritten=True)], calls)
    assert site.path == "s2o"
    assert site.density == pytest.approx((2 * 100**2 + 0.5 * 900**2) / (2 * 100**2 + 900**2))
