"""Private names of torch that only packages need: Inductor's, and those of the tracer in front of it.

A module apart from ``torch_compat.py`` because it takes seconds to import. Nothing here has a stand-in, but for the
name that a version of torch renamed: `package` asks ``torch_compat.require`` first.
"""

from __future__ import annotations

from typing import Any

from s2o_compile.kernels.support.torch_compat import _named
from s2o_compile.kernels.support.torch_compile import _NotRaised

PACKAGES = "packages"

# Tracing a decomposition.
aot_export_module = _named("torch._functorch.aot_autograd.aot_export_module", PACKAGES)
TracingContext = _named("torch._guards.TracingContext", PACKAGES)
tracing = _named("torch._guards.tracing", PACKAGES)
select_decomp_table = _named("torch._inductor.decomposition.select_decomp_table", PACKAGES)

# Compiling.
CustomGraphPass: Any = _named("torch._inductor.custom_graph_pass.CustomGraphPass", PACKAGES)
InductorError: type[Exception] = _named("torch._inductor.exc.InductorError", PACKAGES, _NotRaised)
aoti_compile_and_package = _named("torch._inductor.aoti_compile_and_package", PACKAGES)
cpp_compiler = _named("torch._inductor.cpp_builder.get_cpp_compiler", PACKAGES, lambda: "the C++ compiler")

# Names that the workarounds patch, and names that they write with.
config = _named("torch._inductor.config", PACKAGES)
triton_heuristics = _named("torch._inductor.runtime.triton_heuristics", PACKAGES)
triton_kernel_wrap = _named("torch._higher_order_ops.triton_kernel_wrap", PACKAGES)
SubgraphLowering: Any = _named("torch._inductor.graph.SubgraphLowering", PACKAGES)
PythonWrapperCodegen: Any = _named("torch._inductor.codegen.wrapper.PythonWrapperCodegen", PACKAGES)
EnterSubgraphLine: Any = _named("torch._inductor.codegen.wrapper.EnterSubgraphLine", PACKAGES)
ExitSubgraphLine: Any = _named("torch._inductor.codegen.wrapper.ExitSubgraphLine", PACKAGES)
CppWrapperCpu: Any = _named("torch._inductor.codegen.cpp_wrapper_cpu.CppWrapperCpu", PACKAGES)
Conditional: Any = _named("torch._inductor.ir.Conditional", PACKAGES)
TensorBox: Any = _named("torch._inductor.ir.TensorBox", PACKAGES)
V: Any = _named("torch._inductor.virtualized.V", PACKAGES)
for _path in (
    "torch._inductor.runtime.triton_heuristics.config_to_dict",
    "torch._inductor.runtime.triton_heuristics.CachingAutotuner._create_compile_options",
    "torch._inductor.codegen.wrapper.PythonWrapperCodegen.define_user_defined_triton_kernel",
    "torch._inductor.codegen.cpp_wrapper_cpu.CppWrapperCpu.codegen_conditional",
    "torch._inductor.codegen.cpp_wrapper_cpu.CppWrapperCpu.codegen_subgraph",
    "torch._inductor.config.allow_buffer_reuse",
    "torch._inductor.config.compile_threads",
    "torch._inductor.config._use_fp64_for_unbacked_floats",
):
    _named(_path, PACKAGES)

ANALYSES = ("identify_accessed_tensors", "identify_mutated_tensors")
"""The function that finds the tensors that a kernel writes to, in torch 2.13 and 2.11."""

_FOUND = [name for name in ANALYSES if _named(f"torch._higher_order_ops.triton_kernel_wrap.{name}", PACKAGES, None)]
ANALYSIS = _FOUND[0] if _FOUND else None
