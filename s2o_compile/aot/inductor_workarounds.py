"""Workarounds for bugs of Inductor that break or slow AOT packages: one context manager a bug.

A graph's branches and the Triton kernels that a graph brings along take a longer way through Inductor than anything
else. Each workaround names the upstream issue and the range of torch that it was tested with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import sympy
import torch

from s2o_compile.capture.one_at_a_time import ONE_AT_A_TIME
from s2o_compile.errors import PackageError
from s2o_compile.kernels.support.torch_compat import LAST_PACKAGED, require, torch_release
from s2o_compile.kernels.support.torch_inductor import (
    ANALYSIS,
    PACKAGES,
    Conditional,
    CppWrapperCpu,
    EnterSubgraphLine,
    ExitSubgraphLine,
    PythonWrapperCodegen,
    SubgraphLowering,
    TensorBox,
    V,
    config,
    triton_heuristics,
    triton_kernel_wrap,
)

Patch = Callable[[], Iterator[None]]

NOT_FILED = "not filed upstream yet"
_PULLS = "https://github.com/pytorch/pytorch/pull/"
_ISSUES = "https://github.com/pytorch/pytorch/issues/"


@dataclass(frozen=True, kw_only=True)
class Workaround:
    """One bug of Inductor.

    Attributes:
        bug: The bug in one line.
        upstream: Its issue or pull request in pytorch/pytorch, or `NOT_FILED`.
        patched: A context manager inside which Inductor does not have the bug.
        first: The oldest torch that the workaround was tested with.
        last: The newest one.
    """

    bug: str
    upstream: str
    patched: Callable[[], AbstractContextManager[None]]
    first: tuple[int, int] = (2, 11)
    last: tuple[int, int] = LAST_PACKAGED


WORKAROUNDS: list[Workaround] = []


def _works_around(bug: str, *, upstream: str) -> Callable[[Patch], Patch]:
    def register(function: Patch) -> Patch:
        WORKAROUNDS.append(Workaround(bug=bug, upstream=upstream, patched=contextmanager(function)))
        return function

    return register


@contextmanager
def inductor_workarounds() -> Iterator[None]:
    """Compile inside this block, one thread at a time.

    Raises:
        PackageError: This torch is outside the range that a workaround was tested with.
        MissingTorchNameError: It is inside, but lacks a private name.
    """
    for workaround in WORKAROUNDS:
        if not workaround.first <= torch_release() <= workaround.last:
            low, high = (".".join(map(str, version)) for version in (workaround.first, workaround.last))
            raise PackageError(
                f"package: expected torch {low} to {high}, which the workaround for this bug of Inductor was tested "
                f"with: {workaround.bug} ({workaround.upstream}); got torch {torch.__version__}. Install a torch of "
                "that range to write packages, or run the exported program itself."
            )
    require(PACKAGES)
    with ONE_AT_A_TIME, ExitStack() as stack:
        for workaround in WORKAROUNDS:
            stack.enter_context(workaround.patched())
        yield


@_works_around("memory of a branch is reused by the peak estimate of the graph around it", upstream=f"{_PULLS}184623")
def _no_buffer_reuse() -> Iterator[None]:
    """Buffers are not reused.

    Reuse is decided by the number of a scheduler node and the memory in use at this node. In a branch, the number
    counts the branch's nodes, but the memory is that of the whole graph, which may not have so many nodes. torch 2.13
    estimates by scope. Reuse stays off there, because packages have not been tested with it.
    """
    with config.patch(allow_buffer_reuse=False):
        yield


@_works_around("a graph and its branches give one name (ps0, ps1, ...) to different sizes", upstream=f"{_ISSUES}195604")
def _one_numbering_of_sizes() -> Iterator[None]:
    """A graph and its branches share one numbering of precomputed sizes.

    The launches of a branch are written under the graph around it, which does not know the branch's own names, or uses
    them for other sizes.
    """
    make = SubgraphLowering.__init__

    def made(self: Any, parent: Any, *args: Any, **keywords: Any) -> None:  # noqa: ANN401
        make(self, parent, *args, **keywords)
        self.sizevars.precomputed_replacements = parent.sizevars.precomputed_replacements
        self.sizevars.inv_precomputed_replacements = parent.sizevars.inv_precomputed_replacements

    with patch.object(SubgraphLowering, "__init__", made):
        yield


@_works_around("a user's Triton kernel loses the maxnreg of its configuration", upstream=NOT_FILED)
def _registers_limited() -> Iterator[None]:
    """Kernels keep ``maxnreg``, which Inductor drops when it writes a configuration and when it compiles.

    Kernels are compiled in this process, because the processes that Inductor starts do not have this patch.
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


@_works_around("a user's Triton kernel gets Python floats as doubles", upstream=f"{_PULLS}190340")
def _numbers_in_single_precision() -> Iterator[None]:
    """Kernels get floats in single precision, as Triton passes them. With doubles they would compute in doubles."""
    define = PythonWrapperCodegen.define_user_defined_triton_kernel

    def defined(self: Any, *args: Any, **keywords: Any) -> Any:  # noqa: ANN401
        with config.patch(_use_fp64_for_unbacked_floats=False):
            return define(self, *args, **keywords)

    with patch.object(PythonWrapperCodegen, "define_user_defined_triton_kernel", defined):
        yield


@_works_around("a Triton kernel is compiled and analysed anew for each of its launches", upstream=f"{_PULLS}193227")
def _kernels_analysed_once() -> Iterator[None]:
    """Each kernel is analysed once for its kinds of arguments.

    Inductor asks several times per launch what a kernel writes to. That was most of the time that a layer took.
    """
    if ANALYSIS is None:  # a torch with another name for it is slow, not wrong
        yield
        return
    plain = getattr(triton_kernel_wrap, ANALYSIS)
    known: dict[object, Any] = {}

    def once(kernel: Any, arguments: dict[str, Any], *rest: Any) -> Any:  # noqa: ANN401
        configs = getattr(kernel, "configs", None)
        # A configuration that sets no argument changes nothing in the kernel; ours are made anew for every launch.
        function = kernel.fn if configs and not any(chosen.kwargs for chosen in configs) else kernel
        key = function, tuple((name, _kind(value)) for name, value in arguments.items()), repr(rest)
        if key not in known:
            known[key] = plain(kernel, arguments, *rest)
        return known[key]

    with patch.object(triton_kernel_wrap, ANALYSIS, once):
        yield


def _kind(value: Any) -> object:  # noqa: ANN401
    """The part of an argument that a kernel's code may depend on; not the value of a number known only at run time."""
    if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool | sympy.Expr):
        return type(value)
    if isinstance(value, (torch.Tensor, TensorBox)):
        return torch.Tensor, value.dtype
    return type(value), repr(value)


@_works_around("a branch that several conditionals share is written into each of them", upstream=NOT_FILED)
def _branches_written_once() -> Iterator[None]:
    """A branch that several conditionals share becomes one function of the C++ program.

    Inductor lowers a shared branch once, but writes it into each conditional. From the second time on, its buffers
    count as allocated and are missing in the program.
    """
    write_conditional, write_branch = CppWrapperCpu.codegen_conditional, CppWrapperCpu.codegen_subgraph
    functions: dict[int, tuple[str, Any]] = {}

    def conditional(self: Any, branching: Any) -> None:  # noqa: ANN401
        others = [node for node in V.graph.operations if isinstance(node, Conditional) and node is not branching]
        elsewhere = [taken for node in others for taken in _branches(node)]
        for taken in _branches(branching):
            if id(taken) not in functions and any(taken is other for other in elsewhere):
                name = _write_function(self, taken, len(branching.outputs or ()), write_branch)
                functions[id(taken)] = name, taken  # kept alive with its id
        write_conditional(self, branching)

    def branch(self: Any, taken: Any, inputs: list[str], outputs: list[str]) -> None:  # noqa: ANN401
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


def _branches(branching: Any) -> list[Any]:  # noqa: ANN401
    return [branch for branch in (branching.true_subgraph, branching.false_subgraph) if branch is not None]


def _tensors(branch: Any, inputs: list[str]) -> list[str]:  # noqa: ANN401
    """Those of a branch's inputs that are tensors. Sizes have the same name everywhere."""
    known = branch.graph.graph_inputs.values()
    return [name for name, value in zip(inputs, known, strict=True) if isinstance(value, TensorBox)]


def _write_function(wrapper: Any, branch: Any, n_outputs: int, write: Callable[..., None]) -> str:  # noqa: ANN401
    """Writes a branch as a function of its tensors; its name. It captures sizes, kernels and streams from around it."""
    name = f"run_{branch.name}"
    inputs = [f"{branch.name}_in{place}" for place in range(len(branch.graph.graph_inputs))]
    outputs = [f"{branch.name}_out{place}" for place in range(n_outputs)]
    parameters = [f"AtenTensorHandle {tensor}" for tensor in _tensors(branch, inputs)]
    parameters += [f"RAIIAtenTensorHandle& {tensor}" for tensor in outputs]
    wrapper.writeline(f"auto {name} = [&]({', '.join(parameters)}) {{")
    wrapper.writeline(EnterSubgraphLine(wrapper, branch.graph))
    write(wrapper, branch, inputs, outputs)
    wrapper.writeline(ExitSubgraphLine(wrapper))
    wrapper.writeline("};")
    return name
