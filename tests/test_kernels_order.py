"""Lists made by the GPU's counting sort: the keys that an exact sort would take, in classes that only descend."""

import pytest
import torch

pytest.importorskip("triton")

from s2o_compile.kernels import plan, triton_order
from s2o_compile.kernels.head_slices import heads_together
from s2o_compile.kernels.mask import AttentionMask
from tests.conftest import CUDA, INTERPRETED

LENGTH, SEGMENT = 2200, 512


@pytest.fixture(autouse=True)
def short_lists(monkeypatch):
    """Lists shorter than their prefix at a length the interpreter can bear."""
    monkeypatch.setattr(plan, "MIN_REACH", 256)
    for module in (plan, triton_order):
        monkeypatch.setattr(module, "default_chunk_len", lambda _: 64)


def scores(device, kind):
    generator = torch.Generator().manual_seed(0)
    shape = (2, 2, -(-LENGTH // SEGMENT), LENGTH)
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


def lists(device, kind, *, tau=1.0, key=None, **given):
    mask = AttentionMask(**({"causal": True} | given))
    key = torch.zeros(2, 2, LENGTH, 16, device=device) if key is None else key
    made = scores(device, kind)
    arguments = {"n_queries": LENGTH, "segment_len": SEGMENT, "tau": tau}
    ours = triton_order.order_keys(made.clone(), key, torch.zeros_like(key), mask, **arguments)
    theirs = plan.order_keys(made.clone(), key, torch.zeros_like(key), mask, **arguments)
    return made, mask, ours, theirs


def places(counts):
    return [tuple(place) for place in (counts > 0).nonzero().tolist()]


@pytest.mark.parametrize("device", [INTERPRETED, CUDA])
class TestLists:
    @pytest.mark.parametrize("kind", ["normal", "heavy", "periodic", "ascending", "ties"])
    def test_hold_the_best_keys(self, device, kind, poison_empty):
        made, _, (index, count, prefix), (best, most, in_all) = lists(device, kind)
        assert torch.equal(prefix, in_all)
        assert (count <= most).all()
        for place in places(most):
            ours, theirs = index[place][: count[place]], best[place][: most[place]]
            assert len(ours.unique()) == len(ours)
            assert (ours < place[2] * SEGMENT).all()
            assert len(ours) >= 0.9 * len(theirs)
            worst = made[place][theirs.long()].min()
            good = (made[place][ours.long()] >= worst).float().mean()
            assert good >= 0.9, (place, good)

    @pytest.mark.parametrize("kind", ["normal", "heavy", "periodic", "ascending"])
    def test_descend_from_chunk_to_chunk(self, device, kind):
        made, _, (index, count, _), _ = lists(device, kind)
        for place in places(count):
            ours = made[place][index[place][: count[place]].long()].float()
            # Classes are finest where most tiles stop, and wider than a chunk towards the end.
            for keys, chunk_len in ((ours[: len(ours) // 8], 64), (ours, 256)):
                chunks = [chunk.median() for chunk in keys.split(chunk_len)]
                assert sorted(chunks, reverse=True) == chunks, place

    @pytest.mark.parametrize("given", [{}, {"causal": False}], ids=["causal", "full"])
    def test_are_complete_where_nothing_may_stop(self, device, given):
        _, _, (index, count, prefix), (best, most, _) = lists(device, "normal", tau=0.0, **given)
        assert torch.equal(count, most)
        assert torch.equal(count, prefix[:, None].expand_as(count))
        for place in places(count):
            assert torch.equal(index[place][: count[place]].sort().values, best[place][: most[place]].sort().values)

    def test_leave_padding_out(self, device):
        key_mask = torch.arange(LENGTH, device=device)[None] % torch.tensor([[3], [5]], device=device) != 0
        _, _, (index, count, prefix), (_, most, in_all) = lists(device, "normal", key_mask=key_mask)
        assert torch.equal(prefix, in_all)
        assert (count <= most).all()
        for place in places(count):
            assert key_mask[place[0]][index[place][: count[place]].long()].all()

    @pytest.mark.parametrize("tau", [1.0, 0.0])
    @pytest.mark.parametrize("kind", ["normal", "ties", "two_values", "infinite"])
    def test_start_with_keys_that_hold_nan(self, device, kind, tau):
        """However many keys share the best score: a tile may stop before it has seen them all."""
        key = torch.zeros(2, 2, LENGTH, 16, device=device)
        key[0, 1, 500, 3], key[1, 0, 400, 0] = torch.nan, torch.inf
        _, _, (index, count, _), _ = lists(device, kind, key=key, tau=tau)
        poisoned = {(0, 1): 500, (1, 0): 400}
        for place in places(count):
            if place[:2] in poisoned:
                assert poisoned[place[:2]] == index[place][0], place

    @pytest.mark.parametrize("good", ["poisoned", "better"])
    def test_equals_push_no_better_key_out(self, device, good, monkeypatch):
        """Most keys score the same, and the ones that must be visited stand behind more of them than a list holds."""
        key = torch.zeros(2, 2, LENGTH, 16, device=device)
        made = scores(device, "ties")
        if good == "poisoned":
            key[:, :, 1500] = torch.nan
        else:
            made[..., 1500] = 1.0
        monkeypatch.setattr(f"{__name__}.scores", lambda *_: made)
        _, _, (index, count, prefix), _ = lists(device, "ties", key=key)
        for place in places(count):
            whole = count[place] == prefix[place[0], place[2]]
            assert whole or 1500 in index[place][:64] or place[2] * SEGMENT <= 1500, place
            assert len(index[place][: count[place]].unique()) == count[place]

    def test_are_the_same_twice(self, device):
        first, second = (lists(device, "heavy")[2] for _ in range(2))
        for place in places(first[1]):
            assert torch.equal(first[0][place][: first[1][place]], second[0][place][: second[1][place]])


@pytest.mark.parametrize(
    ("kv_heads", "length", "together"), [(8, 131072, 1), (8, 16384, 8), (3, 65536, 3), (1, 131072, 1)]
)
def test_heads_are_ranked_a_few_at_a_time(kv_heads, length, together):
    key = torch.empty(1, kv_heads, length, 128, dtype=torch.bfloat16, device="meta")
    assert heads_together(key, key, length // plan.default_segment_len(length)) == together
