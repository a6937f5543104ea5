"""The zoo's judge of masks: what a mask is by value, and what the pass should have rewritten."""

import ast
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from benchmarks import zoo_masks
from benchmarks.zoo_masks import BOTH, CAUSAL, DECODE, NUMBERS, OTHER, PADDING, UNREAD, WINDOW, MaskCounter
from s2o_compile.capture import audit as audit
from s2o_compile.passes.site import SiteRecord

N = 12
QUERY, KEY = torch.arange(N)[:, None], torch.arange(N)
CAUSAL_MASK = KEY <= QUERY
LEFT = torch.ones(2, 1, 1, N, dtype=torch.bool)
LEFT[0, ..., :4] = False
RIGHT = LEFT.flip(-1)
PREFIX = CAUSAL_MASK | (KEY < 5)
MASKS = {
    "all": (torch.ones(N, N, dtype=torch.bool), BOTH),
    "causal": (CAUSAL_MASK, CAUSAL),
    "causal-bottom-right": (QUERY[:5] + N - 5 >= KEY, CAUSAL),
    "sliding": (CAUSAL_MASK & (KEY > QUERY - 4), WINDOW),
    "around-the-query": ((KEY - QUERY).abs() < 3, WINDOW),
    "padded": (LEFT.expand(2, 1, N, N), BOTH + PADDING),
    "causal-left-padded": (CAUSAL_MASK & LEFT, CAUSAL + PADDING),
    "causal-right-padded": (CAUSAL_MASK & RIGHT, CAUSAL + PADDING),
    "sliding-left-padded": (CAUSAL_MASK & (KEY > QUERY - 4) & LEFT, WINDOW + PADDING),
    "fully-masked-rows-see-all": ((CAUSAL_MASK & LEFT) | ~(CAUSAL_MASK & LEFT).any(-1, keepdim=True), CAUSAL + PADDING),
    "chunked": (CAUSAL_MASK & (KEY // 4 == QUERY // 4), OTHER),
    "packed": (KEY // 5 == QUERY // 5, OTHER),
    "prefix": (PREFIX, OTHER),
    "one-key-missing": (CAUSAL_MASK & ~((QUERY == 7) & (KEY == 3)), OTHER),
    "strided": ((KEY - QUERY) % 2 == 0, OTHER),
}


@pytest.mark.parametrize(("visible", "kind"), MASKS.values(), ids=MASKS)
def test_kinds_by_value(visible, kind):
    assert zoo_masks.of_visible(visible) == kind


def qkv(length=N):
    return torch.randn(3, 2, 4, length, 8, generator=torch.Generator().manual_seed(0)).unbind()


def seen(attend, *args):
    with torch.no_grad():
        (call,) = audit.take(attend, args, {}, MaskCounter)
    return call.mask


def spelt_out(*added, before=lambda scores: scores, after=lambda scores: scores):
    def attend(q, k, v):
        scores = before(q @ k.transpose(-2, -1) / 8**0.5)
        for tensor in added:
            scores = scores + tensor
        return after(scores).softmax(-1) @ v

    return attend


HIDDEN = torch.zeros(N, N).masked_fill(~CAUSAL_MASK, torch.finfo(torch.float32).min)
ALIBI = (KEY - QUERY) * 0.1


def test_masks_of_scaled_dot_product_attention():
    q, k, v = qkv()
    assert seen(F.scaled_dot_product_attention, q, k, v) == BOTH
    assert seen(F.scaled_dot_product_attention, q, k, v, CAUSAL_MASK & LEFT) == CAUSAL + PADDING
    assert seen(F.scaled_dot_product_attention, q, k, v, HIDDEN) == CAUSAL
    assert seen(F.scaled_dot_product_attention, q, k, v, HIDDEN + ALIBI) == NUMBERS
    assert seen(F.scaled_dot_product_attention, q, k, v, PREFIX) == OTHER
    assert seen(F.scaled_dot_product_attention, q, k, v, None, 0.0, True) == CAUSAL


def test_masks_of_attention_that_is_spelt_out():
    inputs = qkv()
    assert seen(spelt_out(), *inputs) == BOTH
    assert seen(spelt_out(HIDDEN), *inputs) == CAUSAL
    assert seen(spelt_out(after=lambda s: s.masked_fill(~(CAUSAL_MASK & LEFT), -1e4)), *inputs) == CAUSAL + PADDING
    assert seen(spelt_out(HIDDEN, before=lambda s: 5 * torch.tanh(s / 5)), *inputs) == CAUSAL
    assert seen(spelt_out(ALIBI, HIDDEN), *inputs) == NUMBERS
    assert seen(spelt_out(HIDDEN, ALIBI, after=lambda s: s.masked_fill(~CAUSAL_MASK, -1e9)), *inputs) == NUMBERS
    # a maximum taken off, and what is the same for all keys of a query, change no softmax
    assert seen(spelt_out(HIDDEN, after=lambda s: s - s.amax(-1, keepdim=True)), *inputs) == CAUSAL
    assert seen(spelt_out(torch.randn(N, 1)), *inputs) == BOTH
    assert seen(lambda q, k, v: spelt_out()(q[..., -1:, :], k, v), *inputs) == DECODE


def test_sinks_are_no_keys():
    def attend(q, k, v):
        scores = torch.cat([q @ k.transpose(-2, -1) + HIDDEN, torch.zeros(*q.shape[:-1], 1)], dim=-1)
        return scores.softmax(-1)[..., :-1] @ v

    assert seen(attend, *qkv()) == CAUSAL


def test_two_products_are_a_bias_unless_one_is_a_mask():
    q, k, v = qkv()
    assert seen(lambda q, k, v: (q @ k.mT + q.flip(1) @ k.mT).softmax(-1) @ v, q, k, v) == NUMBERS
    padding = LEFT[:, 0, 0, :, None].float()
    both = (1 - padding @ padding.mT)[:, None] * -1e9  # a mask that is itself a product
    assert seen(lambda q, k, v: (q @ k.mT + both).softmax(-1) @ v, q, k, v) == BOTH + PADDING


def ran(mask):
    return audit.Ran("attn", audit.SDPA, (), (), "float32", mask)


def site(reason):
    return SiteRecord(name="attn", rewritten=not reason, reason=reason)


def test_doubt_counts_as_expressible():
    for mask in (UNREAD, BOTH, CAUSAL, WINDOW + PADDING):
        assert zoo_masks.expressible(ran(mask), None)
        assert zoo_masks.expressible(ran(mask), site("the mask m is not proven: m adds numbers to the scores"))
        assert not zoo_masks.contradicts(ran(mask), site(""))
    for mask in (NUMBERS, OTHER):
        assert not zoo_masks.expressible(ran(mask), None)
        assert zoo_masks.contradicts(ran(mask), site(""))
    assert not zoo_masks.expressible(ran(CAUSAL), site("one query token: decode stays dense"))


def test_every_exempt_reason_is_a_text_of_the_passes():
    passes = Path(zoo_masks.__file__).parent.parent / "passes"
    texts = {
        node.value
        for path in passes.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    for beginning in zoo_masks.EXEMPT:
        assert any(text.startswith(beginning) for text in texts), beginning


def flex(score_mod=None, mask_mod=None):
    def call(q, k, v):
        blocks = None if mask_mod is None else create_block_mask(mask_mod, None, None, 160, 160, device="cpu")
        return flex_attention(q, k, v, score_mod=score_mod, block_mask=blocks)

    return call


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(
    ("call", "mask"),
    [
        (flex(), "bidirectional"),
        (flex(mask_mod=lambda b, h, i, j: i >= j), "causal"),
        (flex(mask_mod=lambda b, h, i, j: (i >= j) & (i - j < 9)), "sliding"),
        (flex(lambda s, b, h, i, j: torch.where(i >= j, s, -torch.inf)), "causal"),
        (flex(lambda s, b, h, i, j: s - 0.1 * (i - j)), "numbers added to the scores"),
        (flex(mask_mod=lambda b, h, i, j: (i >= j) | (j < 50)), "another mask"),
    ],
)
@torch.no_grad()
def test_masks_of_flex_attention(call, mask):
    q = torch.randn(1, 2, 160, 16)
    (ran,) = audit.take(call, (q, q, q), {}, MaskCounter)
    assert ran.mask == mask
