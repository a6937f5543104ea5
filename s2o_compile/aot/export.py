"""``export``: a model as an ``ExportedProgram`` whose attentions are sparse, with lengths left open."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import sympy
import torch
from torch import nn
from torch.export import ExportedProgram

from s2o_compile.capture.one_at_a_time import ONE_AT_A_TIME
from s2o_compile.config import S2OConfig, config_or_default
from s2o_compile.errors import ExportError
from s2o_compile.kernels.support.torch_compat import fake_mode_of
from s2o_compile.kernels.support.torch_compile import is_compiled, user_error, user_error_type
from s2o_compile.passes.graph import exported
from s2o_compile.rewriting import rewrite

_ASSERT = torch.ops.aten._assert_scalar.default
_NO_TENSOR = re.compile(r"Found <class '([\w.]+)'> in output")
"""What torch.export says of an output that it does not know."""
_MANY = 2**20
"""A size without a bound is tried up to this one."""


def export(
    model: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    config: S2OConfig | None = None,
    dynamic_shapes: Any = None,  # noqa: ANN401 (whatever torch.export takes)
    strict: bool = False,
) -> ExportedProgram:
    """Export a model for inference and rewrite its attentions, before anything is decomposed.

    Masks are proven for every length that ``dynamic_shapes`` leaves open. ``s2o_compile.record()`` lists the rewritten
    attentions, and why others stay dense, as for ``torch.compile``. ``torch.export``'s own functions work on the result
    (``save``, ``load``, ``unflatten``), and ``run_decompositions`` keeps every attention one node. A process that loads
    it must import s2o_compile first. A process that cannot import it runs a `package`.

    Exports run one at a time, because torch traces them for the whole process. No other thread may call
    ``torch.export``, or a compiled model for the first time, meanwhile.

    Args:
        model: Any module, in eval mode if it has dropout.
        args: Example inputs, as ``torch.export.export(args=...)``.
        kwargs: Example keyword inputs.
        config: Quality and implementation; None for the defaults. ``inner_backend`` has no meaning here.
        dynamic_shapes: As ``torch.export.export(dynamic_shapes=...)``: the sizes that may change, and their ranges.
        strict: As ``torch.export.export(strict=...)``: whether Dynamo captures the model.

    Returns:
        The program. It holds no gradient: attentions run as in inference.

    Raises:
        TypeError: The model is no ``nn.Module``, or is a compiled one.
        OptionError: The configuration is no S2OConfig.
        ExportError: The model returns something else than tensors, such as a cache of keys and values.
        torch._dynamo.exc.UserError: torch.export cannot capture the model; its message says where.
    """
    config = config_or_default(config, "export")
    if not isinstance(model, nn.Module) or is_compiled(model):  # torch.export would capture the model as it was
        raise TypeError(
            f"export: expected an uncompiled torch.nn.Module, got {type(model).__name__}. Pass the module itself: the "
            "result of torch.compile or optimize cannot be exported."
        )
    with ONE_AT_A_TIME:
        with torch.no_grad():  # with gradients wanted, every attention would stay dense
            program = _capture(model, args, dict(kwargs or {}), dynamic_shapes=dynamic_shapes, strict=strict)
        with exported.opened(program):
            rewrite(program.graph_module, config)
        program.graph_module.recompile()
        program.validate()
    return program


def _capture(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], **options: Any) -> ExportedProgram:  # noqa: ANN401
    """torch.export's program.

    torch 2.11 does not know that min(64 n, 192 n), a stride of repeated heads, is 64 n, and calls it a constraint that
    some n violates. As an assertion of the program it is one that holds.
    """
    export = partial(torch.export.export, model, args, kwargs, **options)
    try:
        return export()
    except user_error() as error:
        if getattr(error, "error_type", None) is not user_error_type().CONSTRAINT_VIOLATION:
            raise
        program = export(prefer_deferred_runtime_asserts_over_guards=True)
        if not _asserts_what_holds(program):
            raise
        # Decompositions must not add assertions of their own: the example has several tiles, a single token has not.
        fake = fake_mode_of([node.meta.get("val") for node in program.graph.nodes])
        if fake is not None and fake.shape_env is not None:
            shapes = fake.shape_env
            shapes.settings = replace(shapes.settings, prefer_deferred_runtime_asserts_over_guards=False)
        return program
    except RuntimeError as error:
        found = _NO_TENSOR.search(str(error))
        if found is None:
            raise
        raise ExportError(
            f"export: expected a model that returns tensors, got a {found[1].rpartition('.')[2]} among the outputs of "
            f"{type(model).__name__}. For a model of transformers set model.config.use_cache = False before, or give "
            "use_cache=False in kwargs (docs/export.md); any other model wrap in a module that returns tensors alone."
        ) from None  # torch's own 80 lines say no more


def _asserts_what_holds(program: ExportedProgram) -> bool:
    """Whether no assertion about sizes fails at the ends of their ranges and at a few sizes between them."""
    asserted = [node.args[0] for node in program.graph.find_nodes(op="call_function", target=_ASSERT)]
    conditions = [x.meta["val"].node.expr for x in asserted if isinstance(x, torch.fx.Node)]
    for condition in conditions:
        sizes = {}
        for symbol in condition.free_symbols:
            span = program.range_constraints.get(symbol)
            low, high = (1, _MANY) if span is None else (int(span.lower), int(min(span.upper, _MANY)))
            sizes[symbol] = sorted({low, high, *(n for n in (2, 3, 127, 1000, 4097) if low < n < high)})
        points = (dict(zip(sizes, point, strict=True)) for point in itertools.product(*sizes.values()))
        try:
            if any(condition.subs(point) is sympy.false for point in points):
                return False
        except ZeroDivisionError:  # it says something of sizes that this range does not exclude
            return False
    return True
