"""The job that a process is part of: several ranks that run one program, or this process alone."""

from __future__ import annotations

import warnings

import torch.distributed as dist


def this_rank() -> tuple[int, int] | None:
    """This process's rank and the number of ranks, if there are several."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() < 2:
        return None
    return dist.get_rank(), dist.get_world_size()


def warn(message: str, category: type[Warning], *, stacklevel: int = 1) -> None:
    """Warn once a job: of several ranks, which run the same program, the first one warns.

    ``stacklevel`` counts from the caller of this function.
    """
    rank = this_rank()
    if rank is None or rank[0] == 0:
        warnings.warn(message, category, stacklevel=1 + stacklevel)
