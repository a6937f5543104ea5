"""A compiled module beside the original: the same class, the same weights, compiled at its first call."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

from s2o_compile.capture.generation_masks import build_inside
from s2o_compile.kernels.support.torch_compile import check_before_forward

Model = TypeVar("Model", bound=nn.Module)


def compiled_copy(
    model: Model, backend: str | Callable[..., object], *, dynamic: bool | None = None, fullgraph: bool = False
) -> Model:
    """A shallow copy of a module, compiled in place: it shares every parameter, buffer and submodule.

    The module stays as it is. The other arguments are those of ``torch.compile``.
    """
    compiled = copy.copy(model)  # drops compiled state, shares everything else
    check_before_forward(compiled, _refuse_export)
    _make_traceable(compiled)
    build_inside(compiled)
    compiled.compile(backend=backend, dynamic=dynamic, fullgraph=fullgraph)
    encoder = _encoder(model)
    if encoder is not None:  # generate() calls it by itself, past the model's own forward
        compiled_encoder = copy.copy(encoder)
        compiled_encoder.compile(backend=backend, dynamic=dynamic, fullgraph=fullgraph)

        def get_encoder(*args: object, **kwargs: object) -> object:
            found = model.get_encoder(*args, **kwargs)  # pyright: ignore[reportCallIssue] (a transformers model)
            return compiled_encoder if found is encoder else found

        object.__setattr__(compiled, "get_encoder", get_encoder)
    return compiled


def _refuse_export(module: nn.Module, args: tuple[object, ...]) -> None:
    """Raises under ``torch.export``, which passes over what was compiled: its program would be the dense model.

    ONNX, which knows no other, gets that.
    """
    if torch.compiler.is_exporting() and not torch.onnx.is_in_onnx_export():
        raise TypeError(
            "torch.export: expected an uncompiled module, got the result of s2o_compile.optimize, whose program would "
            "be dense. Pass the original module; s2o_compile.export makes a sparse program of it."
        )


def _make_traceable(model: nn.Module) -> None:
    """Dynamo skips frames of torch's own files: a bare nn.TransformerEncoder needs an outer frame that is not one."""
    if not type(model).__module__.startswith("torch.nn."):
        return
    inner = type(model).forward.__get__(model)

    def forward(*args: object, **kwargs: object) -> object:
        return inner(*args, **kwargs)

    object.__setattr__(model, "forward", forward)


def _encoder(model: nn.Module) -> nn.Module | None:
    """The encoder of a transformers encoder-decoder; None for every other model."""
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False) or not hasattr(model, "get_encoder"):
        return None
    encoder = model.get_encoder()  # pyright: ignore[reportCallIssue] (a transformers model)
    return encoder if isinstance(encoder, nn.Module) and encoder is not model else None
