"""Observers of sparse calls while they run: their tensors, S2O's output and that of exact attention.

Evaluation, calibration and pictures are observers. The operator is opaque, so they see calls in compiled graphs, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from s2o_compile.kernels.core.call import AttentionCall
from s2o_compile.kernels.core.options import OperatorOptions
from s2o_compile.kernels.core.result import Result
from s2o_compile.kernels.exact.dense_heads import whole_tiles
from s2o_compile.kernels.exact.epilogue import add_sinks
from s2o_compile.kernels.exact.sdpa import attend_by_sdpa, needs_pairs
from s2o_compile.kernels.statistics import pairs_by_head
from s2o_compile.kernels.support.errors import InputError
from s2o_compile.kernels.support.scopes import Scopes


@dataclass(frozen=True, kw_only=True, eq=False)
class ObservedCall(AttentionCall):
    """One call on the path "s2o".

    Sinks and the values of fully masked rows are put in behind the call, and chunks are calls of their own. Its mask
    has no window.

    Attributes:
        options: The caller's options.
        execute: The operator's executors: a function of a call, its path and options.
    """

    options: OperatorOptions
    execute: Callable[[AttentionCall, str, OperatorOptions], Result]

    @cached_property
    def result(self) -> Result:
        """S2O's results, computed once however many observers ask.

        If the log-sum-exp is not wanted, that of dense heads may be uninitialised.
        """
        return self.execute(self, "s2o", self.options)

    def run(self, *, dense_heads: Sequence[int] | None = None, **options: Any) -> Result:  # noqa: ANN401 (any field)
        """S2O on the same tensors with other fields of `OperatorOptions`, and other ``dense_heads``, ascending.

        A call is on its path already: ``min_seq_len`` changes nothing. Beside a tau no error budget holds.
        """
        options = {"error": None, **options} if "tau" in options else options
        marked = self.dense_heads if dense_heads is None else dense_heads
        return self.execute(self.but(dense_heads=marked, return_lse=True), "s2o", replace(self.options, **options))

    def exact(self) -> Tensor:
        """Exact attention [B, Hq, Nq, Dv] in the call's dtype, by SDPA or the exact executor."""
        if self.softcap is None and not needs_pairs(self.mask, self.n_keys, self.scale):
            return attend_by_sdpa(self)
        return self._exact_result.output

    def with_sinks(self, output: Tensor, lse: Tensor | None = None) -> Tensor:
        """An output of this call, left as it is, as the model gets it, [B, Hq, Nq, Dv]: sinks change its error.

        Keys that were not visited hardly change an output if their values are like those visited. Beside a sink their
        mass is missing. ``lse``, float32 [B, Hq, Nq], belongs to the output; None for the exact one.
        """
        if self.sinks is None:
            return output
        return add_sinks(output.clone(), self._exact_result.lse if lse is None else lse, self.sinks)[0]

    def densities(self, result: Result) -> Tensor:
        """Float64 [Hq]: computed over visible pairs of a result of this call, all passes and the batch counted."""
        batch, _, n_queries, _ = self.query.shape
        area = self.mask.area(batch, n_queries, self.key.shape[2]).sum().clamp(min=1.0)
        return pairs_by_head(result.computed, n_queries).sum(0) / area.item()

    def replaced_by(self, output: Tensor) -> Result:
        """The caller's results if an observer replaces the output: exact log-sum-exp, every key computed."""
        shape = (*self.query.shape[:3], self.value.shape[3])
        if not isinstance(output, Tensor) or output.shape != shape or output.dtype != self.query.dtype:
            expected = f"None or an output {self.query.dtype} {shape}"
            got = f"{output.dtype} {tuple(output.shape)}" if isinstance(output, Tensor) else repr(output)
            remedy = "Return None to pass S2O's output on, or call.exact()."
            raise InputError("observer", expected=expected, got=got, remedy=remedy)
        lse = self._exact_result.lse if self.wants_lse else self.query.new_empty(0, dtype=torch.float32)
        return Result(output, lse, whole_tiles(self).expand(*shape[:2], -1))

    @cached_property
    def _exact_result(self) -> Result:
        return self.execute(self.but(dense_heads=(), return_lse=True), "dense", self.options)


Observer = Callable[[ObservedCall], Tensor | None]

_observers: Scopes[Observer] = Scopes("s2o_observers")


@contextmanager
def observe_attention(observer: Observer) -> Iterator[None]:
    """Inside the ``with`` block hand every call of this thread on the path "s2o" to the observer before it runs.

    An output [B, Hq, Nq, Dv] in the call's dtype that the observer returns replaces S2O's; None keeps it. Of several
    observers the one opened last decides. An observer that returns ``call.exact()`` sees every layer with its inputs in
    the dense model; else layers get the outputs of sparse layers before them. Calls of other threads are not shown;
    ``record_calls`` says what calls are this thread's.
    """
    with _observers.holding(observer):
        yield


def observing() -> bool:
    """Whether anybody looks at the calls of this thread."""
    return bool(_observers)


def observe(call: ObservedCall) -> Result:
    """Show a call to every observer of this thread, and return the caller's results."""
    outputs = [output for output in (observer(call) for observer in _observers.held()) if output is not None]
    return call.replaced_by(outputs[-1]) if outputs else call.result
