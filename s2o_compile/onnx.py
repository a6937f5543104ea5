"""ONNX: graphs that hold S2O's operators leave torch with dense attention in their place.

    program = s2o_compile.onnx.dense(program)          # an ExportedProgram
    torch.onnx.export(program, f="model.onnx", dynamo=True)

ONNX has no operator that ranks keys, so what leaves is exact and dense: the same attention, without its speed. A model
that was optimized, or that calls ``s2o_compile.attention``, needs no such step: it is dense while ONNX exports it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

import s2o_compile.kernels.ops  # noqa: F401  (defines torch.ops.s2o)
from s2o_compile.capture.one_at_a_time import ONE_AT_A_TIME
from s2o_compile.errors import DenseExportWarning, InputError
from s2o_compile.kernels.core.call import AttentionCall, scale_of
from s2o_compile.kernels.core.documents import by_pairs
from s2o_compile.kernels.core.mask import UNKNOWN_MASK, AttentionMask
from s2o_compile.kernels.exact.formula import attend_outside_torch
from s2o_compile.kernels.support.errors import warn


def dense(program: ExportedProgram) -> ExportedProgram:
    """The program with exact, dense attention wherever it calls S2O's operators; the same one if it calls none.

    Args:
        program: What ``torch.export`` or ``s2o_compile.export`` made; stays as it is.

    Raises:
        TypeError: The program is no ``ExportedProgram``.
        InputError: A call returns its log-sum-exp, which torch's dense attention does not.
    """
    if not isinstance(program, ExportedProgram):
        raise TypeError(
            f"onnx.dense: expected a torch.export.ExportedProgram, got {type(program).__name__}. Call "
            "s2o_compile.export(model, args) first; a model that is optimized needs no such step."
        )
    calls = [node for node in program.graph.nodes if node.target in _DENSE]
    for node in calls:
        if node.kwargs.get("return_lse"):
            raise InputError(
                f"{node} in an exported program",
                expected="no return_lse: torch's dense attention has none",
                got="return_lse=True",
                remedy="Export the model without it.",
            )
    if not calls:
        return program
    warn(f"{len(calls)} attentions run densely in ONNX, which has no operator for S2O.", DenseExportWarning)
    with ONE_AT_A_TIME:
        return program.run_decompositions(_DENSE)


def _attention(
    query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None = None, sinks: Tensor | None = None, *,
    causal: bool = False, causal_offset: int | None = None, window: int | None = None,
    attention_chunk: int | None = None, scale: float | None = None, softcap: float | None = None,
    fully_masked: str = "zeros", layout: str = "auto", **_: object,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    terms = {"window": window, "attention_chunk": attention_chunk, "key_mask": key_mask}
    mask = AttentionMask.aligned(query, key, causal=causal, causal_offset=causal_offset, **terms)
    call = AttentionCall(
        query=query, key=key, value=value, mask=mask, scale=scale_of(query, scale), softcap=softcap, sinks=sinks,
        fully_masked=fully_masked,
    )  # fmt: skip
    return attend_outside_torch(call, layout=layout), query.new_empty(0, dtype=torch.float32)


def _masked_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor, sinks: Tensor | None = None, *,
    scale: float | None = None, softcap: float | None = None, fully_masked: str = "zeros", fill: float | None = None,
    layout: str = "auto", **_: object,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    call = AttentionCall(
        query=query, key=key, value=value, mask=UNKNOWN_MASK, scale=scale_of(query, scale), softcap=softcap,
        sinks=sinks, fully_masked=fully_masked,
    )  # fmt: skip
    return attend_outside_torch(call, attn_mask, layout, fill), query.new_empty(0, dtype=torch.float32)


_DENSE: dict[Any, Callable[..., tuple[Tensor, Tensor]]] = {
    torch.ops.s2o.attention.default: _attention,
    torch.ops.s2o.masked_attention.default: _masked_attention,
    torch.ops.s2o.packed_attention.default: by_pairs(_masked_attention),
}
