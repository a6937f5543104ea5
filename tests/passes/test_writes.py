"""Writes of every kind, at every place of an attention: what the compiled function gives is what eager gives."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

import s2o_compile
from s2o_compile import S2OConfig
from s2o_compile.passes import pipeline
from tests.helpers.capture import rewritten
from tests.helpers.writers import PLACES, WRITERS

pytestmark = [pytest.mark.usefixtures("fresh_dynamo"), pytest.mark.filterwarnings("ignore")]
NAMES = [place.__name__ for place in PLACES]


def compared(write):
    """Runs all places, each on inputs of its own, compiled and in eager; returns the records of the passes."""
    records = []

    def backend(gm, example_inputs):
        records.extend(pipeline.run(gm, {"tau": 0.0, "min_seq_len": 0}, read_masks=True))
        return gm.forward

    def attend(inputs):
        return [place(write, *own) for place, own in zip(PLACES, inputs, strict=True)]

    torch.manual_seed(0)
    inputs = torch.randn(len(PLACES), 3, 2, 4, 8, 16)
    with torch.no_grad():
        expected, written = attend(copies := [x.clone().unbind(0) for x in inputs]), copies
        actual, seen = torch.compile(attend, backend=backend)(copies := [x.clone().unbind(0) for x in inputs]), copies
    for name, *pair in zip(NAMES, actual, expected, strict=True):
        torch.testing.assert_close(*pair, atol=1e-5, rtol=1e-5, equal_nan=True, msg=lambda text, n=name: f"{n}: {text}")
    torch.testing.assert_close(seen, written, atol=0, rtol=0)
    return records


@pytest.mark.parametrize("name", WRITERS)
def test_writes_are_seen(name):
    assert compared(WRITERS[name])


def test_all_of_it_is_rewritten_where_nothing_is_written():
    """Else the test above could not fail."""
    records = compared(lambda x: None)
    assert len(records) == len(PLACES) + 1  # one of them has two sites
    assert not [record.reason for record in records if record.reason]


def reset(k, by):
    """``k`` seen through a view, and then given other elements."""
    view = k.mT
    by(k)
    return view


def through(name):
    return lambda q, k, v: (q @ getattr(k * 1, name)(-1, -2) / 4).softmax(-1) @ v


# Keys [B, H, N, D] with N == D == H, so that a tensor that is transposed in place still fits.
RESHAPED = {
    "transpose_": through("transpose_"),
    "swapaxes_": through("swapaxes_"),
    "swapdims_": through("swapdims_"),
    "bmm": lambda q, k, v: (torch.bmm(q[0], (k[0] * 1).transpose_(1, 2)) / 4).softmax(-1) @ v[0],
    "behind-a-view": lambda q, k, v: (q @ reset(k * 1, lambda k: k.transpose_(-1, -2)) / 4).softmax(-1) @ v,
    "heads-behind-a-view": lambda q, k, v: (q @ reset(k * 1, lambda k: k.swapaxes_(1, 2)) / 4).softmax(-1) @ v,
    "leaf": lambda q, k, v: (q @ reset(k * 1, turned) / 4).softmax(-1) @ v,
    "set_": lambda q, k, v: (q @ reset(k * 1, lambda k: k.set_(k * 2)) / 4).softmax(-1) @ v,
    "values": lambda q, k, v: (q @ k.mT / 4).softmax(-1) @ (v * 1).transpose_(-1, -2),
    "sdpa": lambda q, k, v: sdpa(q, (k * 1).transpose_(1, 2), v),
    "sdpa-later": lambda q, k, v: (sdpa(q, later := k * 1, v), later.transpose_(1, 2)),
    "mask": lambda q, k, v: sdpa(q, k, v, attn_mask=torch.ones(8, 8, dtype=torch.bool).tril().transpose_(0, 1)),
}


@torch.compiler.allow_in_graph
def turned(x):
    x.transpose_(-1, -2)
    return x.shape[0]


@pytest.mark.parametrize("attend", RESHAPED.values(), ids=RESHAPED)
def test_tensors_that_are_given_another_shape_in_place(attend):
    inputs = torch.randn(3, 2, 8, 8, 8).unbind(0)
    rewritten(attend, *inputs)


class Places(torch.nn.Module):
    def __init__(self, write):
        super().__init__()
        self.write = write

    def forward(self, inputs):
        own = inputs * 1  # programs that write to their inputs are refused
        return [place(self.write, *x) for place, x in zip(PLACES, own.unbind(0), strict=True)]


# One of each kind, as export spells it: by method, statement, list, schema, keyword and view.
EXPORTED = (
    *("relu_", "statement", "split", "detached", "out", "foreach", "custom-list", "custom-behind"),
    *("F.silu", "vmap"),
)


@pytest.mark.parametrize("name", EXPORTED)
def test_writes_are_seen_in_exported_programs(name):
    torch.manual_seed(0)
    model, inputs = Places(WRITERS[name]).eval(), torch.randn(len(PLACES), 3, 2, 4, 8, 16)
    with torch.no_grad():
        program = s2o_compile.export(model, (inputs,), config=S2OConfig(tau=0.0, min_seq_len=0))
        actual, expected = program.module()(inputs), model(inputs)
    for place, *pair in zip(NAMES, actual, expected, strict=True):
        torch.testing.assert_close(
            *pair, atol=1e-5, rtol=1e-5, equal_nan=True, msg=lambda text, place=place: f"{place}: {text}"
        )
