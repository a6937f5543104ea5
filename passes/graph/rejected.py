"""Why a match or a proof failed.

`Rejected` is false, so that ``if not site:`` reads well. It formats its reason only when somebody asks: most rejections
are steps of a search that went on elsewhere.
"""

from __future__ import annotations


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

    def __bool__(self) -> bool:
        return False

    def __str__(self) -> str:
        return self.reason

    def __repr__(self) -> str:
        return f"Rejected({self.reason!r})"
