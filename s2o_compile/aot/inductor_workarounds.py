"""What Inductor loses of a package on its way from the graph, kept, and what it does over and over, done once.

A graph's branches, and the kernels that a graph brings along, take a longer way through it than anything else. For
torch 2.11 to 2.13.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import sympy
import torch
from torch._higher_order_ops import triton_kernel_wrap
from torch._inductor import config
from torch._inductor.codegen.cpp_wrapper_cpu import CppWrapperCpu
from torch._inductor.codegen.wrapper import EnterSubgraphLine, ExitSubgraphLine, PythonWrapperCodegen
from torch._inductor.graph import GraphLowering, SubgraphLowering
from torch._inductor.ir import Conditional, Subgraph, TensorBox
from torch._inductor.runtime import triton_heuristics
from torch._inductor.virtualized import V

from s2o_compile.capture.one_at_a_time import ONE_AT_A_TIME

OPTIONS = {
    # Whether memory is used again is decided by the number of a node, which in a branch counts that branch's nodes, and
    # by the memory in use at this node of the whole graph. Such a number may not even exist there.
    "allow_buffer_reuse": False,
}
"""Options to compile with."""

_ANALYSES = ("identify_accessed_tensors", "identify_mutated_tensors")
"""What finds out what a kernel writes to, in torch 2.13 and 2.11."""


@contextmanager
def inductor_workarounds() -> Iterator[None]:
    """Compile inside this block, one thread at a time."""
    with (
        ONE_AT_A_TIME,
        _one_numbering_of_sizes(),
        _registers_limited(),
        _numbers_in_single_precision(),
        _kernels_analysed_once(),
        _branches_written_once(),
    ):
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


@contextmanager
def _kernels_analysed_once() -> Iterator[None]:
    """What a kernel writes to is found out once for its kinds of arguments.

    torch compiles and reads it anew for every launch in a graph, several times over: most of what a layer cost.
    """
    analyse = next((name for name in _ANALYSES if hasattr(triton_kernel_wrap, name)), None)
    if analyse is None:  # a torch of another name for it takes its time
        yield
        return
    plain = getattr(triton_kernel_wrap, analyse)
    known: dict[object, Any] = {}

    def once(kernel: Any, given: dict[str, Any], *rest: Any) -> Any:  # noqa: ANN401
        configs = getattr(kernel, "configs", None)
        # A configuration that sets no argument changes nothing in the kernel; ours are made anew for every launch.
        function = kernel.fn if configs and not any(chosen.kwargs for chosen in configs) else kernel
        key = function, tuple((name, _kind(value)) for name, value in given.items()), repr(rest)
        if key not in known:
            known[key] = plain(kernel, given, *rest)
        return known[key]

    with patch.object(triton_kernel_wrap, analyse, once):
        yield


@contextmanager
def _branches_written_once() -> Iterator[None]:
    """Branches that several conditionals share become functions of the C++ program, which each of them calls.

    Inductor knows shared branches and lowers them once, but would write them into each conditional, where from the
    second time on their buffers count as allocated.
    """
    write_conditional, write_branch = CppWrapperCpu.codegen_conditional, CppWrapperCpu.codegen_subgraph
    functions: dict[int, tuple[str, Subgraph]] = {}

    def conditional(self: CppWrapperCpu, branching: Conditional) -> None:
        others = [node for node in V.graph.operations if isinstance(node, Conditional) and node is not branching]
        elsewhere = [taken for node in others for taken in _branches(node)]
        for taken in _branches(branching):
            if id(taken) not in functions and any(taken is other for other in elsewhere):
                _write_function(self, taken, len(branching.outputs or ()), write_branch)
                functions[id(taken)] = _function_name(taken), taken  # kept alive with its id
        write_conditional(self, branching)

    def branch(self: CppWrapperCpu, taken: Subgraph, inputs: list[str], outputs: list[str]) -> None:
        if id(taken) in functions:
            name, _ = functions[id(taken)]
            self.writeline(f"{name}({', '.join([*_tensors(taken, inputs), *outputs])});")
        else:
            write_branch(self, taken, inputs, outputs)

    with (
        patch.object(CppWrapperCpu, "codegen_conditional", conditional),
        patch.object(CppWrapperCpu, "codegen_subgraph", branch),
    ):
        yield


def _branches(branching: Conditional) -> list[Subgraph]:
    return [branch for branch in (branching.true_subgraph, branching.false_subgraph) if branch is not None]


def _function_name(branch: Subgraph) -> str:
    return f"run_{branch.name}"


def _tensors(branch: Subgraph, inputs: list[str]) -> list[str]:
    """Those of a branch's inputs that are tensors: sizes have the same name everywhere."""
    assert branch.graph is not None
    known = branch.graph.graph_inputs.values()
    return [name for name, value in zip(inputs, known, strict=True) if isinstance(value, TensorBox)]


def _write_function(wrapper: CppWrapperCpu, branch: Subgraph, n_outputs: int, write: Callable[..., None]) -> None:
    """A branch as a function of its tensors; sizes, kernels and streams are those around it."""
    assert branch.graph is not None
    inputs = [f"{branch.name}_in{place}" for place in range(len(branch.graph.graph_inputs))]
    outputs = [f"{branch.name}_out{place}" for place in range(n_outputs)]
    parameters = [f"AtenTensorHandle {name}" for name in _tensors(branch, inputs)]
    parameters += [f"RAIIAtenTensorHandle& {name}" for name in outputs]
    wrapper.writeline(f"auto {_function_name(branch)} = [&]({', '.join(parameters)}) {{")
    wrapper.writeline(EnterSubgraphLine(wrapper, branch.graph))
    write(wrapper, branch, inputs, outputs)
    wrapper.writeline(ExitSubgraphLine(wrapper))
    wrapper.writeline("};")


def _kind(value: object) -> object:
    """What of an argument the code of a kernel may depend on: not the value of what is known when it runs."""
    if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool | sympy.Expr):
        return type(value)
    if isinstance(value, torch.Tensor | TensorBox):
        return torch.Tensor, value.dtype
    return type(value), repr(value)
