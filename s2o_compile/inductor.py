"""What Inductor loses of a package on its way from the graph, kept (torch 2.11 to 2.13).

A graph's branches, and the kernels that a graph brings along, take a longer way through it than anything else.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from torch._inductor import config
from torch._inductor.codegen.wrapper import PythonWrapperCodegen
from torch._inductor.graph import GraphLowering, SubgraphLowering
from torch._inductor.runtime import triton_heuristics

OPTIONS = {
    # Whether memory is used again is decided by the number of a node, which in a branch counts that branch's nodes, and
    # by the memory in use at this node of the whole graph. Such a number may not even exist there.
    "allow_buffer_reuse": False,
}
"""Options to compile with."""


@contextmanager
def mended() -> Iterator[None]:
    """Compile inside this block."""
    with _one_numbering_of_sizes(), _registers_limited(), _numbers_in_single_precision():
        yield


@contextmanager
def _one_numbering_of_sizes() -> Iterator[None]:
    """Sizes that are computed before a launch (ps0, ps1, ...) have one numbering in a graph and its branches.

    A branch would have its own. But its launches are written down under the graph around it, which does not know these
    names, or gave them to other sizes.
    """
    make = SubgraphLowering.__init__

    def made(self: SubgraphLowering, parent: GraphLowering, *args: Any, **keywords: Any) -> None:  # noqa: ANN401
        make(self, parent, *args, **keywords)
        self.sizevars.precomputed_replacements = parent.sizevars.precomputed_replacements
        self.sizevars.inv_precomputed_replacements = parent.sizevars.inv_precomputed_replacements

    with patch.object(SubgraphLowering, "__init__", made):
        yield


@contextmanager
def _registers_limited() -> Iterator[None]:
    """Kernels are compiled with the ``maxnreg`` of their configuration, which would be dropped twice.

    They are compiled in this process: to those that Inductor starts, nothing here is known.
    """
    write, choose = triton_heuristics.config_to_dict, triton_heuristics.CachingAutotuner._create_compile_options

    def limit(chosen: Any) -> dict[str, int]:  # noqa: ANN401
        return {} if getattr(chosen, "maxnreg", None) is None else {"maxnreg": chosen.maxnreg}

    def written(chosen: Any) -> dict[str, Any]:  # noqa: ANN401
        return write(chosen) | limit(chosen)

    def options(self: Any, chosen: Any, meta: dict[str, Any]) -> dict[str, Any]:  # noqa: ANN401
        return choose(self, chosen, meta) | limit(chosen)

    with (
        patch.object(triton_heuristics, "config_to_dict", written),
        patch.object(triton_heuristics.CachingAutotuner, "_create_compile_options", options),
        config.patch(compile_threads=1),
    ):
        yield


@contextmanager
def _numbers_in_single_precision() -> Iterator[None]:
    """Our kernels take numbers in single precision, as from Triton itself; with doubles they would compute in these."""
    define = PythonWrapperCodegen.define_user_defined_triton_kernel

    def defined(self: PythonWrapperCodegen, *args: Any, **keywords: Any) -> Any:  # noqa: ANN401
        with config.patch(_use_fp64_for_unbacked_floats=False):
            return define(self, *args, **keywords)

    known = hasattr(config, "_use_fp64_for_unbacked_floats")
    with patch.object(PythonWrapperCodegen, "define_user_defined_triton_kernel", defined if known else define):
        yield
