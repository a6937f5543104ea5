"""Run-time checks of promises: a mask is compared with the user's promise about it."""

from __future__ import annotations

import torch
from torch import Tensor

MESSAGE = (
    "assume_causal_mask=True promises that attention masks are causal, aligned to the bottom right; this one is not. "
    "Set assume_causal_mask=False (the attention then stays dense), or pass a causal mask."
)

BLOCKS_MESSAGE = (
    "assume_block_masks=True promises that every BlockMask lists exactly the blocks that its mask_mod leaves visible; "
    "this one does not. Make it by create_block_mask from the same mask_mod, or set assume_block_masks=False (the "
    "attention then stays as it is)."
)


def check_causal(mask: Tensor, query_len: int, key_len: int) -> None:
    """Fails, on the device and without waiting for it, unless ``mask`` [..., Nq, Nk] is causal.

    It is bool (True: may be attended), or floating point: 0 where a key is visible, -inf or the dtype's smallest number
    where it is not.

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


def check_blocks(
    mask: Tensor, query_len: int, key_len: int, query_block: int, key_block: int, counts: Tensor, order: Tensor,
    full_counts: Tensor | None = None, full_order: Tensor | None = None,
) -> None:  # fmt: skip
    """Fails, on the device and without waiting for it, unless tables of blocks list the visible blocks of a mask.

    Every block with a visible score must be listed once. Under ``full`` the mask is not looked at: only blocks that
    are visible as a whole may stand there.

    The mask is bool, broadcastable to [B, H, Nq, Nk]; a block is ``query_block`` by ``key_block`` scores. ``order``,
    int32 [B, H, Nq blocks, Nk blocks], begins with the listed key blocks. ``counts``, int32 [B, H, Nq blocks], says how
    many they are. ``full_counts`` and ``full_order`` list the blocks visible as a whole.

    Raises:
        RuntimeError: They do not; on CUDA at the next synchronisation.
    """
    lead = mask.shape[:2] if mask.ndim == 4 else (1, 1)
    visible = mask.expand(*lead, query_len, key_len)
    visible_blocks = ~_whole_blocks(~visible, query_block, key_block)
    times = _times_listed(counts, order, visible_blocks.shape[-1])
    holds = times <= 1
    if full_counts is not None and full_order is not None:
        full_times = _times_listed(full_counts, full_order, visible_blocks.shape[-1])
        holds = (times + full_times <= 1) & ((full_times == 0) | _whole_blocks(visible, query_block, key_block))
        times = times + full_times
    torch._assert_async((holds & ((times == 1) | ~visible_blocks)).all(), BLOCKS_MESSAGE)


def _whole_blocks(mask: Tensor, query_block: int, key_block: int) -> Tensor:
    """The blocks of [B, H, Nq, Nk] that are all True, [B, H, Nq blocks, Nk blocks]; outside counts as True."""
    lead, queries, keys = mask.shape[:2], mask.shape[-2], mask.shape[-1]
    rows, columns = (queries + query_block - 1) // query_block, (keys + key_block - 1) // key_block
    padded = mask.new_ones(*lead, rows * query_block, columns * key_block)
    padded[:, :, :queries, :keys] = mask
    return padded.view(*lead, rows, query_block, columns, key_block).all(-1).all(-2)


def _times_listed(counts: Tensor, order: Tensor, blocks: int) -> Tensor:
    """The times each key block is listed, [B, H, Nq blocks, Nk blocks]; a block out of range adds two to each."""
    listed = torch.arange(order.shape[-1], device=order.device) < counts[..., None]
    outside = listed & ((order < 0) | (order >= blocks))
    times = torch.zeros(*order.shape[:-1], blocks, dtype=torch.int64, device=order.device)
    times = times.scatter_add(-1, order.clamp(0, blocks - 1).long(), listed.long())
    return times + 2 * outside.any(-1, keepdim=True)
