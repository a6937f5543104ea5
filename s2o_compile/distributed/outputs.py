"""The outputs of a model's call, whole again on every rank: logits and states by position, caches layer by layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from s2o_compile.capture.generation_masks import is_cache
from s2o_compile.kernels.sequence.sharded import ShardedSequence
from s2o_compile.kernels.support.errors import InputError


class Kept:
    """The positions whose logits are wanted, as transformers' ``logits_to_keep``: the last ones, or those of a tensor.

    A rank computes those that it holds, and some other in the place of each that it does not.

    Attributes:
        mine: bool [k], which of them this rank holds.
        places: int64 [k], their places in its shard, 0 for those of other ranks.
    """

    def __init__(self, wanted: int | Tensor, sequence: ShardedSequence, device: torch.device) -> None:
        length, here = sequence.layout.length, sequence.positions(device)
        if isinstance(wanted, Tensor):
            positions = wanted.to(device) % length
        else:
            positions = torch.arange(max(length - wanted, 0), length, device=device)
        self.places = torch.searchsorted(here, positions).clamp(max=len(here) - 1)
        self.mine = here[self.places] == positions
        self.places = torch.where(self.mine, self.places, 0)

    def whole(self, logits: Tensor, sequence: ShardedSequence) -> Tensor:
        """Logits [B, k, V] of every position, from those of each rank: one rank holds each."""
        held = sequence.ranks.gather(torch.where(self.mine[:, None], logits, 0).contiguous())
        everybody, wait = held
        wait()
        return everybody.view(-1, *logits.shape).sum(0, dtype=logits.dtype)


def gather_outputs(outputs: Any, sequence: ShardedSequence, kept: Kept | None) -> Any:  # noqa: ANN401 (any model's)
    """The outputs with every shard [B, n, ...] made whole; caches and what holds no tensor stay as they are.

    Raises:
        InputError: A tensor that is no shard, such as a pooled state, which would be that of the shard.
    """

    def gathered(name: str, x: Any) -> Any:  # noqa: ANN401 (any model's)
        if isinstance(x, Tensor):
            if kept is not None and name == "logits":
                return kept.whole(x, sequence)
            if x.dim() < 2 or x.shape[1] != sequence.count:
                raise InputError(
                    f"context parallel, output {name}".rstrip(),
                    expected=f"a number for each of this rank's {sequence.count} tokens, [batch, length, ...]",
                    got=f"shape {tuple(x.shape)}, which may speak of the shard alone",
                    remedy="Return the states of all tokens, and pool them behind the call.",
                )
            return sequence.gather(x, 1)
        kind: Any = type(x)
        if isinstance(x, Mapping) and not is_cache(x):
            changed = {key: gathered(str(key), value) for key, value in x.items()}
            return kind(**changed) if dataclasses.is_dataclass(x) else kind(changed)
        return kind(gathered(name, value) for value in x) if kind in (tuple, list) else x

    return gathered("", outputs)


def fill_cache(cache: Any, shards: Any, sequence: ShardedSequence) -> None:  # noqa: ANN401 (caches of transformers)
    """Write the keys and values of a sharded prefill into an empty cache, whole on every rank, a layer at a time."""
    for number, layer in enumerate(shards.layers):
        whole = [sequence.gather(x, 2) for x in (layer.keys, layer.values)]
        layer.keys = layer.values = None
        cache.update(*whole, number)
