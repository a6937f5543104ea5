"""PBS-Attn, the rival of S2O's paper: causal attention over blocks of permuted keys, in plain torch.

"Sparser Block-Sparse Attention via Token Permutation" (arXiv 2510.21270), written from the paper:

    importance   of a key: its softmax probability, averaged over the last block of queries (no mask)
    order        keys by importance, most important first, inside every segment of ``segment_len``; queries stay
    score        of a query block and a key block: product of their means, softmax over the blocks of earlier segments
    selection    the fewest key blocks whose scores sum to ``threshold``, the block that holds key 0, the own segment

What is selected is computed exactly. Every query head orders and selects for itself. Time is not the point here: a head
and a block of queries are worked at a time, in float32.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor


def order_keys(query: Tensor, key: Tensor, *, scale: float, segment_len: int, block_len: int) -> Tensor:
    """Positions int64 [N] of the keys of one head, [N, D], in their new order."""
    importance = (query[-block_len:] @ key.T * scale).softmax(-1).mean(0)
    places = importance.view(-1, segment_len).argsort(-1, descending=True)
    return (places + torch.arange(0, len(key), segment_len, device=key.device)[:, None]).flatten()


def select_blocks(query: Tensor, key: Tensor, position: Tensor, *, scale: float, threshold: float, per: int) -> Tensor:
    """Bool [query blocks, key blocks]: which are computed.

    Args:
        query: [blocks, block_len, D] of one head.
        key: The same in its new order.
        position: int64 [blocks, block_len], where these keys stood.
        scale: Softmax scale.
        threshold: See ``pbs_attention``.
        per: Blocks in a segment.
    """
    segment = torch.arange(len(key), device=key.device) // per
    own, earlier = segment[:, None] == segment, segment[:, None] > segment
    scores = (query.mean(1) @ key.mean(1).T * scale).masked_fill(~earlier, -torch.inf)
    share, order = scores.double().softmax(-1).nan_to_num(0.0).sort(-1, descending=True)  # nan: nothing is earlier
    rest = share.flip(-1).cumsum(-1).flip(-1)  # of a block and all behind it
    kept = torch.empty_like(own).scatter_(-1, order, rest > 1 - threshold)
    return kept | (position == 0).any(-1) | own


def attend_head(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float, threshold: float, segment_len: int, block_len: int
) -> tuple[Tensor, int]:
    """Output [N, Dv] of one head, [N, D], and how many blocks were computed."""
    position = order_keys(query, key, scale=scale, segment_len=segment_len, block_len=block_len)
    query, key, value, position = (
        x.unflatten(0, (-1, block_len)) for x in (query, key[position], value[position], position)
    )
    selected = select_blocks(query, key, position, scale=scale, threshold=threshold, per=segment_len // block_len)
    counts = selected.sum(-1).tolist()
    first = selected.byte().argsort(dim=-1, descending=True, stable=True)
    row = torch.arange(query.shape[0] * block_len, device=query.device).view(-1, block_len, 1)
    output = query.new_empty(*query.shape[:2], value.shape[2])
    for i, count in enumerate(counts):
        chosen = first[i, :count]
        logits = query[i] @ key[chosen].flatten(0, 1).T * scale
        logits.masked_fill_(position[chosen].flatten() > row[i], -torch.inf)
        output[i] = logits.softmax(-1) @ value[chosen].flatten(0, 1)
    return output.flatten(0, 1), sum(counts)


@torch.no_grad()
def pbs_attention(
    query: Tensor, key: Tensor, value: Tensor, *, threshold: float, segment_len: int = 256, block_len: int = 128
) -> tuple[Tensor, Tensor]:
    """Causal attention by PBS-Attn; segments and blocks have the paper's lengths unless told otherwise.

    Args:
        query: [B, Hq, N, D].
        key: [B, Hkv, N, D].
        value: [B, Hkv, N, Dv].
        threshold: Share of the block scores that is computed, over 0; 1 computes all.
        segment_len: Tokens whose keys are permuted among themselves.
        block_len: Tokens of a query block and of a key block.

    Returns:
        Output [B, Hq, N, Dv] in the query's dtype, and density float64 [Hq]: query-key pairs computed, over those that
        the causal mask shows. Whole blocks are computed, so it may exceed 1.

    Raises:
        ValueError: The threshold is none, or the tokens are no whole segments of whole blocks.
    """
    n, group = query.shape[2], query.shape[1] // key.shape[1]
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold: expected 0 < threshold <= 1, got {threshold}. Use 1 to compute every block.")
    if key.shape[2] != n or n % segment_len or segment_len % block_len:
        raise ValueError(
            f"pbs_attention: expected as many queries as keys, in whole segments of whole blocks, got {n} queries and "
            f"{key.shape[2]} keys, segments of {segment_len} and blocks of {block_len}. Cut the tokens to a multiple."
        )
    lengths = {"segment_len": segment_len, "block_len": block_len}
    output = query.new_empty(*query.shape[:3], value.shape[3])
    blocks = torch.zeros(query.shape[1], dtype=torch.float64)
    for b, h in itertools.product(*map(range, query.shape[:2])):
        head = (x.float() for x in (query[b, h], key[b, h // group], value[b, h // group]))
        output[b, h], count = attend_head(*head, scale=query.shape[3] ** -0.5, threshold=threshold, **lengths)
        blocks[h] += count
    return output, blocks * block_len**2 / (query.shape[0] * n * (n + 1) / 2)
