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
    """

    arguments: dict[str, Any]
    tokens: str
    length: int
    batch: int
    key_mask: Tensor | None

    @property
    def device(self) -> torch.device:
        """Of the tokens."""
        return self.arguments[self.tokens].device


def read_call(
    forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], tokens: str | None
) -> Call:
    """The arguments of a call; InputError for those that cannot be shared out.

    Args:
        forward: The model's forward, for the names of positional arguments.
        args: Positional arguments.
        kwargs: Keyword arguments.
        tokens: The name of the argument that holds the tokens, [B, N, ...]; None for those of transformers' models.
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
    call = Call(arguments=arguments, tokens=given[0], length=length, batch=batch, key_mask=key_mask)
    if mask is None and "position_ids" in arguments and length > 1:
        places = arguments["position_ids"]
        if bool((places.diff(dim=-1) != 1).any()):
            raise InputError(
                "context parallel, position_ids",
                expected="one document, whose positions go up by one",
                got="positions that jump, as of packed documents",
                remedy="Pass an attention_mask if they are none, or run packed documents on one rank each.",
            )
    return call


def of_shard(call: Call, sequence: ShardedSequence, positions: str | None, masks: bool) -> dict[str, Any]:
    """This rank's arguments: shards of those that hold tokens.

    Args:
        call: The whole call.
        sequence: How it is shared out.
        positions: The name of the argument that holds positions, made here if it is not given; None for a model
            without any.
        masks: Whether the model takes an attention mask, which then says that the shard is no packed documents.
    """
    device, mine = call.device, {}
    for name, x in call.arguments.items():
        if name in (*TOKENS, call.tokens, positions, "attention_mask") and isinstance(x, Tensor):
            mine[name] = sequence.shard(x, 0 if x.dim() == 1 else 1)
        elif isinstance(x, Tensor) and call.length in x.shape:
            raise InputError(
                f"context parallel, {name}",
                expected="arguments with tokens to be known by name",
                got=_kind(x),
                remedy=f"Leave it out. Known are {', '.join((call.tokens, *TOKENS))} and attention_mask.",
            )
        else:
            mine[name] = x
    if positions is not None and positions not in mine:
        mine[positions] = sequence.positions(device)[None].expand(call.batch, -1).contiguous()
    if masks and "attention_mask" not in mine:
        mine["attention_mask"] = torch.ones(call.batch, sequence.count, dtype=torch.long, device=device)
    return mine


def _kind(x: object) -> str:
    return f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else shown(x)
