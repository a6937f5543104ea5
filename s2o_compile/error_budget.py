"""From an error budget to a tau, for models that were not calibrated."""

from __future__ import annotations

import itertools
import math

MEASURED = ((0.002, 0.01), (0.01, 0.06), (0.02, 0.15), (0.05, 0.5), (0.1, 1.2), (0.2, 3.0))
"""PLACEHOLDER"""


def tau_for(error: float) -> float:
    """Tau at which a layer's output is expected to be off by this relative L2 error; 0 for 0."""
    if error == 0.0:
        return 0.0
    points = [(math.log(at), math.log(tau)) for at, tau in MEASURED]
    x = math.log(error)
    between = (pair for pair in itertools.pairwise(points) if x <= pair[1][0])
    (x0, y0), (x1, y1) = next(between, (points[-2], points[-1]))
    return math.exp(y0 + (y1 - y0) * (x - x0) / (x1 - x0))
