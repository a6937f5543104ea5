"""Settings by head under tensor parallelism: those of the heads that an attention has on this rank."""

from __future__ import annotations

from typing import Any

from torch import nn

from s2o_compile.kernels.core.head_shards import WHOLE, HeadShard
from s2o_compile.kernels.support.dtensors import is_dtensor, place_among
from s2o_compile.kernels.support.errors import InputError, this_rank


def of_rank(options: dict[str, Any], module: nn.Module, heads: int, kv_heads: int) -> dict[str, Any]:
    """The operator's options with what is said by head for this rank's heads; themselves where nothing is.

    Args:
        options: Keyword arguments of ``torch.ops.s2o.attention``, for the model's heads.
        module: The attention. Weights that are sharded along the features are DTensors.
        heads: Query heads of this rank.
        kv_heads: Key/value heads of this rank.

    Raises:
        InputError: The model has no such heads, or this rank's share of them cannot be told.
    """
    marked, taus = options.get("dense_heads") or [], options.get("head_tau") or []
    if not marked and not taus:
        return options
    shard = _shard_of(module, heads)
    return options | {
        "dense_heads": shard.dense_heads(marked, kv_heads),
        "head_tau": shard.head_tau(taus, heads) or None,
    }


def _shard_of(module: nn.Module, heads: int) -> HeadShard:
    weights: list[Any] = [x for x in module.parameters() if is_dtensor(x) and x.dim() == 2]
    shards = set()
    for weight in weights:
        dims = [number for number, placement in enumerate(weight.placements) if placement.is_shard(0)]
        shards.add(HeadShard(*place_among(weight.device_mesh, dims)))
    shards -= {WHOLE}
    shard = shards.pop() if len(shards) == 1 else WHOLE
    wanted = _heads_of_model(getattr(module, "config", None)) if this_rank() else None  # a decoder may have others
    if shards or (wanted is not None and wanted != heads * shard.count):
        raise InputError(
            "settings by head",
            expected=f"{'the model' if wanted is None else f'{wanted} heads'} in equal shards of DTensors, or whole",
            got=f"{heads} query heads in {type(module).__name__}, of which this rank's share is not known",
            remedy="Leave out dense_heads, site_tau and tau by head, or shard the model by its tp_plan.",
        )
    return shard


def _heads_of_model(config: object) -> int | None:
    count = getattr(config, "num_attention_heads", None)
    return count if isinstance(count, int) else None
