"""Compile what ``triton_order.order_keys`` launches for an H100, without a GPU: run by ``impl/triton/test_compile.py``.

Launches are real up to the last step: arguments are specialised (an integer 1 becomes a constant), code is generated
and assembled. Nothing runs, so tensors hold garbage.
"""

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

from s2o_compile.kernels.core.mask import AttentionMask
from s2o_compile.kernels.impl.triton import order as triton_order


class H100:
    """As much of a driver as a compiler asks for."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, _):
        return 0


def compile_only():
    """From now on launches are compiled for an H100 only; returns the list that their kernels' names go to."""
    driver.set_active(H100())
    launch, compiled = JITFunction.run, []

    def run(self, *args, grid, warmup, **options):
        compiled.append(launch(self, *args, grid=grid, warmup=True, **options).metadata.name)

    JITFunction.run = run
    return compiled


def main():
    compiled = compile_only()
    for causal, padded, batch, heads, n_queries, n_keys in (
        (True, False, 1, 1, 128, 128),  # one head, one segment, one part, every key sampled: all sizes are 1
        (True, True, 2, 2, 1024, 20000),
        (False, False, 1, 2, 1024, 1024),
        (False, True, 1, 1, 1024, 20001),
    ):
        mask = AttentionMask(
            causal=causal,
            offset=n_keys - n_queries if causal else 0,
            key_mask=torch.ones(batch, n_keys, dtype=torch.bool) if padded else None,
        )
        scores = torch.zeros(batch, heads, -(-n_queries // 512), n_keys, dtype=torch.float16)
        key = torch.zeros(batch, heads, n_keys, 16, dtype=torch.bfloat16)
        non_finite = triton_order.find_non_finite(key, key)
        triton_order.order_keys(scores, non_finite, mask, n_queries=n_queries, segment_len=512)
    print(*compiled)


if __name__ == "__main__":
    main()
