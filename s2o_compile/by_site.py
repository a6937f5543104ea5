"""Settings by site name in a configuration: immutable, hashable, and equal to any mapping of the same items."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TypeVar

from s2o_compile.errors import OptionError
from s2o_compile.kernels.support.arguments import as_integer, as_number, shown

T = TypeVar("T", int, float)


class BySite(Mapping[str, tuple[T, ...]]):
    """Numbers by site name; sites without any are dropped."""

    def __init__(self, numbers: Mapping[str, tuple[T, ...]]) -> None:
        self._sites = {site: numbers[site] for site in sorted(numbers) if numbers[site]}

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


def site_heads(given: object) -> BySite[int]:
    """Key/value heads by site name, ascending and each once; OptionError if they are none."""
    found = _checked(given, "dense_heads", "key/value heads >= 0", "(0, 2)", partial(as_integer, least=0))
    return BySite({site: tuple(sorted(set(heads))) for site, heads in found.items()})


def site_taus(given: object) -> BySite[float]:
    """By site name, tau of every query head; OptionError if they are none."""
    wanted = "finite numbers >= 0, one for each query head"
    return BySite(_checked(given, "site_tau", wanted, "(0.5, 0.2, 1.0)", as_number))


def _checked(
    given: object, field: str, wanted: str, example: str, number: Callable[[object], T | None]
) -> dict[str, tuple[T, ...]]:
    """The numbers of every site as Python's; ``number`` returns None for what is none."""
    remedy = f'Give {field}={{"model.layers.3.self_attn": {example}}}, with the names that s2o_compile.explain lists.'
    if not isinstance(given, Mapping):
        raise OptionError(f"{field}: expected site names and their {wanted}, got {shown(given)}. {remedy}")
    found: dict[str, tuple[T, ...]] = {}
    for site, numbers in given.items():
        if not isinstance(site, str) or not site:
            raise OptionError(f"{field}: expected a site name, got {shown(site)}. {remedy}")
        listed = isinstance(numbers, Sequence) and not isinstance(numbers, (str, bytes, bytearray, memoryview))
        accepted = [number(x) for x in numbers] if listed else [None]
        if None in accepted:
            raise OptionError(f"{field}[{shown(site)}]: expected {wanted}, got {shown(numbers)}. {remedy}")
        found[site] = tuple(x for x in accepted if x is not None)
    return found
