"""Compile the kernels that read pages, and lengths of the device, for an H100, without a GPU.

Run by ``impl/triton/test_compile.py``.
"""

import torch

from s2o_compile.kernels.core.call import AttentionCall
from s2o_compile.kernels.core.mask import AttentionMask
from s2o_compile.kernels.core.options import OperatorOptions
from s2o_compile.kernels.core.result import empty_progress, empty_result
from s2o_compile.kernels.impl.triton import exact, forward, packed, sampled
from s2o_compile.kernels.pages.sizes import Sizes
from s2o_compile.kernels.pages.table import BlockTable, flat_view
from s2o_compile.kernels.planner import Planner
from tests.helpers.compile_order import compile_only


def main():
    compiled = compile_only()
    for dim, page_len, length, dtype in ((128, 16, 1024, torch.bfloat16), (64, 1, 128, torch.float16)):
        cache = torch.zeros(2, 1 + length // page_len, page_len, 2, dim, dtype=dtype)
        (key, page_rows), (value, _) = flat_view(cache[0]), flat_view(cache[1])
        table = torch.zeros(1, length // page_len, dtype=torch.int32)
        blocks = BlockTable(table=table, page_len=page_len, page_rows=page_rows, last=cache.shape[1] - 1)
        query = torch.zeros(1, 4, length, dim, dtype=dtype)
        mask = AttentionMask(causal=True)
        call = AttentionCall(query=query, key=key, value=value, mask=mask, scale=0.1, pages=blocks.pages(0, length))
        Planner(call, OperatorOptions(ranking="mean_query", segment_len=128), "triton").plan(call)
        size = torch.zeros(2, dtype=torch.int32)
        unread = Sizes(size, size, size[0], size[0])
        for one in (call, call.but(lengths=unread, pages=None)):
            plan = Planner(one, OperatorOptions(segment_len=128), "triton").plan(one)
            forward.attend(one, plan, 0.5, None, empty_progress(query))
            forward.going_on(one, plan, torch.zeros(1, 4), empty_result(query, dim), empty_progress(query))()
            exact.attend_exact(one)
            rows, result = sampled.attend_rows(one), empty_result(query, dim)
            sampled.lowering(one, rows, result, torch.zeros(1, 4), torch.zeros(1, 4), 0.1)(0.5)
        sequences, lse = torch.zeros(5, 1, dtype=torch.int32), torch.zeros(1, 4, length)
        for part, pages in ((call.but(pages=None), blocks), (call.but(pages=None, sinks=torch.zeros(4)), None)):
            for window in (None, 100):
                part = part.but(mask=AttentionMask(causal=True, window=window))
                packed.attend_packed(part, sequences, 3, pages, torch.zeros_like(query), lse)
    print(*compiled)


if __name__ == "__main__":
    main()
