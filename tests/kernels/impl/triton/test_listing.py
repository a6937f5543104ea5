"""Lists of launches: what runs beside what, and the memory that all of them share."""

import itertools
import random
from contextlib import nullcontext

import pytest

pytest.importorskip("triton")

import torch

from s2o_compile.kernels.impl.triton import direct, listing
from s2o_compile.kernels.impl.triton.listing import Listing, Place, Step, overlap

INPUTS = 3


def step(slots, turn=None, *, is_aside=False):
    """A launch that uses these slots."""
    places = [Place(number, slot, 0) for number, slot in enumerate(slots)]
    return Step(None, (1,), [], places, [], {}, turn, is_aside=is_aside)


def waited_for(steps, number):
    """What has ended when a step begins, by the streams, their forks and joins."""
    here, there = [], []  # under way on the stream, and on the other one
    seen_by_other, seen = set(), set()
    for at, one in enumerate(steps):
        if one.waits & direct.JOIN:
            seen |= {*there} | seen_by_other
        if one.waits & direct.FORK:
            seen_by_other |= {*here} | seen
        if at == number:
            break
        (there if one.is_beside else here).append(at)
    return seen_by_other | {*there} if steps[number].is_beside else seen | {*here}


def test_what_is_aside_runs_beside_all_that_needs_none_of_it():
    moments, solve = step([0, 3], is_aside=True), step([3, 4], is_aside=True)
    flags, pack, samples, score, output = step([0, 1, 5]), step([4, 6]), step([2, 7]), step([5, 6, 8]), step([7, 8, 9])
    steps, window = overlap([moments, solve, flags, pack, samples, score, output], INPUTS)
    assert steps == [moments, solve, flags, samples, pack, score, output]
    assert [x.is_beside for x in steps] == [True, True, *[False] * 5]
    assert [x.waits for x in steps] == [direct.FORK, 0, 0, 0, direct.JOIN, 0, 0]
    assert window == range(4)


@pytest.mark.parametrize("steps", [[[3], [3, 4]], [[3]], []], ids=["all need it", "nothing else", "no launch"])
def test_nothing_is_moved_for_nothing(steps):
    steps = [step(slots, is_aside=not number) for number, slots in enumerate(steps)]
    assert overlap(steps, INPUTS) == (steps, range(0))
    assert not any(x.is_beside or x.waits for x in steps)


class Kernel:
    arg_names = ("a", "b", "c")


RESULTS = 2
OWN = INPUTS + RESULTS  # slots from here on are pieces of the workspace


def random_list(rng):
    """A list of launches on the call's tensors, on memory of all slices, and on memory of one."""
    made, common = Listing([torch.empty(64) for _ in range(OWN)], INPUTS), []

    def use(memory):
        chosen = []
        for _ in Kernel.arg_names:
            if rng.random() < 0.4:
                chosen.append(rng.choice([*made.tensors, *made.tensors[:INPUTS]]))
            elif rng.random() < 0.5 and memory:
                chosen.append(rng.choice(memory))
            else:
                chosen.append(torch.empty(rng.choice([1, 10, 300, 5000]), device="meta"))
                memory.append(chosen[-1])
        made.add(Kernel(), (1,), chosen, {})

    with made.writing():
        for is_aside, most in ((False, 3), (True, 3), (False, 8), (True, 1), (False, 3)):
            with listing.aside() if is_aside else nullcontext():
                for _ in range(rng.randrange(most + 1)):
                    use(common)
        for number in range(rng.choice([0, 1, 2, 5])):
            own = []
            with made.turn(number):
                for _ in range(rng.randrange(1, 4)):
                    use(own if rng.random() < 0.6 else common)
    return made


@pytest.mark.parametrize("event", [True, False], ids=["two streams", "one"])
@pytest.mark.parametrize("seed", range(6))
def test_launches_under_way_need_and_overwrite_nothing_of_each_other(seed, event):
    rng = random.Random(seed)
    for _ in range(50):
        made = random_list(rng)
        order, written = {id(one): n for n, one in enumerate(made.steps)}, [[*one.places] for one in made.steps]
        launches = made.finish()
        steps = [*launches.common, *launches.slices]
        assert {*map(id, steps)} == {*order}
        if not event:
            for one in steps:
                one.is_beside, one.waits = False, 0
        slots, offsets = [], {}
        for one in steps:
            before = written[order[id(one)]]
            slots.append({place.slot for place in before if place.slot >= INPUTS})
            for old, new in zip(before, one.places, strict=True):
                if old.slot >= OWN:
                    assert offsets.setdefault(old.slot, new.offset - old.offset) == new.offset - old.offset
        ended = [waited_for(steps, number) for number in range(len(steps))]

        for one, other in itertools.combinations(range(len(steps)), 2):
            if slots[one] & slots[other]:
                assert order[id(steps[one])] < order[id(steps[other])]
                turns = {steps[one].turn, steps[other].turn}  # slices see to it that they write apart
                assert one in ended[other] or (len(turns) == 2 and None not in turns)
        users = {slot: [n for n, found in enumerate(slots) if slot in found] for slot in offsets}
        for one, other in itertools.combinations(offsets, 2):
            ends = [offsets[slot] + made._pieces[slot].size for slot in (one, other)]
            if offsets[one] < ends[1] and offsets[other] < ends[0]:  # one memory: all of one, then all of the other
                assert any(
                    all(a != b and a in ended[b] for a in users[first] for b in users[last])
                    for first, last in ((one, other), (other, one))
                )


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_memory_of_what_is_aside_is_no_other_one_s_meanwhile(turns):
    """Its memory would be free for the launch behind its last one on the same stream."""
    list_of = Listing([torch.zeros(4), torch.zeros(4)], 1)
    list_of.device = torch.device("cpu")

    def use(*tensors):
        list_of.add(Kernel(), (1,), [*tensors, *[0] * (3 - len(tensors))], {})

    query, output = list_of.tensors
    parts, basis, flags, more, few, scores = (torch.empty(100 + n, device="meta") for n in range(6))
    list_of.is_aside = True
    use(query, parts)
    use(parts, basis)
    list_of.is_aside = False
    use(query, flags)
    use(query, more)
    for number in range(turns):
        with list_of.turn(number):
            use(basis, few)
            use(few, flags, scores)
            use(scores, more, output)
    launches = list_of.finish()
    assert launches.streams == 2
    steps = [*launches.common, *launches.slices]
    assert [x.is_beside for x in steps[:4]] == [True, True, False, False]
    assert steps[4].waits == (direct.JOIN if turns == 1 else direct.JOIN | direct.FORK)
    begins = [next(p.offset for p in x.places if p.slot == 2 and p.argument == 1) for x in steps[:4]]
    assert len({*begins}) == 4, "parts, basis, flags and more lie apart"
    sizes = (400, 404, 408, 412)
    for (a, size), (b, other) in itertools.combinations(zip(begins, sizes, strict=True), 2):
        assert a + size <= b or b + other <= a


def test_memory_in_use_at_the_same_time_never_overlaps():
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        numbers = torch.randint(0, 12, (12, 3), generator=generator).tolist()
        pieces = {
            slot: listing.Piece(1 + 100 * size, None, min(one, other), max(one, other))
            for slot, (size, one, other) in enumerate(numbers)
        }
        for last in (None, 8):
            offsets, size = listing._lay_out(pieces, last)
            assert size >= max(offsets[slot] + piece.size for slot, piece in pieces.items())
            for slot, piece in pieces.items():
                assert offsets[slot] % listing.ALIGNED == 0
                for other, beside in pieces.items():
                    ends = [(x.last if last is None or x.last < last else 99) for x in (piece, beside)]
                    if other < slot and piece.first <= ends[1] and beside.first <= ends[0]:
                        begins = sorted([(offsets[slot], piece.size), (offsets[other], beside.size)])
                        assert begins[0][0] + begins[0][1] <= begins[1][0]
