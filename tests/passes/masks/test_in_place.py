"""Masks written in place: read like functions where nobody sees what lies between, else left alone."""

import pytest
import torch

from s2o_compile.passes.graph.rejected import Rejected
from tests.helpers.masks import capture, k_index, q_index, visible

INF, MIN = float("-inf"), torch.finfo(torch.float32).min


def causal(q, k):
    return k_index(k) <= q_index(q)


def near(q, k):
    return k_index(k) > q_index(q) - 4


def and_(q, k):
    mask = causal(q, k)
    mask &= near(q, k)
    return mask


def and_methods(q, k):
    mask = torch.ones(q, k, dtype=torch.bool)
    mask.logical_and_(causal(q, k))
    mask.bitwise_and_(near(q, k))
    return mask


def times(q, k):
    mask = causal(q, k)
    mask *= near(q, k)
    return mask[None, None].expand(2, 1, q, k)


def masked_fill(q, k):
    mask = torch.ones(q, k, dtype=torch.bool)
    mask.masked_fill_(~causal(q, k), False)
    return mask.masked_fill_(~near(q, k), False)


def inverted(q, k):
    hidden = ~causal(q, k)
    hidden |= ~near(q, k)
    return ~hidden


def set_by_condition(q, k):
    mask = torch.ones(q, k, dtype=torch.bool)
    mask[~causal(q, k)] = False
    mask[~near(q, k)] = False
    return mask


def set_whole(q, k):
    mask = torch.zeros(q, k, dtype=torch.bool)
    mask[...] = causal(q, k)
    mask[:, :] &= near(q, k)
    return mask


def set_all(q, k):
    mask = torch.empty(q, k, dtype=torch.bool)
    mask[:] = causal(q, k) & near(q, k)
    return mask


def triangle(q, k):
    mask = torch.ones(q, k, dtype=torch.bool)
    mask.tril_()
    mask &= near(q, k)
    return mask


def float_fill(q, k):
    mask = torch.zeros(q, k)
    mask.masked_fill_(~causal(q, k), INF)
    mask.masked_fill_(~near(q, k), INF)
    return mask


def float_sum(q, k):
    mask = torch.full((q, k), INF).triu_(1)
    mask += torch.where(near(q, k), 0.0, INF)
    return mask


def float_times(q, k):
    mask = torch.full((q, k), MIN)
    mask *= ~(causal(q, k) & near(q, k)) | (k_index(k) < 0)
    return mask


READABLE = (
    and_, and_methods, times, masked_fill, inverted, set_by_condition, set_all, triangle, float_fill, float_sum,
    float_times,
)  # fmt: skip


@pytest.mark.parametrize("mask_of", READABLE)
def test_writes_to_a_whole_tensor_are_read(mask_of):
    proof, symbols = capture(mask_of)
    assert not isinstance(proof, Rejected), proof
    assert str(proof) == "causal, offset 0, window 4"
    for lengths in ((6, 11), (7, 7), (3, 14)):
        mask = mask_of(*lengths)
        mask = mask if mask.dtype is torch.bool else mask == 0
        assert torch.equal(visible(proof, symbols, lengths)[0, 0].expand(mask.shape), mask)


def part_of_a_row(q, k):
    mask = causal(q, k)
    mask[0] = True
    return mask


def through_a_view(q, k):
    mask = torch.ones(q, k, dtype=torch.bool)
    mask.view(-1)[:3].fill_(False)
    return mask & causal(q, k)


def view_taken_before(q, k):
    mask = torch.ones(q, k, dtype=torch.bool)
    seen = mask[None, None]
    mask &= causal(q, k)
    return seen


def read_before_the_write(q, k):
    mask = causal(q, k)
    before = mask & near(q, k)
    mask |= ~near(q, k)
    return before & mask


def read_between(q, k):
    mask = causal(q, k)
    mask &= near(q, k)
    before = ~mask
    mask.fill_(True)
    return mask & ~before


def written_by_itself(q, k):
    mask = causal(q, k)
    mask &= ~mask
    return mask


def cast_without_a_copy(q, k):
    mask = torch.ones(q, k, dtype=torch.bool)
    same = mask.to(torch.bool).contiguous()
    mask &= causal(q, k)
    return same


def an_input(q, k, mask):
    mask &= causal(q, k)
    return mask


def an_input_seen_elsewhere(q, k, mask):
    other = mask.view(q, k)
    other &= causal(q, k)
    return mask


def out_argument(q, k):
    mask = torch.ones(q, k, dtype=torch.bool)
    torch.logical_and(causal(q, k), near(q, k), out=mask)
    return mask


def a_number_that_is_cut(q, k):
    mask = torch.ones(q, k, dtype=torch.int64)
    mask[...] = causal(q, k) * 0.5
    return mask.bool()


def gated_afterwards(q, k, gate):
    mask = causal(q, k)
    mask &= gate
    return mask


FIVE_BY_NINE = torch.ones(5, 9, dtype=torch.bool)
NOT_READABLE = {
    part_of_a_row: (),
    through_a_view: (),
    view_taken_before: (),
    read_before_the_write: (),
    read_between: (),
    written_by_itself: (),
    cast_without_a_copy: (),
    an_input: (FIVE_BY_NINE,),
    an_input_seen_elsewhere: (FIVE_BY_NINE,),
    out_argument: (),
    a_number_that_is_cut: (),
    gated_afterwards: (torch.tensor(True),),
    set_whole: (),
}


@pytest.mark.parametrize(("mask_of", "extra"), NOT_READABLE.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_all_other_writes_are_left_alone(mask_of, extra):
    proof, _ = capture(mask_of, *(tensor.clone() for tensor in extra), dynamic=not extra)
    assert isinstance(proof, Rejected), str(proof)
    assert "not proven" in proof.reason
