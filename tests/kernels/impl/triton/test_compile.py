"""Kernels compile without a GPU: what only the compiler refuses, the interpreter runs. And what launches hand over."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from tests.helpers.stub_driver import COMPILER

KERNELS = (
    *("find_non_finite_kernel", "bound_classes_kernel", "count_classes_kernel", "add_counts_kernel"),
    "write_classes_kernel",
)
READERS = (
    *("sum_moments_kernel", "pack_rows_kernel", "block_sums_kernel", "score_means_kernel", "gathered_fwd_kernel"),
    *("exact_fwd_kernel", "sampled_fwd_kernel", "packed_fwd_kernel"),
)
"""Kernels that read pages, beside those of the order."""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Triton assembles on Linux only")
@pytest.mark.skipif(importlib.util.find_spec("triton.backends.nvidia") is None, reason="needs Triton's NVIDIA backend")
@pytest.mark.parametrize(
    ("helper", "kernels"),
    [
        ("compile_order", KERNELS),
        ("compile_pages", (*KERNELS, *READERS)),
        # Launches that are made at once hand the bytes over that triton's own launches do.
        pytest.param("compile_launches", KERNELS, marks=pytest.mark.skipif(COMPILER is None, reason="needs C++")),
    ],
)
def test_kernels_compile_without_a_gpu(helper, kernels, tmp_path):
    environment = {name: text for name, text in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", f"tests.helpers.{helper}"],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[4],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    assert set(kernels) <= set(done.stdout.split())
    if helper == "compile_order":
        assert set(done.stdout.split()) == set(kernels)
