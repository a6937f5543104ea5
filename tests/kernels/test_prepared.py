"""Prepared calls: the launches of a call planned anew, on its own memory, and none that was compiled for another."""

import threading
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from s2o_compile.kernels import dispatch, ops, prepared, schedule
from s2o_compile.kernels.core import tuned
from s2o_compile.kernels.core.call import FIELDS, AttentionCall
from s2o_compile.kernels.core.mask import AttentionMask
from s2o_compile.kernels.core.options import OperatorOptions, _copied
from s2o_compile.kernels.core.result import Result, empty_result
from s2o_compile.kernels.impl.triton import direct, listing
from s2o_compile.kernels.impl.triton.forward import gathered_fwd_kernel
from s2o_compile.kernels.observe import observe_attention
from s2o_compile.kernels.pages.prefill_cache import PrefillCache
from s2o_compile.kernels.pages.table import Pages
from s2o_compile.kernels.statistics import record_calls
from s2o_compile.kernels.support.errors import InputError, NoGradientError
from tests.conftest import CUDA, INTERPRETED

LENGTH = 640


def call_of(length=LENGTH, *, heads=4, kv_heads=2, dim=16, device="cpu", dtype=torch.float32, mask=None, **given):
    generator = torch.Generator().manual_seed(length)
    shapes = [(2, h, length, dim) for h in (heads, kv_heads, kv_heads)]
    query, key, value = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
    mask = AttentionMask(causal=True) if mask is None else mask
    return AttentionCall(query=query, key=key, value=value, mask=mask, scale=0.25, **given)


def options_of(**given):
    return OperatorOptions(**{"min_seq_len": 0, "segment_len": 128, "implementation": "triton", **given})


def run(call, options):
    return dispatch.execute(call, "s2o", options)


@pytest.fixture
def launches(monkeypatch):
    """What is launched, instead of launching it: the kernel, its grid, its arguments in their order, and options."""
    made = []

    def record(self, *args, grid, warmup, **keywords):
        arguments = [*args, *(keywords.pop(name) for name in self.arg_names[len(args) :])]
        made.append((self.__name__, tuple(grid), arguments, keywords))

    monkeypatch.setattr(type(gathered_fwd_kernel), "run", record)
    return made


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


PADDED = torch.arange(LENGTH).expand(2, -1) % 7 > 0
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


def moved(x):
    """The same numbers at an address that is no multiple of 16."""
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


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


@pytest.fixture
def at_once(launches, monkeypatch):
    """What is launched at once: the bases of each list, its device, and the numbers of the other stream."""
    made = []

    def run(self, *args, **keywords):
        return SimpleNamespace(run=print, function=1, packed_metadata=(4, 1, 0))

    monkeypatch.setattr(type(gathered_fwd_kernel), "run", run)
    monkeypatch.setattr(direct, "replay", lambda *_: lambda *given: made.append(given))
    return made


def attend(call, *, layout="auto", **options):
    """A call through the operator."""
    mask, of = call.mask, options_of(tau=0.5, **options).to_op_kwargs()
    offset = mask.offset if mask.causal else None
    return ops.attention(
        *call.tensors, mask.key_mask, call.sinks, causal=mask.causal, causal_offset=offset, window=mask.window,
        attention_chunk=mask.attention_chunk, scale=call.scale, softcap=call.softcap,
        fully_masked=call.fully_masked, return_lse=call.return_lse, dense_heads=call.dense_heads, layout=layout, **of,
    )  # fmt: skip


KNOWN = {
    "default": {},
    "padded": {"mask": AttentionMask(causal=True, key_mask=PADDED)},
    "log-sum-exp": {"return_lse": True, "softcap": 20.0},
    "cross": {"mask": AttentionMask()},
}


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


UNKNOWN = {
    "sinks": {"sinks": torch.zeros(4)},
    "mean": {"fully_masked": "mean"},
    "marked head": {"dense_heads": [1]},
    "mask of one row": {"mask": AttentionMask(causal=True, key_mask=PADDED[:1])},
    "chunk that holds all": {"mask": AttentionMask(causal=True, attention_chunk=LENGTH)},
    "chunks": {"mask": AttentionMask(causal=True, attention_chunk=LENGTH // 2)},
    "window that hides nothing": {"mask": AttentionMask(causal=True, window=LENGTH)},
    "far offset": {"mask": AttentionMask(causal=True, offset=2 * LENGTH)},
}
"""Calls that are changed on the way to their launches, or behind them."""


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


DEVICES = [INTERPRETED, CUDA]


def same(one, other):
    return all(torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for x, y in zip(one, other, strict=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("error", [None, 0.02])
def test_the_bits_are_those_of_the_call_planned_anew(device, error, monkeypatch):
    on_cpu = device == "cpu"
    call = call_of(256 if on_cpu else 4096, heads=2, kv_heads=1 if on_cpu else 2, device=device)
    call = call if not on_cpu else call.over(*(x[:1] for x in call.tensors))
    options = options_of(error=error)
    expected = run(call, options)
    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    assert all(same(expected, run(call, options)) for _ in range(1 if on_cpu else 3))
    assert prepared.newest() is not None


def poisoned(empty):
    """Memory that holds what nobody would write."""
    return lambda *args, **keywords: x.fill_(111) if (x := empty(*args, **keywords)).dtype == torch.uint8 else x


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestOnCuda:
    @pytest.fixture(autouse=True)
    def _prepared(self, monkeypatch):
        monkeypatch.setattr(schedule, "SCRATCH_BYTES", 2**21)
        monkeypatch.setattr(schedule, "SCRATCH_SHARE", 2**20)

    @staticmethod
    def call(length=4096, dtype=torch.bfloat16):
        return call_of(length, heads=8, kv_heads=4, dim=64, device="cuda", dtype=dtype)

    def test_other_tensors_get_their_own_results(self):
        options = options_of(segment_len=None, error=0.05)
        run(self.call(), options)
        for seed in range(3):
            call = self.call()
            call = call.over(*(x + 0.1 * seed * torch.randn_like(x) for x in call.tensors))
            result = run(call, options)
            prepared.forget()
            assert same(run(call, options), result)
            run(call, options)

    def test_the_launch_that_looks_at_no_argument_is_used(self, monkeypatch):
        call, options = self.call(), options_of()
        expected = [run(call, options) for _ in range(2)]
        monkeypatch.setattr(type(gathered_fwd_kernel), "run", None)
        assert same(expected[0], run(call, options))

    @pytest.mark.parametrize("error", [None, 0.1, 0.05])
    @pytest.mark.parametrize("case", [*KNOWN, "sinks", "one slice"])
    def test_the_bits_are_the_same_at_once_and_one_by_one(self, case, error, monkeypatch):
        given = {**KNOWN, **UNKNOWN, "one slice": {}}[case]
        if case == "padded":
            given = {
                "mask": AttentionMask(causal=True, key_mask=torch.arange(4096, device="cuda").expand(2, -1) % 7 > 0)
            }
        given = given if case != "sinks" else {"sinks": torch.zeros(8, device="cuda")}
        if case == "one slice":
            monkeypatch.setattr(schedule, "SCRATCH_BYTES", 2**30)
        call, results = self.call().but(**given), []
        for at_most, replay in ((0, None), (128, lambda *_: None), (128, direct.replay)):
            with monkeypatch.context() as changed:
                changed.setattr(prepared, "KEPT", at_most)
                changed.setattr(direct, "replay", replay)
                prepared.forget()
                results += [attend(call, error=error) for _ in range(4)]
                launches = prepared.newest()
        assert launches.replay is not None
        assert (launches.turns == 1) == (case == "one slice")
        assert all(same(results[0], result) for result in results)

    def test_a_cuda_graph_other_streams_and_threads_go_straight_to_launches(self, monkeypatch):
        calls = [self.call(4096 - 128 * (n % 2)) for n in range(4)]
        calls = [call.over(*(x * (1 + n) for x in call.tensors)) for n, call in enumerate(calls)]
        expected = [[attend(call) for _ in range(3)][-1] for call in calls]
        torch.cuda.synchronize()
        monkeypatch.setattr(AttentionCall, "of", None)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = attend(calls[0])
        failed = []

        def attend_often(number):
            with torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(10):
                    result = attend(calls[number])
                    torch.cuda.current_stream().synchronize()
                    failed.extend([number] * (not same(expected[number], result)))

        threads = [threading.Thread(target=attend_often, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failed
        for _ in range(3):
            result[0].zero_()
            graph.replay()
            torch.cuda.synchronize()
            assert same(expected[0], result)

    def test_a_cuda_graph_has_taus_of_its_own(self):
        call, taus = self.call(), options_of(tau=(0.1, 0.2, 0.3, 0.4) * 2).to_op_kwargs()
        arguments = {"causal": True, "causal_offset": 0, "scale": call.scale, **taus}
        expected = [ops.attention(*call.tensors, **arguments) for _ in range(3)][-1]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = ops.attention(*call.tensors, **arguments)
        _copied.cache_clear()
        torch.cuda.empty_cache()
        result[0].zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert same(expected, result)

    def test_a_refused_launch_is_an_error(self, monkeypatch):
        call, packed = self.call(), direct.packed
        expected = [attend(call) for _ in range(3)][-1]
        prepared.forget()
        with monkeypatch.context() as changed:

            def without_blocks(*given, **more):
                launch = packed(*given, **more)
                return launch[:8] + bytes(8) + launch[16:]

            changed.setattr(direct, "packed", without_blocks)
            for _ in range(2):
                attend(call)
            with pytest.raises(RuntimeError, match="expected CUDA_SUCCESS, got CUDA_ERROR_INVALID_VALUE"):
                attend(call)
        prepared.forget()
        assert all(same(expected, attend(call)) for _ in range(3))

    def test_tensors_at_odd_addresses_run_kernels_of_their_own(self):
        call, options = self.call(), options_of()
        expected = [run(call, options) for _ in range(3)][-1]
        for name in ("query", "key", "value"):
            for _ in range(3):
                odd = call.but(**{name: moved(getattr(call, name))})
                assert getattr(odd, name).data_ptr() % 16
                for x, y in zip(expected[:2], run(odd, options)[:2], strict=True):
                    torch.testing.assert_close(x, y, rtol=2e-2, atol=2e-2)

    def test_a_cuda_graph_holds_it(self):
        call, options = self.call(), options_of(error=0.05)
        expected = [run(call, options) for _ in range(3)][-1]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = run(call, options)
        for _ in range(3):
            result.output.zero_()
            graph.replay()
            torch.cuda.synchronize()
            assert same(expected, result)

    def test_streams_and_threads_have_memory_of_their_own(self):
        options, failed = options_of(error=0.05), []
        calls = [self.call(4096 - 128 * (n % 2)) for n in range(4)]
        calls = [call.over(*(x * (1 + n) for x in call.tensors)) for n, call in enumerate(calls)]
        expected = [[run(call, options) for _ in range(3)][-1] for call in calls]
        torch.cuda.synchronize()

        def attend(number):
            with torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(10):
                    result = run(calls[number], options)
                    torch.cuda.current_stream().synchronize()
                    failed.extend([number] * (not same(expected[number], result)))

        threads = [threading.Thread(target=attend, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failed

    def test_a_new_thread_goes_straight_to_launches(self, monkeypatch):
        """It has no context yet, for it has called nothing of CUDA."""
        monkeypatch.setattr(schedule, "SCRATCH_BYTES", 2**30)  # one slice: no other stream makes one
        call, found = self.call(), []
        expected = [attend(call) for _ in range(3)][-1]
        torch.cuda.synchronize()
        monkeypatch.setattr(AttentionCall, "of", None)
        thread = threading.Thread(target=lambda: found.append(attend(call)))
        thread.start()
        thread.join()
        assert same(expected, found[0])

    def test_keys_on_the_cpu_are_refused(self):
        call = self.call()
        for _ in range(4):
            attend(call)
        with pytest.raises(InputError, match="device of key"):
            attend(call.but(key=call.key.cpu()))

    def test_memory_that_is_freed_behind_a_call_is_not_written_before_it_is_read(self):
        """The host is far ahead: inputs, workspaces and results of calls take each other's memory."""
        call = self.call()
        expected = [attend(call) for _ in range(3)][-1]
        sums = []
        for _ in range(50):
            copies = call.over(*(x.clone() for x in call.tensors))
            output, _ = attend(copies)
            copies.key.fill_(torch.nan)
            del copies
            sums.append((output.view(torch.int16) != expected[0].view(torch.int16)).sum())
            output.fill_(torch.nan)
            del output
        assert not torch.stack(sums).any()

    def test_other_places_of_a_tensor_are_read_there(self):
        call = self.call()
        expected = [attend(call) for _ in range(3)][-1]
        storage = torch.cat([torch.full_like(call.key, torch.nan), call.key])
        assert same(expected, attend(call.over(call.query, storage[2:], call.value)))

    @pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
    def test_every_device_is_gone_straight_to(self, monkeypatch):
        """While another one is current."""
        here = self.call()
        there = here.over(*(x.to("cuda:1") for x in here.tensors))
        expected = [[attend(call) for _ in range(3)][-1] for call in (here, there)]
        monkeypatch.setattr(AttentionCall, "of", None)
        for current in (0, 1):
            with torch.cuda.device(current):
                assert same(expected[0], attend(here))
                assert same(expected[0], [x.to("cuda:0") for x in attend(there)])

    @pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
    def test_every_device_has_kernels_of_its_own(self):
        call, options = self.call(), options_of()
        there = call.over(*(x.to("cuda:1") for x in call.tensors))
        results = [[run(each, options) for _ in range(3)] for each in (call, there)]
        assert same(results[0][2], [x.to("cuda:0") for x in results[1][2]])
