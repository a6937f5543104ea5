"""Masks that the prover rejects, each for the right reason."""

import pytest
import torch

from s2o_compile.passes.graph.rejected import Rejected
from tests.helpers.masks import capture, k_index, q_index

INF = float("-inf")


def in_place_and(q, k):
    mask = k_index(k) <= q_index(q)
    mask &= k_index(k) > 1
    return mask


def set_item(q, k):
    mask = k_index(k) <= q_index(q)
    mask[:, 0] = False
    return mask


def moved_index(q, k):
    index = torch.arange(k)
    index += 1
    return index[None] <= q_index(q)


def filled(q, k):
    mask = torch.ones(q, k, dtype=torch.bool)
    mask.fill_(False)
    return mask


def triangle_of_a_changed_tensor(q, k):
    ones = torch.ones(q, k, dtype=torch.bool)
    ones[0] = False
    return ones.tril()


def padding_written_later(q, k, pad):
    keep = pad.clone()
    mask = (k_index(k) <= q_index(q)) & keep[:, None, None]
    keep.fill_(True)
    return mask


def changed_distance(q, k):
    distance = abs(q_index(q) - k_index(k))
    distance += 1
    return distance <= 2


def learned():
    """Causal by its values, but values may change."""
    return torch.tril(torch.ones(5, 9)).bool()


PAD = torch.tensor([[False] * 4 + [True] * 5, [True] * 9])
REJECTED = {
    "future": (lambda q, k: k_index(k) >= q_index(q), (), "no keys after the query"),
    "union": (lambda q, k: (k_index(k) <= q_index(q)) | (k_index(k) < 2), (), "union of masks"),
    "negated-intersection": (lambda q, k: ~((k_index(k) > 3) & (k_index(k) > q_index(q))), (), "union of masks"),
    "not-equal": (lambda q, k: k_index(k) != q_index(q), (), "union of masks"),
    "far-keys": (lambda q, k: abs(q_index(q) - k_index(k)) >= 2, (), "union of masks"),
    "distance-of-a-changed-tensor": (changed_distance, (), "changed in place"),
    "chunks-left-padded": (
        lambda q, k, pad: (k_index(k) - pad[:, None, None, None]) // 4 == (q_index(q) - pad[:, None, None, None]) // 4,
        (torch.zeros(2, dtype=torch.long),),
        "chunked attention",
    ),
    "chunks-not-causal": (
        lambda q, k: (k_index(k) // 4 == q_index(q) // 4).expand(q, k),
        (),
        "without a causal mask of the same offset",
    ),
    "chunks-of-another-offset": (
        lambda q, k: (k_index(k) // 4 == q_index(q) // 4) & (k_index(k) <= q_index(q) + (k - q)),
        (),
        "without a causal mask of the same offset",
    ),
    "chunks-shifted": (
        lambda q, k: ((k_index(k) + 1) // 4 == (q_index(q) + 1) // 4) & (k_index(k) <= q_index(q)),
        (),
        "counts its chunks from position 1",
    ),
    "chunks-of-two-lengths": (
        lambda q, k: (k_index(k) // 4 == q_index(q) // 5) & (k_index(k) <= q_index(q)),
        (),
        "chunks of 4 keys with chunks of 5",
    ),
    "chunks-and-chunks": (
        lambda q, k: (
            (k_index(k) // 4 == q_index(q) // 4) & (k_index(k) // 6 == q_index(q) // 6) & (k_index(k) <= q_index(q))
        ),
        (),
        "chunks of different lengths",
    ),
    "chunks-of-queries": (
        lambda q, k: (q_index(q) // 4 == q_index(q) // 4) & (k_index(k) <= q_index(q)),
        (),
        "chunks of other things",
    ),
    "chunks-of-floats": (
        lambda q, k: (k_index(k).float() // 4 == q_index(q).float() // 4) & (k_index(k) <= q_index(q)),
        (),
        "varies along queries",
    ),
    "chunks-before": (
        lambda q, k: (k_index(k) // 4 <= q_index(q) // 4).expand(q, k),
        (),
        "only a comparison of two",
    ),
    "strided": (lambda q, k: 2 * k_index(k) <= q_index(q), (), "neither a causal bound nor a sliding window"),
    "anti-diagonal": (lambda q, k: k_index(k) + q_index(q) <= k, (), "varies along queries and keys"),
    "first-keys": (lambda q, k: (k_index(k) < 3).expand(q, k), (), "varies along keys"),
    "window-without-causal": (lambda q, k: k_index(k) > q_index(q) - 3, (), "no keys after the query"),
    "empty-window": (lambda q, k: (k_index(k) <= q_index(q)) & (k_index(k) > q_index(q)), (), "may be empty"),
    "tightest-unknown": (
        lambda q, k: (k_index(k) <= q_index(q) + 3) & (k_index(k) <= q_index(q) + (k - q)),
        (),
        "tightest depends on the lengths",
    ),
    "head-dependent": (
        lambda q, k: k_index(k) <= q_index(q) + torch.arange(4)[:, None, None],
        (),
        "varies along heads",
    ),
    "batch-dependent": (
        lambda q, k: k_index(k) <= q_index(q) + torch.arange(2)[:, None, None, None],
        (),
        "varies along batch entries",
    ),
    "false": (lambda q, k: torch.zeros(q, k, dtype=torch.bool), (), "False everywhere"),
    "learned": (lambda q, k, mask: mask, (learned(),), "values of the graph input"),
    "learned-expanded": (lambda q, k, mask: mask[None, None].expand(2, 1, 5, 9), (learned(),), "varies along queries"),
    "gated": (
        lambda q, k, gate: (k_index(k) <= q_index(q)) & gate,
        (torch.tensor(True),),
        "does not vary along the keys",
    ),
    "position-ids": (
        lambda q, k, position_ids: k_index(k) <= position_ids[:, :, None][:, None],
        (torch.arange(5).expand(2, 5),),
        "values of the graph input",
    ),
    "cache-position": (
        lambda q, k, start: k_index(k) <= q_index(q) + start,
        (torch.tensor(4),),
        "values of the graph input",
    ),
    "query-padding": (lambda q, k, pad: pad[:, None, :5, None].expand(2, 1, 5, 9), (PAD,), "varies along queries"),
    "padding-by-head": (lambda q, k, pad: pad[None, :, None].repeat(1, 2, 1, 1), (PAD,), "varies along heads"),
    "in-place-and": (in_place_and, (), "varies along keys"),
    "set-item": (set_item, (), "changed in place by setitem"),
    "moved-index": (moved_index, (), "changed in place by"),
    "filled": (filled, (), "False everywhere"),
    "triangle-of-a-changed-tensor": (triangle_of_a_changed_tensor, (), "changed in place by setitem"),
    "padding-written-later": (padding_written_later, (PAD,), "changed in place by fill_"),
    "float-bias": (lambda q, k: torch.where(k_index(k) <= q_index(q), 0.0, -1.0), (), "adds numbers to the scores"),
    "alibi-in-one-dimension": (
        lambda q, k, slopes: (slopes[:, None] * torch.arange(9)).view(2, 4, 1, 9).reshape(8, 1, 9).view(2, 4, 1, 9),
        (torch.ones(8),),
        "ALiBi and other position biases",
    ),
    "alibi": (lambda q, k: (k_index(k) - q_index(q)).float(), (), "ALiBi and other position biases"),
    "float-input": (lambda q, k, bias: bias, (torch.zeros(5, 9),), "let the model make its mask"),
    "finite-half": (
        lambda q, k: (
            torch.zeros(q, k).half().masked_fill(k_index(k) >= q_index(q), torch.finfo(torch.half).min).float()
        ),
        (),
        "rows without any key",
    ),
    "where-twos": (lambda q, k: torch.where(k_index(k) <= q_index(q), 2, 0) == 1, (), "varies along queries"),
    "visible-minus-inf": (lambda q, k: torch.where(k_index(k) <= q_index(q), INF, 0.0), (), "no keys"),
    "minus-one-of-uint8": (
        lambda q, k: ((k_index(k) <= q_index(q)).to(torch.uint8) - 1) * 1e9,
        (),
        "adds numbers to the scores",
    ),
    "bits-above-a-number-that-rounds-to-one": (
        lambda q, k: ~((k_index(k) > q_index(q)).bfloat16() > 0.999),
        (),
        "is the same everywhere",
    ),
    "integer-bits-above-a-number-that-rounds-to-one": (
        lambda q, k: ~((k_index(k) > q_index(q)).long() > 0.9999999999),
        (),
        "is the same everywhere",
    ),
    "bits-from-a-number-on-that-rounds-to-zero": (
        lambda q, k: (k_index(k) <= q_index(q)).half() >= 1e-9,
        (),
        "only int64 and int32 count exactly",
    ),
    "rounded-fill": (lambda q, k: torch.full((q, k), 0.5, dtype=torch.float32).long().bool(), (), "rounds"),
}


@pytest.mark.parametrize(("mask_of", "extra", "why"), REJECTED.values(), ids=REJECTED)
def test_rejected_masks_say_why(mask_of, extra, why):
    dynamic = not any(tensor.ndim for tensor in extra)
    proof, _ = capture(mask_of, *extra, dynamic=dynamic)
    assert isinstance(proof, Rejected), str(proof)
    assert why in proof.reason


def test_a_mask_made_for_one_length_is_proven_for_that_length_only():
    fixed, symbols = capture(lambda q, k: torch.arange(9)[None] <= torch.arange(5)[:, None], dynamic=False)
    assert str(fixed) == "causal, offset 0"
    assert symbols == (5, 9)


def test_a_run_time_number_as_offset_is_rejected():
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        proof, _ = capture(lambda q, k, start: k_index(k) <= q_index(q) + (start + 1).item(), torch.tensor(3))
    assert isinstance(proof, Rejected)
    assert "computed at run time" in proof.reason
