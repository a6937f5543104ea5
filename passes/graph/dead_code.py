"""Removes nodes that nothing uses any more, after a rewrite took their last user away."""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

from s2o_compile.kernels.support.torch_compat import is_erased
from s2o_compile.passes.graph.calls import function_name, is_pure, written_nodes

_FRESH = frozenset({"zeros", "new_zeros", "ones", "new_ones", "full", "new_full", "empty", "new_empty"})


def remove_dead(graph: fx.Graph, candidates: Iterable[fx.Node]) -> None:
    """Erases the candidates that have neither users nor effects, and then their inputs likewise.

    ``Graph.eliminate_dead_code`` would erase too much. In-place methods such as ``cache.copy_(...)`` have no users
    in a Dynamo graph either.
    """
    pending = list(candidates)
    while pending:
        node = pending.pop()
        if not is_erased(node) and node.users and (written := _only_written(node)):
            for user in written:
                pending += user.all_input_nodes
                graph.erase_node(user)
        if node.graph is not graph or is_erased(node) or node.users or not is_pure(node):
            continue
        pending += node.all_input_nodes
        graph.erase_node(node)


def _only_written(node: fx.Node) -> list[fx.Node]:
    """The users of a fresh tensor, last to first, if all of them only prepare writes to it; else nothing."""
    if function_name(node) not in _FRESH:
        return []
    users, pending = set(), list(node.users)
    while pending:
        user = pending.pop()
        written = written_nodes(user)
        if user.op == "output" or not (is_pure(user) or (written == [node] and not user.users)):
            return []
        if user not in users:
            users.add(user)
            pending += user.users
    return [user for user in reversed(node.graph.nodes) if user in users]
