"""Compiled kernels that are launched directly: as triton itself launches them, and not where that is not known."""

import ctypes
import inspect
import re
import struct
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("triton")

import torch
import triton
from triton.compiler import CompiledKernel
from triton.runtime import JITFunction

from s2o_compile.kernels.impl.triton import direct
from s2o_compile.kernels.support import cpp_library


def test_triton_launches_a_compiled_kernel_as_we_do():
    assert direct.is_tested(), f"look at JITFunction.run of triton {triton.__version__}, then widen the tested range"
    run = " ".join(inspect.getsource(JITFunction.run).split())
    ours = "kernel.run(grid_0, grid_1, grid_2, stream, kernel.function, kernel.packed_metadata, launch_metadata,"
    assert ours in run
    assert "knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook, *bound_args.values())" in run
    assert isinstance(CompiledKernel.run, property)
    assert all(f"self.{name}" in inspect.getsource(CompiledKernel) for name in ("function", "packed_metadata"))


def test_every_launch_can_be_written_down():
    """A launch by ``kernel[grid](...)`` would run on stand-ins without memory."""
    sources = {path.name: path.read_text() for path in Path(direct.__file__).parent.glob("*.py")}
    assert len(sources) > 10
    launches = re.compile(r"\w*kernel\[.*\]\(")
    assert {name for name, text in sources.items() if launches.search(text)} == {"direct.py", "listing.py", "tile.py"}


def test_all_arguments_are_handed_over():
    made = []
    compiled = SimpleNamespace(run=lambda *given: made.append(given), function=7, packed_metadata="m")
    launch = direct.launcher(compiled, (3, 2))
    launch(99, [1, 2.0, True])
    assert made == [(3, 2, 1, 99, 7, "m", None, None, None, 1, 2.0, True)]


SIGNATURE = {"x": "*bf16", "n": "i32", "scale": "fp32", "BLOCK": "constexpr", "wide": "i64", "flag": "u1", "y": "*fp32"}
ARGUMENTS = [None, -3, 0.1, 64, 2**40, True, None]
PLACES = {0: (1, 32), 6: (2, 0)}


def plain_kernel(**changed):
    target = SimpleNamespace(backend="cuda")
    metadata = SimpleNamespace(**{**direct.PLAIN, "target": target, "num_warps": 4, "shared": 512, **changed})
    return SimpleNamespace(run=print, function=7, metadata=metadata, src=SimpleNamespace(signature=SIGNATURE))


def packed(kernel, grid=(3, 2), arguments=ARGUMENTS, places=PLACES, is_beside=False, waits=0):
    return direct.packed(kernel, grid, arguments, places, is_beside=is_beside, waits=waits)


def test_a_plain_launch_is_packed_as_c_lays_it_out():
    sizes = struct.unpack("<9Q", packed(plain_kernel(), waits=3)[:72])
    assert sizes == (7, 3, 2, 1, 4 * 32, 512, 0, 3, 8)
    parameters = [*struct.iter_unpack("<QQ", packed(plain_kernel())[72:])]
    assert [base for base, _ in parameters] == [1, 0, 0, 0, 0, 2, 0, 0]
    assert [offset for _, offset in parameters[:1] + parameters[-3:]] == [32, 0, 0, 0]
    numbers = [offset.to_bytes(8, "little") for _, offset in parameters[1:5]]
    expected = [("<i", -3), ("<f", 0.1), ("<q", 2**40), ("<?", True)]
    for given, (kind, number) in zip(numbers, expected, strict=True):
        assert given.startswith(struct.pack(kind, number))


def test_a_number_is_converted_as_c_converts_it():
    assert direct._bits(direct.NUMBERS["fp32"], 1e300) == direct._bits(direct.NUMBERS["fp32"], float("inf"))
    assert direct._bits(direct.NUMBERS["i64"], -1) == 2**64 - 1
    assert direct._bits(direct.NUMBERS["fp64"], 0.1) == int.from_bytes(struct.pack("<d", 0.1), "little")


@pytest.mark.parametrize("name", [*direct.PLAIN, "target"])
def test_a_launch_with_attributes_or_scratch_memory_is_left_to_triton(name):
    other = SimpleNamespace(backend="hip") if name == "target" else "other"
    assert packed(plain_kernel(**{name: other})) is None
    kernel = plain_kernel()
    delattr(kernel.metadata, name)
    assert packed(kernel) is None


def test_a_launch_that_is_not_understood_is_left_to_triton(monkeypatch):
    for changes in (
        {"signature": {**SIGNATURE, "n": "fp16"}},  # a type that is not known
        {"signature": {**SIGNATURE, "n": ("i32", "i32")}},
        {"signature": {**SIGNATURE, "n": "*i32"}},  # a pointer without a place
        {"signature": {**SIGNATURE, "x": "i64"}},  # a place that is no pointer
        {"signature": {**SIGNATURE, "more": "i32"}},
    ):
        kernel = plain_kernel()
        kernel.src = SimpleNamespace(**changes)
        assert packed(kernel) is None
    kernel = plain_kernel()
    kernel.function = None
    assert packed(kernel) is None
    assert packed(plain_kernel(shared=229 * 1024)) is None
    assert packed(plain_kernel(), grid=(3, 0)) is None
    assert packed(None) is None  # interpreted
    monkeypatch.setattr(triton, "__version__", "3.10.0")
    assert packed(plain_kernel()) is None


class Driver:
    """CUDA's driver, as far as a list calls it: keeps what it is asked for, and refuses what is number ``refused``."""

    def __init__(self, parameters, wait=lambda: None):
        self.made, self.refused, self._wait, self.context = [], None, wait, 44
        number, pointer = ctypes.c_int, ctypes.c_void_p
        kinds = (pointer, *[ctypes.c_uint] * 7, pointer, ctypes.POINTER(ctypes.POINTER(ctypes.c_uint64)), pointer)

        def launch(function, *rest):
            *sizes, stream, values, _ = rest
            first = [values[at][0] for at in range(parameters)]
            self._wait()
            return self._keep((function, sizes, stream, [values[at][0] for at in range(parameters)], first))

        def get_context(into):
            into[0] = self.context
            return 0

        functions = [
            ctypes.CFUNCTYPE(number, ctypes.POINTER(pointer))(get_context),
            ctypes.CFUNCTYPE(number, pointer)(lambda context: self._keep(("context", context, None))),
            ctypes.CFUNCTYPE(number, *kinds)(launch),
            ctypes.CFUNCTYPE(number, pointer, pointer)(lambda event, stream: self._keep(("record", stream, event))),
            ctypes.CFUNCTYPE(number, pointer, pointer, ctypes.c_uint)(
                lambda stream, event, _: self._keep(("wait", stream, event))
            ),
        ]
        self._kept = functions
        self.addresses = (ctypes.c_void_p * 6)(44, *(ctypes.cast(f, ctypes.c_void_p) for f in functions))

    def _keep(self, asked):
        self.made.append(asked)
        return 700 if len(self.made) - 1 == self.refused else 0


@pytest.fixture
def driver(monkeypatch):
    """A driver, and the replay of a list of four launches, the second half in slices."""
    if cpp_library.quietly((direct.SOURCE,)) is None:
        pytest.skip("needs a C++ compiler")
    stub = Driver(parameters=8)
    monkeypatch.setattr(direct, "_driver", lambda: stub.addresses)
    monkeypatch.setattr(direct, "current_stream", lambda device: {0: 11}[device])
    monkeypatch.setattr(direct, "_library", said)
    steps = ((False, 0), (False, 0), (False, direct.FORK), (True, 0))
    stub.replay = direct.replay([packed(plain_kernel(), is_beside=beside, waits=x) for beside, x in steps], 2)
    return stub


def said():
    return SimpleNamespace(cuGetErrorName=lambda status, into: setattr(into._obj, "value", b"CUDA_ERROR_OF_A_TEST"))


def test_all_launches_are_made_in_one_call(driver):
    driver.replay([1000, 2000], 0, 0, 0)
    assert len(driver.made) == 4
    for function, sizes, stream, values, _ in driver.made:
        assert (function, sizes, stream) == (7, [3, 2, 1, 128, 1, 1, 512], 11)
        assert [values[at] for at in (0, 5, 6, 7)] == [1032, 2000, 0, 0]


ORDERED = [11, 11, ("record", 11, 33), ("wait", 22, 33), 11, 22, ("record", 22, 33), ("wait", 11, 33)]


def test_the_other_stream_starts_behind_what_all_slices_need_and_joins(driver):
    driver.replay([1000, 2000], 0, 22, 33)
    assert [asked[2] if isinstance(asked[0], int) else asked for asked in driver.made] == ORDERED


TWICE = ((True, direct.FORK), (False, 0), (False, direct.JOIN), (True, direct.JOIN | direct.FORK))
ORDERED_TWICE = [
    ("record", 11, 33), ("wait", 22, 33), 22, 11, ("record", 22, 33), ("wait", 11, 33), 11,
    ("record", 11, 33), ("wait", 22, 33), 22, ("record", 22, 33), ("wait", 11, 33),
]  # fmt: skip


def test_streams_fork_and_join_where_launches_wait(driver):
    replay = direct.replay([packed(plain_kernel(), is_beside=beside, waits=x) for beside, x in TWICE], 2)
    replay([1000, 2000], 0, 22, 33)
    assert [asked[2] if isinstance(asked[0], int) else asked for asked in driver.made] == ORDERED_TWICE
    driver.made.clear()
    replay([1000, 2000], 0, 0, 0)
    assert [asked[2] for asked in driver.made] == [11] * 4
    for refused in range(len(ORDERED_TWICE)):
        driver.made.clear()
        driver.refused = refused
        with pytest.raises(RuntimeError, match="expected CUDA_SUCCESS"):
            replay([1000, 2000], 0, 22, 33)
        made = [asked[2] if isinstance(asked[0], int) else asked for asked in driver.made]
        assert made[: refused + 1] == ORDERED_TWICE[: refused + 1]
        left = made[refused + 1 :]
        assert all(isinstance(asked, tuple) for asked in left), "a launch behind one that was refused"
        if refused in {2, 3, 4, 5, 9}:  # the other stream holds work that nobody has waited for
            assert left == [("record", 22, 33), ("wait", 11, 33)]


@pytest.mark.parametrize("refused", range(len(ORDERED)))
def test_what_the_driver_refuses_is_an_error_and_the_streams_join(refused, driver):
    driver.refused = refused
    with pytest.raises(RuntimeError, match=r"expected CUDA_SUCCESS, got CUDA_ERROR_OF_A_TEST \(700\)"):
        driver.replay([1000, 2000], 0, 22, 33)
    made = [asked[2] if isinstance(asked[0], int) else asked for asked in driver.made]
    forked, ends = refused > 3, ORDERED[-2:]
    assert made[: refused + 1] == ORDERED[: refused + 1]
    assert made[refused + 1 :] == ([] if not forked else ends if refused < 6 else ends[refused - 5 :] * (refused == 7))


def test_a_thread_without_a_context_gets_that_of_the_kernels(driver):
    """A new thread has none until it calls CUDA's runtime, which a call on tensors that are there may not do."""
    driver.context = None
    driver.replay([1000, 2000], 0, 0, 0)
    assert driver.made[0] == ("context", 44, None)
    assert len(driver.made) == 5
    driver.made.clear()
    driver.refused = 0
    with pytest.raises(RuntimeError, match="expected CUDA_SUCCESS"):
        driver.replay([1000, 2000], 0, 22, 33)
    assert len(driver.made) == 1


def test_threads_make_the_same_list_on_their_own_tensors(driver):
    """The driver waits in every launch until the other thread is in one, too."""
    both = threading.Barrier(2, timeout=60)
    driver._wait = both.wait
    threads = [threading.Thread(target=driver.replay, args=([base, 0], 0, 0, 0)) for base in (10**6, 2 * 10**6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(before == after for *_, after, before in driver.made)
    assert sorted(values[0] for _, _, _, values, _ in driver.made) == [10**6 + 32] * 4 + [2 * 10**6 + 32] * 4


def test_nothing_is_made_at_once_without_a_driver_a_compiler_or_one_of_the_launches(driver, monkeypatch):
    kernels = [packed(plain_kernel())]
    assert direct.replay(kernels, 2) is not None
    assert direct.replay([*kernels, None], 2) is None
    monkeypatch.setattr(cpp_library, "quietly", lambda _: None)
    assert direct.replay(kernels, 2) is None
    monkeypatch.undo()
    monkeypatch.setattr(direct, "_driver", lambda: None)
    assert direct.replay(kernels, 2) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a driver")
def test_a_machine_without_a_driver_has_none():
    assert direct._driver() is None


def test_a_driver_without_a_context_makes_nothing_at_once(monkeypatch):
    library = SimpleNamespace(**{name: ctypes.CFUNCTYPE(ctypes.c_int)(lambda: 0) for name in direct.FUNCTIONS})
    monkeypatch.setattr(direct, "_library", lambda: library)
    for context in (None, 44):
        current = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_void_p))(
            lambda into, context=context: into.__setitem__(0, context) or 0
        )
        library.cuCtxGetCurrent = current
        driver = direct._driver()
        assert (driver is None) == (context is None)
    assert driver[0] == 44
    assert len(driver) == 1 + len(direct.FUNCTIONS)


@pytest.mark.parametrize("version", ["3.5.1", "3.10.0", "4.0"])
def test_a_triton_that_is_not_known_launches_by_itself(version, monkeypatch):
    monkeypatch.setattr(triton, "__version__", version)
    compiled = SimpleNamespace(run=print, function=7, packed_metadata="m")
    assert direct.launcher(compiled, (1,)) is None


@pytest.mark.parametrize("missing", ["run", "function", "packed_metadata"])
def test_a_kernel_without_one_of_its_parts_is_launched_by_triton(missing):
    compiled = SimpleNamespace(run=print, function=7, packed_metadata="m")
    delattr(compiled, missing)
    assert direct.launcher(compiled, (1,)) is None
    assert direct.launcher(None, (1,)) is None  # interpreted


def test_a_profiler_of_launches_is_heard(monkeypatch):
    assert not direct.hooked()
    monkeypatch.setattr(triton.knobs.runtime, "launch_enter_hook", lambda _: None)
    assert direct.hooked()
