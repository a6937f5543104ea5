"""One form of hand-written attention, and the list of all forms that public files have.

A form takes query, key and value [B, H, N, D] and a padding mask [B, N], True for tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

LENGTH, DIM, HEADS, BATCH = 40, 16, 4, 2
NINF = float("-inf")
TRIANGLE = torch.ones(1, 1, 64, 64).tril()
RELATIVE = torch.linspace(-1, 1, HEADS * LENGTH * LENGTH).view(HEADS, LENGTH, LENGTH)

Function = Callable[[nn.Module, Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Form:
    """One form, written anew.

    Attributes:
        files: Public files that have it: repository and path.
        text: The form in words.
        result: The proven mask of the report; behind "dense: " or "not found: " a part of the reason.
        function: Of a module that holds the buffers and parameters, and the four inputs.
        buffers: Of that module, by name.
        parameters: Of that module, by name.
    """

    files: str
    text: str
    result: str
    function: Function
    buffers: Mapping[str, Tensor]
    parameters: Mapping[str, Tensor]

    def module(self) -> nn.Module:
        """A module of this form."""
        return _Holder(self).eval()


class _Holder(nn.Module):
    def __init__(self, form: Form) -> None:
        super().__init__()
        self.function = form.function
        for name, buffer in form.buffers.items():
            self.register_buffer(name, buffer.clone())
        for name, parameter in form.parameters.items():
            self.register_parameter(name, nn.Parameter(parameter.clone()))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, tokens: Tensor) -> Tensor:
        return self.function(self, q, k, v, tokens)


FORMS: dict[str, Form] = {}
"""Every form by the name of its function."""


def form(
    files: str,
    text: str,
    result: str,
    buffers: Mapping[str, Tensor] | None = None,
    parameters: Mapping[str, Tensor] | None = None,
) -> Callable[[Function], Function]:
    """Enters a function into `FORMS`."""

    def enter(function: Function) -> Function:
        FORMS[function.__name__] = Form(
            files=files,
            text=text,
            result=result,
            function=function,
            buffers=buffers or {},
            parameters=parameters or {},
        )
        return function

    return enter


def flat(x: Tensor) -> Tensor:
    """[B * H, N, D]."""
    return x.flatten(0, 1)


def length_first(x: Tensor) -> Tensor:
    """[B, N, H, D]."""
    return x.transpose(1, 2)


def channels(x: Tensor) -> Tensor:
    """One head as an image network has it: [B, D, N]."""
    return x[:, 0].transpose(1, 2)


def above(x: Tensor) -> Tensor:
    """The keys behind each query, bool [N, N]."""
    return torch.ones(x.shape[-2], x.shape[-2], dtype=torch.bool, device=x.device).triu(1)
