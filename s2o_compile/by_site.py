"""Settings by site name in a configuration: immutable, hashable, and equal to any mapping of the same items."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar, Generic, TypeVar

from s2o_compile.errors import OptionError
from s2o_compile.kernels.support.arguments import as_integer, as_number, shown

T = TypeVar("T", int, float)


class _BySite(Mapping[str, tuple[T, ...]], Generic[T]):
    """Numbers by site name; sites without any are dropped.

    Args:
        given: Numbers of every site.

    Raises:
        OptionError: A name that is no text, or numbers that are none of this setting's.
    """

    field: ClassVar[str]
    wanted: ClassVar[str]
    example: ClassVar[str]

    def __init__(self, given: Mapping[str, Sequence[T]]) -> None:
        remedy = f"Give {self.field}={self.example}, with the names that s2o_compile.explain lists."
        if not isinstance(given, Mapping):
            raise OptionError(
                f"{self.field}: expected site names and their {self.wanted}, got {shown(given)}. {remedy}"
            )
        kept: dict[str, tuple[T, ...]] = {}
        for site, numbers in given.items():
            if not isinstance(site, str) or not site:
                raise OptionError(f"{self.field}: expected a site name, got {shown(site)}. {remedy}")
            listed = isinstance(numbers, Sequence) and not isinstance(numbers, (str, bytes, bytearray, memoryview))
            accepted = [self.number(x) for x in numbers] if listed else [None]
            if None in accepted:
                place = f"{self.field}[{shown(site)}]"
                raise OptionError(f"{place}: expected {self.wanted}, got {shown(numbers)}. {remedy}")
            kept[site] = self.in_order([x for x in accepted if x is not None])
        self._sites = {site: kept[site] for site in sorted(kept) if kept[site]}

    @staticmethod
    @abstractmethod
    def number(given: object) -> T | None:
        """One of a site's numbers as Python's; None for anything else."""

    @staticmethod
    def in_order(numbers: Sequence[T]) -> tuple[T, ...]:
        """The numbers as they are kept."""
        return tuple(numbers)

    def __getitem__(self, site: str) -> tuple[T, ...]:
        return self._sites[site]

    def __iter__(self) -> Iterator[str]:
        return iter(self._sites)

    def __len__(self) -> int:
        return len(self._sites)

    def __hash__(self) -> int:
        return hash(tuple(self._sites.items()))

    def __repr__(self) -> str:
        return repr(self._sites)


class SiteHeads(_BySite[int]):
    """Key/value heads by site name, in any order."""

    field, wanted = "dense_heads", "key/value heads >= 0"
    example = '{"model.layers.3.self_attn": (0, 2)}'

    @staticmethod
    def number(given: object) -> int | None:
        """A head's number."""
        return as_integer(given, least=0)

    @staticmethod
    def in_order(numbers: Sequence[int]) -> tuple[int, ...]:
        """Ascending, each once."""
        return tuple(sorted(set(numbers)))


class SiteTaus(_BySite[float]):
    """By site name, tau of every query head."""

    field, wanted = "site_tau", "finite numbers >= 0, one for each query head"
    example = '{"model.layers.3.self_attn": (0.5, 0.2, 1.0)}'

    @staticmethod
    def number(given: object) -> float | None:
        """A tau."""
        return as_number(given)
