"""Values of open ``with`` blocks: state of the context, that is of a thread or an asyncio task.

A server runs one model in many threads. A block sees the calls of its own context and of the contexts that were copied
from it, never those of another thread. A context has an immutable tuple, and a block that has ended is ended
everywhere: in whatever order blocks end, whichever thread ends them, and in tasks that outlive them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Generic, TypeVar

Value = TypeVar("Value")


class Scopes(Generic[Value]):
    """The open blocks of one kind in the current context."""

    def __init__(self, name: str) -> None:
        # A block is a list of its value, emptied at its end: contexts that outlive it keep nothing alive.
        self._scopes: ContextVar[tuple[list[Value], ...]] = ContextVar(name, default=())

    @contextmanager
    def holding(self, value: Value) -> Iterator[None]:
        """A block with a value in this context."""
        scope = [value]
        self._scopes.set((*self._open(), scope))
        try:
            yield
        finally:
            # By emptying it, not by a token of the ContextVar: a token ends a block only where it began, and in order.
            scope.clear()
            self._scopes.set(self._open())

    def held(self) -> list[Value]:
        """The values of all open blocks, in the order in which the blocks began."""
        return [value for scope in self._scopes.get() for value in scope]

    def __bool__(self) -> bool:
        """Whether any block is open; asked in every call of the operator."""
        return any(self._scopes.get())  # a list without elements is false

    def _open(self) -> tuple[list[Value], ...]:
        return tuple(scope for scope in self._scopes.get() if scope)
