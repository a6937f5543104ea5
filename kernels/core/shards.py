"""The sequence whose shard the current context holds, if it holds one: tensors of a call are then parts of it."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from s2o_compile.kernels.support.scopes import Scopes

_sequences: Scopes[Any] = Scopes("s2o_sharded_sequences")


def sharded(sequence: Any) -> AbstractContextManager[None]:  # noqa: ANN401 (a kernels.sequence.ShardedSequence)
    """A block whose calls hold this rank's shard of a sequence; of a whole one if that is None."""
    return _sequences.holding(sequence)


def held_sequence() -> Any:  # noqa: ANN401 (a kernels.sequence.ShardedSequence)
    """The sequence of the innermost block; None where calls hold whole sequences."""
    held = _sequences.held() if _sequences else None
    return held[-1] if held else None
