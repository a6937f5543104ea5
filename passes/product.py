"""Reading matrix products, however they are spelt: ``@``, ``matmul``, ``bmm``, ``baddbmm``, ``einsum``.

A product is brought to one form, [..., M, K] @ [..., K, N] = [..., M, N], by transposes and permutations of its
operands and of its result.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from s2o_compile.passes.graph_values import function_name, value_of, written_arguments
from s2o_compile.passes.operand import Operand, Step

_NAMES = ("matmul", "bmm", "baddbmm", "einsum")
_SWAPS = ("transpose", "swapaxes", "swapdims")


@dataclass(frozen=True, eq=False)
class Product:
    """One matrix product.

    Attributes:
        node: The node that computes it.
        left: [..., M, K].
        right: [..., K, N].
        restore: Steps from [..., M, N] to the value of ``node``; none but for an einsum that permutes its result.
        alpha: A factor of the product (``baddbmm``).
        added: A tensor added to it (``baddbmm``), or None.
    """

    node: fx.Node
    left: Operand
    right: Operand
    restore: tuple[Step, ...] = ()
    alpha: float = 1.0
    added: fx.Node | None = None


def read(node: object) -> Product | None:
    """The product that a node computes, or None."""
    if not isinstance(node, fx.Node) or not isinstance(value_of(node), torch.Tensor):
        return None
    name = function_name(node)
    if name in _NAMES and written_arguments(node):
        return None  # it writes to a tensor of the user's
    if name in ("matmul", "bmm"):
        arguments = _arguments(node, ("input", "other") if name == "matmul" else ("input", "mat2"))
        left, right = arguments if len(arguments) == 2 else (None, None)
        if _is_matrix(left) and _is_matrix(right):
            return Product(node, Operand(left), Operand(right))
    if name == "baddbmm":
        return _baddbmm(node)
    return _einsum(node) if name == "einsum" else None


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
    source = node.args[0] if node.args else None
    if not _is_matrix(source):
        return False
    rank = value_of(source).ndim
    name, dims = function_name(node), node.args[1:]
    if name == "getattr":
        return dims == ("mT",) or (dims == ("T",) and rank == 2)
    if name in _SWAPS and len(dims) == 2 and all(isinstance(dim, int) for dim in dims):
        return {dim % rank for dim in dims} == {rank - 2, rank - 1}
    if name == "permute":
        order = list(dims[0]) if len(dims) == 1 and isinstance(dims[0], tuple | list) else list(dims)
        swapped = [*range(rank - 2), rank - 1, rank - 2]
        return all(isinstance(dim, int) for dim in order) and [dim % rank for dim in order] == swapped
    return False


def _arguments(node: fx.Node, names: tuple[str, ...]) -> tuple[object, ...]:
    return (*node.args, *(node.kwargs[name] for name in names[len(node.args) :] if name in node.kwargs))


def _is_matrix(node: object) -> bool:
    value = value_of(node) if isinstance(node, fx.Node) else None
    return isinstance(value, torch.Tensor) and value.ndim >= 2


def _baddbmm(node: fx.Node) -> Product | None:
    added, left, right = (*_arguments(node, ("input", "batch1", "batch2")), None, None, None)[:3]
    beta, alpha = node.kwargs.get("beta", 1), node.kwargs.get("alpha", 1)
    if not (_is_matrix(left) and _is_matrix(right)) or not isinstance(alpha, int | float):
        return None
    if beta == 0:  # the added tensor is not even read: it may be uninitialised
        return Product(node, Operand(left), Operand(right), alpha=alpha)
    if beta != 1 or not isinstance(added, fx.Node):
        return None
    return Product(node, Operand(left), Operand(right), alpha=alpha, added=added)


def _einsum(node: fx.Node) -> Product | None:
    if not node.args or not isinstance(node.args[0], str):
        return None
    tensors = list(node.args[1]) if isinstance(node.args[1], tuple | list) else list(node.args[1:])
    inputs, arrow, output = node.args[0].replace(" ", "").partition("->")
    labels = inputs.split(",")
    if len(tensors) != 2 or len(labels) != 2 or not arrow or not all(_is_matrix(tensor) for tensor in tensors):
        return None
    first, second = labels
    repeats = any(len(set(text)) != len(text) for text in (first, second, output))
    if repeats or not (first + second + output).isalpha():
        return None
    batch = [label for label in output if label in first and label in second]
    row = [label for label in output if label in first and label not in second]
    column = [label for label in output if label in second and label not in first]
    inner = [label for label in first if label in second and label not in output]
    counts = len(row) == len(column) == len(inner) == 1
    if not counts or len(first) != len(batch) + 2 or len(second) != len(batch) + 2:
        return None
    if output.index(row[0]) > output.index(column[0]):  # [..., N, M]: the transposed product of the operands swapped
        tensors, (first, second), (row, column) = tensors[::-1], (second, first), (column, row)
    return Product(
        node,
        _permuted(Operand(tensors[0]), first, [*batch, *row, *inner]),
        _permuted(Operand(tensors[1]), second, [*batch, *inner, *column]),
        restore=_permuted(Operand(node), "".join([*batch, *row, *column]), list(output)).steps,
    )


def _permuted(operand: Operand, labels: str, wanted: list[str]) -> Operand:
    return _reordered(operand, [labels.index(label) for label in wanted])


def _reordered(operand: Operand, order: list[int]) -> Operand:
    return operand if order == list(range(len(order))) else operand.then(torch.permute, order)
