"""Masks read by value: what is recognised, what is not, and that the output is SDPA's in both cases."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import s2o_compile
from s2o_compile import S2OConfig
from s2o_compile.kernels.calls import read_mask as reading
from s2o_compile.kernels.calls.read_mask import read_mask
from s2o_compile.kernels.statistics import record_calls
from s2o_compile.kernels.support.errors import InputError
from tests.conftest import CUDA, DTYPES, INTERPRETED, on

BATCH, HEADS, KV_HEADS, LENGTH, DIM = 2, 4, 2, 300, 16
EXACT = S2OConfig(tau=0.0, min_seq_len=0, segment_len=128)
LOWEST = torch.finfo(torch.float32).min

ROW, COLUMN = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)[None]
CAUSAL = ROW >= COLUMN
LEFT = torch.ones(BATCH, 1, 1, LENGTH, dtype=torch.bool)
LEFT[0, ..., :100] = False
RIGHT = LEFT.flip(-1)
SEGMENT = torch.arange(LENGTH) // 100


def changed(row: int, column: int) -> Tensor:
    mask = CAUSAL.clone()
    mask[row, column] = ~mask[row, column]
    return mask


def by_head(head: int, mask: Tensor) -> Tensor:
    masks = CAUSAL.expand(1, HEADS, -1, -1).clone()
    masks[:, head] = mask
    return masks


KNOWN = {
    "causal": (CAUSAL, "causal"),
    "causal, rank 4": (CAUSAL[None, None].expand(BATCH, HEADS, -1, -1), "causal"),
    "equal heads": (by_head(0, CAUSAL), "causal"),
    "strict": (ROW > COLUMN, "causal, offset -1, key padding"),
    "ahead": (ROW + 7 >= COLUMN, "causal, offset 7"),
    "window": (CAUSAL & (ROW - 50 < COLUMN), "causal, window 50"),
    "two-sided window": ((ROW + 7 >= COLUMN) & (ROW - 9 <= COLUMN), "sliding window -9..+7"),
    "left padding": (CAUSAL & LEFT, "causal, key padding"),
    "right padding": (CAUSAL & RIGHT, "causal, key padding"),
    "window, padding": (CAUSAL & (ROW - 50 < COLUMN) & LEFT, "causal, window 50, key padding"),
    "padding alone": (RIGHT, "bidirectional, key padding"),
    "padding of queries too": (LEFT & LEFT.transpose(-1, -2), "bidirectional, key padding"),
    "everything": (torch.ones(LENGTH, LENGTH, dtype=torch.bool), "bidirectional"),
}
UNKNOWN = {
    "prefix": CAUSAL | (COLUMN < 50),
    "packed": CAUSAL & (SEGMENT[:, None] == SEGMENT[None]),
    "two heads differ": by_head(1, CAUSAL & (ROW - 30 < COLUMN)),
    "a key too few": changed(200, 50),
    "a key too many": changed(200, 250),
    "nothing": torch.zeros(LENGTH, LENGTH, dtype=torch.bool),
    "one row of one head": by_head(3, changed(7, 0)),
    "a row hidden from one head": by_head(2, CAUSAL & (ROW != 200)),
}


def tensors(dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((BATCH, heads, LENGTH, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS))
    return tuple(torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)


def dense(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    key, value = (x.repeat_interleave(HEADS // KV_HEADS, 1) for x in (key, value))
    return scaled_dot_product_attention(query, key, value, attn_mask=mask)


def compare(mask: Tensor, config: S2OConfig = EXACT) -> tuple[str, str]:
    """Path and mask of a call whose output is that of SDPA."""
    query, key, value = tensors()
    with record_calls() as calls:
        output = s2o_compile.attention(query, key, value, attn_mask=mask, config=config)
    torch.testing.assert_close(output, dense(query, key, value, mask), atol=3e-6, rtol=1e-5)
    (call,) = calls
    return call.path, call.mask


class TestWhatIsRecognised:
    @pytest.mark.parametrize("name", KNOWN)
    def test_bool(self, name):
        mask, text = KNOWN[name]
        assert compare(mask) == ("window" if "window" in name else "s2o", text)

    @pytest.mark.parametrize("hidden", [-torch.inf, LOWEST])
    @pytest.mark.parametrize("name", KNOWN)
    def test_float(self, name, hidden):
        mask, text = KNOWN[name]
        assert compare(torch.zeros(mask.shape).masked_fill(~mask, hidden))[1] == text

    def test_rows_without_any_key_give_the_mean_under_a_low_number(self):
        mask = LEFT & LEFT.transpose(-1, -2)
        assert compare(torch.zeros(mask.shape).masked_fill(~mask, LOWEST)) == ("s2o", "bidirectional, key padding")

    @pytest.mark.parametrize("name", UNKNOWN)
    def test_anything_else_runs_under_the_mask(self, name):
        assert compare(UNKNOWN[name]) == ("masked", "")
        assert compare(torch.zeros(UNKNOWN[name].shape).masked_fill(~UNKNOWN[name], -torch.inf)) == ("masked", "")

    def test_position_biases(self):
        bias = torch.randn(1, HEADS, LENGTH, LENGTH)
        assert compare(bias) == ("masked", "")
        assert compare(bias.masked_fill(~CAUSAL, -torch.inf)) == ("masked", "")
        assert compare(torch.zeros(LENGTH, LENGTH).masked_fill(~CAUSAL, -3.0)) == ("masked", "")

    def test_nan_is_no_mask(self):
        mask = torch.zeros(LENGTH, LENGTH).masked_fill(~CAUSAL, -torch.inf)
        mask[250, 3] = torch.nan
        assert read_mask(mask[None, None], LENGTH, LENGTH, torch.float32) is None

    def test_short_attention_is_not_read(self):
        assert compare(CAUSAL, S2OConfig(tau=0.0)) == ("dense", "")

    def test_no_head_of_the_lengths_is_assumed(self):
        """A cached prefill: fewer queries than keys, the last aligned with the last."""
        mask = CAUSAL[-130:]
        query, key, value = tensors()
        query = query[:, :, -130:]
        with record_calls() as calls:
            output = s2o_compile.attention(query, key, value, attn_mask=mask, config=EXACT)
        torch.testing.assert_close(output, dense(query, key, value, mask), atol=3e-6, rtol=1e-5)
        assert (calls[0].path, calls[0].mask) == ("s2o", "causal")


class TestNumbersThatHide:
    """-10000 hides a key if no score comes near it, which the norms of queries and keys say."""

    MASK = torch.zeros(LENGTH, LENGTH).masked_fill(~CAUSAL, -1e4)

    def test_small_scores(self):
        assert compare(self.MASK) == ("s2o", "causal")

    def test_large_scores(self):
        query, key, value = tensors()
        query, key = 60 * query, 60 * key
        with record_calls() as calls:
            output = s2o_compile.attention(query, key, value, attn_mask=self.MASK, config=EXACT)
        assert calls[0].path == "masked"
        torch.testing.assert_close(output, dense(query, key, value, self.MASK))

    def test_rows_without_any_key(self):
        """They see a softmax of the scores themselves."""
        assert compare(torch.zeros(BATCH, 1, LENGTH, LENGTH).masked_fill(~(CAUSAL & LEFT), -1e4)) == ("masked", "")

    def test_several_numbers_in_such_rows_are_no_mean(self):
        mask = torch.zeros(BATCH, 1, LENGTH, LENGTH).masked_fill(~CAUSAL, LOWEST)
        assert compare(mask + torch.zeros(LEFT.shape).masked_fill(~LEFT, LOWEST)) == ("masked", "")
        assert compare(mask + torch.zeros(RIGHT.shape).masked_fill(~RIGHT, LOWEST)) == ("s2o", "causal, key padding")


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_what_is_read_is_the_mask(data):
    """Bands with padding, some elements changed: either None, or every row is what was read."""
    rows, columns = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 90))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**20)))
    distance = torch.arange(columns) - torch.arange(rows)[:, None]
    late, reach = data.draw(st.integers(-5, columns)), data.draw(st.integers(0, columns))
    mask = ((distance <= late) & (distance >= late - reach)).expand(2, 1, -1, -1)
    if data.draw(st.booleans()):
        mask = mask & (torch.rand(2, 1, 1, columns, generator=generator) < 0.8)
    if data.draw(st.booleans()):
        mask = mask & (torch.rand(2, 1, rows, 1, generator=generator) < 0.8)
    mask = mask.clone()
    for _ in range(data.draw(st.integers(0, 2))):
        at = tuple(int(torch.randint(n, (1,), generator=generator)) for n in mask.shape)
        mask[at] = ~mask[at]
    found = read_mask(mask, rows, columns, torch.float32)
    if found is not None:
        visible = found.mask.visible_pairs(rows, columns, mask.device)
        if found.hidden_rows is not None:
            visible = visible & ~found.hidden_rows[..., None]
        assert torch.equal(visible.expand_as(mask), mask)


class TestTheOperator:
    @pytest.mark.parametrize("mask", [CAUSAL & LEFT, UNKNOWN["prefix"]])
    @pytest.mark.parametrize("fully_masked", ["zeros", "mean"])
    def test_rows_without_any_key_under_a_bool_mask(self, mask, fully_masked):
        query, key, value = tensors()
        mask = mask & (ROW > 3)
        for config in (EXACT, S2OConfig()):
            output = s2o_compile.attention(query, key, value, attn_mask=mask, fully_masked=fully_masked, config=config)
            mean = value.mean(2, keepdim=True).repeat_interleave(HEADS // KV_HEADS, 1)
            expected = torch.where(mask.any(-1, keepdim=True), dense(query, key, value, mask), mean)
            expected = expected if fully_masked == "mean" else dense(query, key, value, mask)
            torch.testing.assert_close(output, expected, atol=3e-6, rtol=1e-5)

    @pytest.mark.parametrize("name", ["left padding", "prefix"])
    @pytest.mark.parametrize("added", [False, True])
    def test_softcap_and_sinks(self, name, added):
        query, key, value = tensors()
        visible = KNOWN[name][0] if name in KNOWN else UNKNOWN[name]
        mask = torch.zeros(visible.shape).masked_fill(~visible, -torch.inf) if added else visible
        sinks = torch.linspace(-1, 2, HEADS)
        output = s2o_compile.attention(query, key, value, attn_mask=mask, sinks=sinks, softcap=2.0, config=EXACT)
        logits = 2 * torch.tanh(query @ key.repeat_interleave(2, 1).mT * DIM**-0.5 / 2)
        logits = logits.masked_fill(~visible, -torch.inf)
        logits = torch.cat([logits, sinks[:, None, None].expand(BATCH, -1, LENGTH, 1)], -1)
        expected = logits.softmax(-1)[..., :-1] @ value.repeat_interleave(2, 1)
        torch.testing.assert_close(output, expected, atol=3e-6, rtol=1e-5)

    @pytest.mark.parametrize("name", ["causal", "prefix"])
    def test_value_dims_of_their_own(self, name):
        query, key, value = tensors()
        mask = KNOWN[name][0] if name in KNOWN else UNKNOWN[name]
        output = s2o_compile.attention(query, key, value[..., :6], attn_mask=mask, config=EXACT)
        torch.testing.assert_close(output, dense(query, key, value, mask)[..., :6], atol=3e-6, rtol=1e-5)

    @pytest.mark.filterwarnings("ignore::s2o_compile.DenseGradientWarning")
    def test_gradients_flow_through_sdpa(self):
        query, key, value = (x.requires_grad_() for x in tensors())
        bias = torch.randn(LENGTH, LENGTH, requires_grad=True)
        s2o_compile.attention(query, key, value, attn_mask=bias, config=EXACT).sum().backward()
        ours = bias.grad
        bias.grad = None
        dense(query, key, value, bias).sum().backward()
        torch.testing.assert_close(ours, bias.grad)

    def test_vmap(self):
        query, key, value = tensors()
        masks = torch.stack([CAUSAL, UNKNOWN["prefix"]])

        def call(mask):
            return s2o_compile.attention(query, key, value, attn_mask=mask, config=EXACT)

        expected = torch.stack([dense(query, key, value, mask) for mask in masks])
        torch.testing.assert_close(torch.vmap(call)(masks), expected, atol=3e-6, rtol=1e-5)

    def test_autocast(self):
        query, key, value = tensors()
        mask = torch.zeros(LENGTH, LENGTH).masked_fill(~CAUSAL, LOWEST)
        with torch.autocast("cpu", torch.bfloat16):
            output = s2o_compile.attention(query, key, value, attn_mask=mask, config=EXACT)
        assert output.dtype is torch.bfloat16
        torch.testing.assert_close(output.float(), dense(query, key, value, mask), atol=3e-2, rtol=3e-2)

    @pytest.mark.parametrize(
        ("mask", "more", "message"),
        [
            (torch.ones(LENGTH, 7, dtype=torch.bool), {}, "shape of attn_mask"),
            (torch.ones(LENGTH, dtype=torch.bool), {}, "shape of attn_mask"),
            (torch.ones(LENGTH, LENGTH, dtype=torch.int64), {}, "dtype of attn_mask"),
            (torch.ones(LENGTH, LENGTH, dtype=torch.float16), {}, "dtype of attn_mask"),
            (CAUSAL, {"causal": True, "window": 5}, "got causal, window"),
            (CAUSAL, {"return_lse": True}, "got return_lse"),
        ],
    )
    def test_bad_input(self, mask, more, message):
        with pytest.raises(InputError, match=message):
            s2o_compile.attention(*tensors(), attn_mask=mask, **more)


FEW = ("left padding", "two-sided window", "a key too many", "padding of queries too")


@pytest.mark.parametrize(
    ("device", "name", "dtype"),
    [
        *on(INTERPRETED, *((name, dtype) for name in FEW for dtype in (torch.bool, torch.float32))),
        *on(CUDA, *((name, dtype) for name in (*KNOWN, *UNKNOWN) for dtype in (torch.bool, *DTYPES.values()))),
    ],
)
def test_the_triton_kernel_compares_alike(device, name, dtype):
    compare_mask = pytest.importorskip("s2o_compile.kernels.impl.triton.compare_mask")
    mask = KNOWN[name][0] if name in KNOWN else UNKNOWN[name]
    mask = mask[(None,) * (4 - mask.dim())].to(device)
    mask = mask if device == "cuda" or mask.shape[2] == 1 else mask[:, :, 190:220]  # the interpreter is slow
    if dtype is not torch.bool:
        mask = torch.zeros(mask.shape, dtype=dtype, device=device).masked_fill(~mask, torch.finfo(dtype).min)
        if name == "a key too few":
            mask[..., 10, 50] -= 1  # a number of no mask
    mask = mask.expand(-1, -1, -1, LENGTH)
    band = reading.suggest(mask)
    expected = reading.compare_with(mask.cpu(), reading.Band(*(x.cpu() for x in vars(band).values())))
    found = compare_mask.compare_with(mask, band)
    assert bool(found.differs) == bool(expected.differs)
    if not expected.differs:  # the comparison ends at the first difference
        assert torch.equal(found.fully_masked.cpu(), expected.fully_masked)
        assert torch.equal(found.hidden_rows.cpu(), expected.hidden_rows)
        assert torch.equal(found.extremes.cpu(), expected.extremes)
