"""What keys hold that no query sees changes nothing in a package, NaN included; rows that see no key get zeros."""

import dataclasses
import math

import pytest
import torch
from torch.export import Dim
from torch.nn.functional import scaled_dot_product_attention

import s2o_compile
from s2o_compile import onnx
from s2o_compile.kernels import ops
from s2o_compile.kernels.impl.aot import attention as decomposition
from tests.conftest import PACKAGED, Case
from tests.helpers.operator_calls import arguments, call

DENSE = pytest.mark.parametrize("dense_heads", [[], [1], [0, 1]], ids=["sparse", "one-dense", "all-dense"])
CASES = [
    Case(queries=700, heads=4, kv_heads=2, batch=2, padding="left"),
    Case(queries=700, heads=4, kv_heads=2, batch=2, padding="all"),
    Case(queries=700, heads=4, kv_heads=2, batch=2, padding="right", causal=False),
    Case(queries=700, heads=4, kv_heads=2, batch=2, padding="left", softcap=20.0),
    Case(queries=700, heads=4, kv_heads=2, batch=2, padding="left", sinks=True),
    Case(queries=700, heads=4, kv_heads=2, batch=2, padding="left", window=200),
    Case(queries=500, keys=900, heads=4, kv_heads=2, offset=28),
    Case(queries=500, heads=4, kv_heads=2, offset=-500),
]
"""They hide keys from every query: padding, places of a cache that are still free, or all of them."""


def package(inputs, **options):
    keywords = arguments(inputs, segment_len=256, **options)
    return decomposition.attention(*inputs.tensors, inputs.mask.key_mask, inputs.sinks, **keywords)[0]


def holding(inputs, where, number):
    """The inputs with a number in key and value where bool [B, Nk] says so."""
    key, value = (x.masked_fill(where[:, None, :, None], number) for x in (inputs.key, inputs.value))
    return dataclasses.replace(inputs, key=key, value=value)


def not_seen(inputs):
    """Bool [B, Nk], keys that no query sees, and [B, Nq], rows that see no key."""
    sizes = inputs.query.shape[2], inputs.key.shape[2]
    pairs = inputs.mask.visible_pairs(*sizes, inputs.query.device).expand(len(inputs.query), 1, *sizes)[:, 0]
    return ~pairs.any(1), ~pairs.any(2)


@DENSE
@pytest.mark.parametrize("case", CASES, ids=str)
@torch.no_grad()
def test_keys_that_no_query_sees(case, dense_heads):
    inputs = case.inputs()
    unseen, _ = not_seen(inputs)
    options = {"tau": 0.5, "dense_heads": dense_heads}
    expected = package(holding(inputs, unseen, 0.0), **options)
    operator, _ = call(holding(inputs, unseen, math.nan), segment_len=256, **options)
    assert unseen.any()
    assert operator.isfinite().all()
    assert torch.equal(expected == 0, operator == 0)  # rows that see no key
    for number in (math.nan, math.inf):
        assert torch.equal(package(holding(inputs, unseen, number), **options), expected)


@DENSE
@torch.no_grad()
def test_rows_that_see_no_key_beside_rows_that_see_nan(dense_heads):
    inputs = Case(queries=500, heads=4, kv_heads=2, offset=-100).inputs()
    inputs = holding(inputs, torch.arange(500)[None] == 0, math.nan)
    for attend in (package, lambda *args, **options: call(*args, **options)[0]):
        output = attend(inputs, dense_heads=dense_heads)
        assert (output[:, :, :100] == 0).all()
        assert output[:, :, 100:].isnan().all()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_dense_attention_of_other_formats_and_of_derivatives(case):
    """There hidden numbers change nothing, and NaN is where SDPA's is."""
    inputs = case.inputs()
    unseen, blind = not_seen(inputs)
    given = arguments(inputs)
    del given["tau"], given["min_seq_len"]

    def attend(number):
        query, key, value = (x.requires_grad_() for x in holding(inputs, unseen, number).tensors)
        rest = inputs.mask.key_mask, inputs.sinks
        exported = onnx._attention(query.detach(), key.detach(), value.detach(), *rest, **given)[0]
        output, _ = ops.differentiable_attention(query, key, value, *rest, **given)
        return exported, output, *torch.autograd.grad(output.square().sum(), (query, key, value))

    found = attend(7.0)
    assert all(x.isfinite().all() for x in found)
    assert all(torch.equal(x, y) for x, y in zip(found, attend(0.0), strict=True))
    with_nan = holding(inputs, unseen, math.nan).tensors
    pairs = inputs.mask.visible_pairs(case.queries, case.n_keys, inputs.query.device)
    expected = scaled_dot_product_attention(*with_nan, attn_mask=pairs, enable_gqa=True).isnan()
    for output, spoilt in zip(found[:2], attend(math.nan)[:2], strict=True):
        assert (output.transpose(1, 2)[blind] == 0).all()
        assert torch.equal(spoilt.isnan(), expected)


class Padded(torch.nn.Module):
    """A call with a key mask whose length is open."""

    def forward(self, query, key, value, key_mask):
        return torch.ops.s2o.attention(query, key, value, key_mask, causal=True, min_seq_len=256, dense_heads=[1])[0]


@PACKAGED
@pytest.mark.slow
@torch.no_grad()
def test_a_package_runs_with_padding(tmp_path):
    """Inductor freed the mask in each round of a loop, and the process crashed."""
    inputs = Case(queries=700, heads=4, kv_heads=2, padding="right").inputs()
    tensors, length = (*inputs.tensors, inputs.mask.key_mask), Dim("length", max=4096)
    program = torch.export.export(Padded(), tensors, dynamic_shapes=(*({2: length},) * 3, {1: length}))
    written = s2o_compile.package(program, tmp_path / "model.pt2")
    output = torch._inductor.aoti_load_package(str(written.path))(*tensors)
    torch.testing.assert_close(output, Padded()(*tensors), atol=1e-5, rtol=1e-5)
