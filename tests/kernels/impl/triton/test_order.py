"""Lists made by the GPU's counting sort: the keys that an exact sort would take, in classes that only descend."""

import functools
import itertools

import pytest
import torch

pytest.importorskip("triton")

from s2o_compile.kernels.core import plan
from s2o_compile.kernels.core.mask import AttentionMask
from s2o_compile.kernels.impl.triton import order as triton_order
from tests.conftest import CUDA, INTERPRETED

LENGTH, SEGMENT = 2200, 512


def n_heads(device):
    """Interpreted, a head takes seconds."""
    return 2 if device == "cuda" else 1


def scores(device, kind):
    generator = torch.Generator().manual_seed(0)
    shape = (2, n_heads(device), -(-LENGTH // SEGMENT), LENGTH)
    x = {
        "normal": lambda: torch.randn(shape, generator=generator),
        "heavy": lambda: torch.randn(shape, generator=generator).exp() ** 3,
        "periodic": lambda: torch.arange(LENGTH).expand(shape) % 8 + torch.rand(shape, generator=generator) / 4,
        "ascending": lambda: torch.arange(LENGTH).expand(shape) / LENGTH,
        "ties": lambda: torch.zeros(shape),
        "two_values": lambda: (torch.rand(shape, generator=generator) < 0.3).float(),
        "infinite": lambda: torch.full(shape, torch.inf),
    }[kind]()
    return x.to(device, torch.float16)


def rankings(device, kind, *, key=None, **given):
    mask = AttentionMask(**({"causal": True} | given))
    key = torch.zeros(2, n_heads(device), LENGTH, 16, device=device) if key is None else key
    made = scores(device, kind)
    ours, theirs = (
        order_keys(made.clone(), non_finite(key, torch.zeros_like(key)), mask, n_queries=LENGTH, segment_len=SEGMENT)
        for order_keys, non_finite in (
            (triton_order.order_keys, triton_order.find_non_finite),
            (plan.order_keys, plan.non_finite_keys),
        )
    )
    return made, ours, theirs


@functools.cache
def causal_rankings(device, kind):
    return rankings(device, kind)


def each(index, count):
    """Every ranking with its place, empty ones left out."""
    for b, h, segment in itertools.product(*map(range, index.shape[:3])):
        if count[b, segment] > 0:
            yield (b, h, segment), index[b, h, segment, : count[b, segment]].long()


SLOW = functools.partial(pytest.param, marks=pytest.mark.slow)
"""Of a kind whose rankings take seconds in the interpreter."""

KINDS = ("normal", "heavy", "periodic", SLOW("ascending"))


@pytest.mark.parametrize("device", [INTERPRETED, CUDA])
class TestLists:
    @pytest.mark.parametrize("given", [{}, SLOW({"causal": False}), {"padded": True}], ids=["causal", "full", "padded"])
    def test_hold_every_prefix_key_once(self, device, given, poison_empty):
        given = dict(given)
        if given.pop("padded", False):
            every = torch.arange(LENGTH, device=device)[None]
            given["key_mask"] = every % torch.tensor([[3], [5]], device=device) != 0
        _, (index, count), (best, expected) = rankings(device, "normal", **given)
        assert torch.equal(count, expected)
        for (place, ours), (_, theirs) in zip(each(index, count), each(best, count), strict=True):
            assert torch.equal(ours.sort().values, theirs.sort().values), place

    @pytest.mark.parametrize("kind", KINDS)
    def test_begin_with_the_best_keys(self, device, kind):
        made, (index, count), (best, _) = causal_rankings(device, kind)
        for (place, ours), (_, theirs) in zip(each(index, count), each(best, count), strict=True):
            for part in (len(ours) // 8, len(ours) // 2):
                worst = made[place][theirs[:part]].min()
                assert (made[place][ours[:part]] >= worst).float().mean() >= 0.85, (place, part)

    @pytest.mark.parametrize("kind", KINDS)
    def test_descend_from_chunk_to_chunk(self, device, kind):
        made, (index, count), _ = causal_rankings(device, kind)
        for place, ours in each(index, count):
            ordered = made[place][ours].float()
            # Classes are finest where most tiles stop, and wider than a chunk towards the end.
            for keys, chunk_len in ((ordered[: len(ordered) // 8], 64), (ordered, 256)):
                chunks = [chunk.median() for chunk in keys.split(chunk_len)]
                assert sorted(chunks, reverse=True) == chunks, place

    @pytest.mark.parametrize("kind", [SLOW("normal"), "ties", "two_values", SLOW("infinite")])
    def test_start_with_keys_that_hold_nan(self, device, kind):
        """However many keys share the best score: a tile may stop before it has seen them all."""
        last = n_heads(device) - 1
        key = torch.zeros(2, last + 1, LENGTH, 16, device=device)
        key[0, last, 500, 3], key[1, 0, 400, 0] = torch.nan, torch.inf
        _, (index, count), _ = rankings(device, kind, key=key)
        non_finite = {(0, last): 500, (1, 0): 400}
        for place, ours in each(index, count):
            if place[:2] in non_finite:
                assert ours[0] == non_finite[place[:2]], place

    def test_a_better_key_stands_before_equals(self, device, monkeypatch):
        made = scores(device, "ties")
        made[..., 1500] = 1.0
        monkeypatch.setattr(f"{__name__}.scores", lambda *_: made)
        _, (index, count), _ = rankings(device, "ties")
        for place, ours in each(index, count):
            assert 1500 in ours[:64] or place[2] * SEGMENT <= 1500, place

    def test_are_the_same_twice(self, device):
        (first, count), (second, _) = (made(device, "heavy")[1] for made in (causal_rankings, rankings))
        for (_, one), (place, other) in zip(each(first, count), each(second, count), strict=True):
            assert torch.equal(one, other), place

    @pytest.mark.parametrize("lane_keys", [128, 8], ids=["few programs a row", "many"])
    def test_depend_on_their_own_prefix_alone(self, device, lane_keys, monkeypatch):
        monkeypatch.setattr(triton_order, "LANE_KEYS", lane_keys)
        made, key = scores(device, "normal"), torch.zeros(2, n_heads(device), LENGTH, 16, device=device)
        flags = triton_order.find_non_finite(key, key)
        (index, count), (cut_index, cut_count) = (
            triton_order.order_keys(
                made[:, :, : -(-length // SEGMENT), :length].contiguous(), flags[:, :, :length].contiguous(),
                AttentionMask(causal=True), n_queries=length, segment_len=SEGMENT,
            )
            for length in (LENGTH, 3 * SEGMENT)
        )  # fmt: skip
        assert torch.equal(cut_count, count[:, :3])
        for place, ours in each(cut_index, cut_count):
            assert torch.equal(ours, index[place][: len(ours)].long()), place
            assert torch.equal(ours.sort().values, torch.arange(len(ours), device=device)), place
