"""Which attentions may run sparse although gradients flow through them."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from s2o_compile.kernels.core.options import OperatorOptions
from s2o_compile.kernels.dispatch import is_short
from s2o_compile.kernels.impl.flex.forward import LEAST_HEAD_DIM
from s2o_compile.passes.graph.nodes import value_of
from s2o_compile.passes.graph.rejected import Rejected
from s2o_compile.passes.site import AttentionSite

WITHOUT_BACKWARD = ("cpu",)
"""Devices for which FlexAttention has no backward."""

_ASKED = {"implementation": ("auto", "flex"), "list_per": ("group",), "query_order": ("none",)}
"""What FlexAttention can do of options that name a way to do it."""


def gradients_wanted(site: AttentionSite) -> bool:
    """Whether the output of an attention needs a gradient."""
    output = value_of(site.node)
    return isinstance(output, torch.Tensor) and output.requires_grad


def check(site: AttentionSite, options: Mapping[str, object], training: str) -> Rejected | None:
    """Why an attention that gradients flow through stays dense, or None.

    Args:
        site: The attention.
        options: Keyword arguments of the operator.
        training: That of S2OConfig.
    """
    if training != "sparse":
        return Rejected(
            "gradients are wanted and the sparse operator has none: call the model under torch.no_grad(), or train it "
            'with S2OConfig(training="sparse") on a GPU'
        )
    query, key, value = (operand.value for operand in (site.query, site.key, site.value))
    if query.device.type in WITHOUT_BACKWARD:
        return Rejected("gradients are wanted, and FlexAttention has no backward on a %s", query.device.type.upper())
    for name, allowed in _ASKED.items():
        chosen = options.get(name, getattr(OperatorOptions, name))
        if chosen not in allowed:
            return Rejected("gradients are wanted, and FlexAttention, which has them, knows no %s=%s", name, chosen)
    if site.mask.read is not None:
        return Rejected("gradients are wanted, and its mask is not proven: masks are read without them only")
    if site.sinks is not None or site.mask.chunk is not None:
        return Rejected("gradients are wanted, and with sinks or chunks there are none of sparse attention")
    sizes = [size for tensor in (query, key, value) for size in tensor.shape]
    numbers = [x for x in (site.mask.offset, site.mask.window, site.softcap) if x is not None]
    if not all(isinstance(x, int | float) for x in (*sizes, *numbers, 1.0 if site.scale is None else site.scale)):
        return Rejected("gradients are wanted, and its sizes are symbolic: torch.compile(dynamic=False) fixes them")
    if min(query.shape[3], value.shape[3]) < LEAST_HEAD_DIM:
        return Rejected("gradients are wanted, and FlexAttention takes no head dim below %s", LEAST_HEAD_DIM)
    if isinstance(site.scale, int | float) and site.scale <= 0:
        return Rejected("gradients are wanted, and its scale is not positive")
    shortest = options.get("min_seq_len")
    if is_short(query, query.shape[2], key.shape[2], shortest if isinstance(shortest, int) else "auto"):
        return Rejected("%s queries and %s keys are short: dense is faster", query.shape[2], key.shape[2])
    return None
