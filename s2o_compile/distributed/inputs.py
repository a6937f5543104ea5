"""The arguments of a model's call, whole on every rank, and this rank's shard of them.

Every argument that has tokens must be known by name: what is not known would be the whole sequence beside a shard of
it. Positions are arguments, because a model that counted its own would count those of the shard.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from s2o_compile.kernels.sequence.sharded import ShardedSequence
from s2o_compile.kernels.support.arguments import shown
from s2o_compile.kernels.support.errors import InputError

TOKENS = ("input_ids", "inputs_embeds", "token_type_ids", "position_ids", "cache_position")
"""Arguments of transformers' models that hold tokens; their dimension is 1, or 0 of a vector."""

REFUSED = {
    "labels": "The loss looks at neighbours of other ranks: compute it from the logits.",
    "output_attentions": "There are no attention weights.",
}


@dataclass(frozen=True, kw_only=True)
class Call:
    """The arguments of one call by name, whole.

    Attributes:
        arguments: By name, without those that are None.
        tokens: The name of the argument that the length is read from.
        length: Tokens of the sequence.
        batch: Sequences.
        key_mask: bool [B, N], the padding; None for none.
        documents: [B or 1, N], equal inside of a packed document; None for one document.
    """

    arguments: dict[str, Any]
    tokens: str
    length: int
    batch: int
    key_mask: Tensor | None
    documents: Tensor | None

    @property
    def device(self) -> torch.device:
        """Of the tokens."""
        return self.arguments[self.tokens].device

    @property
    def jumps(self) -> bool:
        """Whether jumps of positions alone tell documents apart."""
        return self.documents is not None and not any(x is self.documents for x in self.arguments.values())


def read_call(
    forward: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    tokens: str | None,
    positions: str | None = None,
    documents: str | None = None,
) -> Call:
    """The arguments of a call; InputError for those that cannot be shared out.

    Args:
        forward: The model's forward, for the names of positional arguments.
        args: Positional arguments.
        kwargs: Keyword arguments.
        tokens: The name of the argument that holds the tokens, [B, N, ...]; None for those of transformers' models.
        positions: The name of that with positions. Where they jump, and no mask is given, models of transformers find
            documents.
        documents: The name of that with documents, [B or 1, N].
    """
    try:
        bound = inspect.signature(forward).bind_partial(*args)
    except TypeError as error:
        raise InputError(
            "context parallel", expected="arguments of the model's forward", got=str(error), remedy="Name them."
        ) from error
    arguments = {name: x for name, x in {**bound.arguments, **kwargs}.items() if x is not None}
    known = ("input_ids", "inputs_embeds") if tokens is None else (tokens,)
    given = [name for name in known if isinstance(arguments.get(name), Tensor)]
    if len(given) != 1 or arguments[given[0]].dim() < 2:
        raise InputError(
            "context parallel",
            expected=f"tokens [batch, length, ...] as one of {', '.join(known)}",
            got=", ".join(f"{name}: {_kind(x)}" for name, x in arguments.items()) or "no argument",
            remedy='Name the argument that holds them: context_parallel(..., tokens="x").',
        )
    for name, remedy in REFUSED.items():
        if arguments.get(name) is not None and arguments[name] is not False:
            raise InputError(f"context parallel, {name}", expected="none", got=_kind(arguments[name]), remedy=remedy)
    batch, length = arguments[given[0]].shape[:2]
    mask = arguments.get("attention_mask")
    if mask is not None and (not isinstance(mask, Tensor) or tuple(mask.shape) != (batch, length)):
        raise InputError(
            "context parallel, attention_mask",
            expected=f"padding of shape ({batch}, {length}), or None",
            got=_kind(mask),
            remedy="Pass which tokens are real, [batch, length]; use a dynamic cache.",
        )
    key_mask = None if mask is None or bool(mask.bool().all()) else mask.bool()
    ids = arguments.get(documents) if documents else None
    if ids is None and mask is None:
        name = positions or "position_ids"
        ids, jumps = _jumps(arguments.get(name), length)
        if jumps and "attention_mask" in inspect.signature(forward).parameters:
            raise InputError(
                f"context parallel, {name}",
                expected="integers, where positions jump: the model takes that for another document",
                got=_kind(arguments[name]),
                remedy="Pass .long() of them.",
            )
    return Call(arguments=arguments, tokens=given[0], length=length, batch=batch, key_mask=key_mask, documents=ids)


def _jumps(positions: object, length: int) -> tuple[Tensor | None, bool]:
    """The documents [B or 1, N] that begin where positions, integers, do not go up by one; None where all do.

    And whether others than integers jump.
    """
    if not isinstance(positions, Tensor) or positions.dim() > 2 or positions.shape[-1] != length:
        return None, False
    changes = positions.diff(dim=-1) != 1
    if not bool(changes.any()) or positions.is_floating_point():
        return None, bool(changes.any())
    ids = torch.nn.functional.pad(changes.long().cumsum(-1), (1, 0))
    return ids.view(-1, ids.shape[-1]), False


def of_shard(call: Call, sequence: ShardedSequence, positions: str | None, masks: bool) -> dict[str, Any]:
    """This rank's arguments: shards of those that hold tokens.

    Args:
        call: The whole call.
        sequence: How it is shared out.
        positions: The name of the argument that holds positions, made here if it is not given; None for a model
            without any.
        masks: Whether the model takes an attention mask, which then says that the shard is no packed documents.

    Raises:
        InputError: An argument with tokens that nobody knows, or positions that jump on some ranks alone.
    """
    device, mine = call.device, {}
    for name, x in call.arguments.items():
        is_known = name in (*TOKENS, call.tokens, positions, "attention_mask") or x is call.documents
        dim = min(x.dim() - 1, 1) if isinstance(x, Tensor) else 0
        if is_known and isinstance(x, Tensor) and x.dim() and x.shape[dim] == call.length:
            mine[name] = sequence.shard(x, dim)
        elif isinstance(x, Tensor) and (is_known or call.length in x.shape):
            raise InputError(
                f"context parallel, {name}",
                expected="arguments with tokens, [batch, length, ...], to be known by name",
                got=_kind(x),
                remedy=f"Leave it out. Known are {', '.join((call.tokens, *TOKENS))} and attention_mask.",
            )
        else:
            mine[name] = x
    if positions is not None and positions not in mine:
        mine[positions] = sequence.positions(device)[None].expand(call.batch, -1).contiguous()
    if call.jumps:
        _check_jumps(call.arguments[positions or "position_ids"], sequence)
    elif masks and "attention_mask" not in mine:
        mine["attention_mask"] = torch.ones(call.batch, sequence.count, dtype=torch.long, device=device)
    return mine


def _check_jumps(positions: Tensor, sequence: ShardedSequence) -> None:
    """Raise InputError unless positions jump on every rank: a model takes those that do not for one document."""
    shards = (sequence.layout.take(positions, rank, -1) for rank in range(sequence.ranks.size))
    if not all(bool((shard.diff(dim=-1) != 1).any()) for shard in shards):
        raise InputError(
            "context parallel, packed documents",
            expected="positions that jump on every rank, by which models know that documents are packed",
            got="a rank whose positions go up by one",
            remedy='Leave order at "zigzag", or run packed documents on one rank each.',
        )


def _kind(x: object) -> str:
    return f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else shown(x)
