"""Finds the keys and values behind ``repeat_kv``, so that the operator reads each of them once.

Grouped-query models copy every key head for its group of query heads before they call SDPA:

    k[:, :, None].expand(B, Hkv, G, N, D).reshape(B, Hkv * G, N, D)      Llama and most others
    torch.repeat_interleave(k, G, dim=1)                                 the same by name
    k.expand(B, Hq, N, D), from one head                                 Falcon's multi-query

The operator knows groups itself. A step is checked by the elements that it reads, not by its form.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import torch
from torch import fx

from s2o_compile.kernels.support.dtensors import is_dtensor
from s2o_compile.passes.graph.calls import function_name
from s2o_compile.passes.graph.nodes import Size, arguments, known, same_sizes, value_of
from s2o_compile.passes.graph.operand import Operand
from s2o_compile.passes.masks import views
from s2o_compile.passes.masks.prover import MaskProver

_COPIES = ("contiguous", "clone")


def _unwrap(node: fx.Node, site: fx.Node, prover: MaskProver) -> fx.Node:
    """The [B, Hkv, N, D] tensor that ``node`` [B, Hq, N, D], an operand of a site, repeats; ``node`` if it does not."""
    repeated = node
    while function_name(repeated) in _COPIES and isinstance(repeated.args[0], fx.Node):
        repeated = repeated.args[0]
    base = _interleaved(repeated) or _grouped(repeated, prover) or _one_head(repeated, prover)
    return node if base is None or not is_untouched(node, base, site, prover) else base


def unwrapped(key: Operand, value: Operand, site: fx.Node, prover: MaskProver) -> tuple[Operand, Operand]:
    """Key and value without the copies of their heads; those that are seen through steps are left as they are."""
    once = [operand if operand.steps else Operand(_unwrap(operand.node, site, prover)) for operand in (key, value)]
    return (once[0], once[1]) if known(once[0].value.shape[1] == once[1].value.shape[1]) else (key, value)


def is_untouched(node: fx.Node, base: fx.Node, site: fx.Node, prover: MaskProver) -> bool:
    """Whether reading ``base`` at the site gives the value of ``node``, a copy or view of it."""
    path = []
    while node is not base and node.args and isinstance(node.args[0], fx.Node):
        path.append(node)
        node = node.args[0]
    if node is not base:
        return False
    own = set(prover.mutations.writers(base))
    if any(set(prover.mutations.writers(step)) - own for step in path):
        return False  # written into a copy
    return not path or not prover.mutations.last_write(base, after=path[-1], before=site)


def _interleaved(node: fx.Node) -> fx.Node | None:
    """The argument of ``repeat_interleave(k, G, dim=1)``."""
    base, repeats, dim = arguments(node, "input|self", "repeats", "dim")
    if function_name(node) != "repeat_interleave" or not isinstance(base, fx.Node):
        return None
    shape = value_of(node).shape
    if not isinstance(repeats, int) or not isinstance(dim, int) or dim % len(shape) != 1:
        return None
    return base if known(shape[1] == value_of(base).shape[1] * repeats) else None


def _grouped(node: fx.Node, prover: MaskProver) -> fx.Node | None:
    """The [B, Hkv, N, D] source of [B, Hkv, G, N, D] merged to [B, Hkv * G, N, D]."""
    if function_name(node) not in ("reshape", "view", "flatten") or not isinstance(node.args[0], fx.Node):
        return None
    groups, shape = value_of(node.args[0]), value_of(node).shape
    if not isinstance(groups, torch.Tensor) or groups.ndim != 5 or len(shape) != 4:
        return None
    batch, heads, group, length, dim = groups.shape
    if not same_sizes(shape, (batch, heads * group, length, dim)):
        return None
    return read_along(node.args[0], (0, 1, 3, 4), (batch, heads, length, dim), prover)


def _one_head(node: fx.Node, prover: MaskProver) -> fx.Node | None:
    """The [B, 1, N, D] source of [B, Hq, N, D]."""
    if function_name(node) not in ("expand", "expand_as", "broadcast_to", "repeat"):
        return None
    batch, _, length, dim = value_of(node).shape
    return read_along(node, (0, None, 2, 3), (batch, 1, length, dim), prover)


def read_along(node: fx.Node, axes: Sequence[int | None], shape: Sequence[Size], prover: MaskProver) -> fx.Node | None:
    """The nearest tensor of a shape that ``node`` is a view of, dimension by dimension along the given axes."""
    for seen in islice(views.chain(node, prover.indices.evaluate), 1, None):
        base = value_of(seen.node)
        if base.dtype != value_of(node).dtype or is_dtensor(base) != is_dtensor(value_of(node)):
            return None
        if same_sizes(base.shape, shape):
            reads = all(
                known(size == 1) or (axis is not None and index.is_axis(axis))
                for index, axis, size in zip(seen.indices, axes, base.shape, strict=True)
            )
            return seen.node if reads else None
    return None
