"""A list of launches and triton itself hand the same bytes to CUDA's driver, for an H100, without a GPU.

Run by ``impl/triton/test_compile.py``. Everything is real but the driver: arguments are specialised, kernels are
compiled, and triton's own C function packs its arguments. Nothing runs, so tensors hold garbage.
"""

import os
import re
import tempfile
from pathlib import Path

import torch
from triton.backends.nvidia.driver import CudaLauncher, CudaUtils
from triton.compiler import CompiledKernel
from triton.runtime import driver

from s2o_compile.kernels import prepared, schedule
from s2o_compile.kernels.core.call import AttentionCall
from s2o_compile.kernels.core.mask import AttentionMask
from s2o_compile.kernels.core.options import OperatorOptions
from s2o_compile.kernels.core.result import Result, empty_result
from s2o_compile.kernels.impl.triton import exact, listing
from s2o_compile.kernels.pages.table import BlockTable, flat_view
from tests.helpers.compile_order import H100
from tests.helpers.stub_driver import Launched, StubDriver

STREAM, OTHER, EVENT = 0x1000, 0x2000, 0x3000


class Driver(H100):
    """Triton's driver over a stub: it loads no kernel, but numbers them."""

    launcher_cls = CudaLauncher

    def __init__(self, stub):
        driver.set_active(self)
        self.utils, self.names, initialise = CudaUtils(), {}, CompiledKernel._init_handles
        self.utils.load_binary = self.load
        self.utils.unload_module = lambda _: None
        self.utils.get_device_properties = lambda _: {"max_shared_mem": 227 * 1024}

        def init_handles(kernel):
            initialise(kernel)
            declared = re.findall(r"\.param \.[a-z](\d+)", kernel.asm["ptx"])
            stub.widths[kernel.function] = [int(bits) // 8 for bits in declared]

        CompiledKernel._init_handles = init_handles

    def get_current_stream(self, _):
        return STREAM

    def load(self, name, *_):
        handle = 0x100 + len(self.names)
        self.names[handle] = name
        return handle, handle, 0, 0, 1024


def cases():
    """Calls and options."""
    generator = torch.Generator().manual_seed(0)

    def call(length=1024, dim=128, dtype=torch.bfloat16, **given):
        query, key, value = (torch.randn(1, heads, length, dim, generator=generator).to(dtype) for heads in (4, 2, 2))
        mask = given.pop("mask", AttentionMask(causal=True))
        return AttentionCall(query=query, key=key, value=value, mask=mask, scale=0.1, **given)

    yield "default", call(), {}
    yield "tau", call(), {"tau": 0.5}
    yield "budget", call(), {"error": 0.05}
    padded = AttentionMask(causal=True, key_mask=torch.ones(1, 1024, dtype=torch.bool))
    yield "padded, taus by head", call(mask=padded), {"tau": (0.1, 0.2, 0.3, 0.4), "error": 0.02}
    yield "cross, softcap, odd", call(length=1001, dim=80, dtype=torch.float16, mask=AttentionMask(), softcap=20.0), {}
    yield (
        "float32, unread rows, sinks",
        call(dim=64, dtype=torch.float32, unread_rows=torch.zeros(1, 1024, dtype=torch.bool), sinks=torch.zeros(4)),
        {},
    )
    yield "mean query", call(), {"ranking": "mean_query"}
    cache = torch.zeros(2, 65, 16, 2, 128, dtype=torch.bfloat16)
    (key, page_rows), (value, _) = flat_view(cache[0]), flat_view(cache[1])
    blocks = BlockTable(table=torch.zeros(1, 64, dtype=torch.int32), page_len=16, page_rows=page_rows, last=64)
    yield "pages", call().but(key=key, value=value, pages=blocks.pages(0, 1024)), {}
    packed = torch.zeros(3, 1500, 4, 128, dtype=torch.bfloat16)  # [T, H, D]: one sequence of several
    of_varlen = [x[300:1324, :heads].transpose(0, 1)[None] for x, heads in zip(packed, (4, 2, 2), strict=True)]
    yield "varlen", call().over(*of_varlen), {}
    yield "slices", call(length=384), {"tau": 0.5}


def main():
    folder = tempfile.TemporaryDirectory()
    stub = StubDriver(Path(folder.name))
    os.environ["TRITON_LIBCUDA_PATH"] = folder.name  # triton links its module with it
    names = Driver(stub).names
    workspaces = {}
    listing.Launches.workspace = lambda self, *_: workspaces.setdefault(
        id(self), torch.empty(self.size, dtype=torch.uint8)
    )
    for case, call, given in cases():
        if case == "slices":
            schedule.SCRATCH_BYTES, schedule.SCRATCH_SHARE = 1, 2**40
            prepared.numbers_of_other = lambda *_: (OTHER, EVENT)
        options = OperatorOptions(**{"min_seq_len": 0, "segment_len": 128, "implementation": "triton", **given})
        result = empty_result(call.query, call.value.shape[3])
        if case == "varlen":
            output = torch.empty(1500, 4, 128, dtype=torch.bfloat16)[300:1324].transpose(0, 1)[None]
            result = Result(output, torch.empty(1, 4, 1500)[..., 300:1324], result.computed)
        schedule.empty_state = lambda *_, result=result: result
        prepared.forget()
        sides = []
        for _ in range(3):  # planned anew, written down and made by triton, made at once
            stub.made.clear()
            schedule.attend(call, options, "triton", exact.attend_exact, result.output)
            sides.append(stub.made.copy())
        (launches,) = prepared._lists.values()
        by_triton, at_once = ([x for x in side if isinstance(x, Launched)] for side in sides[1:])
        assert launches is not None, case
        assert launches.replay is not None, case
        assert len(sides[0]) == len(by_triton) == launches.count, case
        for one, other in zip(by_triton, at_once, strict=True):
            assert one._replace(stream=0) == other._replace(stream=0), (case, names[one.function])
            assert one.sizes[7] == 0, (case, names[one.function])
        assert {x.stream for x in by_triton} == {STREAM}
        orders = [(number, x) for number, x in enumerate(sides[2]) if x not in at_once]
        if case != "slices":
            assert not orders
            assert {x.stream for x in at_once} == {STREAM}
        else:  # the basis, then the slices: each time the other stream starts behind this one, and joins it
            fork, join = (
                [("record", STREAM, EVENT), ("wait", OTHER, EVENT)],
                [("record", OTHER, EVENT), ("wait", STREAM, EVENT)],
            )
            assert [x for _, x in orders] == [*fork, *join, *fork, *join]
            expected = [OTHER if step.is_beside else STREAM for step in (*launches.common, *launches.slices)]
            assert OTHER in expected[: len(launches.common)]
            assert {*expected[len(launches.common) :]} == {STREAM, OTHER}
            assert [x.stream for x in at_once] == expected
    print(*names.values())


if __name__ == "__main__":
    main()
