"""Functions that stand in for the operators: they know every argument of the schema, or say which change nothing."""

import inspect

import pytest
import torch

from s2o_compile import onnx
from s2o_compile.kernels.impl.aot import attention as aot

HOW = {
    "tau",
    "error",
    "head_tau",
    "segment_len",
    "ranking",
    "ranking_per",
    "implementation",
    "min_seq_len",
    "dense_heads",
}
"""How to be sparse: dense attention does not ask."""
NAMES = ("attention", "masked_attention", "packed_attention")
OPERATORS = {name: getattr(torch.ops.s2o, name).default for name in NAMES}
NOT_ASKED = {
    # A package refuses other rankings and implementations, and a log-sum-exp, before it decomposes.
    aot.attention: {"ranking", "ranking_per", "implementation", "return_lse", "site"},
    aot.masked_attention: HOW | {"site"},
    onnx._attention: HOW | {"return_lse", "site"},
    onnx._masked_attention: HOW | {"site"},
}


@pytest.mark.parametrize("stand_in", NOT_ASKED, ids=lambda function: f"{function.__module__}.{function.__name__}")
def test_it_knows_the_arguments_of_its_operator(stand_in):
    operator = OPERATORS[stand_in.__name__.lstrip("_")]
    arguments = {argument.name for argument in operator._schema.arguments}
    known = {name for name, it in inspect.signature(stand_in).parameters.items() if it.kind is not it.VAR_KEYWORD}
    assert known | NOT_ASKED[stand_in] == arguments
    assert not known & NOT_ASKED[stand_in]
