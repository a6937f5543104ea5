"""One head dim for query, key and value: what fused kernels that know a single head dim are given.

Zero columns change no product q . k, and those of the value are zero columns of the output, to be cut off again.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import pad


def pad_to_equal(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key [..., D] and value [..., Dv] with zero columns up to the larger of the two; themselves if equal."""
    missing = query.shape[-1] - value.shape[-1]
    if missing > 0:
        value = pad(value, (0, missing))
    elif missing < 0:
        query, key = pad(query, (0, -missing)), pad(key, (0, -missing))
    return query, key, value
