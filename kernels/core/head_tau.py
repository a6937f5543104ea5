"""A tau for each query head, on the device that compares with it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from s2o_compile.kernels.support.errors import InputError


def check(tau: float | Sequence[float], heads: int) -> None:
    """Raise InputError unless tau is one number, or one for each query head."""
    if isinstance(tau, Sequence) and len(tau) != heads:
        raise InputError(
            "tau",
            expected=f"one number, or {heads}, one for each query head",
            got=f"{len(tau)} numbers",
            remedy="Give one number for all heads, or calibrate the model again if its heads have changed.",
        )


def on_device(taus: tuple[float, ...], device: torch.device) -> Tensor:
    """float32 [Hq]; kept from call to call, for a copy to a GPU would be made anew in every call."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        # A CUDA graph records no copy from the host, and its memory is no place for what others use, too.
        return torch.cat([torch.full((1,), tau, dtype=torch.float32, device=device) for tau in taus])
    return _kept(taus, device)


@lru_cache(maxsize=1024)
def _kept(taus: tuple[float, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(mode=False):
        return torch.tensor(taus, dtype=torch.float32, device=device)
