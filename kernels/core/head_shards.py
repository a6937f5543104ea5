"""Heads of a model that ranks share out: settings by head hold the model's numbers, a rank's tensors its own heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from s2o_compile.kernels.support.errors import InputError


class HeadShard(NamedTuple):
    """The heads of this rank: the ``index``-th of ``count`` equal parts of the model's."""

    index: int = 0
    count: int = 1

    def dense_heads(self, marked: Sequence[int], kv_heads: int) -> list[int]:
        """Those of the marked heads that this rank holds, by its own numbers.

        Args:
            marked: Key/value heads of the model.
            kv_heads: Key/value heads of this rank.

        Raises:
            InputError: The model has no such head.
        """
        if any(head >= kv_heads * self.count for head in marked):
            raise InputError(
                "dense_heads",
                expected=f"key/value heads below {kv_heads * self.count}, of all ranks together",
                got=list(marked),
                remedy="Give the model's heads; each rank takes its own.",
            )
        first = self.index * kv_heads
        return [head - first for head in marked if first <= head < first + kv_heads]

    def head_tau(self, taus: Sequence[float], heads: int) -> list[float]:
        """Tau of each query head of this rank.

        Args:
            taus: One for each query head of the model, or for each of this rank's.
            heads: Query heads of this rank.

        Raises:
            InputError: They are neither.
        """
        if not taus or len(taus) == heads:
            return list(taus)
        if len(taus) != heads * self.count:
            raise InputError(
                "tau",
                expected=f"one number, or {heads * self.count}, one for each query head of all {self.count} ranks",
                got=f"{len(taus)} numbers",
                remedy="Give the model's heads, and calibrate it again if they have changed; each rank takes its own.",
            )
        return list(taus[self.index * heads : (self.index + 1) * heads])


WHOLE = HeadShard()
"""All heads of the model are on this rank."""
