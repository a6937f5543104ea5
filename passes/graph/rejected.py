"""Why a match or a proof failed, as an exception inside the passes and as a value at their boundaries.

Whatever reads the graph raises `Refused` where it cannot go on. A boundary (a frontend's ``match``, the prover's
``prove``, the pipeline) answers with the reason as a value, `Rejected`. A search that goes on elsewhere catches
`Refused`, or calls `attempt`. Reasons are formatted only when somebody asks, because most searches go on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class Rejected:
    """A failed match or proof: false, with a reason for the user.

    Args:
        template: ``%``-style message.
        *args: Its arguments; nodes, shapes and other `Rejected` are formatted lazily.
    """

    __slots__ = ("args", "template")

    def __init__(self, template: str, *args: object) -> None:
        self.template = template
        self.args = args

    @property
    def reason(self) -> str:
        """The formatted reason."""
        return self.template % self.args if self.args else self.template

    def __bool__(self) -> Literal[False]:
        return False

    def __str__(self) -> str:
        return self.reason

    def __repr__(self) -> str:
        return f"Rejected({self.reason!r})"


class Refused(Exception):
    """A match or a proof fails here; arguments as `Rejected`.

    Attributes:
        why: The reason, which may be kept: unlike the exception, it holds no traceback.
    """

    def __init__(self, template: str, *args: object) -> None:
        super().__init__(template, *args)
        self.why = Rejected(template, *args)

    @classmethod
    def because(cls, why: Rejected) -> Refused:
        """The exception for a reason that was kept."""
        return cls(why.template, *why.args)

    def __str__(self) -> str:
        return self.why.reason


def attempt(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | Rejected:
    """The result of a call, or why it was refused."""
    try:
        return function(*args, **kwargs)
    except Refused as error:
        return error.why


def accepted(answer: T | Rejected) -> T:
    """The result that `attempt` gave; raises if it was refused."""
    if isinstance(answer, Rejected):
        raise Refused.because(answer)
    return answer
