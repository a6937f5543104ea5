"""Errors of the operator: expected, got, remedy; among several ranks they name their own, and one rank warns."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist

_PASSED_OVER = (f"{Path(__file__).parents[2]}{os.sep}", f"{Path(torch.__file__).parent}{os.sep}", "<eval_with_key>")
"""Files of this package and of torch, and graphs."""


def this_rank() -> tuple[int, int] | None:
    """This process's rank and the number of ranks, if there are several."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() < 2:
        return None
    return dist.get_rank(), dist.get_world_size()


def warn(message: str, category: type[Warning] = UserWarning, *, each_machine: bool = False) -> None:
    """Warn at the user's line, once a job: of several ranks, which run the same program, the first one warns.

    With ``each_machine`` the first rank of every machine does; launchers say which that is.
    """
    rank, local = this_rank(), os.environ.get("LOCAL_RANK") if each_machine else None
    is_first = local == "0" if local else rank is None or rank[0] == 0
    if is_first:
        warnings.warn(message, category, stacklevel=1 if torch.compiler.is_dynamo_compiling() else _level_of_user())


def _level_of_user() -> int:
    """The ``stacklevel`` for the caller of this function that names the innermost line outside `_PASSED_OVER`."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith((*_PASSED_OVER, "<frozen importlib")):
        level += not frame.f_code.co_filename.startswith("<frozen importlib")  # Python does not count these
        frame = frame.f_back
    return level


class S2OError(Exception):
    """Base of every error this project raises on purpose. Among several ranks its text names the one that it is of."""

    def __init__(self, *given: object) -> None:
        super().__init__(*given)
        self._rank = this_rank()

    def __str__(self) -> str:
        text = super().__str__()
        return text if self._rank is None else f"[rank {self._rank[0]} of {self._rank[1]}] {text}"


class InputError(S2OError, ValueError):
    """A tensor or number handed to the operator cannot be used.

    Attributes:
        reason: The message without the operator's name, for those who do not call it.
    """

    def __init__(self, what: str, *, expected: str, got: object, remedy: str) -> None:
        self.reason = f"{what}: expected {expected}, got {got}. {remedy}"
        super().__init__(f"s2o attention: {self.reason}")


class RankError(S2OError, RuntimeError):
    """Ranks of a process group that differ in what they must agree on, or one that has ended."""


class ImplementationUnavailableError(S2OError, RuntimeError):
    """An implementation was asked for by name and cannot run here. It is never replaced silently."""


class NoGradientError(S2OError, RuntimeError):
    """A backward came through the operator."""

    def __init__(self) -> None:
        super().__init__(
            "s2o attention: expected no backward through torch.ops.s2o, got one. Call s2o_compile.attention, which is "
            "dense where an input requires grad, or run the forward under torch.no_grad()."
        )


class DenseGradientWarning(UserWarning):
    """Attention that could be sparse is dense, because derivatives of it are wanted."""


class TunedFileWarning(UserWarning):
    """The user's file of launch configurations and crossover lengths cannot be used."""
