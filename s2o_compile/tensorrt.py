"""TensorRT: engines for everything around S2O's operators, which stay operators of PyTorch between them.

    fast = s2o_compile.tensorrt.compile(model, (ids,))                                      # ahead of time
    fast = torch.compile(model, backend="s2o", options={"s2o.inner_backend": "tensorrt"})   # at the first call

TensorRT has no operator that ranks keys. torch-tensorrt cuts a graph where it has no converter. ``torch_executed_ops``
names our operators, so that it cuts there. It is imported when it is needed: ``pip install 's2o-compile[tensorrt]'``.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

from torch import fx, nn
from torch.export import ExportedProgram

from s2o_compile.aot.export import export
from s2o_compile.config import S2OConfig
from s2o_compile.errors import OptionError, TensorRTUnavailableError
from s2o_compile.kernels.support.torch_compat import OpOverload
from s2o_compile.kernels.support.torch_compile import lookup_backend


def compile(
    model: nn.Module | ExportedProgram,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    *,
    config: S2OConfig | None = None,
    dynamic_shapes: Any = None,  # noqa: ANN401 (as torch.export takes them)
    **settings: Any,  # noqa: ANN401 (torch-tensorrt's)
) -> fx.GraphModule:
    """Export a model, rewrite its attention, and build TensorRT engines around S2O's operators.

    Args:
        model: A module on a CUDA device, or the result of ``s2o_compile.export``.
        args: Example inputs; for an exported program also ``torch_tensorrt.Input``.
        kwargs: Example keyword inputs.
        config: Quality and implementation, None for the defaults. Only for a module.
        dynamic_shapes: As ``torch.export.export(dynamic_shapes=...)``. Only for a module.
        **settings: Any setting of ``torch_tensorrt.dynamo.compile``, such as ``min_block_size``.

    Raises:
        TensorRTUnavailableError: torch-tensorrt or TensorRT's libraries are missing.
        OptionError: ``config`` or ``dynamic_shapes`` beside an exported program.
    """
    dynamo = _torch_tensorrt().dynamo
    if isinstance(model, ExportedProgram):
        if config is not None or dynamic_shapes is not None:
            raise OptionError(
                "s2o_compile.tensorrt.compile: expected no config and no dynamic_shapes beside an exported program, "
                "which has them in it. Give them to s2o_compile.export."
            )
        program = model
    else:
        program = export(model, tuple(args), kwargs, config=config, dynamic_shapes=dynamic_shapes)
    settings = _with_our_operators(settings, program.graph)
    return dynamo.compile(program, arg_inputs=tuple(args), kwarg_inputs=dict(kwargs or {}), **settings)


def compile_graph(gm: fx.GraphModule, example_inputs: Sequence[Any], settings: Mapping[str, Any]) -> Any:  # noqa: ANN401
    """Compile a rewritten Dynamo graph by torch-tensorrt's own backend of torch.compile, under any of its settings.

    Raises:
        TensorRTUnavailableError: torch-tensorrt or TensorRT's libraries are missing.
    """
    _torch_tensorrt()  # makes the backend known
    backend: Any = lookup_backend("torch_tensorrt")
    return backend(gm, example_inputs, options=_with_our_operators(settings, gm.graph))


def _torch_tensorrt() -> ModuleType:
    try:
        return importlib.import_module("torch_tensorrt")
    except Exception as error:  # it raises a bare Exception where TensorRT's libraries are missing
        raise TensorRTUnavailableError(
            "s2o_compile.tensorrt: expected torch-tensorrt and TensorRT's libraries, got "
            f"{type(error).__name__}: {error}. Install both with `pip install 's2o-compile[tensorrt]'`, on a machine "
            'with an NVIDIA GPU, or use inner_backend="inductor".'
        ) from error


def _with_our_operators(settings: Mapping[str, Any], graph: fx.Graph) -> dict[str, Any]:
    """Settings under which our operators run in PyTorch, beside those that the user wants there."""
    ours = {
        f"torch.ops.{node.target}"  # the name that torch-tensorrt's partitioner compares
        for node in graph.nodes
        if isinstance(node.target, OpOverload) and node.target.namespace == "s2o"
    }
    return {**settings, "torch_executed_ops": {*settings.get("torch_executed_ops", ()), *ours}}
