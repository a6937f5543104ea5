"""What tests of document masks share: ids of documents, pieces of masks, and a comparison with eager."""

import torch

from tests.helpers.capture import Capture

PACKED = torch.ops.s2o.packed_attention.default
BATCH, LENGTH = 2, 160
LOWEST = torch.finfo(torch.float32).min
IN_ORDER = torch.stack([torch.arange(LENGTH) >= 90, torch.arange(LENGTH) // 60])
IN_PIECES = torch.stack([torch.arange(LENGTH) // 40 % 2, torch.arange(LENGTH) // 9 % 3])
POSITIONS = torch.stack([torch.cat([torch.arange(n), torch.arange(3, LENGTH - n + 3)]) for n in (90, 40)])


def heads(length=LENGTH):
    generator = torch.Generator().manual_seed(length)
    return [torch.randn(BATCH, 2, length, 8, generator=generator) for _ in range(3)]


def index(x):
    return torch.arange(x.shape[2])


def causal(q, k, ahead=0):
    return index(k) <= index(q)[:, None] + ahead


def same(ids):
    return ids[:, None, :, None] == ids[:, None, None]


def ids_of(positions):
    return (positions.diff(prepend=positions[:, :1] - 1, dim=-1) != 1).cumsum(-1)


def both(positions):
    """A comparison of the positions of queries with those of keys."""
    return positions[:, None, :, None], positions[:, None, None]


def added(visible, number=-torch.inf):
    return torch.zeros(visible.shape).masked_fill(~visible, number)


def written_out(q, k, v, mask):
    return (q @ k.mT * 8**-0.5 + mask).softmax(-1) @ v


def check(function, ids, *inputs, masks, dynamic=False):
    capture = Capture({"tau": 0.0, "min_seq_len": 0})
    compiled = torch.compile(function, backend=capture)
    with torch.no_grad():
        for given in (ids, ids.flip(0), ids.flip(-1)):
            tensors = [*inputs, given.clone()]
            for x, dim in zip(tensors, (2, 2, 2, 1), strict=True):
                if dynamic:
                    torch._dynamo.mark_dynamic(x, dim)
            output = compiled(*tensors)
            expected = function(*inputs, given.clone())
            torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)
    assert [(record.mask, record.reason) for record in capture.records] == [(mask, "") for mask in masks]
    return capture
