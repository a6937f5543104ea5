"""torch's default dtype and default device are the user's: nothing that the operator makes goes by them."""

from contextlib import contextmanager

import pytest
import torch

import s2o_compile
from s2o_compile.kernels.support import cpp_library
from tests.helpers.packings import config

LENGTH = 300
CPU = torch.device("cpu")
IMPLEMENTATIONS = [
    "torch",
    pytest.param("cpp", marks=pytest.mark.skipif(not cpp_library.serves(CPU), reason="needs a C++ compiler")),
]


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


DEFAULTS = {
    "device": lambda: torch.device("meta"),  # whose tensors have no memory
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float64": lambda: default_dtype(torch.float64),
}
QUERY, KEY, VALUE = TENSORS = [torch.randn(1, heads, LENGTH, 16) for heads in (4, 2, 2)]
LOWER = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
TERMS = {
    "causal": {"causal": True},
    "budget": {"causal": True, "sinks": torch.zeros(4)},
    "padded": {"causal": True, "key_mask": torch.arange(LENGTH)[None] % 7 > 0, "fully_masked": "mean"},
    "window": {"causal": True, "window": 50},
    "chunks": {"causal": True, "attention_chunk": 140},
    "softcap": {"softcap": 5.0, "return_lse": True},
    "read": {"attn_mask": torch.zeros(LENGTH, LENGTH).masked_fill(~LOWER, -torch.inf)},
}
ROWS = [x[0].transpose(0, 1) for x in TENSORS]
CACHE = ROWS[1].unflatten(0, (-1, 10)), ROWS[2].unflatten(0, (-1, 10))
TABLE = torch.arange(LENGTH // 10)[None]


def planned(options):
    plan = s2o_compile.plan(*TENSORS, causal=True, config=options)
    return s2o_compile.attention(*TENSORS, causal=True, plan=plan, config=options)


def packed(options):
    starts = [0, 10, 150, LENGTH]
    return s2o_compile.attention_varlen(*ROWS, starts, starts, return_lse=True, config=options)


def in_chunks(options):
    chunks, outputs = s2o_compile.PrefillCache(), []
    for first, last in ((0, 150), (150, LENGTH)):
        given = ROWS[0][first:last], CACHE, TABLE, [0, last - first], [last]
        outputs.append(s2o_compile.attention_paged(*given, chunks=chunks, config=options))
    return torch.cat(outputs)


CALLS = {
    name: lambda options, terms=terms: s2o_compile.attention(*TENSORS, **terms, config=options)
    for name, terms in TERMS.items()
} | {"planned": planned, "packed": packed, "in chunks": in_chunks}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("call", CALLS)
def test_results_are_the_same(call, implementation):
    options = config(tau=0.2, error=0.02 if call == "budget" else None, implementation=implementation)
    expected = CALLS[call](options)
    for default in DEFAULTS.values():
        with default():
            found = CALLS[call](options)
        pairs = zip(expected, found, strict=True) if isinstance(expected, tuple) else [(expected, found)]
        assert all(torch.equal(one, other) for one, other in pairs)
