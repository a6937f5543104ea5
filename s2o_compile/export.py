"""``export``: a model as an ``ExportedProgram`` whose attentions are sparse, with lengths left open."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from s2o_compile.backend import rewrite
from s2o_compile.config import S2OConfig, config_or_default
from s2o_compile.passes import exported


def export(
    model: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    config: S2OConfig | None = None,
    dynamic_shapes: Any = None,  # noqa: ANN401 (whatever torch.export takes)
) -> ExportedProgram:
    """Export a model for inference and rewrite its attentions, before anything is decomposed.

    Masks are proven for every length that ``dynamic_shapes`` leaves open. What was rewritten, and why the rest was not,
    is in ``s2o_compile.record()``, as for ``torch.compile``. ``torch.export.save`` and ``load`` work on the result, and
    ``run_decompositions`` keeps every attention one node; a process that loads it must import s2o_compile first. One
    that cannot runs a `package`.

    Args:
        model: Any module, in eval mode if it has dropout.
        args: Example inputs, as ``torch.export.export(args=...)``.
        kwargs: Example keyword inputs.
        config: Quality and implementation; None for the defaults. ``inner_backend`` has no meaning here.
        dynamic_shapes: As ``torch.export.export(dynamic_shapes=...)``: which sizes may change, and between what.

    Returns:
        The program. It holds no gradient: attentions run as in inference.

    Raises:
        TypeError: The model is no ``nn.Module``, or is a compiled one.
        OptionError: The configuration is no S2OConfig.
        torch._dynamo.exc.UserError: torch.export cannot capture the model; its message says where.
    """
    config = config_or_default(config, "export")
    optimized = getattr(model, "_compiled_call_impl", None) is not None  # by torch.export it would be looked past
    if not isinstance(model, nn.Module) or isinstance(model, torch._dynamo.OptimizedModule) or optimized:
        raise TypeError(
            f"export: expected an uncompiled torch.nn.Module, got {type(model).__name__}. Pass the module itself; what "
            "torch.compile or optimize returned cannot be exported."
        )
    with torch.no_grad():  # with gradients wanted, every attention would stay dense
        program = torch.export.export(model, args, dict(kwargs or {}), dynamic_shapes=dynamic_shapes)
    with exported.opened(program.graph):
        rewrite(program.graph_module, config)
    program.graph_module.recompile()
    program.validate()
    return program
