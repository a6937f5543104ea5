"""FlashPrefill's block rule, a rival of S2O: causal attention over blocks whose mean score is near the largest.

Written from its description, in plain torch:

    score        of a query block and a key block: mean of the logits of all their pairs, the product of their means
    selection    key blocks whose score is at most ``threshold`` below the largest of the query block, the block that
                 holds key 0, and the query block's own
    correction   a block left out counts as ``block_len`` keys that are its mean key, with its mean value

Every query head selects for itself. Time is not the point here: a head and a block of queries are worked at a time, in
float32. Density counts the pairs of selected blocks; the correction's products, one for a query and a block, are free.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor


def attend_head(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float, threshold: float, block_len: int, corrected: bool
) -> tuple[Tensor, int]:
    """Output [N, Dv] of one head, [N, D], and how many blocks were computed."""
    query_blocks, key_blocks, value_blocks = (x.unflatten(0, (-1, block_len)) for x in (query, key, value))
    mean_key, mean_value = key_blocks.mean(1), value_blocks.mean(1)
    scores = query_blocks.mean(1) @ mean_key.T * scale
    output, computed = query.new_empty(len(query), value.shape[1]), 0
    future = torch.ones(block_len, block_len, dtype=torch.bool, device=query.device).triu(1)
    for i, rows in enumerate(query_blocks):
        near = scores[i, : i + 1] >= scores[i, : i + 1].max() - threshold
        near[0], near[i] = True, True
        chosen, left = near.nonzero()[:, 0], (~near).nonzero()[:, 0]
        logits = rows @ key_blocks[chosen].flatten(0, 1).T * scale
        logits[:, -block_len:].masked_fill_(future, -torch.inf)
        values = value_blocks[chosen].flatten(0, 1)
        if corrected:
            far = rows @ mean_key[left].T * scale + math.log(block_len)
            logits, values = torch.cat([logits, far], 1), torch.cat([values, mean_value[left]])
        output[i * block_len : (i + 1) * block_len] = logits.softmax(-1) @ values
        computed += len(chosen)
    return output, computed


@torch.no_grad()
def flash_prefill(
    query: Tensor, key: Tensor, value: Tensor, *, threshold: float, block_len: int = 128, corrected: bool = True
) -> tuple[Tensor, Tensor]:
    """Causal attention by FlashPrefill's rule.

    Args:
        query: [B, Hq, N, D].
        key: [B, Hkv, N, D].
        value: [B, Hkv, N, Dv].
        threshold: How far below the largest a block's mean score may lie, in units of a logit, 0 or more.
        block_len: Tokens of a query block and of a key block.
        corrected: Whether blocks left out count by their means.

    Returns:
        Output [B, Hq, N, Dv] in the query's dtype, and density float64 [Hq]: query-key pairs computed, over those that
        the causal mask shows. Whole blocks are computed, so it may exceed 1.

    Raises:
        ValueError: The threshold is negative, or the tokens are no whole blocks.
    """
    n, group = query.shape[2], query.shape[1] // key.shape[1]
    if not threshold >= 0:
        raise ValueError(f"threshold: expected 0 or more, got {threshold}. Use math.inf to compute every block.")
    if key.shape[2] != n or n % block_len:
        raise ValueError(
            f"flash_prefill: expected as many queries as keys, in whole blocks of {block_len}, got {n} queries and "
            f"{key.shape[2]} keys. Cut the tokens to a multiple."
        )
    output = query.new_empty(*query.shape[:3], value.shape[3])
    blocks = torch.zeros(query.shape[1], dtype=torch.float64)
    for b, h in itertools.product(*map(range, query.shape[:2])):
        head = (x.float() for x in (query[b, h], key[b, h // group], value[b, h // group]))
        output[b, h], count = attend_head(
            *head, scale=query.shape[3] ** -0.5, threshold=threshold, block_len=block_len, corrected=corrected
        )
        blocks[h] += count
    return output, blocks * block_len**2 / (query.shape[0] * n * (n + 1) / 2)
