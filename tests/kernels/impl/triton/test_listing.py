"""Lists of launches: what runs beside what, and the memory that all of them share."""

import itertools
import random

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


def own(step):
    return {place.slot for place in step.places if place.slot >= INPUTS}


def random_steps(rng):
    """Launches of which a few are aside, and slices behind them."""
    aside, slices = rng.randrange(4), rng.choice([0, 3])
    first = rng.randrange(3)
    steps = []
    for number in range(first + aside + 12):
        slots = rng.sample(range(12), rng.randrange(1, 4))
        turn = None if number < first + aside + 9 or not slices else number % 3
        steps.append(step(slots, turn, is_aside=first <= number < first + aside))
    return steps


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


@pytest.mark.parametrize("seed", range(20))
def test_steps_with_memory_in_common_keep_their_order(seed):
    rng = random.Random(seed)
    for _ in range(30):
        steps = random_steps(rng)
        before = {id(one): number for number, one in enumerate(steps)}
        after, _ = overlap(steps, INPUTS)
        assert {*map(id, after)} == {*map(id, steps)}
        common = [one for one in after if one.turn is None]
        for (_, one), (number, other) in itertools.combinations(enumerate(common), 2):
            if own(one) & own(other):
                assert before[id(one)] < before[id(other)]
                assert common.index(one) in waited_for(common, number)


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
