"""The operator's options, with their defaults and checks in one place."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor

from s2o_compile.kernels.core.budget_rule import first_tau, tau_for
from s2o_compile.kernels.core.plan import TILE_LEN
from s2o_compile.kernels.support.arguments import as_integer, as_number, as_numbers, is_one_of, shown
from s2o_compile.kernels.support.errors import InputError

Function = TypeVar("Function", bound=Callable[..., Any])

RANKINGS = ("per_query", "mean_query")
RANKING_PER = ("head", "group")
IMPLEMENTATIONS = ("auto", "triton", "cpp", "torch", "flex")


DEFAULT_TAU, DEFAULT_ERROR = 0.5, 0.1
"""The quality where neither a tau nor an error is given: tau 0.5 errs less than that on what was measured."""

LONGEST_SEGMENT = 2**20
"""Queries of a segment at most: shorter inputs are padded to one, so a typing error could fill the memory."""


@dataclass(frozen=True, kw_only=True)
class OperatorOptions:
    """The operator's options; every field is a keyword of ``s2o::attention``.

    Without ``tau`` and ``error`` they are `DEFAULT_TAU` and `DEFAULT_ERROR`.

    Attributes:
        tau: Stop a query tile once its estimated unvisited softmax mass, relative to the mass visited, is below this in
            every row; 0 never stops and is exact. The worst row decides, so values near 1 leave far less unvisited. One
            number, or a tuple with one for each query head. None beside an error: the error says where to begin.
        error: Ceiling of a call, the relative L2 error of its output on sampled queries. Where it does not hold, heads
            visit more keys, up to all of them. ``tau`` is where it begins. 0 stands for tau 0. None beside a tau
            measures nothing.
        min_seq_len: Shorter key lengths run dense, in tokens; "auto" takes the device's measured crossover.
        segment_len: Queries that share one ranking, a multiple of 128; None chooses by length.
        ranking: "per_query" or "mean_query".
        ranking_per: "group": the query heads of a key/value head share one ranking; "head": each has its own.
        implementation: "auto", "triton", "cpp", "torch" or "flex" (FlexAttention). A named one never falls back.
    """

    tau: float | tuple[float, ...] | None = None
    error: float | None = None
    min_seq_len: int | str = "auto"
    segment_len: int | None = None
    ranking: str = "per_query"
    ranking_per: str = "group"
    implementation: str = "auto"

    def __post_init__(self) -> None:
        if self.tau is None and self.error is None:
            object.__setattr__(self, "tau", DEFAULT_TAU)
            object.__setattr__(self, "error", DEFAULT_ERROR)
        several = isinstance(self.tau, (list, tuple))  # JSON knows no tuples
        tau = as_numbers(self.tau) if several else as_number(self.tau)
        if self.tau is not None and tau is None:
            raise InputError(
                "tau",
                expected="finite numbers >= 0, one for each query head" if several else "a finite number >= 0",
                got=shown(self.tau),
                remedy="Use tau=0.0 for an exact result, and numbers that float32 can hold.",
            )
        error = None if self.error is None else as_number(self.error, most=1.0)
        if self.error is not None and error is None:
            raise InputError(
                "error",
                expected="a relative error between 0 and 1, or None",
                got=shown(self.error),
                remedy="0.02 allows the output of an attention to be 2 % off.",
            )
        shortest = self.min_seq_len if is_one_of(self.min_seq_len, ("auto",)) else as_integer(self.min_seq_len, least=0)
        if shortest is None:
            raise InputError(
                "min_seq_len",
                expected='an integer >= 0, or "auto"',
                got=shown(self.min_seq_len),
                remedy='Give a length in tokens; 0 never runs dense for being short, "auto" chooses by device.',
            )
        length = None if self.segment_len is None else as_integer(self.segment_len, least=1, most=LONGEST_SEGMENT)
        if self.segment_len is not None and (length is None or length % TILE_LEN):
            raise InputError(
                "segment_len",
                expected=f"a positive multiple of {TILE_LEN} up to {LONGEST_SEGMENT}, or None",
                got=shown(self.segment_len),
                remedy="Leave it None to choose by length.",
            )
        names = {"ranking": RANKINGS, "ranking_per": RANKING_PER, "implementation": IMPLEMENTATIONS}
        for name, allowed in names.items():
            if not is_one_of(getattr(self, name), allowed):
                removed = " sub_mean was removed: it was best in no measurement." if name == "ranking" else ""
                raise InputError(
                    name,
                    expected=f"one of {', '.join(map(repr, allowed))}",
                    got=shown(getattr(self, name)),
                    remedy="Choose one of these names." + removed,
                )
        for name, value in (("tau", tau), ("error", error), ("min_seq_len", shortest), ("segment_len", length)):
            object.__setattr__(self, name, value)  # as Python's numbers

    def check_heads(self, heads: int) -> None:
        """Raise InputError unless tau is one number, or one for each of this many query heads."""
        if isinstance(self.tau, tuple) and len(self.tau) != heads:
            raise InputError(
                "tau",
                expected=f"one number, or {heads}, one for each query head",
                got=f"{len(self.tau)} numbers",
                remedy="Give one number for all heads, or calibrate the model again if its heads have changed.",
            )

    @property
    def has_default_ceiling(self) -> bool:
        """Whether the error is the default's, beside a tau: where it cannot be measured, the tau alone decides."""
        return self.error == DEFAULT_ERROR and self.tau is not None

    @property
    def ceiling(self) -> float | None:
        """The error that has to be measured; None where there is none to hold, or nothing is left out."""
        exact = not any(self.tau) if isinstance(self.tau, tuple) else self.tau == 0.0
        return None if exact else self.error or None

    @property
    def fixed_tau(self) -> float | tuple[float, ...]:
        """Tau of an executor that cannot go on: the one that was given, else that of the error."""
        if self.error == 0.0:
            return 0.0
        if self.tau is not None:
            return self.tau
        assert self.error is not None
        return tau_for(self.error)

    def tau_on(self, device: torch.device) -> float | Tensor:
        """Where a call begins, as executors take it: one number, or float32 [Hq] on the device."""
        if self.error == 0.0:
            return 0.0
        if self.tau is None:
            assert self.error is not None
            return first_tau(self.error)
        if not isinstance(self.tau, tuple):
            return self.tau
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            # A CUDA graph records no copy from the host, and its memory must not be shared with other calls.
            return torch.cat([torch.full((1,), tau, dtype=torch.float32, device=device) for tau in self.tau])
        return _copied(self.tau, device)

    def to_op_kwargs(self) -> dict[str, Any]:
        """The options as keyword arguments of ``torch.ops.s2o.attention``.

        Operator schemas have no int-or-str type, so None encodes "auto", and no float-or-list type, so ``head_tau``
        stands for ``tau`` where each head has its own. The default tau and error are no argument, as in the schemas.
        """
        options: dict[str, Any] = {name: getattr(self, name) for name in FIELDS}
        if (self.tau, self.error) == (DEFAULT_TAU, DEFAULT_ERROR):
            options |= {"tau": None, "error": None}
        if isinstance(self.tau, tuple):
            options |= {"tau": None, "head_tau": list(self.tau)}
        return options | {"min_seq_len": None if self.min_seq_len == "auto" else self.min_seq_len}


FIELDS = tuple(field.name for field in fields(OperatorOptions))


def from_op_kwargs(
    tau: float | None = None, min_seq_len: int | None = None, segment_len: int | None = None,
    ranking: str = "per_query", ranking_per: str = "group", implementation: str = "auto",
    head_tau: Sequence[float] | None = None, error: float | None = None,
) -> OperatorOptions:  # fmt: skip
    """The options of arguments of ``torch.ops.s2o.attention``; the inverse of ``to_op_kwargs``."""
    taus = tuple(head_tau or ())
    return _checked_once(tau, min_seq_len, segment_len, ranking, ranking_per, implementation, taus, error)


def takes_options(operator: Function) -> Function:
    """Let a function with ``**options`` have the arguments of `from_op_kwargs` in its signature, its operator's schema.

    They stand before ``dense_heads``.
    """
    own = list(inspect.signature(operator).parameters.values())[:-1]
    options = inspect.signature(from_op_kwargs).parameters.values()
    at = [parameter.name for parameter in own].index("dense_heads")
    own[at:at] = (parameter.replace(kind=parameter.KEYWORD_ONLY) for parameter in options)
    vars(operator)["__signature__"] = inspect.signature(operator).replace(parameters=own)
    return operator


@lru_cache(maxsize=1024, typed=True)
def _checked_once(
    tau: float | None, min_seq_len: int | None, segment_len: int | None, ranking: str, ranking_per: str,
    implementation: str, head_tau: tuple[float, ...], error: float | None,
) -> OperatorOptions:  # fmt: skip
    """A model's calls have few different ones."""
    return OperatorOptions(
        tau=head_tau or tau,
        error=error,
        min_seq_len="auto" if min_seq_len is None else min_seq_len,
        segment_len=segment_len,
        ranking=ranking,
        ranking_per=ranking_per,
        implementation=implementation,
    )


def taus_by_head(
    heads: int, tau: float | None = None, head_tau: Sequence[float] | None = None, error: float | None = None
) -> Sequence[float]:
    """`OperatorOptions.fixed_tau` for each query head, from arguments of ``torch.ops.s2o.attention``."""
    fixed = OperatorOptions(tau=tuple(head_tau or ()) or tau, error=error).fixed_tau
    return fixed if isinstance(fixed, tuple) else (fixed,) * heads


@lru_cache(maxsize=1024)
def _copied(taus: tuple[float, ...], device: torch.device) -> Tensor:
    """float32 [Hq]; cached because each copy to a GPU takes time."""
    with torch.inference_mode(mode=False):
        return torch.tensor(taus, dtype=torch.float32, device=device)
