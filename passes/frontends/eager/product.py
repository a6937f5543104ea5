"""Reads matrix products in all their forms: ``@``, ``matmul``, ``bmm``, ``baddbmm``, ``einsum``.

All products take one form, [..., M, K] @ [..., K, N] = [..., M, N]. Operands and results are transposed or permuted to
it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx

from s2o_compile.passes.graph.calls import function_name, written_nodes
from s2o_compile.passes.graph.nodes import arguments, value_of
from s2o_compile.passes.graph.operand import Operand, Step
from s2o_compile.passes.graph.rejected import Rejected, attempt
from s2o_compile.passes.masks import views

_MATRICES = {
    **dict.fromkeys(("matmul", "linalg_matmul"), "other|tensor2"),
    **dict.fromkeys(("bmm", "mm"), "mat2"),
}
_NAMES = (*_MATRICES, "baddbmm", "einsum")
Order = tuple[int, ...] | None
"""Where a tensor has the dimensions [..., queries, keys]; None if in that very order."""
_LABELS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True, eq=False)
class Product:
    """One matrix product.

    Attributes:
        node: The node that computes it.
        left: [..., M, K].
        right: [..., K, N].
        restore: Steps from [..., M, N] to the value of ``node``, which an einsum or swapped operands permute.
        alpha: A factor of the product (``baddbmm``).
        added: A tensor added to it (``baddbmm``), or None.
        tied: Whether it sums over several dimensions; then its operands are not in that form.
    """

    node: fx.Node
    left: Operand
    right: Operand
    restore: tuple[Step, ...] = ()
    alpha: float = 1.0
    added: fx.Node | None = None
    tied: bool = False


def read(node: object, weights: fx.Node | None = None, order: Order = None) -> Product | None:
    """The product that a node computes, or None.

    Weights are the left operand: [..., M, K], once their dimensions are in an order. Several dimensions of an einsum
    can be its M if the right operand lacks them. Without weights, M is the last but one of the result.
    """
    if not isinstance(node, fx.Node) or not isinstance(value_of(node), torch.Tensor):
        return None
    name, matmul = function_name(node), None
    if name in _NAMES and written_nodes(node):
        return None  # it writes to a tensor of the user's
    if name in _MATRICES:
        left, right = arguments(node, "input|self", _MATRICES[name])
        if _is_matrix(left) and _is_matrix(right):
            matmul = Product(node, Operand(left), Operand(right))
    elif name == "baddbmm":
        matmul = _baddbmm(node)
    elif name == "einsum":
        return _einsum(node, weights, order)
    if weights is None or matmul is None or (order is None and matmul.left.node is weights):
        return matmul
    if order != _swapped(len(order or ())) or matmul.right.node is not weights:
        return None
    return turned(matmul)


def turned(matmul: Product) -> Product:
    """The same product as that of its operands swapped: B^T @ A^T is the transpose of A @ B."""
    order = order_of(matmul) or tuple(range(value_of(matmul.node).ndim))
    inverse = [(*order[:-2], order[-1], order[-2]).index(dim) for dim in range(len(order))]
    left, right = transposed(matmul.right), transposed(matmul.left)
    return replace(matmul, left=left, right=right, restore=_reordered(Operand(matmul.node), inverse).steps)


def order_of(matmul: Product) -> Order:
    """Where the value of a product has the dimensions [..., M, N]."""
    if not matmul.restore:
        return None
    ((_, (order,)),) = matmul.restore
    return tuple(order.index(dim) for dim in range(len(order)))


def permuted(node: fx.Node, order: Order) -> Order | Rejected:
    """The order of a permutation's value, if its source has an order; a reason if its form is not known."""
    dims = attempt(views.permutation, node)
    if isinstance(dims, Rejected):
        return dims
    order = tuple(dims.index(dim) for dim in (range(len(dims)) if order is None else order))
    return None if order == tuple(range(len(order))) else order


def _swapped(rank: int) -> tuple[int, ...]:
    return (*range(rank - 2), rank - 1, rank - 2)


def transposed(operand: Operand) -> Operand:
    """The operand with its last two dimensions swapped, without a step where two swaps cancel."""
    node = operand.node
    if not operand.steps and _swaps_last_two(node):
        return Operand(node.args[0])  # pyright: ignore[reportArgumentType]
    if len(operand.steps) == 1 and operand.steps[0][0] is torch.permute:
        order = operand.steps[0][1][0]
        return _reordered(Operand(node), [*order[:-2], order[-1], order[-2]])
    return operand.then(torch.transpose, -2, -1)


def _swaps_last_two(node: fx.Node) -> bool:
    if function_name(node) not in views.PERMUTATIONS or not node.args or not _is_matrix(node.args[0]):
        return False
    rank = value_of(node.args[0]).ndim
    return attempt(views.permutation, node) == list(_swapped(rank))


def _is_matrix(node: object) -> bool:
    value = value_of(node) if isinstance(node, fx.Node) else None
    return isinstance(value, torch.Tensor) and value.ndim >= 2


def _baddbmm(node: fx.Node) -> Product | None:
    added, left, right = arguments(node, "input", "batch1", "batch2")
    beta, alpha = node.kwargs.get("beta", 1), node.kwargs.get("alpha", 1)
    if not (_is_matrix(left) and _is_matrix(right)) or not isinstance(alpha, int | float):
        return None
    if beta == 0:
        added = None  # it is not even read: it may be uninitialised
    elif beta != 1 or not isinstance(added, fx.Node):
        return None
    return Product(node, Operand(left), Operand(right), alpha=alpha, added=added)


def _einsum(node: fx.Node, weights: fx.Node | None, order: Order) -> Product | None:
    equation, *tensors = node.args or (None,)
    if len(tensors) == 1 and isinstance(tensors[0], tuple | list):
        tensors = list(tensors[0])
    if not isinstance(equation, str) or len(tensors) != 2 or not all(_is_matrix(tensor) for tensor in tensors):
        return None
    labels = _labels(equation, [value_of(tensor).ndim for tensor in tensors])
    if labels is None:
        return None
    first, second, output = labels
    inner = [label for label in first if label in second and label not in output]
    summed = [label for label in first + second if label not in output and label not in inner]
    if not inner or summed or len(output) < 2:
        return None
    rows, columns = (
        [label for label in output if label in own and label not in other]
        for own, other in ((first, second), (second, first))
    )
    if not rows or not columns:
        return None
    if len(inner) > 1:
        return Product(node, Operand(tensors[0]), Operand(tensors[1]), tied=True)
    in_order = output.index(rows[-1]) < output.index(columns[-1]) if weights is None else tensors[0] is weights
    if not in_order:  # [..., N, M] is the transposed product of the operands swapped
        tensors, first, second, rows, columns = tensors[::-1], second, first, columns, rows
    row, column = rows[-1], columns[-1]
    lead = [label for label in output if label not in (row, column)]
    if weights is not None:
        *lead, row, last = first if order is None else [first[dim] for dim in order]
        if tensors[0] is not weights or last != inner[0] or row not in rows or len(columns) > 1:
            return None
    return Product(
        node,
        _arranged(tensors[0], first, [*lead, row, inner[0]]),
        _arranged(tensors[1], second, [*lead, inner[0], column]),
        restore=_reordered(Operand(node), [[*lead, row, column].index(label) for label in output]).steps,
    )


def _labels(equation: str, ranks: Sequence[int]) -> tuple[str, str, str] | None:
    """The labels of both operands and of the result, ellipses replaced by labels; None if the equation is unknown."""
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    named = inputs.split(",")
    if len(named) != 2 or not arrow:
        return None
    free = [label for label in _LABELS if label not in equation]
    hidden = [rank - len(text.replace("...", "")) for text, rank in zip(named, ranks, strict=True)]
    if max(hidden) > len(free) or any(count < 0 for count in hidden):
        return None
    # Dimensions behind an ellipsis are aligned at the last one.
    first, second = (
        text.replace("...", "".join(free[max(hidden) - count : max(hidden)]))
        for text, count in zip(named, hidden, strict=True)
    )
    output = output.replace("...", "".join(free[: max(hidden)]))
    if any(len(set(text)) != len(text) or (text and not text.isalpha()) for text in (first, second, output)):
        return None
    fits = (len(first), len(second)) == tuple(ranks) and set(output) <= set(first + second)
    return (first, second, output) if fits else None


def _arranged(node: fx.Node, labels: str, wanted: list[str]) -> Operand:
    """A tensor with its dimensions in the wanted order; of size 1 where it has none, but for leading ones."""
    operand = _reordered(Operand(node), [labels.index(label) for label in wanted if label in labels])
    present = [label in labels for label in wanted]
    for at in range(present.index(True), len(wanted)):
        if not present[at]:
            operand = operand.then(torch.unsqueeze, at - present.index(True))
    return operand


def _reordered(operand: Operand, order: list[int]) -> Operand:
    return operand if order == list(range(len(order))) else operand.then(torch.permute, order)
