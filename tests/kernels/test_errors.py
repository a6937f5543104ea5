"""Wrong calls of ``s2o::attention``: what was expected, what came, and what to do."""

import math
import re

import pytest
import torch

from s2o_compile.kernels import dispatch as operator
from s2o_compile.kernels.core.call import AttentionCall
from s2o_compile.kernels.core.options import OperatorOptions
from s2o_compile.kernels.support.errors import ImplementationUnavailableError, InputError, S2OError
from tests.helpers.operator_calls import OPERATOR


def tensors(query=(2, 4, 200, 64), key=(2, 2, 200, 64), value=None, dtype=torch.float32):
    return [torch.zeros(shape, dtype=dtype) for shape in (query, key, key if value is None else value)]


def says(*parts):
    """Message pattern: what, expected, got, remedy, in this order."""
    return "s2o attention: " + ".*".join(re.escape(part) for part in parts)


class TestErrors:
    @pytest.mark.parametrize(
        ("args", "options", "message"),
        [
            (
                tensors(query=(4, 200, 64)),
                {},
                ("rank of query", "4 dimensions", "got 3 of shape (4, 200,", "unsqueeze"),
            ),
            (tensors(key=(2, 2, 200, 64, 1)), {}, ("rank of key", "4 dimensions", "got 5", "transpose")),
            (tensors(value=(200, 64)), {}, ("rank of value", "4 dimensions", "got 2", "unsqueeze")),
            (tensors(query=(2, 4, 0, 64)), {}, ("size of query", "at least one element", "(2, 4, 0, 64)", "Skip")),
            (tensors(key=(2, 2, 0, 64)), {}, ("size of key", "at least one element", "(2, 2, 0, 64)", "Skip")),
            (
                tensors(dtype=torch.float64),
                {},
                ("dtype of query", "float16, bfloat16, float32", "float64", ".to("),
            ),
            (
                [*tensors()[:2], tensors(dtype=torch.bfloat16)[2]],
                {},
                (
                    "dtype of value",
                    "the same for query, key and value",
                    "bfloat16 beside a torch.float32",
                    ".to(dtype)",
                ),
            ),
            (
                [tensors()[0], *(x.to("meta") for x in tensors()[1:])],
                {},
                ("device of key", "expected cpu", "got meta", ".to(device)"),
            ),
            (
                tensors(value=(2, 2, 100, 32)),
                {},
                ("shape of value", "(2, 2, 200) and", "(2, 2, 200, 64)", "got (2, 2, 100, 32)", "one value"),
            ),
            (tensors(key=(1, 2, 200, 64)), {}, ("shape of key", "[2, kv_heads, keys, 64]", "(1, 2, 200, 64)", "batch")),
            (
                tensors(key=(2, 2, 200, 32)),
                {},
                ("shape of key", "kv_heads, keys, 64]", "(2, 2, 200, 32)", "head_dim"),
            ),
            (tensors(key=(2, 3, 200, 64)), {}, ("number of heads", "divisible by the 3", "got 4", "group")),
            (tensors((1, 1, 9, 513), (1, 1, 9, 513)), {}, ("head_dim of query", "at most 512", "got 513", "dense")),
            (tensors(value=(2, 2, 200, 513)), {}, ("head_dim of value", "at most 512", "got 513", "dense")),
            (tensors(), {"causal": True, "window": 0}, ("window", "at least 1", "window=0, causal=True", "drop")),
            (
                tensors(),
                {"causal": False, "window": 9},
                ("window", "causal=True", "window=9, causal=False", "Pass causal=True"),
            ),
            (
                [*tensors(), torch.ones(2, 200)],
                {},
                ("key_mask", "bool of shape (2, 200)", "torch.float32 of shape (2, 200)", "[batch, keys]"),
            ),
            (
                [*tensors(), torch.ones(2, 1, 1, 200, dtype=torch.bool)],
                {},
                ("key_mask", "(2, 200)", "(2, 1, 1, 200)", "[batch, keys]"),
            ),
            (
                [*tensors(), torch.ones(3, 200, dtype=torch.bool)],
                {},
                ("key_mask", "or (1, 200)", "(3, 200)", "[batch, keys]"),
            ),
            (
                [*tensors(), torch.ones(2, 200, dtype=torch.bool, device="meta")],
                {},
                ("device of key_mask", "expected cpu", "got meta", ".to(device)"),
            ),
        ],
        ids=lambda x: x[0] if isinstance(x, tuple) else None,
    )
    def test_tensors(self, args, options, message):
        given = {"causal": True, "window": None, **options}
        key_mask = args[3] if len(args) > 3 else None
        with pytest.raises(InputError, match=says(*message)):
            AttentionCall.of(*args[:3], key_mask, **given)
        with pytest.raises(InputError, match=says(*message)):
            OPERATOR(*args, **given)

    @pytest.mark.parametrize(
        ("name", "value", "message"),
        [
            ("tau", -0.1, ("finite number >= 0", "got -0.1", "tau=0.0")),
            ("tau", math.inf, ("finite number >= 0", "got inf", "tau=0.0")),
            ("tau", math.nan, ("finite number >= 0", "got nan", "tau=0.0")),
            ("tau", "1", ("finite number >= 0", "got the text '1'", "tau=0.0")),
            ("tau", True, ("finite number >= 0", "got True", "tau=0.0")),
            ("min_seq_len", -1, ('integer >= 0, or "auto"', "got -1", "length in tokens")),
            ("min_seq_len", 1.5, ('integer >= 0, or "auto"', "got 1.5", "length in tokens")),
            ("min_seq_len", True, ('integer >= 0, or "auto"', "got True", "length in tokens")),
            ("segment_len", 0, ("positive multiple of 128", "got 0", "None")),
            ("segment_len", -128, ("positive multiple of 128", "got -128", "None")),
            ("segment_len", 100, ("positive multiple of 128", "got 100", "None")),
            ("segment_len", 128.0, ("positive multiple of 128", "got 128.0", "None")),
            ("ranking", "best", ("'per_query', 'mean_query'", "got 'best'", "Choose")),
            ("ranking", "sub_mean", ("'per_query', 'mean_query'", "got 'sub_mean'", "sub_mean was removed")),
            ("implementation", "cuda", ("'auto', 'triton', 'cpp', 'torch'", "got 'cuda'", "Choose")),
        ],
    )
    def test_options(self, name, value, message):
        with pytest.raises(InputError, match=says(name, *message)):
            OperatorOptions(**{name: value})

    def test_options_reach_the_operator(self):
        with pytest.raises(InputError, match=says("tau", "got -1.0")):
            OPERATOR(*tensors(), tau=-1.0)

    def test_triton_without_triton_is_refused(self, monkeypatch):
        monkeypatch.setattr(operator, "triton_forward", None)
        with pytest.raises(ImplementationUnavailableError, match=r"expected the triton package, got none.*Install"):
            OPERATOR(*tensors(), implementation="triton", min_seq_len=0)

    @pytest.mark.parametrize("shortest", [0, 10**6])
    def test_triton_on_the_cpu_is_refused(self, monkeypatch, shortest):
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        with pytest.raises(ImplementationUnavailableError, match=r"expected CUDA tensors, got cpu.*Move.*INTERPRET"):
            OPERATOR(*tensors(), implementation="triton", min_seq_len=shortest)

    def test_one_hierarchy(self):
        assert issubclass(InputError, S2OError)
        assert issubclass(InputError, ValueError)
        assert issubclass(ImplementationUnavailableError, S2OError)
        assert issubclass(ImplementationUnavailableError, RuntimeError)
