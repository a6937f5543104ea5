"""What the ranking can use again between the chunks of one prefill.

A server computes a long prompt in chunks: few queries, and all keys so far. Keys of earlier chunks have not changed, so
neither have the few numbers that score them, their sums of values, and whether they are finite. A `PrefillCache` keeps
these. It holds 2 to 6 % of the memory of the keys and values themselves.

The directions that score keys are chosen by the first chunk that ranks, and later chunks keep them. Without a cache
every chunk chooses its own. Nothing else differs: over the same directions the results are the same, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from s2o_compile.kernels.support.errors import InputError

Kept = TypeVar("Kept")


class _Grown(NamedTuple):
    """Entries [B, H, room, ..] that are made of ``keys`` keys, by the rule that ``version`` names."""

    version: object
    keys: int
    entries: Tensor


class PrefillCache:
    """Kept by the caller between the chunks of one prefill, one for each layer and sequence.

    Give the same object to `s2o_compile.attention_paged` with every chunk. A chunk's own keys, the last ``n_queries``
    of its sequence, are always new. All keys before them must be those of the chunks before, as far as these ran with
    this cache. ``clear`` makes it ready for another sequence. It must not serve two calls at a time.
    """

    def __init__(self) -> None:
        self._made_for: object = None
        self._once: dict[str, object] = {}
        self._grown: dict[str, _Grown] = {}

    def clear(self) -> None:
        """Forget everything."""
        self.__init__()

    @property
    def nbytes(self) -> int:
        """Bytes of memory that grow with the keys."""
        return sum(kept.entries.nbytes for kept in self._grown.values())

    def check(self, made_for: object) -> None:
        """Raise InputError unless chunks before were made for the same heads, dtype, device and options."""
        if self._made_for is None:
            self._made_for = made_for
        if self._made_for != made_for:
            raise InputError(
                "chunks",
                expected=f"{self._made_for}, as of the chunks before: sizes, dtype, device and options",
                got=made_for,
                remedy="Keep one PrefillCache for each layer and sequence, or clear() it.",
            )

    def begin(self, earlier: int) -> None:
        """Keep what is known of the ``earlier`` keys alone: those behind them are a chunk's own, however it runs."""
        for name, kept in self._grown.items():
            self._grown[name] = kept._replace(keys=min(kept.keys, earlier))

    def once(self, name: str, make: Callable[[], Kept]) -> Kept:
        """What ``make`` made when this name was asked for first."""
        if name not in self._once:
            self._once[name] = make()
        return self._once[name]  # pyright: ignore[reportReturnType]

    def known(self, name: str, earlier: int, version: object = None) -> int:
        """How many of the ``earlier`` keys, those before a chunk's own, are in what is kept under a name.

        Another version of it is forgotten.
        """
        kept = self._grown.get(name)
        return min(kept.keys, earlier) if kept is not None and kept.version == version else 0

    def extend(self, name: str, n_keys: int, first: int, new: Tensor, version: object = None) -> Tensor:
        """What is kept under a name for all ``n_keys`` keys, [B, H, n, ..]: entries from ``first`` on are new."""
        size = first + new.shape[2]
        room = self._grown[name].entries if first else new[:, :, :0]
        if room.shape[2] < size:  # by half more than needed: a copy for every chunk would cost as much as it spares
            with torch.inference_mode(mode=False):  # later chunks may run outside of that mode
                more = torch.empty(*new.shape[:2], size + size // 2, *new.shape[3:], dtype=new.dtype, device=new.device)
            more[:, :, :first] = room[:, :, :first]
            room = more
        room[:, :, first:size] = new
        self._grown[name] = _Grown(version, n_keys, room)
        return room[:, :, :size]
