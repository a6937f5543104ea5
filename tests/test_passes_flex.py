"""flex_attention and kernels of other packages: rewritten only without a mask of their own, else named."""

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from s2o_compile.passes import foreign
from tests.capture import heads, rewritten

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without:UserWarning")


def causal(b, h, i, j):
    return i >= j


def shifted(score, b, h, i, j):
    return score + (i - j)


BLOCKS = create_block_mask(causal, None, None, 128, 128, device="cpu")


def sized():
    return tuple(heads(length=128) for _ in range(3))


@pytest.fixture(autouse=True)
def inference():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("scale", [None, 0.3])
def test_without_a_mask_it_is_rewritten(scale):
    capture = rewritten(lambda q, k, v: flex_attention(q, k, v, scale=scale), *sized())
    (record,) = capture.records
    assert (record.rewritten, record.mask) == (True, "bidirectional")
    assert len(capture.calls) == 1


def test_groups_stay_grouped():
    q, k, v = sized()
    capture = rewritten(lambda q, k, v: flex_attention(q, k, v, enable_gqa=True), q, k[:, :2], v[:, :2])
    assert capture.records[0].key_shape[1] == "2"


LEFT = {
    "score_mod": (lambda q, k, v: flex_attention(q, k, v, score_mod=shifted), "score_mod"),
    "block-mask": (lambda q, k, v: flex_attention(q, k, v, block_mask=BLOCKS), "tables are data"),
    "lse": (lambda q, k, v: flex_attention(q, k, v, return_lse=True)[1], "more than the output"),
}


@pytest.mark.parametrize(("function", "reason"), LEFT.values(), ids=LEFT)
def test_the_rest_is_left_and_named(function, reason):
    capture = rewritten(function, *sized())
    (record,) = capture.records
    assert not record.rewritten
    assert reason in record.reason


@torch.library.custom_op("toy::flash_attn_forward", mutates_args=())
def kernel(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, k, v)


@kernel.register_fake
def _(q, k, v):
    return torch.empty_like(q)


def test_kernels_of_other_packages_are_named():
    capture = rewritten(lambda q, k, v: kernel(q, k, v), *sized())
    (record,) = capture.records
    assert not record.rewritten
    assert "kernel of its own" in record.reason


def test_torch_itself_is_not_foreign():
    capture = rewritten(lambda q, k, v: torch.nn.functional.scaled_dot_product_attention(q, k, v), *sized())
    assert not any(foreign.is_attention(node) for node in capture.nodes)
