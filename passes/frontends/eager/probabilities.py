"""Follows the probabilities of hand-written attention from a softmax to their product with the values.

    softmax(...)  [[..., :-1], the sinks]  [nan_to_num]  [masked_fill(hidden, 0)]  [dropout that is off]  @ v

Transposed, they can stand on the right: ``v^T @ softmax(...)^T``.
``masked_fill(isnan(x), 0)`` is ``nan_to_num``. The operator gives fully masked rows (by -inf) zeros anyway.
Brackets are optional; casts, copies and reshapes of leading dimensions may stand anywhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from s2o_compile.passes.frontends.eager import product
from s2o_compile.passes.frontends.eager.product import Order, Product
from s2o_compile.passes.graph.calls import function_name, written_nodes
from s2o_compile.passes.graph.nodes import arguments, choice, same_sizes, value_of
from s2o_compile.passes.graph.rejected import Refused, accepted, attempt
from s2o_compile.passes.masks import views
from s2o_compile.passes.masks.proof import MaskPart
from s2o_compile.passes.masks.prover import MaskProver

_PASSED_ON = frozenset(
    {"contiguous", "clone", "view", "reshape", "unflatten", "flatten", "unsqueeze", "squeeze", "detach", *views.CASTS}
)
_QUESTIONS = frozenset({"isnan", "zeros_like"})


@dataclass(frozen=True, eq=False)
class Probabilities:
    """The steps between a softmax and the values.

    Attributes:
        product: Probabilities times values.
        nodes: The nodes between, first to last.
        zeroed: The fills that set probabilities to zero, and the shape of the probabilities.
    """

    product: Product
    nodes: tuple[fx.Node, ...]
    zeroed: tuple[tuple[MaskPart, torch.Size], ...]


def feed_product(node: fx.Node, depth: int = 6) -> bool:
    """Whether some user multiplies these probabilities, or an elementwise function of them, with values."""
    for user in node.users:
        if function_name(user) == "setitem" and user.args[2] is node:  # into a part of a tensor
            whole = user.args[0]
            if depth and isinstance(whole, fx.Node) and any(map(product.read, whole.users)):
                return True
        matmul = product.read(user)
        if matmul is not None and node in (matmul.left.node, matmul.right.node):
            return True
        value = value_of(user)
        same_rows = isinstance(value, torch.Tensor) and (
            same_sizes(value.shape[-2:-1], value_of(node).shape[-2:-1]) or function_name(user) in views.PERMUTATIONS
        )
        if depth and matmul is None and same_rows and feed_product(user, depth - 1):
            return True
    return False


def follow(softmax: fx.Node, prover: MaskProver, *, cut: bool | None, order: Order) -> Probabilities:
    """The product of probabilities and values, and the steps before it; raises `Refused`.

    ``cut`` says whether the first column (else the last) belongs to sinks and must be cut off; None without sinks.
    ``order`` says where the softmax has queries and keys.
    """
    first_order = order
    holders, nodes, zeroed = [softmax], [], []  # the holders share what they hold: a tensor and writes to all of it
    while True:
        users = sorted(
            {user for node in holders for user in _live_users(node)} - set(nodes), key=prover.mutations.position
        )
        # The next step's questions: where is it NaN, and a zero of its shape.
        asked = [user for user in users if function_name(user) in _QUESTIONS and set(user.users) <= set(users)]
        nodes += asked
        users = [user for user in users if user not in asked]
        writes = bool(users) and any(node in written_nodes(users[0]) for node in holders)
        if len(users) != 1 and not writes:
            others = [user for user in users if product.read(user) is None]
            raise Refused(
                "its probabilities are read by %s as well, as output_attentions and need_weights ask",
                ", ".join(map(str, others or users)),
            )
        user = users[0]
        node = next(holder for holder in holders if holder in user.all_input_nodes)
        matmul = product.read(user, node, order)
        if matmul is not None and matmul.tied:
            raise Refused("%s sums its probabilities over several dimensions", user)
        if function_name(user) == "setitem" and user.args[2] is node:
            raise Refused(
                "its probabilities are written into a part of %s by %s; keep them in a tensor of their own for the "
                "whole batch",
                user.args[0],
                user,
            )
        if matmul is not None:
            if cut is not None:
                raise Refused("the probabilities of its sinks are not cut off before %s", user)
            if matmul.added is not None or matmul.alpha != 1:
                raise Refused("%s adds a tensor to the output, or scales it", user)
            if matmul.right.node in (softmax, *nodes):
                raise Refused("%s multiplies its probabilities by themselves", user)
            return Probabilities(matmul, tuple(nodes), tuple(zeroed))
        if order is not None and product.read(user) is not None:
            raise Refused("%s does not multiply its probabilities along the keys, which its softmax runs over", user)
        if cut is not None and order is None and _cuts(user, node, prover, first=cut):
            cut = None
        elif function_name(user) in views.PERMUTATIONS and isinstance(value_of(user), torch.Tensor):
            order = accepted(product.permuted(user, order))
        else:
            step = _step(user, node, prover)
            same = same_sizes(value_of(user).shape, value_of(node).shape)
            if (order is not None and not same) or (step is not None and order != first_order):
                raise Refused("%s changes its probabilities after they were transposed", user)
            zeroed += [] if step is None else [(step, value_of(user).shape)]
        nodes.append(user)
        holders = [*holders, user] if writes else [user]


def _step(user: fx.Node, node: fx.Node, prover: MaskProver) -> MaskPart | None:
    """The fill by which a step sets probabilities to zero; None if it passes them on as they are."""
    name = function_name(user)
    if name == "dropout" and _drops(user):
        raise Refused("dropout is active: call model.eval()")
    if name == "masked_fill":
        source, condition, fill = arguments(user, "input|self", "mask", "value")
        negated = False
    elif name == "where" and (arms := choice(user)) is not None:
        condition, source, fill = arms
        negated = fill is not node
        source, fill = (source, fill) if negated else (fill, source)
    else:
        source = node if name == "dropout" or (name in _PASSED_ON and _keeps_rows(user, node)) else None
        if name == "nan_to_num":
            source, nan = arguments(user, "input|self", "nan")
            source = source if nan in (None, 0) else None
        if source is not node:
            raise Refused("its probabilities pass %s (%s) before they meet the values", user, name or user.op)
        return None
    zero = source is node and isinstance(condition, fx.Node) and prover.indices.fill(fill) == 0
    if not zero or not _keeps_rows(user, node):
        raise Refused("its probabilities pass %s (%s) before they meet the values", user, name)
    if function_name(condition) == "isnan" and condition.args[:1] == (node,) and not negated:
        return None
    return MaskPart(condition, 0.0, negated)


def _live_users(node: fx.Node) -> list[fx.Node]:
    """Users, without views that nobody reads."""
    passing = (*_PASSED_ON, "dropout", "getitem")
    return [user for user in node.users if user.users or function_name(user) not in passing]


def _keeps_rows(node: fx.Node, source: fx.Node) -> bool:
    value, before = value_of(node), value_of(source)
    floating = isinstance(value, torch.Tensor) and value.dtype.is_floating_point
    return floating and value.ndim >= 2 and same_sizes(value.shape[-2:], before.shape[-2:])


def _cuts(node: fx.Node, source: fx.Node, prover: MaskProver, *, first: bool) -> bool:
    """Whether a slice takes all columns but the first, or but the last."""
    seen = function_name(node) in ("getitem", "slice") and attempt(views.source, node, prover.indices.evaluate)
    if not seen or seen.node is not source:
        return False
    before, after = value_of(source).shape, value_of(node).shape
    starts = [*(0 for _ in before[:-1]), int(first)]
    in_place = all(
        index.is_axis(dim, start) for dim, (index, start) in enumerate(zip(seen.indices, starts, strict=True))
    )
    return in_place and same_sizes(after, (*before[:-1], before[-1] - 1))


def _drops(node: fx.Node) -> bool:
    """Whether a call of ``F.dropout(x, p, training)`` or ``aten.dropout(x, p, train)`` drops anything."""
    _, p, training = arguments(node, "input", "p", "training|train")
    return p != 0 and training is not False
