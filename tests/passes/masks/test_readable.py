"""Masks that the passes cannot prove and leave to the operator: what it reads, what eager attention makes of several.

Every run is compared with the function uncompiled. Rows without any key are where masks differ that look alike.
"""

import functools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from s2o_compile import S2OConfig, explain
from s2o_compile.backend import s2o
from s2o_compile.recording import record

pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo"),
    pytest.mark.filterwarnings("ignore::s2o_compile.NothingRewrittenWarning"),
]

sdpa = F.scaled_dot_product_attention
LENGTH, INF, LOWEST = 160, float("-inf"), torch.finfo(torch.float32).min
EXACT = {"s2o.tau": 0.0, "s2o.min_seq_len": 0, "s2o.inner_backend": "eager"}

CAUSAL = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
PADDING = torch.ones(2, 1, 1, LENGTH, dtype=torch.bool)
PADDING[0, ..., :37] = False  # on the left: the first rows under both see no key
SEGMENT = torch.arange(LENGTH) // 50


def heads(length=LENGTH, dtype=torch.float32, *, spread=1.0):
    generator = torch.Generator().manual_seed(length)
    return [(spread * torch.randn(2, length, 4, 16, generator=generator)).to(dtype).transpose(1, 2) for _ in range(3)]


def added(visible, number, dtype=torch.float32):
    return torch.zeros(visible.shape).masked_fill(~visible, number).to(dtype)


def cloned(inputs):
    return [x.clone() if isinstance(x, torch.Tensor) else x for x in inputs]


def run(function, *inputs, tolerance=1e-5, **options):
    """Runs a function compiled and in eager, equal results and strides; returns the sites of the report."""
    backend = functools.partial(s2o, options={**EXACT, **options})
    with torch.no_grad(), record() as recording:
        actual = torch.compile(function, backend=backend)(*cloned(inputs))
        expected = function(*cloned(inputs))
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance, check_stride=True)
    return recording.report.sites


def fused(q, k, v, mask):
    return sdpa(q, k, v, attn_mask=mask)


def sums(q, k, v, *masks):
    scores = q @ k.transpose(-1, -2) * 0.25
    for mask in masks:
        scores = scores + mask
    return scores.softmax(-1, dtype=torch.float32).to(v.dtype) @ v


def fills(q, k, v, *hidden):
    scores = q @ k.transpose(-1, -2) * 0.25
    for condition in hidden:
        scores = scores.masked_fill(condition, torch.finfo(scores.dtype).min)
    return scores.softmax(-1, dtype=torch.float32).to(v.dtype) @ v


def buffered(q, k, v, buffer, mask):
    """As GPT-Neo: a stored causal mask, cut to length, fills; padding is added."""
    scores, length = q @ k.transpose(-1, -2) * 0.25, q.shape[-2]
    scores = torch.where(buffer[:, :, :length, :length], scores, torch.finfo(scores.dtype).min) + mask
    return scores.softmax(-1) @ v


WINDOW = CAUSAL & ~CAUSAL.tril(-9)
PACKED = CAUSAL & (SEGMENT[:, None] == SEGMENT)
BIAS = torch.arange(LENGTH) - torch.arange(LENGTH)[:, None].float()


MASKS = {
    "causal": (CAUSAL, "causal", "s2o"),
    "window": (WINDOW, "causal, window 9", "window"),
    "padded": (CAUSAL & PADDING, "causal, key padding", "s2o"),
    "-inf": (added(CAUSAL & PADDING, INF), "causal, key padding", "s2o"),
    "lowest": (added(CAUSAL & PADDING, LOWEST), "causal, key padding", "s2o"),
    "-1e4": (added(CAUSAL, -1e4), "causal", "s2o"),
    "-1e4, fully masked": (added(CAUSAL & PADDING, -1e4), "another mask", "masked"),  # no mean: scores show beside it
    "bias": (added(CAUSAL, INF) + BIAS, "another mask", "masked"),
    "packed": (PACKED, "another mask", "masked"),
}
HAND_WRITTEN = {
    sums: ["lowest", "-1e4", "-1e4, fully masked", "bias"],  # eager rows of -inf are NaN
    fills: ["causal", "window", "padded", "packed"],
}


@pytest.mark.parametrize(
    ("form", "name"),
    [(fused, name) for name in MASKS] + [(f, name) for f, names in HAND_WRITTEN.items() for name in names],
)
def test_a_mask_that_enters_the_graph(form, name):
    mask, text, path = MASKS[name]
    (site,) = run(form, *heads(), ~mask if form is fills else mask)
    assert (site.rewritten, site.mask, site.path) == (True, f"{text} (read at run time)", path)


@pytest.mark.parametrize(
    ("visible", "text"),
    [(torch.zeros(2, LENGTH, dtype=torch.bool), "causal"), (torch.arange(LENGTH)[None] < 5, "another mask")],
    ids=["nothing more", "a prefix"],
)
def test_a_union_is_what_its_values_make_it(visible, text):
    def either(q, k, v, visible):
        position = torch.arange(q.shape[-2])
        return sdpa(q, k, v, attn_mask=(position[:, None] >= position) | visible[:, None, None])

    (site,) = run(either, *heads(), visible)
    assert site.mask == f"{text} (read at run time)"


@pytest.mark.parametrize(
    ("mask", "path"),
    [
        (torch.zeros(2, 1, 1, LENGTH), "s2o"),
        (added(PADDING.flip(-1), LOWEST), "s2o"),
        (added(PADDING, LOWEST), "masked"),  # in fully masked rows some keys are hidden once, some twice
        (added(PADDING, -1e4), "masked"),
    ],
    ids=["none", "right", "left", "left -1e4"],
)
def test_two_masks_are_read_as_one(mask, path):
    (site,) = run(buffered, *heads(), CAUSAL[None, None], mask)
    assert (site.rewritten, site.path) == (True, path)


@pytest.mark.parametrize("form", [sums, fills])
def test_several_masks_of_one_kind(form):
    masks = CAUSAL[None, None], PADDING.flip(-1).expand(2, 1, LENGTH, LENGTH)
    masks = [~mask if form is fills else added(mask, INF) for mask in masks]
    (site,) = run(form, *heads(), *masks)
    assert (site.mask, site.path) == ("causal, key padding (read at run time)", "s2o")


def test_read_masks_off_leaves_them_with_their_reason():
    (site,) = run(fused, *heads(), CAUSAL, **{"s2o.read_masks": False})
    assert not site.rewritten
    assert "varies along queries" in site.reason
    (site,) = run(sums, *heads(), added(CAUSAL, INF), **{"s2o.read_masks": False})
    assert "enters the graph as it is and adds numbers to the scores" in site.reason


class Learned(nn.Module):
    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(added(CAUSAL, INF), requires_grad=False)
        self.register_buffer("slopes", torch.tensor([0.5, 0.25, 0.125, 0.0625])[:, None, None])

    def forward(self, q, k, v, kind):
        if kind == "learned":
            return sdpa(q, k, v, attn_mask=self.bias)
        position = torch.arange(q.shape[-2])
        return sdpa(q, k, v, attn_mask=self.slopes * (position - position[:, None]).abs().neg())


@pytest.mark.parametrize("kind", ["learned", "ALiBi"])
def test_what_is_no_mask_by_its_making_is_left(kind):
    (site,) = run(Learned(), *heads(), kind)
    assert not site.rewritten
    assert "adds numbers to the scores" in site.reason


def test_layers_share_what_is_made_of_a_mask():
    def layers(q, k, v, hidden):
        return fills(fills(q, k, v, hidden), k, v, hidden)

    graphs = []

    def backend(gm, example_inputs):
        graphs.append(gm)
        return s2o(gm, example_inputs, options=EXACT)

    inputs = *heads(), ~CAUSAL
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(layers, backend=backend)(*inputs), layers(*inputs))
    targets = [str(node.target) for gm in graphs for node in gm.graph.nodes]
    assert sum("masked_attention" in target for target in targets) == 2
    assert sum("logical_not" in target for target in targets) == 1


def test_the_report_says_what_was_read_and_why():
    config = S2OConfig(tau=0.0, min_seq_len=0, inner_backend="eager")
    with torch.no_grad():
        text = str(explain(fused, *heads(), CAUSAL, config=config))
        other = str(explain(fused, *heads(), PACKED, config=config))
    assert "causal (read at run time)" in text
    assert "1 rewritten, 0 left dense" in text
    assert "masks read at run time, because they could not be proven:\n  - 1 x the mask l_mask_ is not proven:" in text
    assert "another mask (read at run time)" in other
    assert "rewritten, ran dense (its mask)" in other


@pytest.mark.parametrize("form", [fused, fills, buffered])
def test_one_graph_serves_every_length(form):
    graphs = []

    def backend(gm, example_inputs):
        graphs.append(gm)
        return s2o(gm, example_inputs, options=EXACT)

    compiled = torch.compile(form, backend=backend)
    with torch.no_grad(), record() as recording:
        for length in (150, 180, 131, 40):
            q, k, v = heads(length)
            visible = torch.ones(length, length, dtype=torch.bool).tril()
            masks = {
                fused: (visible,),
                fills: (~visible,),
                buffered: (torch.ones(1, 1, 200, 200, dtype=torch.bool).tril(), torch.zeros(2, 1, length, length)),
            }[form]
            for tensor in (q, k, v):
                torch._dynamo.mark_dynamic(tensor, 2)
            for mask in masks[-1:]:
                torch._dynamo.mark_dynamic(mask, mask.ndim - 1)
                torch._dynamo.mark_dynamic(mask, mask.ndim - 2)
            torch.testing.assert_close(compiled(q, k, v, *masks), form(q, k, v, *masks), atol=1e-5, rtol=1e-5)
    assert len(graphs) == 1
    assert [call.path for call in recording.calls] == ["s2o", "s2o", "s2o", "dense"]


@pytest.mark.parametrize("number", [-1500.0, -1e4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_in_few_bits_are_rounded(dtype, number):
    """Beside -1e4 bfloat16 has steps of 64: a row without any key gets a mean, in float32 a softmax of its scores."""
    mask = added(CAUSAL & PADDING, number, dtype)
    for masks in ((mask,), (mask, torch.zeros(2, 1, 1, LENGTH, dtype=dtype))):
        (site,) = run(sums, *heads(dtype=dtype, spread=2.0), *masks, tolerance=1e-2)
        assert not site.rewritten
        assert "adds numbers to the scores" in site.reason
        assert len(masks) > 1 or "not read at run time, which needs float32" in site.reason


def test_a_low_number_that_is_known_is_read_in_bfloat16():
    def chosen(q, k, v, visible):
        return sums(q, k, v, torch.where(visible, 0.0, torch.finfo(q.dtype).min).to(q.dtype))

    (site,) = run(chosen, *heads(dtype=torch.bfloat16), CAUSAL & PADDING, tolerance=5e-2)
    assert (site.mask, site.path) == ("causal, key padding (read at run time)", "s2o")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_fill_and_a_sum_in_few_bits(dtype):
    def both(q, k, v, hidden, mask):
        return (q @ k.transpose(-1, -2) * 0.25).masked_fill(hidden, INF).add(mask).softmax(-1) @ v

    mask = added(PADDING, -6e4, dtype)
    (site,) = run(both, *heads(dtype=dtype, spread=2.0), ~CAUSAL, mask, tolerance=1e-2)
    assert not site.rewritten


def test_a_mask_of_another_dtype_than_its_query_is_left():
    def upcast(q, k, v, mask):
        return ((q @ k.transpose(-1, -2)).to(mask.dtype) * 0.25 + mask).softmax(-1).to(v.dtype) @ v

    (site,) = run(upcast, *heads(), added(CAUSAL, INF, torch.float64))
    assert not site.rewritten

    def autocast(q, k, v, mask):  # fused attention would cast the mask, and lowest would be -inf
        with torch.autocast("cpu", torch.bfloat16):
            return upcast(q, k, v, mask)

    (site,) = run(autocast, *heads(dtype=torch.bfloat16), added(CAUSAL & PADDING, LOWEST), tolerance=2e-2)
    assert not site.rewritten


def test_a_mask_written_between_two_layers_is_not_shared():
    def layers(q, k, v, hidden, more):
        first = fills(q, k, v, hidden)
        hidden.logical_or_(more)
        return fills(first, k, v, hidden)

    late = (torch.arange(LENGTH) > 100).expand(LENGTH, LENGTH)
    run(layers, *heads(), ~CAUSAL, late)

    def added_layers(q, k, v, mask, more):
        first = sums(q, k, v, mask)
        mask.add_(more)
        return sums(first, k, v, mask)

    sites = run(added_layers, *heads(), added(CAUSAL, INF), added(~late, LOWEST))
    assert [site.mask for site in sites] == ["causal (read at run time)", "causal, key padding (read at run time)"]


def test_masks_are_shared_by_layers_of_one_dtype():
    def infinite(q, k, v, a, b):
        return (q @ k.transpose(-1, -2)).masked_fill(a, INF).masked_fill(b, INF).softmax(-1) @ v

    def mixed(q, k, v, a, b):
        return infinite(*(x.bfloat16() for x in (q, k, v)), a, b), infinite(q, k, v, a, b)

    masks = ~CAUSAL[None, None], ~PADDING.flip(-1)
    backend = functools.partial(s2o, options=EXACT)
    with torch.no_grad():
        (_, actual), (_, expected) = (call(*heads(), *masks) for call in (torch.compile(mixed, backend=backend), mixed))
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("second", ["fill", "sum"])
def test_probabilities_zeroed_under_one_of_two_masks(second):
    """A row without any key is a mean, from which the keys of the first mask are taken away again."""

    def zeroed(q, k, v, hidden, more):
        scores = (q @ k.transpose(-1, -2) * 0.25).masked_fill(hidden, LOWEST)
        scores = scores.masked_fill(more, LOWEST) if second == "fill" else scores + more
        return scores.softmax(-1).masked_fill(hidden, 0.0) @ v

    more = ~PADDING if second == "fill" else added(PADDING, LOWEST)
    (site,) = run(zeroed, *heads(), ~CAUSAL, more)
    assert not site.rewritten


def test_probabilities_zeroed_under_the_only_mask():
    def zeroed(q, k, v, hidden):
        """DeBERTa's XSoftmax."""
        return (q @ k.transpose(-1, -2)).masked_fill(hidden, LOWEST).softmax(-1).masked_fill(hidden, 0.0) @ v

    (site,) = run(zeroed, *heads(), ~(CAUSAL & PADDING))
    assert (site.mask, site.path) == ("causal, key padding (read at run time)", "s2o")


def test_the_numbers_of_fills_do_not_depend_on_the_default_dtype():
    def chosen(q, k, v, seen, hidden):
        scores = q @ k.transpose(-1, -2) * 0.25
        return torch.where(seen, scores, LOWEST).masked_fill(hidden, LOWEST).softmax(-1) @ v

    inputs = *heads(), ~CAUSAL[None, None], ~PADDING
    torch.set_default_dtype(torch.bfloat16)  # in which float32's lowest is -inf
    try:
        run(fills, *inputs)
        run(chosen, *inputs)
    finally:
        torch.set_default_dtype(torch.float32)
