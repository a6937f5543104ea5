"""Finds the tensors of a graph that are changed in place, and their values where they are read.

A node describes its tensor only while nobody writes into the tensor afterwards. One kind of write can still be read
like a function. The tensor is made in the graph, each write covers all of it (``mask &= other``,
``mask.masked_fill_(...)``), and nobody sees it before the last write. Every reader then sees one value: the last
write, applied to the result of the write before, down to the node that made the tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import fx

from s2o_compile.kernels.support.torch_compat import storages, tree_leaves
from s2o_compile.passes.graph.calls import function_name, may_alias, may_reshape, written_nodes
from s2o_compile.passes.graph.nodes import value_of
from s2o_compile.passes.graph.rejected import Refused

_ANYWHERE = -1
"""The storage of tensors with an unknown storage: a write to it may be a write to any tensor."""

# Writes with a functional form: the result has the first argument's shape and depends on nothing else.
_READABLE = frozenset({"and", "or", "mul", "add", "masked_fill", "fill", "zero", "triu", "tril", "setitem"})


class Mutations:
    """The in-place writes of a graph.

    Views share their base's storage in the fake values too, so a write through any view counts for all of them.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self._position = {node: index for index, node in enumerate(graph.nodes)}
        self._writers: dict[int, list[fx.Node]] = {}
        self._members: dict[int, list[fx.Node]] = {}  # nodes whose value lies in a storage, in graph order
        self._written: dict[fx.Node, frozenset[int]] = {}
        self._chains: dict[int, tuple[fx.Node, ...] | None] = {}
        self._state: dict[int, int] = {}  # how many writes have happened, where not all of them
        self._shared: dict[int, int] = {}  # of storages that may be one, another one
        for node in graph.nodes:
            if may_alias(node):
                self._share({storage for each in (node, *node.all_input_nodes) for storage in _storages(each)})
        for node in graph.nodes:
            for storage in self._places(node):
                self._members.setdefault(storage, []).append(node)
            # `n += 1` on an integer writes nothing
            written = frozenset(storage for target in written_nodes(node) for storage in self._places(target))
            if written:
                self._written[node] = written
            for storage in written:
                self._writers.setdefault(storage, []).append(node)

    def writers(self, node: fx.Node) -> tuple[fx.Node, ...]:
        """The nodes that write to the tensors of ``node``, or to what it writes, anywhere in the graph, in order."""
        writers = {writer for storage in self._touched(node) for writer in self._writers.get(storage, ())}
        return tuple(sorted(writers, key=self.position))

    def writer(self, node: fx.Node) -> fx.Node | None:
        """The first of them, or None."""
        return next(iter(self.writers(node)), None)

    def check_shape(self, node: fx.Node) -> None:
        """Raises `Refused` if a tensor may be given another shape in place: its fake value has the last."""
        for writer in filter(may_reshape, self.writers(node)):
            raise Refused("%s may be given another shape in place by %s", node, writer)

    def position(self, node: fx.Node) -> int:
        """The position of a node in the graph."""
        return self._position[node]

    def last_write(self, node: fx.Node, before: fx.Node, after: fx.Node | None = None) -> fx.Node | None:
        """The last node that writes to the tensor of ``node`` between it (or ``after``) and another node, or None."""
        start, stop = self._position[node if after is None else after], self._position[before]
        return next((w for w in reversed(self.writers(node)) if start < self._position[w] < stop), None)

    def settled(self, node: fx.Node) -> fx.Node:
        """The node that, read as a function, gives the value of a node's tensor: its last write, or itself.

        Inside `before`, it gives the state before the write. Raises `Refused` if no node does.
        """
        written = [storage for storage in self._touched(node) if storage in self._writers]
        if not written:
            return node
        chain = self._chain(written[0]) if len(written) == 1 else None
        if chain is None:
            raise Refused("%s is changed in place by %s", node, self._writers[written[0]][0])
        # Any other node in the storage is a view made after the last write, and describes itself.
        return chain[self._state.get(written[0], len(chain) - 1)] if node in chain else node

    @contextmanager
    def before(self, node: fx.Node) -> Iterator[None]:
        """A block in which the tensor that a node writes has the value from before the write."""
        outer, written = self._state, self._written.get(node, frozenset())
        for storage in written if len(written) == 1 else ():
            chain = self._chain(storage)
            if chain is not None:
                self._state = {**outer, storage: chain.index(node) - 1}
        try:
            yield
        finally:
            self._state = outer

    def _touched(self, node: fx.Node) -> frozenset[int]:
        """The storages of a node's tensors, and those that it writes to."""
        touched = self._places(node) | self._written.get(node, frozenset())
        return touched | {_ANYWHERE} if touched and _ANYWHERE in self._writers else touched

    def _places(self, node: fx.Node) -> frozenset[int]:
        """The storages of a node's tensors, one for all that may be the same."""
        return frozenset(map(self._root, _storages(node)))

    def _root(self, storage: int) -> int:
        while storage in self._shared:
            storage = self._shared[storage]
        return storage

    def _share(self, storages: set[int]) -> None:
        first, *others = sorted({self._root(storage) for storage in storages} or {_ANYWHERE})  # _ANYWHERE stays a root
        self._shared |= dict.fromkeys(others, first)

    def _chain(self, storage: int) -> tuple[fx.Node, ...] | None:
        """The maker of a tensor and its writes, in order; None if anything may see a state between."""
        if storage not in self._chains:
            members = self._members[storage]
            chain = (members[0], *self._writers[storage])
            readable = storage != _ANYWHERE and self._is_readable(chain, members)
            self._chains[storage] = chain if readable else None
        return self._chains[storage]

    def _is_readable(self, chain: Sequence[fx.Node], members: Sequence[fx.Node]) -> bool:
        base, last = chain[0], self._position[chain[-1]]
        if base.op not in ("call_function", "call_method") or len(set(chain)) < len(chain):
            return False
        for at, writer in enumerate(chain[1:], 1):
            # The whole tensor, by its maker's name or by that of an earlier write; and by no other argument.
            if function_name(writer) not in _READABLE or not writer.args or writer.args[0] not in chain[:at]:
                return False
            others: list[fx.Node] = []
            fx.map_arg((writer.args[1:], writer.kwargs), others.append)
            if any(other in members for other in others):
                return False
        if any(self._position[node] < last and node not in chain for node in members):
            return False  # a view or a copy by reference, through which an earlier state can be seen
        readers = {user for node in chain for user in node.users}
        return all(user in chain or self._position[user] > last for user in readers)


def _storages(node: fx.Node) -> frozenset[int]:
    """The storages of the tensors in a node's value, which may be a tuple or a list of them."""
    each_storage = (storages(value) for value in tree_leaves(value_of(node)) if isinstance(value, torch.Tensor))
    return frozenset(_ANYWHERE if storage is None else storage for each in each_storage for storage in each)
