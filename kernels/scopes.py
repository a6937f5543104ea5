"""What ``with`` blocks hold open around a call: state of the context, that is of a thread or an asyncio task.

A server runs one model in many threads. A block sees the calls of its own context and of the contexts that were copied
from it, never those of another thread. A context holds an immutable tuple, and a block that has ended is ended
everywhere: in whatever order blocks end, whichever thread ends them, and in tasks that outlive them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Generic, TypeVar

Held = TypeVar("Held")


@dataclass(eq=False)
class _Scope(Generic[Held]):
    held: Held
    is_open: bool = True


class Scopes(Generic[Held]):
    """The open blocks of one kind in the current context."""

    def __init__(self, name: str) -> None:
        self._scopes: ContextVar[tuple[_Scope[Held], ...]] = ContextVar(name, default=())

    @contextmanager
    def holding(self, held: Held) -> Iterator[None]:
        """Hold something open in this context."""
        scope = _Scope(held)
        self._scopes.set((*self._open(), scope))
        try:
            yield
        finally:
            # By a mark, not by a token of the ContextVar: a token ends a block only where it began, and in order.
            scope.is_open = False
            self._scopes.set(self._open())

    def held(self) -> list[Held]:
        """What is held open, in the order in which the blocks began."""
        return [scope.held for scope in self._scopes.get() if scope.is_open]

    def __bool__(self) -> bool:
        """Whether anything is held open; asked in every call of the operator."""
        scopes = self._scopes.get()
        return bool(scopes) and any(scope.is_open for scope in scopes)

    def _open(self) -> tuple[_Scope[Held], ...]:
        return tuple(scope for scope in self._scopes.get() if scope.is_open)
