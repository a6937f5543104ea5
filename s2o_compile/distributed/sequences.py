"""A sequence shared out over ranks, for those who call attention themselves."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from s2o_compile.kernels.core.plan import TILE_LEN, default_segment_len
from s2o_compile.kernels.sequence.layout import Layout
from s2o_compile.kernels.sequence.ranks import Ranks
from s2o_compile.kernels.sequence.sharded import ShardedSequence, check_method
from s2o_compile.kernels.support.arguments import is_one_of, shown
from s2o_compile.kernels.support.errors import InputError

ORDERS = ("zigzag", "head_tail")
INTEGERS = (torch.int32, torch.int64)


def shard_sequence(
    mesh: Any,  # noqa: ANN401 (a DeviceMesh or a process group)
    length: int,
    *,
    key_mask: Tensor | None = None,
    documents: Tensor | None = None,
    method: str = "all_gather",
    order: str = "zigzag",
    segment_len: int | None = None,
) -> ShardedSequence:
    """Share a sequence out over the ranks of a mesh; every rank calls it with the same arguments.

        sequence = s2o_compile.distributed.shard_sequence(mesh["cp"], ids.shape[1])
        q, k, v = (sequence.shard(x, 2) for x in (q, k, v))          # [B, H, n, D]: this rank's tokens
        with sequence.attending():
            out = s2o_compile.attention(q, k, v, causal=True)        # to the keys of the whole sequence
        whole = sequence.gather(out, 2)                              # [B, H, N, D] on every rank

    Inside the block the arguments of a mask (``causal``, ``window``, ``attention_chunk``) speak of positions in the
    whole sequence.

    Args:
        mesh: One dimension of a ``DeviceMesh``, or a process group.
        length: Tokens N of the whole sequence.
        key_mask: bool [B, N] or [1, N], True where a key may be attended (padding is False): the whole sequence's.
        documents: Integers [B, N] or [1, N], equal inside of a document, of a packed sequence: the whole sequence's.
            Inside the block ``torch.ops.s2o.packed_attention`` takes this rank's shard of them, and
            ``s2o_compile.attention_varlen`` the whole sequence's ``cu_seqlens``.
        method: "all_gather": every rank gets all keys and values, a few heads at a time. "ulysses": every rank gets
            all tokens of its share of the heads, whose number must be divisible.
        order: "zigzag": tokens in several turns over the ranks, cut where segments begin. "head_tail": two pieces a
            rank, as torch's ``context_parallel`` shares out its buffers; where these are no whole segments, tiles are
            not those of one device.
        segment_len: Of the configuration, if it names one.

    Raises:
        InputError: A mesh, a length or a name that cannot be used.
        RankError: Ranks give different arguments.
    """
    ranks = Ranks(mesh, "shard_sequence")
    with ranks.checking("shard_sequence"):
        check_method(method)
        _check(order, length, key_mask, documents)
        segment = segment_len or default_segment_len(length)
        # Documents have segments of their own, which begin anywhere.
        units = (segment, TILE_LEN, 1) if order == "zigzag" and documents is None else (1,)
        layout = Layout.zigzag(length, ranks.size, units=units, turns=None if order == "zigzag" else 1)
    if key_mask is not None and bool(key_mask.all()):
        key_mask = None
    documents = None if documents is None else documents.long()
    facts = {"length": length, "method": method, "pieces": layout.pieces, "padding": checksum(key_mask)}
    ranks.agree("shard_sequence", facts | {"documents": checksum(documents)})
    return ShardedSequence(ranks=ranks, layout=layout, method=method, key_mask=key_mask, documents=documents)


def _check(order: object, length: int, key_mask: Tensor | None, documents: Tensor | None) -> None:
    if not is_one_of(order, ORDERS):
        names = ", ".join(map(repr, ORDERS))
        raise InputError("order", expected=f"one of {names}", got=shown(order), remedy="Choose one of these names.")
    for name, x, kinds in (("key_mask", key_mask, (torch.bool,)), ("documents", documents, INTEGERS)):
        if x is not None and (x.dtype not in kinds or x.dim() != 2 or x.shape[1] != length):
            raise InputError(
                name,
                expected=f"{' or '.join(map(str, kinds))} of shape [B, {length}], of the whole sequence",
                got=f"{x.dtype} of shape {tuple(x.shape)}",
                remedy="Pass it unsharded.",
            )


def checksum(x: Tensor | None) -> int | None:
    """A number that differs for tensors that differ, all but surely. Waits for the device."""
    if x is None:
        return None
    values = x.detach().contiguous().flatten()
    if values.is_floating_point():
        kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
        values = values.view(kinds[values.element_size()])
    values = values.long()
    weights = torch.arange(1, len(values) + 1, device=x.device) * 2654435761 % 2147483647
    return int((values * weights).sum())
