"""Prepared calls: the launches of a call planned anew, on its own memory, and none that was compiled for another."""

import pytest
import torch

pytest.importorskip("triton")

from s2o_compile.kernels import prepared, schedule
from s2o_compile.kernels.core import tuned
from s2o_compile.kernels.core.call import FIELDS
from s2o_compile.kernels.core.mask import AttentionMask
from s2o_compile.kernels.core.result import empty_result
from s2o_compile.kernels.impl.triton import listing
from s2o_compile.kernels.pages.prefill_cache import PrefillCache
from s2o_compile.kernels.pages.table import Pages
from tests.helpers.prepared_calls import LENGTH, PADDED, call_of, moved, options_of, run


def comparable(launch, own):
    """A launch with addresses for the call's own tensors, and dtypes for those of a workspace."""
    name, grid, arguments, options = launch
    ends = [(x.untyped_storage().data_ptr(), x.untyped_storage().nbytes()) for x in own]
    shown = []
    for x in arguments:
        if isinstance(x, torch.Tensor):
            inside = any(begin <= x.data_ptr() < begin + size for begin, size in ends)
            x = (x.dtype, x.data_ptr() if inside else None)
        shown.append(x)
    return name, grid, shown, options


CASES = {
    "default": ({}, {}),
    "cross": ({"mask": AttentionMask()}, {}),
    "padded": ({"mask": AttentionMask(causal=True, key_mask=PADDED)}, {"error": 0.05}),
    "budget": ({"unread_rows": ~PADDED, "sinks": torch.zeros(4)}, {"error": 0.05}),
    "taus by head": ({}, {"tau": (0.1, 0.2, 0.3, 0.4), "error": 0.02}),
    "softcap": ({"softcap": 30.0}, {"tau": (0.1, 0.2, 0.3, 0.4)}),
    "wide values": ({}, {"tau": 0.5}),
    "mean query": ({}, {"ranking": "mean_query"}),
    "marked head": ({"dense_heads": [1], "return_lse": True}, {}),
}


@pytest.mark.parametrize("scratch", [None, 1], ids=["whole", "slices"])
@pytest.mark.parametrize("case", CASES)
def test_a_list_holds_the_launches_of_the_call(case, scratch, launches, monkeypatch):
    if scratch is not None:
        monkeypatch.setattr(schedule, "SCRATCH_BYTES", scratch)
        monkeypatch.setattr(schedule, "SCRATCH_SHARE", 2**40)
    laid_out, lay_out = [], listing._lay_out
    monkeypatch.setattr(
        listing, "_lay_out", lambda *given, **more: laid_out.append((x := lay_out(*given, **more))[1]) or x
    )
    given, options = CASES[case]
    call, options = call_of(**given), options_of(**options)
    if case == "wide values":
        call = call.but(value=torch.randn(2, 2, LENGTH, 300))
    own = [x for x in (*call.tensors, call.mask.key_mask, call.sinks, call.unread_rows) if x is not None]
    result = empty_result(call.query, call.value.shape[3])
    monkeypatch.setattr(schedule, "empty_result", lambda *_: result)
    sides = []
    for _ in range(3):
        launches.clear()
        run(call, options)
        sides.append([comparable(launch, [*own, *result]) for launch in launches])
    assert sides[0]
    assert sorted(map(repr, sides[0])) == sorted(map(repr, sides[1]))
    assert sides[1] == sides[2]
    (kept,) = prepared._lists.values()
    assert kept.count + (case == "marked head") == len(sides[0])
    assert (kept.turns > 1) == (scratch is not None)
    if scratch is not None:  # memory that all slices share comes first, then that of each stream
        workspace = len(tensors_of(call, options.tau_on(call.query.device)))
        places = [(step.is_beside, x) for step in kept.slices for x in step.places if x.slot == workspace]
        own, beside = ([x.offset for on, x in places if on == turn and x.offset >= laid_out[0]] for turn in (0, 1))
        assert max(own) < min(beside) <= max(beside) < kept.size


@pytest.mark.parametrize("case", ["own rankings", "chunks of a prefill"])
def test_other_work_than_launches_is_never_left_out(case, launches):
    own = case == "own rankings"
    for _ in range(3):
        launches.clear()
        run(call_of(kept=None if own else PrefillCache()), options_of(tau=0.5, ranking_per="head" if own else "group"))
        assert len(launches) == 16
    assert list(prepared._lists.values()) == ([None] if own else [])


def test_a_call_of_many_slices_is_not_prepared(launches, monkeypatch):
    monkeypatch.setattr(schedule, "SCRATCH_BYTES", 1)
    monkeypatch.setattr(schedule, "SCRATCH_SHARE", 2**40)
    monkeypatch.setattr(listing, "MOST_TURNS", 9)
    for _ in range(3):
        launches.clear()
        run(call_of(), options_of(tau=0.5))
        assert len(launches) == 6 + 10 * 10
    assert list(prepared._lists.values()) == [None]


def pages(length=64):
    return Pages(table=torch.zeros(8, dtype=torch.int32), length=length, page_len=16, page_rows=16, last=7)


CHANGES = {
    "query": [lambda call: call.query[:, :, 1:], lambda call: call.query.half()],
    "key": [lambda call: call.key[:, :, :-1], lambda call: call.key.transpose(1, 2).contiguous().transpose(1, 2)],
    "value": [lambda call: call.value[..., :-1], lambda call: moved(call.value)],
    "mask": [
        lambda call: AttentionMask(), lambda call: AttentionMask(causal=True, offset=1),
        lambda call: AttentionMask(causal=True, key_mask=PADDED),
        lambda call: AttentionMask(causal=True, window=5), lambda call: AttentionMask(causal=True, attention_chunk=5),
    ],
    "scale": [lambda call: 0.5],
    "softcap": [lambda call: 2.0],
    "sinks": [lambda call: torch.zeros(4)],
    "dense_heads": [lambda call: [1]],
    "unread_rows": [lambda call: ~PADDED],
    "pages": [lambda call: pages(), lambda call: pages(63)],
}  # fmt: skip
"""Changes of every field that launches depend on."""
NOT_THEIRS = {"site", "return_lse", "fully_masked", "kept", "lengths"}
"""Fields that they do not depend on. Beside a cache of a prefill, or lengths of the device, nothing is prepared."""


def tensors_of(call, tau):
    return prepared._inputs(call, tau) | empty_result(call.query, 16)._asdict()


def key_of(call, options=None, tau=0.5):
    return prepared._key(call, options or options_of(), tensors_of(call, tau))


def test_a_key_holds_all_that_launches_depend_on():
    assert {*CHANGES} | NOT_THEIRS == FIELDS
    call = call_of()
    calls = [call, *(call.but(**{name: change(call)}) for name, changes in CHANGES.items() for change in changes)]
    keys = [key_of(changed) for changed in calls]
    assert key_of(call_of()) == keys[0]
    others = [options_of(**{name: value}) for name, value in (("tau", 0.1), ("error", 0.1), ("segment_len", 256))]
    keys += [key_of(call, options) for options in others]
    keys += [key_of(call, tau=torch.zeros(4)), key_of(call, tau=moved(torch.zeros(4)))]
    tuned.forget()
    keys.append(key_of(call))
    assert len({*keys}) == len(keys)


def test_a_key_holds_the_device():
    on = [torch.empty(2, 4, LENGTH, 16, device=device) for device in ("cpu", "meta")]
    keys = {key_of(call_of().but(query=query, key=query, value=query)) for query in on}
    assert len(keys) == 2


def test_lists_and_keys_are_kept_in_bounded_number(launches, monkeypatch):
    monkeypatch.setattr(prepared, "KEPT", 2)
    monkeypatch.setattr(prepared, "SEEN", 3)
    for length in (256, 300, 400, 500, 256, 256):
        for _ in range(2):
            run(call_of(length), options_of())
    assert len(prepared._lists) == 2
    assert len(prepared._seen) <= 3
    monkeypatch.setattr(prepared, "LAUNCHES", prepared.newest().count)  # the newest list takes it all
    for _ in range(2):
        run(call_of(300), options_of())
    assert len(prepared._lists) == 1
    monkeypatch.setattr(prepared, "LAUNCHES", 0)  # it is kept all the same
    for _ in range(2):
        run(call_of(400), options_of())
    assert len(prepared._lists) == 1
    monkeypatch.setattr(prepared, "KEPT", 0)
    prepared.forget()
    run(call_of(), options_of())
    assert not prepared._seen
