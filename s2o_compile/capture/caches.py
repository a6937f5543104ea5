"""transformers' caches of keys and values among arguments and outputs, by their type: their name has changed."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any


def name_of_cache(values: Mapping[str, Any]) -> Any:  # noqa: ANN401 (a name or None)
    """The name of the first cache; None if there is none."""
    kind = getattr(sys.modules.get("transformers.cache_utils"), "Cache", None)
    return next((name for name, value in values.items() if kind is not None and isinstance(value, kind)), None)
