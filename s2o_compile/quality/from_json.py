"""Makes dataclasses from JSON by their annotations: a value of the right type, or a ValueError."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any

from s2o_compile.config import S2OConfig
from s2o_compile.kernels.support.arguments import as_integer, shown


def as_type(wanted: Any, value: object, place: str) -> Any:  # noqa: ANN401 (an annotation, and what it names)
    """The value as its annotation has it; ``place`` is its name in messages.

    An annotation is str, int, float, a dataclass, a tuple or a mapping of these, or one of these or None. A float may
    be NaN or infinite, because a model's loss may.

    Raises:
        ValueError: The value is of another type; the message names its place.
    """
    origin, inner = typing.get_origin(wanted), typing.get_args(wanted)
    if origin in (types.UnionType, typing.Union):
        return None if value is None else as_type(inner[0], value, place)
    if origin is tuple and isinstance(value, list):
        return tuple(as_type(inner[0], one, f"{place}[{index}]") for index, one in enumerate(value))
    if origin is Mapping and isinstance(value, dict):
        return {name: as_type(inner[1], one, f"{place}[{shown(name)}]") for name, one in value.items()}
    if wanted is S2OConfig and isinstance(value, dict):
        return S2OConfig.from_dict(value)
    if dataclasses.is_dataclass(wanted) and isinstance(value, dict):
        return _dataclass(wanted, value, place)
    if wanted in (str, float) and isinstance(value, wanted):
        return value
    whole = as_integer(value)
    if wanted in (int, float) and whole is not None:
        return wanted(whole)
    name = str(wanted) if inner else getattr(wanted, "__name__", str(wanted))
    raise ValueError(f"{shown(value)} as {place}, which is a {name}")


def _dataclass(wanted: Any, value: dict[str, object], place: str) -> Any:  # noqa: ANN401 (a dataclass)
    known = typing.get_type_hints(wanted)
    for field in dataclasses.fields(wanted):
        if field.name not in value and field.default is dataclasses.MISSING:
            raise ValueError(f"no {place}.{field.name}")
    for name in value:
        if name not in known:
            raise ValueError(f"an unknown {place}.{shown(name)}")
    return wanted(**{name: as_type(known[name], one, f"{place}.{name}") for name, one in value.items()})
