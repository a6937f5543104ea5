"""Random attentions under document masks, now and then with a mistake in them, and inputs that show a wrong proof."""

import operator

import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

LENGTH, HEADS = 150, 2


def inputs(rng, batch):
    """Query, key, value, ids and positions; of ids some come back after another document, positions leap."""
    generator = torch.Generator().manual_seed(rng.randrange(10**6))

    def numbers(high, *shape):
        return torch.randint(high, shape, generator=generator)

    q, k, v = (torch.randn(batch, HEADS, LENGTH, 8, generator=generator) for _ in range(3))
    starts = torch.rand(batch, LENGTH, generator=generator) < 0.03
    ids = starts.cumsum(-1) if rng.random() < 0.6 else numbers(3, batch, LENGTH)
    ids = ids * rng.choice((1, 1, 256, 2**32)) - rng.choice((0, 1))
    steps = torch.where(starts, numbers(9, batch, LENGTH) - 4, 1)
    positions = steps.cumsum(-1) if rng.random() < 0.7 else numbers(5, batch, LENGTH)
    return q, k, v, ids, positions


def _counted(rng):
    """Ids of positions as transformers counts them, or nearly so."""
    step, first = rng.choice((1, 1, 1, 1, 0, 2)), rng.choice((1, 1, 0))
    compare = rng.choice((operator.ne, operator.ne, operator.ne, operator.ne, operator.lt, operator.eq))
    cast = rng.choice((None, None, torch.int32, torch.int64))
    dim = rng.choice((-1, 1, 1, 0)) if rng.random() < 0.3 else -1

    def ids_of(ids, positions):
        leaps = compare(positions.diff(prepend=positions[:, :1] - first, dim=-1), step)
        return (leaps if cast is None else leaps.to(cast)).cumsum(dim)

    return ids_of


def _cast(rng):
    """A cast that may change ids, or none."""
    dtypes = (None, None, None, None, torch.int32, torch.uint8, torch.int16, torch.float32, torch.bool, torch.int64)
    return rng.choice(dtypes)


def _sides(rng):
    """Numbers of queries [.., N, 1] and of keys [.., 1, N] from [B, N], each in one of several spellings."""
    ways = (
        (lambda x: x[:, None, :, None], lambda x: x[:, None, None, :]),
        (lambda x: x.unsqueeze(1).unsqueeze(-1), lambda x: x.unsqueeze(1).unsqueeze(-2)),
        (lambda x: x[:, None, None].expand(-1, 1, LENGTH, -1).mT, lambda x: x[:, None, None].expand(-1, 1, LENGTH, -1)),
        (lambda x: x.view(x.shape[0], 1, -1, 1), lambda x: x.reshape(x.shape[0], 1, 1, -1)),
        (lambda x: x[0][:, None], lambda x: x[0][None]),
    )
    query, key = rng.choice(ways)
    if rng.random() < 0.2:  # another spelling of the keys, or the wrong way round
        query, key = rng.choice(ways)[0], rng.choice(ways)[1]
    if rng.random() < 0.1:
        query, key = key, query
    if rng.random() < 0.05:
        query = lambda x: x[:, :, None]  # noqa: E731 (documents along the heads)
    return query, key


def random_attention(rng):
    """A function of `inputs`, which is attention under a document mask or something near it."""
    as_queries, as_keys = _sides(rng)
    casts = [_cast(rng)] * 2 if rng.random() < 0.8 else [_cast(rng), _cast(rng)]
    make = _counted(rng) if rng.random() < 0.5 else lambda ids, positions: ids
    other = make if rng.random() < 0.9 else lambda ids, positions: positions
    shift = rng.choice((0, 0, 0, 0, 0, 1))
    compare = rng.choice((*(torch.eq,) * 12, torch.ne, torch.le, torch.ge))
    by_positions, causal = rng.random() < 0.5, rng.random() < 0.8
    window = rng.choice((None, None, 20))
    bound = rng.choice((*(operator.le,) * 5, operator.lt, operator.ge))
    ahead = rng.choice((0, 0, 0, 0, 2, -1))
    padded, union, rolled, written = (rng.random() < p for p in (0.3, 0.05, 0.05, 0.05))
    filled = rng.choice((None, None, -torch.inf, torch.finfo(torch.float32).min))
    by_hand = rng.random() < 0.3

    def attention(q, k, v, ids, positions):
        first, second = make(ids, positions), other(ids, positions)
        if rolled:
            second = second.roll(1, -1)
        sides = as_queries(first), as_keys(second)
        sides = [side if cast is None else side.to(cast) for side, cast in zip(sides, casts, strict=True)]
        mask = compare(sides[0], sides[1] + shift if shift else sides[1])
        index = torch.arange(q.shape[2])
        i, j = (as_queries(positions), as_keys(positions)) if by_positions else (index[:, None], index[None])
        if causal:
            seen = bound(j, i + ahead if ahead else i)
            mask = mask | seen if union else mask & seen
        if window is not None:
            mask = mask & (j > i - window)
        if padded:
            mask = mask & (ids != 0)[:, None, None]
        if written:
            ids.add_(1)
        if filled is not None:
            mask = torch.zeros(mask.shape).masked_fill(~mask, filled)
        if not by_hand:
            return sdpa(q, k, v, attn_mask=mask)
        scores = q @ k.mT * 8**-0.5
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype is torch.bool else scores + mask
        return scores.softmax(-1) @ v

    return attention
