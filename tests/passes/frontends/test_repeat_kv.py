"""Key and value heads that a model repeats for SDPA: unwrapped where they are copies of whole heads, else left."""

import pytest
import torch
from torch.nn import functional as F

from tests.helpers.capture import heads, rewritten


def repeat_kv(x, groups):
    batch, count, length, dim = x.shape
    return x[:, :, None].expand(batch, count, groups, length, dim).reshape(batch, count * groups, length, dim)


REPEATS = {
    "none-expand-reshape": lambda x: repeat_kv(x, 2),
    "unsqueeze-expand-flatten": lambda x: x.unsqueeze(2).expand(-1, -1, 2, -1, -1).flatten(1, 2),
    "unsqueeze-repeat-view": lambda x: x.unsqueeze(2).repeat(1, 1, 2, 1, 1).view(2, 4, -1, 16),
    "repeat-interleave": lambda x: torch.repeat_interleave(x, 2, dim=1),
    "repeat-interleave-method": lambda x: x.repeat_interleave(2, 1),
    "repeat-interleave-negative-dim": lambda x: x.repeat_interleave(repeats=2, dim=-3),
    "contiguous": lambda x: repeat_kv(x, 2).contiguous(),
}


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("repeat", REPEATS.values(), ids=REPEATS)
def test_repeat_kv_is_unwrapped(repeat, dynamic):
    q, k, v = heads(4), heads(2), heads(2)
    mark = [(tensor, 2) for tensor in (q, k, v)] if dynamic else []
    capture = rewritten(
        lambda q, k, v: F.scaled_dot_product_attention(q, repeat(k), repeat(v), is_causal=True), q, k, v, mark=mark
    )
    assert capture.records[0].key_shape[1] == "2"
    assert not any(value.ndim == 5 for value in capture.values)  # the copies are gone


NOT_REPEATS = {
    "tiled-heads": lambda x: x.repeat(1, 2, 1, 1),  # head h reads h % 2: not how the operator groups
    "tiled-by-expand": lambda x: x[:, None].expand(-1, 2, -1, -1, -1).reshape(2, 4, -1, 16),
    "repeat-then-changed": lambda x: repeat_kv(x, 2) * 2,
}


@pytest.mark.parametrize("repeat", NOT_REPEATS.values(), ids=NOT_REPEATS)
def test_other_copies_of_heads_stay(repeat):
    capture = rewritten(
        lambda q, k, v: F.scaled_dot_product_attention(q, repeat(k), repeat(v)), heads(4), heads(2), heads(2)
    )
    assert capture.records[0].key_shape[1] == "4"


def test_keys_written_after_they_were_repeated_are_not_read_again():
    def function(q, k, v):
        k = k.clone()
        repeated = repeat_kv(k, 2)
        k.zero_()
        return F.scaled_dot_product_attention(q, repeated, repeat_kv(v, 2))

    assert rewritten(function, heads(4), heads(2), heads(2)).records[0].key_shape[1] == "4"


def test_cache_written_before_it_is_repeated_is_unwrapped():
    def function(q, k, v, cache):
        cache.copy_(k)
        return F.scaled_dot_product_attention(q, repeat_kv(cache, 2), repeat_kv(v, 2))

    capture = rewritten(function, heads(4), heads(2), heads(2), heads(2))
    assert capture.records[0].key_shape[1] == "2"
    assert any(node.target == "copy_" for node in capture.nodes)  # a write without users is no dead code


def test_a_write_that_only_the_mask_used_stays():
    def function(q, k, v, cache):
        seen = torch.ones_like(cache.copy_(k)[:1, :1] @ q[:1, :1].mT, dtype=torch.bool)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen), cache

    cache = torch.zeros(2, 4, 40, 16)
    capture = rewritten(function, heads(), heads(), heads(), cache)
    assert capture.records[0].mask == "bidirectional"
    assert any(node.target == "copy_" for node in capture.nodes)
    assert not any(node.name.startswith("matmul") for node in capture.nodes)
