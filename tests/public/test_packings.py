"""Random packings under every feature at tau 0: each sequence is float64's attention, beside others that are all NaN.

Every second sequence has NaN for keys and values, then the others have. Pages that nobody uses and the ends of the last
ones are NaN, too.
"""

import pytest
import torch

import s2o_compile
from tests.conftest import INTERPRETED
from tests.helpers.packings import LAYOUTS, Packing, assert_exact, config, in_pages, sinks_of

ALL = {"heads": 4, "kv_heads": 2, "softcap": 5.0, "sinks": True, "scale": 0.3, "value_dim": 24}
FEATURES = {
    "causal": {},
    "bidirectional": {"causal": False},
    "window": {"window": 50},
    "softcap": {"softcap": 5.0},
    "sinks": {"sinks": True},
    "scale": {"scale": 0.1},
    "negative-scale": {"scale": -0.2},
    "value-dim": {"value_dim": 24},
    "groups": {"heads": 6, "kv_heads": 2},
    "all": ALL,
    "all-bidirectional": {**ALL, "causal": False},
    "all-window": {**ALL, "window": 200},
}


def check(packing, device="cpu", *, page_len=0, layout="pair", unread=False, bounds=False, **options):
    """Every sequence is exact while the others are NaN: packed, or in pages of so many tokens.

    Args:
        unread: Whether lengths lie on the device.
        bounds: Whether the longest lengths are said.
    """
    inputs = packing.inputs(device)
    longest = [max(pair[at] for pair in packing.lengths) for at in (0, 1)] if bounds else ()
    for turn in (0, 1):
        hidden = range(turn, len(inputs), 2)
        query, key, value, *starts = packing.joined(inputs, device, hidden)
        on = device if unread else "cpu"
        shared = {**packing.options(), "sinks": sinks_of(inputs), "return_lse": True, "config": config(**options)}
        if page_len:
            cache, table, lengths = in_pages(key, value, starts[1], page_len, layout)
            arguments = cache, table.to(device), starts[0].to(on), lengths.to(on)
            output, lse = s2o_compile.attention_paged(query, *arguments, *longest, **shared)
        else:
            output, lse = s2o_compile.attention_varlen(
                query, key, value, *(x.to(on) for x in starts), *longest, **shared
            )
        assert_exact(packing, inputs, output, lse, hidden)


def tables_of(name, seed):
    """Pages of another length and layout for each feature; only one layout has a head dim of its own for values."""
    fields = FEATURES[name]
    return {"page_len": (1, 7, 16, 48)[seed % 4], "layout": "pair" if "value_dim" in fields else LAYOUTS[seed % 3]}


@pytest.mark.parametrize("implementation", ["cpp", "torch"])
@pytest.mark.parametrize("name", FEATURES)
def test_short_ones(name, implementation):
    seed = [*FEATURES].index(name)
    dtype = "fp32" if (seed % 2 == 0) == (implementation == "cpp") else "bf16"
    packing = Packing.random(seed, 7, 300, dtype=dtype, **FEATURES[name])
    packing = Packing(**{**vars(packing), "lengths": (*packing.lengths, (130, 200), (0, 9))})
    check(packing, implementation=implementation)
    check(packing, implementation=implementation, **tables_of(name, seed))


@pytest.mark.slow
@pytest.mark.parametrize("device", [INTERPRETED])
@pytest.mark.parametrize("name", ["all", "all-bidirectional"])
@pytest.mark.filterwarnings("ignore:divide by zero", "ignore:All-NaN slice", "ignore:invalid value")
def test_short_ones_in_interpreted_kernels(name, device):
    packing = Packing(lengths=((3, 40), (0, 9), (130, 200), (7, 7)), **FEATURES[name])
    check(packing, device, page_len=7, implementation="triton")


@pytest.mark.parametrize("count", [1, 2, 64])
def test_so_many(count):
    packing = Packing.random(count, count, 200, heads=1)
    check(packing)
    check(packing, page_len=16)


LONG = {
    "causal": ("cpp", "fp32", {}),
    "bidirectional": ("cpp", "bf16", {}),
    "all": ("cpp", "bf16", {}),
    "all-bidirectional": ("torch", "fp32", {}),
    "all-window": ("torch", "bf16", {"window": 3000}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LONG)
def test_long_ones(name):
    implementation, dtype, changed = LONG[name]
    fields = {**FEATURES[name], "dtype": dtype, **changed}
    if name == "causal":
        fields["heads"] = 1
    packing = Packing.random(7, 62, 20_000, 12_000, **fields)
    longest = (20_000, 20_000) if name == "causal" else (500, 20_000)
    packing = Packing(**{**vars(packing), "lengths": ((300, 300), *packing.lengths, longest)})
    check(packing, implementation=implementation, segment_len=512)
    check(packing, implementation=implementation, segment_len=512, **tables_of(name, 2))


ON_GPU = {
    "causal": "bf16",
    "groups": "bf16",
    "sinks": "bf16",
    "value-dim": "bf16",
    "bidirectional": "fp32",
    "negative-scale": "fp32",
    "window": "fp32",
    "softcap": "fp16",
    "all": "fp16",
    "all-bidirectional": "fp32",
    "all-window": "bf16",
}
"""Few kinds of kernels, which compile for seconds each."""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ON_GPU)
def test_long_ones_on_a_gpu(name):
    seed = [*FEATURES].index(name)
    fields = {"head_dim": 64, "dtype": ON_GPU[name], **FEATURES[name]}
    packing = Packing.random(seed, (1, 2, 7, 62)[seed % 4], 20_000, 20_000, **fields)
    longest = 20_000, (1000, 20_000)[seed % 2]
    packing = Packing(**{**vars(packing), "lengths": ((300, 300), *packing.lengths, longest[::-1])})
    tables = tables_of(name, seed)
    check(packing, "cuda", segment_len=512, **tables)
    check(packing, "cuda", segment_len=512, unread=True, bounds=True)
    check(packing, "cuda", segment_len=512, unread=True, min_seq_len=1000, **tables)
