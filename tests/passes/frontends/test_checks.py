"""Layers that share a compiled function but not their head dims or head counts: Dynamo makes symbols of these."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

import s2o_compile
from s2o_compile.kernels.statistics import record_calls
from tests.helpers.capture import Capture

LENGTH = 150


def fused(q, k, v):
    return sdpa(q, k, v, is_causal=True, enable_gqa=True)


def repeated(q, k, v):
    group = q.shape[1] // k.shape[1]
    return sdpa(q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), is_causal=True)


def written_out(q, k, v):
    return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v


def einsums(q, k, v):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return torch.einsum("bhqk,bkhd->bqhd", (torch.einsum("bqhd,bkhd->bhqk", q, k) * 0.3).softmax(-1), v)


def layers(*sizes):
    """Query, key and value [1, H, N, D] of each (query heads, key heads, head dim, value dim)."""
    return [
        tuple(torch.randn(1, count, LENGTH, dim) for count, dim in ((heads, dim), (kv, dim), (kv, value_dim)))
        for heads, kv, dim, value_dim in sizes
    ]


DIMS = layers((4, 4, 16, 16), (4, 4, 32, 32), (4, 4, 64, 64))
HEADS = layers((4, 4, 16, 16), (2, 2, 16, 16), (8, 8, 32, 32))
GROUPS = layers((4, 2, 16, 16), (8, 2, 16, 16), (8, 4, 32, 32))
VALUES = layers((4, 4, 16, 16), (4, 4, 16, 32), (4, 4, 32, 8))


@pytest.mark.parametrize(
    ("function", "given"),
    [
        *[(fused, given) for given in (DIMS, HEADS, GROUPS, VALUES)],
        (repeated, GROUPS),
        (written_out, HEADS),
        (einsums, HEADS),
    ],
    ids=lambda x: x.__name__ if callable(x) else str([tuple(v.shape[1::2]) for _, _, v in x]),
)
@pytest.mark.usefixtures("fresh_dynamo")
def test_every_layer_is_rewritten(function, given):
    capture = Capture()
    compiled = torch.compile(function, backend=capture)
    with record_calls() as calls:
        for tensors in given:
            torch.testing.assert_close(compiled(*tensors), function(*tensors), atol=1e-5, rtol=1e-5)
    assert [record.reason for record in capture.records if not record.rewritten] == []
    assert [call.path for call in calls] == ["s2o"] * 3
    assert len(capture.graphs) <= 3


@pytest.mark.usefixtures("fresh_dynamo")
def test_a_wide_head_is_another_graph():
    capture = Capture()
    compiled = torch.compile(fused, backend=capture)
    for tensors in layers((2, 2, 16, 16), (2, 2, 32, 32), (2, 2, 600, 600), (2, 2, 64, 64)):
        torch.testing.assert_close(compiled(*tensors), fused(*tensors), atol=1e-5, rtol=1e-5)
    assert [record.rewritten for record in capture.records] == [True, True, False]
    assert "expected at most 512" in capture.records[-1].reason


def test_an_exported_program_takes_no_guard():
    class Attend(torch.nn.Module):
        def forward(self, *tensors):
            return fused(*tensors)

    for dim, reason in ((1, "expected constants in an exported program"), (3, "give its dimension a maximum")):
        shapes = ({dim: torch.export.Dim("size", min=2)},) * 3
        with pytest.warns(s2o_compile.NothingRewrittenWarning, match=reason):
            s2o_compile.export(Attend(), HEADS[0], dynamic_shapes={"tensors": shapes})
