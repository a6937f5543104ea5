"""Finds the keys and values behind ``repeat_kv``, so that the operator reads each of them once.

Grouped-query models copy every key head for its group of query heads before they call SDPA:

    k[:, :, None].expand(B, Hkv, G, N, D).reshape(B, Hkv * G, N, D)      Llama and most others
    torch.repeat_interleave(k, G, dim=1)                                 the same by name
    k.expand(B, Hq, N, D), from one head                                 Falcon's multi-query

The operator knows groups itself. A step is checked by the elements that it reads, not by its form.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from s2o_compile.passes.graph.calls import function_name
from s2o_compile.passes.graph.nodes import Size, known, value_of
from s2o_compile.passes.graph.operand import Operand
from s2o_compile.passes.graph.rejected import attempt
from s2o_compile.passes.masks import views
from s2o_compile.passes.masks.index_tensor import IndexTensor
from s2o_compile.passes.masks.prover import MaskProver

_COPIES = ("contiguous", "clone")


def unwrap(node: fx.Node, site: fx.Node, prover: MaskProver) -> fx.Node:
    """The [B, Hkv, N, D] tensor that ``node`` [B, Hq, N, D] repeats; ``node`` itself if it repeats none.

    Args:
        node: Key or value operand.
        site: The attention that reads it.
        prover: Knows index tensors and in-place writes of the graph.
    """
    repeated = node
    while function_name(repeated) in _COPIES and isinstance(repeated.args[0], fx.Node):
        repeated = repeated.args[0]
    base = _interleaved(repeated) or _grouped(repeated, prover) or _one_head(repeated, prover)
    return node if base is None or not is_untouched(node, base, site, prover) else base


def unwrapped(operand: Operand, site: fx.Node, prover: MaskProver) -> Operand:
    """An operand without the copies of its heads; one that is seen through steps is left as it is."""
    return operand if operand.steps else Operand(unwrap(operand.node, site, prover))


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
    return not path or not prover.mutations.changed(base, after=path[-1], before=site)


def _interleaved(node: fx.Node) -> fx.Node | None:
    """The argument of ``repeat_interleave(k, G, dim=1)``."""
    if function_name(node) != "repeat_interleave" or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    options = {**dict(zip(("repeats", "dim"), node.args[1:], strict=False)), **node.kwargs}
    base, shape = node.args[0], value_of(node).shape
    dim = options.get("dim")
    if not isinstance(options.get("repeats"), int) or not isinstance(dim, int) or dim % len(shape) != 1:
        return None
    return base if known(shape[1] == value_of(base).shape[1] * options["repeats"]) else None


def _grouped(node: fx.Node, prover: MaskProver) -> fx.Node | None:
    """The [B, Hkv, N, D] source of [B, Hkv, G, N, D] merged to [B, Hkv * G, N, D]."""
    if function_name(node) not in ("reshape", "view", "flatten") or not isinstance(node.args[0], fx.Node):
        return None
    groups, shape = value_of(node.args[0]), value_of(node).shape
    if not isinstance(groups, torch.Tensor) or groups.ndim != 5 or len(shape) != 4:
        return None
    batch, heads, group, length, dim = groups.shape
    if not _equal(shape, (batch, heads * group, length, dim)):
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
    full = value_of(node).shape
    indices = tuple(IndexTensor.axis(full, dim) for dim in range(len(full)))
    while True:
        source = attempt(views.source, node, prover.indices)
        if not source or value_of(source.node).dtype != value_of(node).dtype:
            return None
        indices = tuple(index.at(indices, full) for index in source.indices)
        node = source.node
        base = value_of(node).shape
        if len(base) == len(shape) and _equal(base, shape):
            reads = all(
                known(size == 1) or (axis is not None and _is_axis(index, axis))
                for index, axis, size in zip(indices, axes, base, strict=True)
            )
            return node if reads else None


def _is_axis(index: IndexTensor, axis: int) -> bool:
    return known(index.const == 0) and all(step == int(dim == axis) for dim, step in enumerate(index.steps))


def _equal(left: Sequence[Size], right: Sequence[Size]) -> bool:
    return all(known(a == b) for a, b in zip(left, right, strict=True))
