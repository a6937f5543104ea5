"""Calls of the operator that go straight to their launches, and those that never do."""

import pytest
import torch

pytest.importorskip("triton")

from s2o_compile.kernels import ops, prepared
from s2o_compile.kernels.core import tuned
from s2o_compile.kernels.core.call import AttentionCall
from s2o_compile.kernels.core.mask import AttentionMask
from s2o_compile.kernels.core.result import Result, empty_result
from s2o_compile.kernels.impl.triton import direct, listing
from s2o_compile.kernels.observe import observe_attention
from s2o_compile.kernels.statistics import record_calls
from s2o_compile.kernels.support.errors import InputError, NoGradientError
from tests.helpers.prepared_calls import KNOWN, LENGTH, PADDED, UNKNOWN, attend, call_of, moved, options_of


@pytest.mark.parametrize("case", KNOWN)
def test_arguments_that_are_known_go_straight_to_their_launches(case, at_once, monkeypatch):
    call = call_of(**KNOWN[case])
    for _ in range(3):
        attend(call)
    assert len(at_once) == 1  # the first is planned anew, the second written down and compiled
    monkeypatch.setattr(AttentionCall, "of", None)  # nobody looks at the call any more
    counts = []
    monkeypatch.setattr(prepared, "count", counts.append)
    output, lse = attend(call)
    assert counts == ["s2o"]
    assert len(at_once) == 2
    names = [*prepared._inputs(call, 0.5), *Result._fields]
    (*before, _), (*known, workspace) = (bases for bases, *_ in at_once)
    own = [x.data_ptr() for x in prepared._inputs(call, 0.5).values()]
    assert known[: len(own)] == before[: len(own)] == own
    assert known[names.index("output")] == output.data_ptr()
    assert output.stride() == empty_result(call.query, 16).output.stride()
    rows, tiles = 2 * 4 * LENGTH * 4, 2 * 4 * 5 * 4
    size = prepared.newest().size
    if call.return_lse:
        assert known[names.index("lse")] == lse.data_ptr()
        assert lse.shape == (2, 4, LENGTH)
    else:
        assert known[names.index("lse")] == workspace + size
        assert lse.shape == (0,)
    assert known[names.index("computed")] >= workspace + size + rows
    assert known[names.index("computed")] % 16 == 0
    sized = []
    monkeypatch.setattr(listing.Launches, "workspace", lambda self, device, more: sized.append(more) or torch.empty(1))
    attend(call)
    assert known[names.index("computed")] + tiles <= workspace + size + sized[0]
    monkeypatch.setattr(prepared, "KEPT", 0)  # every call is planned anew, this one too
    with pytest.raises(TypeError, match="NoneType"):
        attend(call)


@pytest.mark.parametrize("case", [*UNKNOWN, "strided"])
def test_a_call_that_needs_more_than_launches_never_goes_straight_to_them(case, at_once, monkeypatch):
    call = call_of(**UNKNOWN.get(case, {}))
    if case == "strided":
        call = call.but(value=torch.stack([call.value] * 2, -1)[..., 0])
    looked_at, of = [], AttentionCall.of
    monkeypatch.setattr(AttentionCall, "of", lambda *args, **given: looked_at.append(1) or of(*args, **given))
    for _ in range(5):
        attend(call_of())  # known from its third time on
        attend(call)
    assert len(looked_at) == 2 + 5


@pytest.mark.parametrize("name", ["query", "key", "value", "key_mask"])
def test_a_tensor_that_lies_elsewhere_is_refused_as_ever(name, at_once):
    """Its address would be read as one of the query's device."""
    call = call_of(mask=AttentionMask(causal=True, key_mask=PADDED))
    for _ in range(4):
        attend(call)
    made, tensors = len(at_once), {**call.__dict__, "key_mask": PADDED}
    elsewhere = {**tensors, name: tensors[name].to("meta")}
    with pytest.raises(InputError, match="device of "):
        ops.attention(
            *(elsewhere[each] for each in ("query", "key", "value", "key_mask")),
            causal=True, causal_offset=0, scale=0.25, **options_of(tau=0.5).to_op_kwargs(),
        )  # fmt: skip
    assert len(at_once) == made


OTHER_VALUES = {
    "causal": {"causal": False}, "causal_offset": {"causal_offset": -128}, "scale": {"scale": 0.5},
    "softcap": {"softcap": 20.0}, "window": {"window": 200}, "attention_chunk": {"attention_chunk": 256},
    "sinks": {"sinks": torch.zeros(4)}, "fully_masked": {"fully_masked": "mean"}, "dense_heads": {"dense_heads": [0]},
    "key_mask": {"key_mask": PADDED}, "tau": {"tau": 0.6}, "head_tau": {"tau": None, "head_tau": [0.5] * 4},
    "error": {"error": 0.05}, "min_seq_len": {"min_seq_len": 2 * LENGTH}, "segment_len": {"segment_len": 256},
    "ranking": {"ranking": "mean_query"}, "ranking_per": {"ranking_per": "head"},
    "implementation": {"implementation": "torch"},
}  # fmt: skip
"""Every argument of the operator that changes a result, with another value."""


@pytest.fixture
def looked_at(at_once, monkeypatch):
    """A call that is known, and the operator's way to every call that is not."""
    call, usual = call_of(), {"causal": True, "causal_offset": 0, "scale": 0.25, **options_of(tau=0.5).to_op_kwargs()}
    for _ in range(4):
        ops.attention(*call.tensors, **usual)
    monkeypatch.setattr(AttentionCall, "of", None)  # nobody looks at a call that is known
    ops.attention(*call.tensors, **usual)
    return call, usual, pytest.raises(TypeError, match="NoneType")


@pytest.mark.parametrize("name", OTHER_VALUES)
def test_no_other_value_of_an_argument_is_taken_for_one_that_is_known(name, looked_at):
    call, usual, raises = looked_at
    with raises:
        ops.attention(*call.tensors, **{**usual, **OTHER_VALUES[name]})


def test_every_argument_that_changes_a_result_is_tried():
    arguments = {argument.name for argument in torch.ops.s2o.attention.default._schema.arguments}
    assert arguments - set(OTHER_VALUES) == {"query", "key", "value", "return_lse", "site", "layout"}


@pytest.mark.parametrize("change", ["strides", "expanded", "address", "dtype", "length", "heads"])
def test_no_other_tensor_is_taken_for_one_that_is_known(change, looked_at):
    call, usual, raises = looked_at
    query, key, value = call.tensors
    others = {
        "strides": (query, key, value.transpose(1, 2).contiguous().transpose(1, 2)),
        "expanded": (query, key[:1].expand(2, -1, -1, -1), value),
        "address": (query, moved(key), value),
        "dtype": [x.half() for x in call.tensors],
        "length": [x[:, :, :-1] for x in call.tensors],
        "heads": (query, key[:, :1], value[:, :1]),
    }[change]
    with raises:
        ops.attention(*others, **usual)


def test_a_table_that_was_read_again_is_asked(looked_at):
    call, usual, raises = looked_at
    tuned.forget()
    with raises:
        ops.attention(*call.tensors, **usual)


def test_gradients_modes_and_views_take_the_same_way(looked_at, at_once):
    """Results of a known call are as others under ``requires_grad``, ``inference_mode`` and a negation to be done."""
    (call, usual, _), operator = looked_at, torch.ops.s2o.attention.default
    wanted = call.query.detach().requires_grad_()
    output, _ = operator(wanted, *call.tensors[1:], **usual)
    assert output.requires_grad
    with pytest.raises(NoGradientError):
        output.sum().backward()
    with torch.inference_mode():
        assert operator(*call.tensors, **usual)[0].is_inference()
    assert not operator(*call.tensors, **usual)[0].is_inference()
    made = len(at_once)
    operator(torch._neg_view(call.query), *call.tensors[1:], **usual)
    bases, *_ = at_once[-1]
    assert len(at_once) == made + 1
    assert bases[0] != call.query.data_ptr()  # the negated one


def test_a_call_is_known_by_its_own_arguments_alone(at_once, monkeypatch):
    """Whatever the operator is asked for between: what is kept is the key of the call that was launched."""
    kept = []
    keep = prepared._keep
    monkeypatch.setattr(prepared, "_keep", lambda key, launches: kept.append(key) or keep(key, launches))
    calls = [call_of(**given) for given in ({}, *UNKNOWN.values(), *KNOWN.values())]
    for call in calls * 4:
        attend(call)
    straight = {key for key in kept if not any(part[:1] == ("output",) for part in key if isinstance(part, tuple))}
    assert len(straight) == len(KNOWN)


def test_who_records_or_observes_sees_a_call_that_is_known(at_once):
    call = call_of()
    for _ in range(3):
        attend(call)
    with record_calls() as recorded:
        attend(call)
    assert [x.path for x in recorded] == ["s2o"]
    seen = []
    with observe_attention(lambda call: seen.append(call)):
        attend(call)
    assert len(seen) == 1


def test_other_layouts_and_listeners_are_heard(at_once, monkeypatch):
    call = call_of()
    for _ in range(4):
        output, _ = attend(call, layout="BHND")
        assert output.is_contiguous()
    made = len(at_once)
    monkeypatch.setattr(direct, "hooked", lambda: True)
    attend(call)
    assert len(at_once) == made
