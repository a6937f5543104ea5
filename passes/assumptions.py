"""The run-time check of a promise: a mask that the user said is causal is compared with the causal mask."""

from __future__ import annotations

import torch
from torch import Tensor

MESSAGE = (
    "assume_causal_mask=True promises that attention masks are causal, aligned to the bottom right; this one is not. "
    "Set assume_causal_mask=False (the attention then stays dense), or pass a causal mask."
)


def check_causal(mask: Tensor, query_len: int, key_len: int) -> None:
    """Fails, on the device and without waiting for it, unless ``mask`` [..., Nq, Nk] is causal.

    Args:
        mask: bool (True: may be attended), or floating point: 0 where a key is visible, -inf or the dtype's smallest
            number where it is not.
        query_len: Nq.
        key_len: Nk.

    Raises:
        RuntimeError: It is not; on CUDA at the next synchronisation.
    """
    row = torch.arange(query_len, device=mask.device)[:, None]
    causal = torch.arange(key_len, device=mask.device) <= row + (key_len - query_len)
    if mask.dtype is torch.bool:
        holds = mask == causal
    else:
        holds = torch.where(causal, mask == 0, mask <= torch.finfo(mask.dtype).min)
    torch._assert_async(holds.all(), MESSAGE)
