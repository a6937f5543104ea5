"""Hand-written attention that only looks like what the frontend reads: exact, or left dense, and never a crash."""

import pytest
import torch
from torch.nn import functional as F

from s2o_compile.passes import rewrite
from s2o_compile.passes.graph.operand import computed
from tests.helpers.capture import OPERATOR, Capture, heads, rewritten

HIDDEN = torch.ones(40, 40, dtype=torch.bool).triu(1)
CAUSAL = torch.zeros(40, 40).masked_fill(HIDDEN, float("-inf"))
PADDED = torch.arange(40)[None] >= torch.tensor([[40], [30]])
EITHER, OTHER = torch.arange(40).expand(2, -1) % 2 == 0, torch.arange(40).expand(2, -1) < 35
SINKS = torch.rand(4)
NINF = float("-inf")


def flat(x):
    return x.flatten(0, 1)


def written_copy(q, k, v):
    k, v = (x[:, :2].repeat_interleave(2, 1) for x in (k, v))
    v[:, 1] = 0
    return F.scaled_dot_product_attention(q, k, v)


def written_copy_by_hand(q, k, v):
    k, v = (x[:, :2].repeat_interleave(2, 1) for x in (k, v))
    k.mul_(3)
    return (q @ k.mT).softmax(-1) @ v


def base_written_after_the_copy(q, k, v):
    base = k[:, :2] * 1
    copy = base[:, :, None].expand(2, 2, 2, 40, 16).clone()
    base.mul_(3)
    return (q @ copy.reshape(2, 4, 40, 16).mT).softmax(-1) @ v + base.sum() * 0


def upcast_then_written(q, k, v):
    q, k, v = (x.bfloat16() * 1 for x in (q, k, v))
    wide = q.float()
    q.mul_(3)
    return ((wide @ k.float().mT).softmax(-1).to(v.dtype) @ v + 0 * q).float()


def sinks_written_after_the_copy(q, k, v):
    sinks = SINKS.view(1, -1, 1, 1).repeat(2, 1, 40, 1)
    sinks.add_(3)
    return torch.cat([q @ k.mT, sinks], -1).softmax(-1)[..., :-1] @ v


def scaled_output(q, k, v):
    probabilities = (flat(q) @ flat(k).mT).softmax(-1)
    return torch.baddbmm(torch.zeros(8, 40, 16), probabilities, flat(v), beta=0, alpha=0.5)


def into_a_buffer(q, k, v):
    buffer = torch.zeros(8, 40, 40)
    alias = buffer[0, 0]
    scores = torch.bmm(flat(q), flat(k).mT, out=buffer)
    return torch.bmm(scores.softmax(-1), flat(v)) + alias.sum()


def enlarged_heads(q, k, v):
    return (q[:, :1] @ k[:, :1].mT + CAUSAL.expand(1, 4, 40, 40)).softmax(-1) @ v[:, :1]


def enlarged_batch(q, k, v):
    q, k, v = q[:1], k[:1], v[:1]
    return (q @ k.mT + torch.where(PADDED[:, None, None], NINF, 0.0)).softmax(-1) @ v


def other_split(q, k, v):
    scores = (q @ k.mT).view(2, 2, 2, 40, 40).masked_fill(PADDED[:, None, None, :], NINF)
    return scores.softmax(-1).view(2, 4, 40, 40) @ v


def sinks_by_query(q, k, v):
    q, k, v = (flat(x)[:, :4] for x in (q, k, v))
    scores = torch.bmm(q, k.mT).view(2, 4, 4, 4) + torch.zeros(4, 4)
    joined = torch.cat([scores.view(8, 4, 4), SINKS[None, :, None].expand(8, 4, 1)], -1)
    return torch.bmm(joined.softmax(-1)[..., :-1], v)


def crossed_order(q, k, v):
    mask = PADDED[:, None, None]
    first = (q @ k.mT).masked_fill(mask, NINF).softmax(-1)
    second = (k @ q.mT).masked_fill(mask, NINF).softmax(-1)
    late = second @ v
    return first @ v - late


def factor_by_row_of_heads(q, k, v):
    scores = torch.bmm(flat(q), flat(k).mT) * torch.linspace(0.1, 1, 8).view(8, 1, 1)
    return (scores.view(2, 4, 40, 40) + CAUSAL).softmax(-1) @ v


def one_row_of_keys(q, k, v):
    scores = torch.matmul(flat(q), flat(k)[:1].mT).view(2, 4, 40, 40) + CAUSAL
    return torch.matmul(scores.softmax(-1).view(8, 40, 40), flat(v)[:1])


def einsum_one_value_head(q, k, v):
    probabilities = (q @ k.mT).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", probabilities, v[:, :1].transpose(1, 2)).flatten(2)


def below():
    return torch.arange(40)[None] <= torch.arange(40)[:, None]


def zeroed_behind_a_small_fill(fill, factor=1.0):
    def function(q, k, v):
        hidden = ~below()
        return ((q @ k.mT).masked_fill(hidden, fill) * factor).softmax(-1).masked_fill(hidden, 0.0) @ v

    return function


def one_row_of_heads_for_each_batch(q, k, v):
    """[R, N, N] @ [B, R, N, D]: the rows are heads, not batch entries."""
    return (q[0, :2] @ k[0, :2].mT).softmax(-1) @ v[:, :2]


def batch_entries_as_heads_of_the_values(q, k, v):
    return (q[:, :1] @ k[:, :1].mT).softmax(-1).view(2, 40, 40) @ v[:, :2]


def minus_the_transposed_maximum(q, k, v):
    scores = q @ k.mT
    return (scores - scores.amax(-1, keepdim=True).mT).softmax(-1) @ v


def squared_in_place(q, k, v):
    scores = q @ k.mT
    scores.add_(torch.where(below(), 0.0, NINF))
    probabilities = scores.softmax(-1)
    return probabilities @ probabilities


CASES = {
    "zeroed-behind-a-small-fill": zeroed_behind_a_small_fill(-5.0),
    "zeroed-behind-a-fill-by-zero": zeroed_behind_a_small_fill(0.0),
    "zeroed-behind-a-shrunk-fill": zeroed_behind_a_small_fill(-1e9, 1e-9),
    "filled-by-a-number-that-grows": lambda q, k, v: ((q @ k.mT).masked_fill(~below(), -1.0) * 1e9).softmax(-1) @ v,
    "one-row-of-heads-for-each-batch": one_row_of_heads_for_each_batch,
    "batch-entries-as-heads-of-the-values": batch_entries_as_heads_of_the_values,
    "probabilities-split-another-way": lambda q, k, v: (q @ k.mT).softmax(-1).view(4, 2, 1, 40, 40) @ v[0, 0],
    "minus-the-transposed-maximum": minus_the_transposed_maximum,
    "squared-in-place": squared_in_place,
    "softmax-of-an-attention": lambda q, k, v: ((q @ k.mT).softmax(-1) @ v).softmax(-1) @ v[0, 0].mT,
    "written-copy": written_copy,
    "written-copy-by-hand": written_copy_by_hand,
    "base-written-after-the-copy": base_written_after_the_copy,
    "sinks-written-after-the-copy": sinks_written_after_the_copy,
    "negative-scale": lambda q, k, v: (-0.4 * (q @ k.mT)).masked_fill(HIDDEN, NINF).softmax(-1) @ v,
    "zero-scale": lambda q, k, v: (0.0 * (q @ k.mT)).masked_fill(HIDDEN, NINF).softmax(-1) @ v,
    "negative-scale-sdpa": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=~HIDDEN, scale=-0.4),
    "where-as-a-method": lambda q, k, v: (
        (q @ k.mT).masked_fill(EITHER.where(OTHER, True)[:, None, None], NINF).softmax(-1) @ v
    ),
    "scores-where-as-a-method": lambda q, k, v: (q @ k.mT).where(~HIDDEN, NINF).softmax(-1) @ v,
    "scaled-output": scaled_output,
    "into-a-buffer": into_a_buffer,
    "rounded-scale": lambda q, k, v: (q @ k.mT * torch.full((), 0.3, dtype=torch.bfloat16)).softmax(-1) @ v,
    "enlarged-heads": enlarged_heads,
    "enlarged-batch": enlarged_batch,
    "other-split": other_split,
    "sinks-by-query": sinks_by_query,
    "crossed-order": crossed_order,
    "factor-by-row-of-heads": factor_by_row_of_heads,
    "one-row-of-keys": one_row_of_keys,
    "einsum-one-value-head": einsum_one_value_head,
}


@pytest.mark.parametrize("function", CASES.values(), ids=CASES)
def test_computes_what_the_original_computes(function):
    with torch.no_grad():
        capture = rewritten(function, heads(), heads(), heads(), tolerance=2e-5)
    assert not [record.reason for record in capture.records if "the pass failed" in record.reason]


def test_an_upcast_that_is_written_afterwards():
    with torch.no_grad():
        rewritten(upcast_then_written, heads(), heads(), heads(), tolerance=2e-2)


def test_a_buffer_of_the_user_is_written():
    def function(q, k, v, buffer):
        scores = torch.bmm(flat(q), flat(k).mT, out=buffer)
        return torch.bmm(scores.softmax(-1), flat(v)), buffer * 2

    with torch.no_grad():
        rewritten(function, heads(), heads(), heads(), torch.zeros(8, 40, 40))


def test_its_output_lies_in_memory_as_the_original_does():
    def function(q, k, v):
        scores = torch.einsum("...id,...jd->...ij", q, k)
        return torch.einsum("...ij,...jd->...id", scores.softmax(-1), v)

    inputs = heads(), heads()[0], heads()[0]
    with torch.no_grad():
        capture = rewritten(function, *inputs)
        output = torch.compile(function, backend=Capture())(*inputs)
    assert len(capture.calls) == 1
    assert output.stride() == function(*inputs).stride()


def half_numbers_in_single_scores(q, k, v):
    """float16's lowest number hides nothing among scores of float32."""
    scores = (q @ k.mT).float() * 100
    return scores.masked_fill(~below(), torch.finfo(torch.float16).min).softmax(-1).to(q.dtype) @ v


def fully_masked_in_half(q, k, v, padded):
    """float32's lowest number is -inf in float16: a row without any key is zero, and no mean."""
    fill = torch.finfo(torch.float32).min
    return torch.where(padded[:, None, None], fill, q @ k.mT).softmax(-1).nan_to_num() @ v


def test_numbers_that_hide_in_one_dtype():
    q, k, v = (heads(dtype=torch.float16) * factor for factor in (20, 60, 1))
    with torch.no_grad():
        rewritten(half_numbers_in_single_scores, q, k, v, tolerance=1e-2)
        rewritten(fully_masked_in_half, q, k, v, torch.ones(2, 40, dtype=torch.bool), tolerance=1e-2)


def test_values_of_another_dtype_are_named():
    q, k, v = (heads(dtype=torch.float16) for _ in range(3))
    with torch.no_grad():
        capture = rewritten(lambda q, k, v: (q @ k.mT).float().softmax(-1) @ v.float(), q, k, v, tolerance=1e-2)
    assert "query, key and value are torch.float16, torch.float16, torch.float32" in capture.records[0].reason


def test_one_row_of_dynamic_length_by_einsum():
    def function(q, k, v):
        scores = torch.einsum("bhid,bhjd->bhij", q, k)
        return torch.einsum("bhij,bhjd->bihd", scores.softmax(-1), v).flatten(2)

    inputs = [heads(batch=1) for _ in range(3)]
    with torch.no_grad():
        capture = rewritten(function, *inputs, mark=[(x, 2) for x in inputs])
    assert len(capture.calls) == 1


def test_a_failing_rewrite_leaves_the_graph_alone(monkeypatch):
    def function(q, k, v, padded):
        def attend(q):
            return (q @ k.mT).masked_fill(padded[:, None, None], NINF).softmax(-1) @ v

        return attend(attend(q))

    def fail_once(like, call, args, kwargs=None):
        if call is OPERATOR and not failed:
            failed.append(call)
            raise ValueError("no such value")
        return computed(like, call, args, kwargs)

    failed = []
    monkeypatch.setattr(rewrite, "computed", fail_once)
    padded = torch.arange(40).expand(2, -1) > 30
    with torch.no_grad():
        capture = rewritten(function, heads(), heads(), heads(), padded, tolerance=2e-5)
    assert [record.rewritten for record in capture.records] == [False, True]
    assert "the pass failed on it (ValueError: no such value)" in capture.records[0].reason
    assert len(capture.calls) == 1
