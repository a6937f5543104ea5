"""Hand-written attention in other ranks, broadcasts and einsums: brought to [B, H, N, D], or left dense."""

import pytest
import torch
from torch.nn import functional as F

from tests.helpers.capture import heads, rewritten

PADDING = torch.arange(40)[None] >= torch.tensor([[40], [30]])
BY_GROUP = torch.arange(40) >= torch.tensor([[[40]], [[30]]])
PER_GROUP = torch.rand(2, 2, 1, 1)
NINF = float("-inf")


def below(length=40):
    return torch.arange(length)[None] <= torch.arange(length)[:, None]


def bias():
    return torch.where(below(), 0.0, NINF)


def hidden(k):
    """Padding [B, 1, 1, Nk], as an input of the attention."""
    return PADDING[: len(k), None, None]


def one_batch_of_keys(q, k, v):
    return (q @ k[:1].transpose(-2, -1) / 4).softmax(-1) @ v[:1]


def one_batch_of_queries(q, k, v):
    return (q[:1] @ k.transpose(-2, -1) / 4).masked_fill(hidden(k), NINF).softmax(-1) @ v


def one_batch_of_values(q, k, v):
    return (q @ k.transpose(-2, -1) / 4 + bias()).softmax(-1) @ v[:1]


def one_query_head(q, k, v):
    return (q[:, :1] @ k.transpose(-2, -1) / 4).softmax(-1) @ v


def lower_rank_of_keys(q, k, v):
    return (q @ k[0].transpose(-2, -1) / 4).softmax(-1) @ v[0]


def matrices(q, k, v):
    return (q[0, 0] @ k[0, 0].T / 4 + bias()).softmax(-1) @ v[0, 0]


def matrix_products(q, k, v):
    return torch.mm(torch.mm(q[0, 0], k[0, 0].t()).softmax(-1), v[0, 0])


def one_head_padded(q, k, v):
    """Scores [B, Nq, Nk] whose mask's first dimension is the batch."""
    q, k, v = q[:, 0], k[:, 0], v[:, 0]
    return (q @ k.transpose(-2, -1)).masked_fill(PADDING[:, None], NINF).softmax(-1) @ v


def grouped(q, k, v):
    """Grouped heads in five dimensions, [B, Hkv, G, N, D]."""
    q = q.unflatten(1, (2, 2))
    k, v = (x[:, :2, None] for x in (k, v))
    scores = (q @ k.transpose(-2, -1) / 4).masked_fill(~below(), NINF)
    return (scores.softmax(-1) @ v).flatten(1, 2)


def grouped_padded(q, k, v):
    q = q.unflatten(1, (2, 2))
    k, v = (x[:, :2, None] for x in (k, v))
    scores = (q @ k.transpose(-2, -1)).masked_fill(PADDING[:, None, None, None], NINF) + bias()
    return (scores.softmax(-1) @ v).flatten(1, 2)


def grouped_scores_split(q, k, v):
    """Grouped queries and keys, masks and values over all heads."""
    k, v = (x[:, :2] for x in (k, v))
    scores = (q.unflatten(1, (2, 2)) @ k[:, :, None].mT).view(2, 4, 40, 40).masked_fill(hidden(k), NINF)
    return scores.softmax(-1).unflatten(1, (2, 2)) @ v[:, :, None]


def flat_values(q, k, v):
    """Scores in four dimensions, values in three."""
    scores = (q @ k.mT).masked_fill(hidden(k), NINF).flatten(0, 1) + bias()
    return torch.bmm(scores.softmax(-1), v.flatten(0, 1)).view(2, 4, 40, 16)


def windows(q, k, v):
    """[B, H, W, N, D]: attention inside windows."""
    q, k, v = (x.reshape(2, 4, 5, 8, 16) for x in (q, k, v))
    return ((q @ k.mT / 4).softmax(-1) @ v).reshape(2, 4, 40, 16)


def einsum_one_key_head(q, k, v):
    scores = torch.einsum("bhid,bjd->bhij", q, k[:, 0]) / 4 + bias()
    return torch.einsum("bhij,bjd->bhid", scores.softmax(-1), v[:, 0])


def einsum_one_key_head_by_length(q, k, v):
    q = q.transpose(1, 2)
    scores = torch.einsum("bqhd,bkd->bhqk", q, k[:, 0])
    return torch.einsum("bhqk,bkd->bqhd", scores.softmax(-1), v[:, 0])


def einsum_grouped(q, k, v):
    q, k, v = q.unflatten(1, (2, 2)), k[:, :2], v[:, :2]
    scores = torch.einsum("bhgid,bhjd->bhgij", q, k) / 4 + bias()
    return torch.einsum("bhgij,bhjd->bhgid", scores.softmax(-1), v).flatten(1, 2)


def einsum_grouped_by_length(q, k, v):
    q, k, v = q.transpose(1, 2).unflatten(2, (2, 2)), k.transpose(1, 2)[:, :, :2], v.transpose(1, 2)[:, :, :2]
    scores = torch.einsum("bqhgd,bkhd->bhgqk", q, k)
    return torch.einsum("bhgqk,bkhd->bqhgd", scores.softmax(-1), v)


def einsum_ellipsis(q, k, v):
    scores = torch.einsum("...qd, ...kd -> ...qk", q, k) / 4 + bias()
    return torch.einsum("...qk,...kd->...qd", scores.softmax(-1), v)


def einsum_ellipsis_inside(q, k, v):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = torch.einsum("...qhd,...khd->...hqk", q, k)
    return torch.einsum("...hqk,...khd->...qhd", scores.softmax(-1), v)


def by_keywords(q, k, v):
    scores = torch.matmul(input=q, other=torch.transpose(k, dim0=-2, dim1=-1))
    scores = torch.where(condition=below(), input=torch.mul(input=scores, other=0.25), other=NINF)
    scores = torch.masked_fill(input=scores, mask=hidden(k), value=NINF)
    return torch.matmul(input=F.softmax(input=scores, dim=-1), other=v)


def methods_by_keywords(q, k, v):
    scores = q.matmul(other=k.mT).masked_fill(mask=~below(), value=NINF)
    return scores.softmax(dim=-1).to(dtype=q.dtype).matmul(other=v)


def fused_by_keywords(q, k, v):
    mask = below()
    return F.scaled_dot_product_attention(query=q, key=k, value=v, attn_mask=mask, dropout_p=0.0, scale=0.3)


def baddbmm_into_zeros(q, k, v):
    q, k = (x.flatten(0, 1) for x in (q, k))
    scores = torch.baddbmm(torch.zeros(8, 40, 40), q, k.transpose(1, 2), beta=1.0, alpha=0.25)
    return (scores.view(2, 4, 40, 40) + bias()).softmax(-1) @ v


def baddbmm_into_an_expanded_mask(q, k, v):
    q, k = (x.flatten(0, 1) for x in (q, k))
    mask = torch.zeros(40, 40).masked_fill(~below(), -1e9).expand(8, -1, -1)
    scores = torch.baddbmm(mask, q, k.transpose(1, 2), beta=1.0, alpha=0.25)
    return scores.view(2, 4, 40, 40).softmax(-1) @ v


REWRITTEN = {
    "baddbmm-expanded-mask": (baddbmm_into_an_expanded_mask, "causal"),
    "one-batch-of-keys": (one_batch_of_keys, "bidirectional"),
    "one-batch-of-queries": (one_batch_of_queries, "bidirectional, key padding"),
    "one-batch-of-values": (one_batch_of_values, "causal"),
    "one-query-head": (one_query_head, "bidirectional"),
    "lower-rank-of-keys": (lower_rank_of_keys, "bidirectional"),
    "matrices": (matrices, "causal"),
    "mm": (matrix_products, "bidirectional"),
    "one-head-padded": (one_head_padded, "bidirectional, key padding"),
    "grouped": (grouped, "causal"),
    "grouped-padded": (grouped_padded, "causal, key padding"),
    "grouped-scores-split": (grouped_scores_split, "bidirectional, key padding"),
    "flat-values": (flat_values, "causal, key padding"),
    "windows": (windows, "bidirectional"),
    "einsum-one-key-head": (einsum_one_key_head, "causal"),
    "einsum-one-key-head-BNHD": (einsum_one_key_head_by_length, "bidirectional"),
    "einsum-grouped": (einsum_grouped, "causal"),
    "einsum-grouped-BNHD": (einsum_grouped_by_length, "bidirectional"),
    "einsum-ellipsis": (einsum_ellipsis, "causal"),
    "einsum-ellipsis-BNHD": (einsum_ellipsis_inside, "bidirectional"),
    "keywords": (by_keywords, "causal, key padding"),
    "methods-keywords": (methods_by_keywords, "causal"),
    "sdpa-keywords": (fused_by_keywords, "causal"),
    "baddbmm-zeros": (baddbmm_into_zeros, "causal"),
}


@pytest.mark.parametrize(("function", "mask"), REWRITTEN.values(), ids=REWRITTEN)
@torch.no_grad()
def test_rewritten(function, mask):
    (record,) = rewritten(function, heads(), heads(), heads()).records
    assert (record.reason, record.mask) == ("", mask)


def test_grouped_keys_are_read_once():
    (record,) = rewritten(grouped, heads(), heads(), heads()).records
    assert (record.query_shape[1], record.key_shape[1]) == ("4", "2")


@pytest.mark.parametrize(
    "function", [one_batch_of_keys, einsum_one_key_head_by_length, einsum_grouped_by_length], ids=lambda f: f.__name__
)
@torch.no_grad()
def test_rewritten_for_every_length(function):
    q, k, v = heads(), heads(), heads()
    capture = rewritten(function, q, k, v, mark=[(x, dim) for x in (q, k, v) for dim in (0, 2)])
    assert [record.reason for record in capture.records] == [""]


def group_factor(q, k, v):
    q = q.unflatten(1, (2, 2))
    return (q @ k[:, :2, None].mT * PER_GROUP).softmax(-1) @ v[:, :2, None]


def mask_by_group(q, k, v):
    """A mask whose second dimension is the groups, not the heads."""
    q = q.unflatten(1, (2, 2))
    return (q @ k[:, :2, None].mT).masked_fill(BY_GROUP, NINF).softmax(-1) @ v[:, :2, None]


def groups_first(q, k, v):
    """[B, G, Hkv, N, D]: query head g * Hkv + h reads key head h, which is not the operator's grouping."""
    q = q.unflatten(1, (2, 2))
    k, v = (x[:, None, :2] for x in (k, v))
    return (q @ k.mT).softmax(-1) @ v


def other_groups_of_values(q, k, v):
    q = q.unflatten(1, (2, 2))
    return (q @ k[:, :2, None].mT).softmax(-1) @ v.unflatten(1, (2, 2))


def padding_as_heads(q, k, v):
    """Scores [B * H, Nq, Nk] under a mask [B * H, 1, Nk]: which head has which row is nobody's knowledge."""
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    scores = (q @ k.mT).masked_fill(PADDING.repeat_interleave(4, 0)[:, None], NINF)
    return (scores.view(2, 4, 40, 40).softmax(-1).view(8, 40, 40)) @ v


def zeroed_in_another_split(q, k, v):
    """The mask runs along the batch of the scores, and along the groups' heads of the probabilities."""
    k, v = (x[:, :2] for x in (k, v))
    scores = (q.unflatten(1, (2, 2)) @ k[:, :, None].mT).view(2, 4, 40, 40).masked_fill(hidden(k), NINF)
    weights = scores.softmax(-1).unflatten(1, (2, 2)).masked_fill(hidden(k), 0.0)
    return weights @ v[:, :, None]


def summed_label(q, k, v):
    scores = torch.einsum("bhid,bhje->bhij", q, k)
    return torch.einsum("bhij,bhjd->bhid", scores.softmax(-1), v)


def baddbmm_into_ones(q, k, v):
    q, k = (x.flatten(0, 1) for x in (q, k))
    scores = torch.baddbmm(torch.ones(8, 40, 40), q, k.transpose(1, 2)).tril()
    return scores.view(2, 4, 40, 40).softmax(-1) @ v


def learned_by_group(q, k, v):
    q = q.unflatten(1, (2, 2))
    return (q @ k[:, :2, None].mT + PER_GROUP).softmax(-1) @ v[:, :2, None]


DENSE = {
    "group-factor": (group_factor, "another split into heads"),
    "learned-by-group": (learned_by_group, "adds numbers to the scores"),
    "mask-by-group": (mask_by_group, "does not fit the scores'"),
    "groups-first": (groups_first, "no common split into heads"),
    "other-groups-of-values": (other_groups_of_values, "key and value differ in shape"),
    "padding-as-heads": (padding_as_heads, "does not fit the scores'"),
    "zeroed-in-another-split": (zeroed_in_another_split, "behind the softmax"),
    "baddbmm-ones": (baddbmm_into_ones, "(tril) stands between"),
}


@pytest.mark.parametrize(("function", "reason"), DENSE.values(), ids=DENSE)
@torch.no_grad()
def test_left_dense(function, reason):
    capture = rewritten(function, heads(), heads(), heads())
    assert [record.rewritten for record in capture.records] == [False]
    assert reason in capture.records[0].reason


def test_an_einsum_that_sums_more_is_no_product_of_queries_and_keys():
    assert rewritten(summed_label, heads(), heads(), heads()).records == []


def test_fused_attention_reads_one_batch_of_keys_for_all():
    def function(q, k, v):
        return F.scaled_dot_product_attention(q, k[:1], v[:1], attn_mask=~hidden(q))

    (record,) = rewritten(function, heads(), heads(), heads()).records
    assert (record.reason, record.mask, record.key_shape[0]) == ("", "bidirectional, key padding", "2")


def test_fused_attention_with_other_batches_of_keys_is_torchs_to_refuse():
    def function(q, k, v):
        return F.scaled_dot_product_attention(q, k, v.expand(2, 4, 40, 16))

    (record,) = rewritten(function, heads(batch=2), heads(batch=2), heads(batch=1)).records
    assert record.rewritten
