"""The formula: its products are finite, as those of every executor are."""

import dataclasses

import torch

from s2o_compile.kernels.exact.formula import attend_by_formula
from tests.conftest import Case, bounds, distance, exact_attention


def test_products_beyond_the_largest_float16():
    """What a head's scale makes small again may be too large for float16 before it."""
    inputs = Case(queries=130, dtype="fp16", softcap=50.0, sinks=True).inputs()
    inputs = dataclasses.replace(inputs, query=inputs.query * 2000, scale=inputs.scale / 2000)
    expected, _ = exact_attention(inputs)
    limit, _ = bounds(inputs, torch.float32)
    limit += torch.finfo(inputs.query.dtype).eps * inputs.value.abs().max().item()  # weights and output are rounded
    assert distance(attend_by_formula(inputs.call), expected) <= limit
