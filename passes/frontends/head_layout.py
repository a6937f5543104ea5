"""Brings 2-D to 5-D and broadcast operands of hand-written attention to [B, H, N, D].

    [N, D]              one head of one sequence
    [R, N, D]           bmm's: R = B * H, split again where the scores were, else one head each
    [B, Hkv, G, N, D]   grouped heads, or windows: one dimension of heads; keys of size 1 along G stay grouped
    a size of 1         where another operand has more: read by all of them

Each change is a view step of an operand, which the rewriter inserts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch

from s2o_compile.passes.frontends.checks import check_untransformed
from s2o_compile.passes.graph.nodes import Size, known
from s2o_compile.passes.graph.operand import Operand, Step
from s2o_compile.passes.graph.rejected import Refused
from s2o_compile.passes.masks.proof import MERGED

Axes = tuple[int | None, ...]


def to_heads(
    query: Operand, key: Operand, value: Operand, heads: int | None, scores: Sequence[Size], weights: Sequence[Size]
) -> tuple[Operand, Operand, Operand, tuple[Step, ...]]:
    """The operands of two products as [B, Hq, Nq, D], [B, Hkv, Nk, D] and [B, Hkv, Nk, Dv], and the steps back.

    The steps lead from [B, Hq, Nq, Dv] to the product of probabilities and values.

    Args:
        query: [..., Nq, D].
        key: [..., Nk, D].
        value: [..., Nk, Dv].
        heads: Heads that products in three dimensions were split into; None if they were not.
        scores: Shape of the product of queries and keys.
        weights: Shape of the probabilities where they meet the values.
    """
    operands = (query, key, value)
    if not all(isinstance(operand.value, torch.Tensor) for operand in operands):
        raise Refused("the shapes of query, key and value are not recorded in the graph")
    check_untransformed(*(operand.value for operand in operands))
    shapes = ", ".join(str(tuple(operand.value.shape)) for operand in operands)
    rank = max(len(weights), value.value.ndim)
    if len(scores) > 5 or rank > 5:
        raise Refused("query, key and value have shapes %s, expected at most [B, Hkv, G, N, D]", shapes)
    if value.value.ndim > len(weights) > 2 and not known(weights[0] == 1):
        raise Refused("its probabilities of shape %s are broadcast to values of a higher rank", tuple(weights))
    lifted = [_lifted(operand, at) for operand, at in zip(operands, (len(scores), len(scores), rank), strict=True)]
    rows = [operand.value.shape[0] for operand in lifted if operand.value.ndim == 3]
    several = [count for count in rows if not known(count == 1)]
    if not all(known(count == several[0]) for count in several):
        raise Refused("its products broadcast %s rows of heads to one another", ", ".join(map(str, rows)))
    groups = next((tuple(shape[1:3]) for shape in (scores, weights) if len(shape) == 5), None)
    fours = [_four(operand, heads or 1, groups) for operand in lifted]
    split = [operand for operand in fours if operand is not None]
    unequal = Refused("query, key and value of shapes %s have no common split into heads", shapes)
    if len(split) < len(fours):
        raise unequal
    restore: dict[int, tuple[Step, ...]] = {
        2: ((torch.select, (0, 0)), (torch.select, (0, 0))),
        3: ((torch.flatten, (0, 1)),),
        5: ((torch.unflatten, (1, groups)),),
    }
    brought = broadcast(*split)
    if rank == 5 and not known(math.prod(groups or ()) == brought[0].value.shape[1]):
        raise unequal
    return (*brought, restore.get(rank, ()))


def broadcast(query: Operand, key: Operand, value: Operand) -> tuple[Operand, Operand, Operand]:
    """Operands in four dimensions with one batch, and one number of heads for keys and values."""
    batch = _largest(operand.value.shape[0] for operand in (query, key, value))
    key_heads = _largest(operand.value.shape[1] for operand in (key, value))
    one_query = known(query.value.shape[1] == 1)
    return (
        _expanded(query, batch, key_heads if one_query else query.value.shape[1]),
        _expanded(key, batch, key_heads),
        _expanded(value, batch, key_heads),
    )


def axes(
    operand: object, scores: Sequence[Size], lead: Sequence[Size], *, split: bool, order: Sequence[int] | None = None
) -> Axes | None:
    """Along which axis of [B, Hq, Nq, Nk] each dimension of a mask or factor runs; None for a size of 1, else `MERGED`.

    It met scores of some shape, with ``lead`` (B, Hq); those in three dimensions may have been split into heads.
    ``order`` says where they have [..., queries, keys], if not in that order.
    Instead of a tuple, None if it means nothing to scores in four dimensions.
    """
    shape = operand.shape if isinstance(operand, torch.Tensor) else ()
    batch, heads = lead
    order = range(len(scores)) if order is None else order
    scores = [scores[dim] for dim in order]
    if len(scores) == 4:
        runs, same = (0, 1, 2, 3), known(scores[0] == batch) and known(scores[1] == heads)
    elif len(scores) == 5:
        runs, same = (0, MERGED, MERGED, 2, 3), known(scores[0] == batch) and known(scores[1] * scores[2] == heads)
    else:
        runs, same = (MERGED if split else 0, 2, 3)[-len(scores) :], len(scores) in (2, 3)
    if not same or len(shape) > len(runs):
        return None
    runs = [runs[order.index(dim)] for dim in range(len(runs))]
    runs = runs[len(runs) - len(shape) :]
    return tuple(None if known(size == 1) else axis for size, axis in zip(shape, runs, strict=True))


def broadcasts(along: Axes) -> bool:
    """Whether a tensor with these axes broadcasts to [B, Hq, Nq, Nk] as it is."""
    return len(along) <= 4 and all(
        axis in (None, wanted) for axis, wanted in zip(reversed(along), (3, 2, 1, 0), strict=False)
    )


def _lifted(operand: Operand, rank: int) -> Operand:
    """With leading dimensions of size 1, as a product adds them to the operand of the lower rank."""
    for _ in range(rank - operand.value.ndim):
        operand = operand.then(torch.unsqueeze, 0)
    return operand


def _four(operand: Operand, heads: int, groups: Sequence[Size] | None) -> Operand | None:
    """[B, H, N, D] of an operand of any rank; ``groups`` are the sizes of the two dimensions of heads."""
    shape = operand.value.shape
    if len(shape) == 2:
        return operand.then(torch.unsqueeze, 0).then(torch.unsqueeze, 0)
    if len(shape) == 3:
        if known(shape[0] == 1):
            return operand.then(torch.unsqueeze, 0)
        return operand.then(torch.unflatten, 0, (-1, heads))
    if len(shape) != 5:
        return operand
    if groups is None or not all(isinstance(size, int) for size in (*groups, *shape[1:3])):
        return None
    if tuple(shape[1:3]) == tuple(groups):
        return operand.then(torch.flatten, 1, 2)
    if shape[2] == 1 and shape[1] in (1, groups[0]):
        return operand.then(torch.select, 2, 0)
    return None


def _largest(sizes: Iterable[Size]) -> Size:
    """The first size that is not known to be 1: where others differ from it, the original fails as well."""
    candidates = list(sizes)
    return next((size for size in candidates if not known(size == 1)), candidates[0])


def _expanded(operand: Operand, batch: Size, heads: Size) -> Operand:
    shape = operand.value.shape
    wanted = [
        size if known(own == 1) and not known(size == 1) else -1
        for own, size in zip(shape[:2], (batch, heads), strict=True)
    ]
    return operand if wanted == [-1, -1] else operand.then(torch.Tensor.expand, *wanted, -1, -1)
