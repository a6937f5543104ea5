"""Text and JSON that a user wrote or a program stored: whatever the bytes are, there is one kind of error."""

from __future__ import annotations

import json
from decimal import Decimal
from typing import Any


def decode(content: bytes) -> str:
    """UTF-8 text, on every platform; a byte order mark is dropped.

    Raises:
        UnicodeDecodeError: The bytes are none.
    """
    return content.decode("utf-8-sig")


def parse_json(text: str | bytes) -> Any:  # noqa: ANN401 (whatever the text holds)
    """The value of a JSON text.

    Integers with more digits than Python converts are Decimals, so that their reader can name the field. NaN and
    infinities are numbers.

    Raises:
        ValueError: The text holds no JSON, is nested too deeply, or gives a name twice. The message is one line.
    """
    try:
        text = text.removeprefix("\ufeff") if isinstance(text, str) else decode(text)
        return json.loads(text, object_pairs_hook=_once, parse_int=_integer)
    except RecursionError as error:
        raise ValueError("no JSON (nested too deeply)") from error
    except ValueError as error:
        raise ValueError(f"no JSON ({error})") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in pairs:
        if name in fields:
            raise ValueError(f"the name {name[:60]!r} twice in one object")
        fields[name] = value
    return fields


def _integer(digits: str) -> int | Decimal:
    try:
        return int(digits)
    except ValueError:  # more digits than Python converts
        return Decimal(digits)
